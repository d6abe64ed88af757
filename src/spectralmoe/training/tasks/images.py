"""Image classification: cross-entropy with label smoothing and mixup, on data sets and folders of images."""

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

from spectralmoe.data.image_data import ImageData, Split, load_data
from spectralmoe.diagnostics.evaluation import run_over
from spectralmoe.errors import UserError
from spectralmoe.naming import shown
from spectralmoe.training.network import ModelMeta, build_network, fitting_data, model_meta, read_image_meta
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks.base import Part, Task, rounded
from spectralmoe.training.tasks.classification import CLASSIFICATION, class_scores
from spectralmoe.training.tasks.image_verbs import classify, patch, write_wrong
from spectralmoe.training.tasks.shown import HeldOut, Predictions, Shown
from spectralmoe.training.vision import build_vision

__all__ = ["ImageTask", "Images"]


@dataclass(frozen=True, slots=True)
class Images:
    """Images (B, C, H, W) with labels (B,); mixed ones are ``share`` of the first label and the rest of the second."""

    images: Tensor
    labels: Tensor
    others: Tensor | None = None
    share: float = 1.0

    def part(self, chosen: slice, device: torch.device) -> Images:
        """Some of the images, on ``device``."""
        others = None if self.others is None else self.others[chosen].to(device)
        return Images(self.images[chosen].to(device), self.labels[chosen].to(device), others, self.share)


class ImageTask(Task):
    r"""Classify images.

    Args:
        data: training, validation and test images.
        label_smoothing: :math:`\epsilon` of the targets :math:`(1-\epsilon)\,\mathrm{onehot} + \epsilon / C`
            (Szegedy et al., arXiv 1512.00567, section 7).
        mixup: a of :math:`\lambda \sim \mathrm{Beta}(a, a)`; images and targets become
            :math:`\lambda x_i + (1-\lambda) x_j` (Zhang et al., arXiv 1710.09412). 0: none.

    >>> from spectralmoe.data.image_data import load_data
    >>> task = ImageTask(load_data("digits"))
    >>> task.size, tuple(task.example().shape)
    (1079, (1, 1, 8, 8))
    """

    metrics = CLASSIFICATION
    does = "classifies images"

    def __init__(self, data: ImageData, *, label_smoothing: float = 0.0, mixup: float = 0.0) -> None:
        self.data, self.label_smoothing, self.mixup = data, label_smoothing, mixup
        self.name, self.notes = data.name, data.notes

    @classmethod
    def open(cls, settings: TrainSettings, data_dir: Path | None = None, download: bool = False) -> Self:
        name, side = settings.data, settings.image_size
        if side is not None and settings.backbone is None and not name.startswith(("folder:", "hf:")):
            raise UserError(  # a timm model resizes the images of other data sets itself
                f"image size {side}: only images of folder:PATH and hf:NAME are resized, {name!r} comes in one size"
            )
        data = load_data(name, data_dir=data_dir, download=download, side=side)
        if settings.hold_out is not None:
            data = data.without(settings.hold_out)
        if settings.train_size is not None:
            data = data.subset(settings.train_size)
        optimization = settings.optimization
        return cls(data, label_smoothing=optimization.label_smoothing, mixup=optimization.mixup)

    @property
    def size(self) -> int:
        return len(self.data.train)

    @property
    def fingerprint(self) -> str:
        return self.data.fingerprint

    def build(self, settings: TrainSettings) -> nn.Module:
        if settings.backbone is not None:
            return build_vision(self.data, settings.backbone, settings)
        return build_network(self.data, settings.network, settings.row, settings.depth, settings.optimization.seed)

    def batch(self, indices: Tensor, draw: np.random.Generator) -> Images:
        images, labels = self.data.train.images[indices], self.data.train.labels[indices]
        if not self.mixup:
            return Images(images, labels)
        share = float(draw.beta(self.mixup, self.mixup))
        order = torch.from_numpy(draw.permutation(len(labels)))
        return Images(share * images + (1 - share) * images[order], labels, labels[order], share)

    def loss(self, model: nn.Module, batch: Images) -> Tensor:
        """Mean cross-entropy."""
        logits, smoothing = model(batch.images).float(), self.label_smoothing
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
        if batch.others is None:
            return loss
        other = F.cross_entropy(logits, batch.others, label_smoothing=smoothing)
        return batch.share * loss + (1 - batch.share) * other

    def score(self, model: nn.Module, part: Part) -> dict[str, float]:
        split = self._split(part)
        return class_scores(run_over(model, split.images), split.labels) if len(split) else {}

    def example(self) -> Tensor:
        return self.data.test.images[:1]

    def labelled(self, part: Part) -> tuple[Tensor, Tensor]:
        split = self._split(part)
        return split.images, split.labels

    def meta(
        self, settings: TrainSettings, results: Mapping[str, float], loads: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        return model_meta(
            self.data,
            shown(settings.row),
            settings.hold_out,
            settings=settings.model_dump(mode="json"),
            results={**rounded(results, loads), "test_images": len(self.data.test)},
        )

    @classmethod
    def read_meta(cls, network: nn.Module, values: Any, folder: Path) -> ModelMeta:
        return read_image_meta(network, values, folder)

    @classmethod
    def reopen(
        cls, meta: ModelMeta, name: str | None = None, data_dir: Path | None = None, download: bool = False
    ) -> Self:
        return cls(fitting_data(name, meta, data_dir, download))

    @classmethod
    def predict(cls, network: nn.Module, meta: ModelMeta, inputs: Sequence[str], **options: Any) -> Predictions:
        for given in inputs:
            if not os.path.exists(given):
                raise UserError(f"there is no file {given!r}; the model {cls.does}, and reads them from files")
        return classify(network, meta, [Path(file) for file in inputs])

    def summary(self, scores: Mapping[str, float]) -> Shown:
        images, accuracy = len(self.data.test), scores["accuracy"]
        text = f"{accuracy:.2f}% of {images} test images of {self.name} are right"
        return Shown({"images": images, "accuracy": accuracy}, text)

    def write_wrong(self, network: nn.Module, folder: Path) -> list[dict[str, Any]]:
        test = self.data.test
        return write_wrong(folder, test, run_over(network, test.images).argmax(-1), self.data.classes)

    def held_out(self) -> HeldOut:
        test, classes = self.data.test, self.data.classes
        return HeldOut("images", test.images, test.labels, classes, partial(patch, test, classes))

    def _split(self, part: Part) -> Split:
        return self.data.validation if part == "validation" else self.data.test
