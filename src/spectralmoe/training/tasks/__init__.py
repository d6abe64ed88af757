"""What can be learned: one file a task, found by the name of its data."""

from __future__ import annotations

from pathlib import Path

from spectralmoe.training.tasks.base import Batch, Metric, Part, Task
from spectralmoe.training.tasks.images import ImageTask
from spectralmoe.training.tasks.text import TextTask
from spectralmoe.training.train_settings import TrainSettings

__all__ = ["TASKS", "Batch", "ImageTask", "Metric", "Part", "Task", "TextTask", "open_task"]

TASKS: dict[str, type[Task]] = {
    "images": ImageTask,
    "text": TextTask,
}
"""What stands before the colon in the name of the data -> its task; other names are those of images."""


def open_task(settings: TrainSettings, data_dir: Path | None = None, download: bool = False) -> Task:
    """The task of a run, found by the name of its data: ``KIND:NAME``, or the name of a set of images.

    Raises:
        UserError: as ``Task.open``.

    >>> task = open_task(TrainSettings(data="digits", train_size=100))
    >>> task.name, task.size, task.metric.key
    ('digits', 100, 'accuracy')
    """
    kind, colon, _ = settings.data.partition(":")
    return TASKS.get(kind if colon else "images", ImageTask).open(settings, data_dir, download)
