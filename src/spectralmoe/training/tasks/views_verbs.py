"""What the verbs do with a saved network of several views: its meta, and the classes of image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from spectralmoe.data.image_files import conversions, read_image
from spectralmoe.data.views import views_of
from spectralmoe.diagnostics.evaluation import run_over
from spectralmoe.errors import UserError
from spectralmoe.models import ViewsMoE
from spectralmoe.training.settings import Positive, Settings, Several, parse
from spectralmoe.training.tasks.shown import Predictions, Shown

__all__ = ["ViewsMeta", "classify_views", "read_views_meta"]

Pair = Annotated[tuple[float, float], Field(strict=False)]


class ViewsMeta(Settings):
    """What a saved network needs to be used on images, of which it reads the views.

    Attributes:
        scales: mean and standard deviation of each view.
        results: measured after training.
        settings: of the run that trained it.
    """

    data: str
    classes: Several[str]
    image_size: Annotated[tuple[Positive, Positive], Field(strict=False)]
    scales: Several[Pair]
    router: str
    results: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)


def read_views_meta(network: nn.Module, values: Any, folder: Path) -> ViewsMeta:
    """What was saved beside a network of several views.

    Raises:
        UserError: another network; values that are missing, or do not fit it.
    """
    where = f"{folder / 'config.json'}: meta"
    if not isinstance(network, ViewsMoE):
        raise UserError(
            f"{folder} holds a {type(network).__name__}, and its meta is that of a network of several views"
        )
    meta = parse(ViewsMeta, values, where)
    widths = [view.shape[1] for view in views_of(torch.zeros(1, 1, *meta.image_size))]
    if len(meta.classes) != network.num_classes or widths != network.widths or len(meta.scales) != len(widths):
        raise UserError(f"{where} does not fit the network")
    return meta


def classify_views(network: nn.Module, meta: ViewsMeta, files: Sequence[Path]) -> Predictions:
    """The most likely class of each image file, whose views are all there, and its probability.

    Raises:
        UserError: a file that is missing or no image.
    """
    images = torch.stack([read_image(file, channels=1, size=meta.image_size) for file in files])
    views = views_of(images, meta.scales)
    inputs = torch.cat([*views, torch.ones(len(images), len(views))], 1)
    classes = []
    for file, probabilities in zip(files, run_over(network, inputs).softmax(-1), strict=True):
        label = int(probabilities.argmax())
        probability, name = float(probabilities[label]), meta.classes[label]
        values = {"file": str(file), "class": name, "label": label, "probability": probability}
        classes.append(Shown(values, f"{file}: {name} ({probability:.1%})"))
    converted = conversions(files, channels=1, size=meta.image_size)
    return Predictions(classes, [converted] if converted else [])
