"""How fast the layers are: against the arithmetic in them and against other libraries, side by side in one run."""

from spectralmoe.bench.runner import SUITES, run
from spectralmoe.bench.settings import Settings
from spectralmoe.bench.targets import TARGETS

__all__ = ["SUITES", "TARGETS", "Settings", "run"]
