"""MoE models of Hugging Face's transformers: load one, run it on text, watch its routers, monitor its training,
make one of a dense model."""

from spectralmoe.hf.language import TransformersModel, encode, run, training_facts
from spectralmoe.hf.load import load_transformers
from spectralmoe.hf.shrink import merge_experts, prune_experts
from spectralmoe.hf.swap import Swapped, swap_routers
from spectralmoe.hf.trainer import trainer_callback
from spectralmoe.hf.upcycling import upcycle
from spectralmoe.hf.watch import watch_transformers

__all__ = [
    "Swapped",
    "TransformersModel",
    "encode",
    "load_transformers",
    "merge_experts",
    "prune_experts",
    "run",
    "swap_routers",
    "trainer_callback",
    "training_facts",
    "upcycle",
    "watch_transformers",
]
