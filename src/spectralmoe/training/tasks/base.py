"""Tasks: what a training run learns, as samples, a loss and metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
import torch
from torch import Tensor, nn

from spectralmoe.context import Context
from spectralmoe.errors import UserError
from spectralmoe.rows import Trial
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks.shown import HeldOut, Predictions, Shown

__all__ = ["Batch", "Metric", "Part", "Task", "rounded"]

Part = Literal["validation", "test"]
"""A part of the data that training does not see: one to choose by, one to report."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One value of a trained network: its key in files, its name, and how it is shown.

    Attributes:
        better: which way is better.
        unit: written behind the value.

    >>> accuracy = Metric("accuracy", "accuracy", "share of right classes", "higher", unit="%")
    >>> accuracy.show(93.204), accuracy.heading, accuracy.key_of("validation")
    ('93.20%', 'accuracy %', 'validation_accuracy')
    """

    key: str
    title: str
    meaning: str
    better: Literal["higher", "lower"]
    unit: str = ""
    digits: int = 2

    @property
    def heading(self) -> str:
        """The title with the unit."""
        return f"{self.title} {self.unit}".rstrip()

    def key_of(self, part: Part) -> str:
        """The key of the value on one part of the data."""
        return f"{part}_{self.key}"

    def show(self, value: float) -> str:
        """The value with its unit."""
        space = "" if self.unit in ("", "%") else " "
        return f"{value:.{self.digits}f}{space}{self.unit}"

    def named(self, value: float) -> str:
        """The value with its unit, or with its title where it has none."""
        return self.show(value) if self.unit else f"{self.show(value)} {self.title}"

    def rank(self, value: float) -> float:
        """A number that grows as the value gets better."""
        return value if self.better == "higher" else -value


class Batch(Protocol):
    """The samples of one step, in a form of the task."""

    def part(self, chosen: slice, device: torch.device) -> Self:
        """Some of the samples, on ``device``."""


class Task(ABC):
    """Data with a loss and metrics: all that the training loop and a comparison know of what is learned.

    A subclass is one file and one entry of ``TASKS``. A network is any module that ``loss`` and ``score`` can call.

    Of a saved network the verbs know what ``read_meta`` made of the values saved beside it, and hand it to ``reopen``,
    ``predict`` and ``write_wrong``. A task that leaves these out can be trained and compared.

    Attributes:
        name: of the data.
        metrics: what ``score`` measures; choices on the validation part are made by the first.
        notes: what a user should know about how the data were read.
        does: what a network of the task does, for people: "classifies images".
        options: what ``predict`` can be asked for beside its inputs.
        unit: what speeds are counted in, ``units`` of them a sample.
        gives: names of the side information that the blocks of its networks give their layers, D numbers a token.
    """

    name: str
    metrics: tuple[Metric, ...]
    notes: tuple[str, ...] = ()
    does: ClassVar[str] = "has a task of its own"
    options: ClassVar[Sequence[str]] = ()
    unit: str = "sample"
    gives: ClassVar[Sequence[str]] = ()

    @classmethod
    @abstractmethod
    def open(cls, settings: TrainSettings, data_dir: Path | None = None, download: bool = False) -> Self:
        """The task on the data that the settings name.

        Raises:
            UserError: they cannot be had, or settings do not fit them.
        """

    @property
    @abstractmethod
    def size(self) -> int:
        """How many samples the training part has."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of all samples: a name may stand for other data later."""

    @abstractmethod
    def build(self, settings: TrainSettings) -> nn.Module:
        """The untrained network of a run; under one seed all routers start with the same other parts.

        Raises:
            UserError: settings that no network can be built from.
        """

    @classmethod
    def trial(cls, settings: TrainSettings) -> Trial:
        """What a comparison tries a layer of every row with, before it runs: by default two tokens of width D."""
        dim = settings.network.width
        context = Context(tokens={name: torch.zeros(2, dim) for name in cls.gives}) if cls.gives else None
        return Trial(torch.zeros(2, dim), context)

    @abstractmethod
    def batch(self, indices: Tensor, draw: np.random.Generator) -> Batch:
        """The training samples (B,) int64 at ``indices``; whatever is random about them comes from ``draw``, which
        depends on the seed and the step alone.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch, a scalar in fp32. It runs in the precision of the run, so logits are cast first."""

    @abstractmethod
    def score(self, model: nn.Module, part: Part) -> dict[str, float]:
        """Metric key -> value on one part of the data, in evaluation mode; empty where there is no such part."""

    @abstractmethod
    def example(self) -> Tensor:
        """One sample (1, ...) as the network takes it, to count operations on."""

    @property
    def units(self) -> int:
        """How many of ``unit`` a sample is."""
        return 1

    def inputs(self, part: Part) -> Tensor:
        """Samples (N, ...) of a part as the network takes them, to look at routers with."""
        labelled = self.labelled(part)
        return self.example() if labelled is None else labelled[0]

    def beside(self, part: Part) -> dict[str, Tensor]:
        """What the network takes by keyword beside ``inputs``, a row (N, ...) each; by default nothing."""
        return {}

    def labelled(self, part: Part) -> tuple[Tensor, Tensor] | None:
        """Inputs (N, ...) and classes (N,) of a part, where the task is to classify; else None."""
        return None

    def meta(
        self, settings: TrainSettings, results: Mapping[str, float], loads: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """JSON values that are saved beside the network, for those who load it.

        Args:
            results: scores on the test part.
            loads: layer name -> share of the load of each expert (E,) there.
        """
        return {"data": self.name, "settings": settings.model_dump(mode="json"), "results": rounded(results, loads)}

    @classmethod
    def read_meta(cls, network: nn.Module, values: Any, folder: Path) -> Any:
        """What ``meta`` saved beside a network, checked.

        Raises:
            UserError: it is not of this task, or does not fit the network; names the folder.
        """
        raise _absent("evaluate, predict and inspect", cls)

    @classmethod
    def reopen(cls, meta: Any, name: str | None = None, data_dir: Path | None = None, download: bool = False) -> Self:
        """The task of a saved network on the data called ``name``, by default those that it was trained on.

        Raises:
            UserError: they cannot be had, or do not fit the network.
        """
        raise _absent("evaluate and inspect", cls)

    @classmethod
    def predict(cls, network: nn.Module, meta: Any, inputs: Sequence[str], **options: Any) -> Predictions:
        """The predictions of a saved network for each input, in evaluation mode.

        Raises:
            UserError: an input that cannot be read.
        """
        raise _absent("predict", cls)

    def summary(self, scores: Mapping[str, float]) -> Shown:
        """Scores on the test part for ``evaluate``; the text is the metric in a sentence."""
        value = self.metric.named(scores[self.metric.key])
        return Shown(dict(scores), f"{value} on the test part of {self.name}")

    def write_wrong(self, network: nn.Module, folder: Path) -> list[dict[str, Any]]:
        """Write the test samples that the network gets wrong as files; one entry for each, with its ``file``.

        Raises:
            UserError: nothing is right or wrong in this task; the folder cannot be written.
        """
        raise _absent("--wrong", type(self))

    def held_out(self) -> HeldOut:
        """Samples of the test part to look at routers with.

        Raises:
            UserError: the task has no form for it.
        """
        raise _absent("inspect", type(self))

    def pictures(self, networks: Iterable[tuple[str, nn.Module]], folder: Path) -> list[Path]:
        """Draw what several networks, each with its name, make of samples into ``folder``: the paths, none by default.

        Raises:
            UserError: they cannot be drawn.
        """
        return []

    @property
    def metric(self) -> Metric:
        """The metric by which validation data decide."""
        return self.metrics[0]


def _absent(what: str, task: type[Task]) -> UserError:
    return UserError(f"{what}: not for a network that {task.does}")


def rounded(results: Mapping[str, float], loads: Mapping[str, Tensor]) -> dict[str, Any]:
    """Scores and loads with the digits that people read."""
    shares = {name: [round(share, 4) for share in load.tolist()] for name, load in loads.items()}
    return {**{key: round(value, 4) for key, value in results.items()}, "loads": shares}
