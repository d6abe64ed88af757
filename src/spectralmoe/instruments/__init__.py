"""Instruments: they gather the values of ``diagnostics`` over a run, compare them with thresholds, and write them down.

``Inspector`` looks at a model once, ``Monitor`` while it trains; both make findings by the same rules.
"""

from spectralmoe.instruments.cures import CURES, THRESHOLDS
from spectralmoe.instruments.document import inspection_document
from spectralmoe.instruments.findings import Finding
from spectralmoe.instruments.inspector import Inspector
from spectralmoe.instruments.monitor import Monitor
from spectralmoe.instruments.monitor_log import read_monitor
from spectralmoe.instruments.problems import find_problems
from spectralmoe.instruments.samples import Place

__all__ = [
    "CURES",
    "THRESHOLDS",
    "Finding",
    "Inspector",
    "Monitor",
    "Place",
    "find_problems",
    "inspection_document",
    "read_monitor",
]
