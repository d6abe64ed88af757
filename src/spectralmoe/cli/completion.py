"""What a shell completes: names of routers, data sets, suites and other choices; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spectralmoe.training.names import (
    DATA_NAMES,
    OWN_EXPERTS,
    OWN_LOSSES,
    OWN_ROWS,
    ROUTER_NAMES,
    SIDE_READERS,
    SIGNAL_NAMES,
    TEXT_NAMES,
)

__all__ = [
    "LOG_NAMES",
    "SUITES",
    "complete_data",
    "complete_few_shot_rows",
    "complete_finetune_router",
    "complete_images",
    "complete_routers",
    "listed",
    "one_among",
]

SUITES = ("layer", "router", "penalty", "branch", "step", "scaling", "decode", "memory")

LOG_NAMES = ("csv", "tensorboard", "wandb")


def one_among(*names: str) -> Callable[[str], list[str]]:
    """A completion of one word.

    >>> one_among("cpu", "cuda")("cu")
    ['cuda']
    """
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def listed(incomplete: str, names: Sequence[str]) -> list[str]:
    """Completions of the last name of a list with commas; those that stand before are not offered again.

    >>> listed("linear,co", ("linear", "cosine"))
    ['linear,cosine']
    """
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in names if name.startswith(last) and name not in before.split(",")]


def complete_routers(incomplete: str) -> list[str]:
    """Of ``--routers``."""
    return listed(incomplete, ROUTER_NAMES)


def complete_few_shot_rows(incomplete: str) -> list[str]:
    """Of ``--rows``."""
    routers = (name for name in ROUTER_NAMES if name not in (*OWN_EXPERTS, *SIDE_READERS))
    return listed(incomplete, (*OWN_ROWS, "adapter", *routers))


complete_finetune_router = one_among(
    *(name for name in ROUTER_NAMES if name not in (*OWN_EXPERTS, *OWN_LOSSES, *SIDE_READERS, "dense"))
)
complete_images = one_among(*DATA_NAMES, "folder:", "hf:")
complete_data = one_among(
    *DATA_NAMES,
    "folder:",
    "hf:",
    *(f"text:{name}" for name in TEXT_NAMES),
    "text:hf:",
    "restore:photos",
    "restore:folder:",
    *(f"signals:{name}" for name in SIGNAL_NAMES),
    *(f"views:{name}" for name in DATA_NAMES),
)
