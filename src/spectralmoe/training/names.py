"""Names that the command line shows and completes: the keys of tables, repeated here so that help needs no torch."""

from __future__ import annotations

__all__ = [
    "DATA_NAMES",
    "DEFAULT_ROUTERS",
    "FRESH_ROWS",
    "OWN_EXPERTS",
    "OWN_LOSSES",
    "OWN_ROWS",
    "ROUTER_NAMES",
    "SIDE_READERS",
    "SIGNAL_NAMES",
    "TEXT_NAMES",
]

ROUTER_NAMES = (
    "linear",
    "linear+load_balance",
    "linear+balanced",
    "cosine",
    "prototype",
    "sr-moe",
    "eigenbasis",
    "emoe",
    "emoe-faithful",
    "synergy",
    "specialization",
    "l2r",
    "moec",
    "ermoe",
    "ermoe-context",
    "mumoe",
    "mumoe-tr",
    "omoe",
    "mpoe",
    "mofme",
    "confsmoe",
    "moce-ir",
    "phyg-moe",
    "dense",
)
OWN_EXPERTS = ("ermoe", "ermoe-context", "mumoe", "mumoe-tr", "mpoe", "mofme", "confsmoe", "moce-ir")
"""Routers with experts of their own, which do not fit where there are experts already."""
OWN_LOSSES = ("synergy", "specialization", "omoe")
"""Routers with terms on experts' outputs, or with their own optimizer: not for experts of other libraries."""
SIDE_READERS = ("phyg-moe",)
"""Routers that read side information of a sample, which networks of other data do not give."""
DEFAULT_ROUTERS = ("linear", "linear+load_balance", "prototype", "sr-moe", "emoe")
DATA_NAMES = ("digits", "fashion-mnist", "mnist5k")
TEXT_NAMES = ("pydoc", "stdlib", "fortunes")
SIGNAL_NAMES = ("interference",)
FRESH_ROWS = ("emoe", "linear-probe", "adapter", "linear", "linear+load_balance")
OWN_ROWS = ("own", "linear-probe")
