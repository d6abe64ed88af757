"""Where the epochs of a run are written while it trains: one file a kind of log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

from spectralmoe.errors import UserError, one_of
from spectralmoe.training.logs.base import Epochs, Log
from spectralmoe.training.logs.csv_file import CsvLog
from spectralmoe.training.logs.tensorboard import TensorBoardLog
from spectralmoe.training.logs.wandb import WandbLog

__all__ = ["LOGS", "Epochs", "Log", "check_logs", "open_logs"]

LOGS: Mapping[str, Callable[[Path, str], Log]] = {
    "csv": CsvLog,
    "tensorboard": TensorBoardLog,
    "wandb": WandbLog,
}


PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}
"""What a log needs besides this library."""


def check_logs(names: Sequence[str]) -> None:
    """Refuse what cannot be logged to, before anything runs.

    Raises:
        UserError: an unknown name; a log whose package is not installed.
    """
    for name in names:
        if name not in LOGS:
            raise one_of("log", name, LOGS)
        package = PACKAGES.get(name)
        if package is not None and find_spec(package) is None:
            raise UserError(f"--log {name} needs the package {package}: pip install {package}")


@contextmanager
def open_logs(names: Sequence[str], folder: Path, title: str) -> Iterator[list[Log]]:
    """The logs called ``names``, in ``folder``; closed at the end of the block.

    Raises:
        UserError: as ``check_logs``; a log that refuses the run.
    """
    check_logs(names)
    with ExitStack() as stack:
        logs = []
        for name in dict.fromkeys(names):
            log = LOGS[name](folder, title)
            stack.callback(log.close)
            logs.append(log)
        yield logs
