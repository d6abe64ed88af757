"""Speed of the layers, compared in one run with their bare arithmetic and with other libraries."""

from spectralmoe.bench.runner import SUITES, run
from spectralmoe.bench.settings import Settings
from spectralmoe.bench.targets import TARGETS

__all__ = ["SUITES", "TARGETS", "Settings", "run"]
