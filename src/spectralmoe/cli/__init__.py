"""The command line: ``spectralmoe VERB``, with one file for each verb."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a correction was refused or a training diverged, 2 a mistake of the
    user's (one line on stderr), 130 interrupted.
    """
    from spectralmoe.cli.app import run

    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))
