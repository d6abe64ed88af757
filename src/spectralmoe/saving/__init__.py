"""Saving and loading: whole models, parts of vision models alone, ranks alone, and the Hugging Face Hub."""

from spectralmoe.saving.parts import load_parts, read_parts_config, save_parts
from spectralmoe.saving.ranks import load_ranks, save_ranks
from spectralmoe.saving.whole import FORMAT, load, read_config, save

__all__ = [
    "FORMAT",
    "load",
    "load_parts",
    "load_ranks",
    "read_config",
    "read_parts_config",
    "save",
    "save_parts",
    "save_ranks",
]
