"""MoE models of Hugging Face's transformers: load one, run it on text, watch its routers, monitor its training."""

from spectralmoe.hf.added_terms import AddedTerms, add_terms
from spectralmoe.hf.freezing import freeze_routers, train_only_routers
from spectralmoe.hf.language import TransformersModel, encode, run, training_facts
from spectralmoe.hf.load import load_transformers
from spectralmoe.hf.resume import resume_safe
from spectralmoe.hf.swap import Swapped, swap_routers
from spectralmoe.hf.trainer import attach_callback, trainer_callback
from spectralmoe.hf.watch import watch_transformers

__all__ = [
    "AddedTerms",
    "Swapped",
    "TransformersModel",
    "add_terms",
    "attach_callback",
    "encode",
    "freeze_routers",
    "load_transformers",
    "resume_safe",
    "run",
    "swap_routers",
    "train_only_routers",
    "trainer_callback",
    "training_facts",
    "watch_transformers",
]
