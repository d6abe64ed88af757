"""Dense language models made into stock MoE models: targets, methods and router starts, each a table."""

from spectralmoe.hf.upcycling.methods import METHODS
from spectralmoe.hf.upcycling.starts import STARTS
from spectralmoe.hf.upcycling.targets import TARGETS
from spectralmoe.hf.upcycling.upcycle import upcycle

__all__ = ["METHODS", "STARTS", "TARGETS", "upcycle"]
