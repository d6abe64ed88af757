"""Saving and loading: whole models, parts of vision models alone, ranks alone, and the Hugging Face Hub."""

from spectralmoe.saving.whole import FORMAT, load, read_config, save

__all__ = ["FORMAT", "load", "read_config", "save"]
