"""Saving: a whole model, the trained parts of a vision model alone, or either through the Hugging Face Hub."""

from spectralmoe.saving.whole import FORMAT, load, read_config, save

__all__ = ["FORMAT", "load", "read_config", "save"]
