"""Classification of samples of several views, any of which may be missing: accuracy at stated missing rates."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.data.image_data import ImageData, load_data
from spectralmoe.data.imputation import PoolImputer
from spectralmoe.data.views import VIEWS, Scales, present_views, scales_of, views_of
from spectralmoe.diagnostics.evaluation import run_over
from spectralmoe.errors import UserError
from spectralmoe.experts import ConfidentExperts
from spectralmoe.instruments.samples import Place
from spectralmoe.models import ViewsMoE, views_moe
from spectralmoe.naming import shown
from spectralmoe.recorder import record
from spectralmoe.regularizers import class_target, confidence_loss
from spectralmoe.training.settings import parse
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.settings.views import Views, is_views
from spectralmoe.training.tasks.base import Metric, Part, Task, rounded
from spectralmoe.training.tasks.classification import calibration_error
from spectralmoe.training.tasks.shown import HeldOut, Predictions, Shown
from spectralmoe.training.tasks.views_verbs import ViewsMeta, classify_views, read_views_meta

__all__ = ["Samples", "ViewsTask"]

GELU = {"type": "feed_forward", "activation": "gelu", "bias": True}
ACCURACY = Metric(
    "accuracy", "accuracy", "share of samples whose class is right, mean over missing rates", "higher", "%"
)
ECE = Metric("ece", "ECE", "expected calibration error, 15 bins of confidence, mean over missing rates", "lower", "%")


@dataclass(frozen=True, slots=True)
class Samples:
    """Rows (B, F + V), as ``ViewsMoE`` takes them, with labels (B,)."""

    inputs: Tensor
    labels: Tensor

    def part(self, chosen: slice, device: torch.device) -> Samples:
        """Some of the samples, on ``device``."""
        return Samples(self.inputs[chosen].to(device), self.labels[chosen].to(device))


class ViewsTask(Task):
    r"""Classify grey images by views of them (``views_of``), some of which are missing.

    In training each view of a sample is missing at one rate, drawn anew at each step; the validation and the test part
    are measured at several, with draws that are always the same. At least one view of a sample is there. The loss is
    the cross-entropy, and for layers of ``ConfidentExperts`` ``confidence_loss``, its mean over layers, with the
    probability of the true class by the network's own head on an expert's output as the target.

    ``accuracy`` is the mean over the measured rates; each has an ``accuracy_missing_PERCENT``, too, where there are
    several. Comparisons make no corrections of single samples here.

    Args:
        data: grey images.
        views: what is missing, and what stands in its place.
        scales: of the views of a model that there is already; None: those of the training part.

    Raises:
        UserError: images with colours; a pool of fewer samples than are drawn.

    >>> task = ViewsTask(load_data("digits"))
    >>> task.size, tuple(task.example().shape), [metric.key for metric in task.metrics][:3]
    (1079, (1, 107), ['accuracy', 'accuracy_missing_0', 'accuracy_missing_30'])
    """

    does = "classifies samples of several views"

    def __init__(self, data: ImageData, views: Views | None = None, scales: Scales | None = None) -> None:
        self.data, self.views = data, views or Views()
        self.name, self.notes = f"views:{data.name}", data.notes
        self.scales = scales or scales_of(views_of(data.train.images))
        self.train = views_of(data.train.images, self.scales)
        self.pools = (
            [PoolImputer(view, self.views.samples) for view in self.train] if self.views.placeholder == "pool" else []
        )
        rates = self.views.rates
        self.reported = {rate: _metric_at(rate) for rate in rates} if len(rates) > 1 else {}
        self.metrics = (ACCURACY, *self.reported.values(), ECE)
        self.parts = {part: [self._measured(part, rate) for rate in rates] for part in ("validation", "test")}

    @classmethod
    def open(cls, settings: TrainSettings, data_dir: Path | None = None, download: bool = False) -> Self:
        data = load_data(settings.data.partition(":")[2], data_dir=data_dir, download=download)
        return cls(data if settings.train_size is None else data.subset(settings.train_size), settings.views)

    @property
    def size(self) -> int:
        return len(self.data.train)

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    def build(self, settings: TrainSettings) -> ViewsMoE:
        """The untrained network: ``[network]`` has D, E, H and k, the depth is the number of blocks."""
        network, preset = settings.network, settings.preset
        num_experts, hidden = preset.sizes(network.num_experts, network.hidden, network.k)
        torch.manual_seed(settings.optimization.seed)
        return views_moe(
            self.data.num_classes,
            [view.shape[1] for view in self.train],
            width=network.width,
            depth=settings.depth,
            heads=self.views.heads,
            num_experts=num_experts,
            hidden=hidden,
            experts=partial(preset.make_experts, spare=network.spare, default=GELU),
            router=preset.routers(network.k),
            keep=self.views.keep,
        )

    def batch(self, indices: Tensor, draw: np.random.Generator) -> Samples:
        generator = torch.Generator().manual_seed(int(draw.integers(2**62)))
        views = [view[indices] for view in self.train]
        return Samples(self._rows(views, self.views.missing, generator), self.data.train.labels[indices])

    def loss(self, model: nn.Module, batch: Samples) -> Tensor:
        """Mean cross-entropy, and what the experts' confidence is off."""
        network = next(module for module in model.modules() if isinstance(module, ViewsMoE))
        sure = any(isinstance(module, ConfidentExperts) for module in network.modules())
        if not (sure and self.views.confidence):
            return F.cross_entropy(model(batch.inputs).float(), batch.labels)
        with record(model, keep=("confidence", "unweighed")) as tape:
            loss = F.cross_entropy(model(batch.inputs).float(), batch.labels)
        labels = batch.labels[:, None].expand(-1, len(VIEWS)).flatten()
        off = [confidence_loss(item, class_target(item, network.head, labels)) for item in tape]
        return loss + self.views.confidence * torch.stack(off).mean()

    def score(self, model: nn.Module, part: Part) -> dict[str, float]:
        labels, values = self._labels(part), list[tuple[float, float]]()
        for inputs in self.parts[part]:
            logits = run_over(model, inputs)
            right = 100 * float((logits.argmax(-1) == labels).float().mean())
            values.append((right, 100 * calibration_error(logits, labels)))
        accuracies, errors = zip(*values, strict=True)
        each = {metric.key: value for metric, value in zip(self.reported.values(), accuracies, strict=False)}
        return {ACCURACY.key: _mean(accuracies), **each, ECE.key: _mean(errors)}

    def example(self) -> Tensor:
        return self._complete()[:1]

    def inputs(self, part: Part) -> Tensor:
        return torch.cat(self.parts[part])

    def meta(
        self, settings: TrainSettings, results: Mapping[str, float], loads: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        meta = ViewsMeta(
            data=self.name,
            classes=self.data.classes,
            image_size=self.data.image_size,
            scales=self.scales,
            router=shown(settings.row),
            settings=settings.model_dump(mode="json"),
            results=rounded(results, loads),
        )
        return meta.model_dump(mode="json")

    @classmethod
    def read_meta(cls, network: nn.Module, values: Any, folder: Path) -> ViewsMeta:
        return read_views_meta(network, values, folder)

    @classmethod
    def reopen(
        cls, meta: ViewsMeta, name: str | None = None, data_dir: Path | None = None, download: bool = False
    ) -> Self:
        if not is_views(name or meta.data):
            raise UserError(f"{name!r} does not fit the model, which {cls.does}: name views:NAME")
        views = parse(Views, meta.settings.get("views") or {}, "the model's meta")
        data = load_data((name or meta.data).partition(":")[2], data_dir=data_dir, download=download)
        if (data.image_size, data.num_classes) != (meta.image_size, len(meta.classes)):
            raise UserError(f"{data.name!r} does not fit the model: other classes, or images of another size")
        size = meta.settings.get("train_size") if name in (None, meta.data) else None
        return cls(data if size is None else data.subset(size), views, meta.scales)  # a pool of what it was trained on

    @classmethod
    def predict(cls, network: nn.Module, meta: ViewsMeta, inputs: Sequence[str], **options: Any) -> Predictions:
        for given in inputs:
            if not os.path.exists(given):
                raise UserError(f"there is no file {given!r}; the model {cls.does}, and makes them of images in files")
        return classify_views(network, meta, [Path(file) for file in inputs])

    def summary(self, scores: Mapping[str, float]) -> Shown:
        samples = len(self._labels("test"))
        lines = [f"{scores[ACCURACY.key]:.2f}% of {samples} test samples of {self.name} are right"]
        lines += [f"  {metric.title}: {metric.show(scores[metric.key])}" for metric in self.reported.values()]
        return Shown({"samples": samples, **scores}, "\n".join(lines))

    def held_out(self) -> HeldOut:
        labels, classes = self._labels("test"), self.data.classes

        def describe(index: int, place: Place) -> dict[str, Any]:
            return {"text": f"{classes[int(labels[index])]}, {VIEWS[place.position]}"}

        return HeldOut("samples", self._complete(), labels, classes, describe)

    def _labels(self, part: Part) -> Tensor:
        return self.data.validation.labels if part == "validation" else self.data.test.labels

    def _measured(self, part: Part, rate: float) -> Tensor:
        """Rows of a part at a missing rate, always the same."""
        images = self.data.validation.images if part == "validation" else self.data.test.images
        generator = torch.Generator().manual_seed(2 * round(10_000 * rate) + (part == "test"))
        return self._rows(views_of(images, self.scales), rate, generator)

    def _complete(self) -> Tensor:
        """Rows of the test part with every view."""
        return self._rows(views_of(self.data.test.images, self.scales), 0.0, torch.Generator())

    def _rows(self, views: Sequence[Tensor], rate: float, generator: torch.Generator) -> Tensor:
        """Rows (B, F + V) of views (B, W) each, with placeholders for those that are missing."""
        present = present_views(len(views[0]), rate, generator)
        filled = []
        for number, view in enumerate(views):
            there = present[:, number]
            if self.pools:
                filled.append(self.pools[number](view, there, generator))
                continue
            noise = self.views.placeholder == "noise"
            instead = torch.randn(view.shape, generator=generator) if noise else torch.zeros_like(view)
            filled.append(torch.where(there[:, None], view, instead))
        return torch.cat([*filled, present.to(views[0].dtype)], 1)


def _metric_at(rate: float) -> Metric:
    percent = f"{100 * rate:g}"
    meaning = f"share of samples whose class is right where {percent}% of the views are missing"
    return Metric(f"{ACCURACY.key}_missing_{percent}", f"accuracy, {percent}% missing", meaning, "higher", unit="%")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
