"""Mixture-of-Experts whose routing is shaped by geometry: eigenbases, prototypes, spectra."""

from spectralmoe.dispatch import Dense, Dispatch, Grouped, Loop
from spectralmoe.errors import UserError
from spectralmoe.experts import Adapter, Experts, FeedForward, ModuleExperts
from spectralmoe.instruments.monitor import Monitor
from spectralmoe.manifold import retract
from spectralmoe.moe import MoE, Recordable
from spectralmoe.router import Router, shard_routers
from spectralmoe.routing import Routing
from spectralmoe.saving import load, save
from spectralmoe.scorers import (
    CosineScorer,
    EigenbasisScorer,
    LinearScorer,
    PrincipalScorer,
    PrototypeScorer,
    Scorer,
)
from spectralmoe.selectors import Balanced, Capacity, ExpertChoice, NoisyTopK, Selector, SoftBalanced, TopK, TopP
from spectralmoe.steps import after_step, attach, before_step, param_groups
from spectralmoe.tape import Record, Tape, feed, record
from spectralmoe.terms import Term, penalty

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "Balanced",
    "Capacity",
    "CosineScorer",
    "Dense",
    "Dispatch",
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
    "PrincipalScorer",
    "PrototypeScorer",
    "Record",
    "Recordable",
    "Router",
    "Routing",
    "Scorer",
    "Selector",
    "SoftBalanced",
    "Tape",
    "Term",
    "TopK",
    "TopP",
    "UserError",
    "__version__",
    "after_step",
    "attach",
    "before_step",
    "feed",
    "load",
    "param_groups",
    "penalty",
    "record",
    "retract",
    "save",
    "shard_routers",
]
