"""Mixture-of-Experts layers for PyTorch whose routing is shaped by geometry: eigenbases, prototypes, spectra."""

from typing import TYPE_CHECKING

from spectralmoe.version import __version__

if TYPE_CHECKING:
    from spectralmoe.context import Context
    from spectralmoe.dispatch import Dense, Dispatch, Grouped, Loop
    from spectralmoe.errors import UserError
    from spectralmoe.experts import Adapter, EigenExperts, Experts, FeedForward, ModuleExperts
    from spectralmoe.feeding import feed
    from spectralmoe.instruments.monitor import Monitor
    from spectralmoe.manifold import retract
    from spectralmoe.moe import MoE
    from spectralmoe.placement import Placement
    from spectralmoe.recorder import record
    from spectralmoe.recording import Recordable
    from spectralmoe.router import Router, shard_routers
    from spectralmoe.routing import Routing
    from spectralmoe.saving import load, save
    from spectralmoe.scorers import (
        BasisScorer,
        ContextScorer,
        CosineScorer,
        EigenbasisScorer,
        LinearScorer,
        PrincipalScorer,
        PrototypeScorer,
        SaturatedScorer,
        Scorer,
    )
    from spectralmoe.selectors import (
        Balanced,
        Capacity,
        ExpertChoice,
        NoisyTopK,
        Selector,
        Soft,
        SoftBalanced,
        TopK,
        TopP,
    )
    from spectralmoe.steps import after_step, attach, param_groups
    from spectralmoe.tape import Record, Tape
    from spectralmoe.terms import Term, penalty

__all__ = [
    "Adapter",
    "Balanced",
    "BasisScorer",
    "Capacity",
    "Context",
    "ContextScorer",
    "CosineScorer",
    "Dense",
    "Dispatch",
    "EigenExperts",
    "EigenbasisScorer",
    "ExpertChoice",
    "Experts",
    "FeedForward",
    "Grouped",
    "LinearScorer",
    "Loop",
    "MoE",
    "ModuleExperts",
    "Monitor",
    "NoisyTopK",
    "Placement",
    "PrincipalScorer",
    "PrototypeScorer",
    "Record",
    "Recordable",
    "Router",
    "Routing",
    "SaturatedScorer",
    "Scorer",
    "Selector",
    "Soft",
    "SoftBalanced",
    "Tape",
    "Term",
    "TopK",
    "TopP",
    "UserError",
    "__version__",
    "after_step",
    "attach",
    "feed",
    "load",
    "param_groups",
    "penalty",
    "record",
    "retract",
    "save",
    "shard_routers",
]

_NAMES = {
    "context": ("Context",),
    "dispatch": ("Dense", "Dispatch", "Grouped", "Loop"),
    "errors": ("UserError",),
    "experts": ("Adapter", "EigenExperts", "Experts", "FeedForward", "ModuleExperts"),
    "feeding": ("feed",),
    "instruments.monitor": ("Monitor",),
    "manifold": ("retract",),
    "moe": ("MoE",),
    "placement": ("Placement",),
    "recorder": ("record",),
    "recording": ("Recordable",),
    "router": ("Router", "shard_routers"),
    "routing": ("Routing",),
    "saving": ("load", "save"),
    "scorers": (
        "BasisScorer",
        "ContextScorer",
        "CosineScorer",
        "EigenbasisScorer",
        "LinearScorer",
        "PrincipalScorer",
        "PrototypeScorer",
        "SaturatedScorer",
        "Scorer",
    ),
    "selectors": (
        "Balanced",
        "Capacity",
        "ExpertChoice",
        "NoisyTopK",
        "Selector",
        "Soft",
        "SoftBalanced",
        "TopK",
        "TopP",
    ),
    "steps": ("after_step", "attach", "param_groups"),
    "tape": ("Record", "Tape"),
    "terms": ("Term", "penalty"),
}
"""Module -> its names that can be imported from here; a module is imported at the first use of one."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """A public name, or a module of the package."""
        from importlib import import_module
        from importlib.util import find_spec

        for module, names in _NAMES.items():
            if name in names:
                value = globals()[name] = getattr(import_module(f"spectralmoe.{module}"), name)
                return value
        if not name.startswith("_") and find_spec(f"spectralmoe.{name}"):
            return import_module(f"spectralmoe.{name}")
        raise AttributeError(f"module 'spectralmoe' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
