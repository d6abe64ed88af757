"""Dense language models made into stock MoE models: targets, methods and router starts, each a table."""

from spectralmoe.hf.upcycle.methods import METHODS
from spectralmoe.hf.upcycle.starts import STARTS
from spectralmoe.hf.upcycle.targets import TARGETS
from spectralmoe.hf.upcycle.upcycle import upcycle

__all__ = ["METHODS", "STARTS", "TARGETS", "upcycle"]
