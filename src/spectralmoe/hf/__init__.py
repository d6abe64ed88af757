"""Mixtures of experts of Hugging Face's transformers: load one, run it on text, watch its routers, replace them, train
with terms, prune, and make one of a dense model."""

from spectralmoe.hf.language import TransformersModel, encode, run, training_facts
from spectralmoe.hf.load import load_transformers
from spectralmoe.hf.routers.fit import Agreement, fit_scorer
from spectralmoe.hf.routers.fold import distill_to_gate, fold_routers
from spectralmoe.hf.routers.folder import load_swapped, save_swapped
from spectralmoe.hf.routers.swap import Swapped, swap_routers
from spectralmoe.hf.shrinking.replicate_quantize import replicate_and_quantize_experts
from spectralmoe.hf.shrinking.shrink import merge_experts, prune_experts
from spectralmoe.hf.training.added_terms import AddedTerms, add_terms
from spectralmoe.hf.training.callbacks import attach_callback, trainer_callback
from spectralmoe.hf.training.freezing import freeze_experts, freeze_routers, train_only_routers
from spectralmoe.hf.training.resume import resume_safe
from spectralmoe.hf.upcycling import upcycle
from spectralmoe.hf.watch import watch_transformers

__all__ = [
    "AddedTerms",
    "Agreement",
    "Swapped",
    "TransformersModel",
    "add_terms",
    "attach_callback",
    "distill_to_gate",
    "encode",
    "fit_scorer",
    "fold_routers",
    "freeze_experts",
    "freeze_routers",
    "load_swapped",
    "load_transformers",
    "merge_experts",
    "prune_experts",
    "replicate_and_quantize_experts",
    "resume_safe",
    "run",
    "save_swapped",
    "swap_routers",
    "train_only_routers",
    "trainer_callback",
    "training_facts",
    "upcycle",
    "watch_transformers",
]
