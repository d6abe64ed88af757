"""MoE models of Hugging Face's transformers: load one, run it on text, watch its routers, monitor its training."""

from spectralmoe.hf.added_terms import AddedTerms, add_terms
from spectralmoe.hf.fit import Agreement, fit_scorer
from spectralmoe.hf.fold import distill_to_gate, fold_routers
from spectralmoe.hf.freezing import freeze_routers, train_only_routers
from spectralmoe.hf.language import TransformersModel, encode, run, training_facts
from spectralmoe.hf.load import load_transformers
from spectralmoe.hf.resume import resume_safe
from spectralmoe.hf.swap import Swapped, swap_routers
from spectralmoe.hf.swapped_folder import load_swapped, save_swapped
from spectralmoe.hf.trainer import attach_callback, trainer_callback
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
    "freeze_routers",
    "load_swapped",
    "load_transformers",
    "resume_safe",
    "run",
    "save_swapped",
    "swap_routers",
    "train_only_routers",
    "trainer_callback",
    "training_facts",
    "watch_transformers",
]
