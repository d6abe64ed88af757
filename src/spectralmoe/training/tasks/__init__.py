"""Tasks, one file each; the name of the data finds the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks.base import Batch, Metric, Part, Task
from spectralmoe.training.tasks.images import ImageTask
from spectralmoe.training.tasks.restoration import RestorationTask
from spectralmoe.training.tasks.signals import SignalTask
from spectralmoe.training.tasks.text import TextTask
from spectralmoe.training.tasks.views import ViewsTask

__all__ = [
    "TASKS",
    "Batch",
    "ImageTask",
    "Metric",
    "Part",
    "RestorationTask",
    "SignalTask",
    "Task",
    "TextTask",
    "ViewsTask",
    "open_task",
    "task_of",
]

TASKS: dict[str, type[Task]] = {
    "images": ImageTask,
    "text": TextTask,
    "signals": SignalTask,
    "restore": RestorationTask,
    "views": ViewsTask,
}
"""What stands before the colon in the name of the data -> its task; other names are those of images."""


def open_task(settings: TrainSettings, data_dir: Path | None = None, download: bool = False) -> Task:
    """The task of a run, found by the name of its data.

    Raises:
        UserError: as ``Task.open``.

    >>> task = open_task(TrainSettings(data="digits", train_size=100))
    >>> task.name, task.size, task.metric.key
    ('digits', 100, 'accuracy')
    """
    return task_of(settings.data).open(settings, data_dir, download)


def task_of(data: Any) -> type[Task]:
    """The kind of task that data of this name are: ``KIND:NAME``, or the name of a set of images.

    >>> task_of("digits").__name__, task_of("folder:pictures").__name__
    ('ImageTask', 'ImageTask')
    """
    kind, colon, _ = str(data).partition(":")
    return TASKS.get(kind if colon else "images", ImageTask)
