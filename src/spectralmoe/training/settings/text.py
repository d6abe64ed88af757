"""Settings of a run on text: the section ``[text]``, and what text has in place of the defaults for images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from spectralmoe.data.vocabulary import BYTES
from spectralmoe.training.settings.base import Positive, Settings

__all__ = ["Text", "check_text", "is_text", "with_text_defaults"]

DEFAULTS: dict[str, dict[str, Any]] = {
    "network": {"width": 128, "hidden": 128},
    "optimization": {"epochs": 2, "batch_size": 8},
    "text": {},
}
IMAGES_ONLY = ("image_size", "hold_out", "backbone", "moe")


class Text(Settings):
    """How text is cut and read. Width, experts and k of the model are those of ``[network]``.

    Attributes:
        length: S, tokens in a window.
        vocab: "bytes", or the size of a byte-pair vocabulary that is learned from the training part.
        heads: of each attention.
        measured: how many windows of each domain the validation and the test part are measured on, spread evenly.
    """

    length: Positive = 256
    vocab: Annotated[int, Field(gt=BYTES, le=65536)] | Literal["bytes"] = "bytes"
    heads: Positive = 4
    measured: Positive = 256


def is_text(data: Any) -> bool:
    """Whether data of this name are text."""
    return isinstance(data, str) and data.startswith("text:")


def with_text_defaults(values: Any) -> Any:
    """``values`` laid over the defaults of text, if their data are text."""
    if not isinstance(values, Mapping) or not is_text(values.get("data")):
        return values
    filled = dict(values)
    for section, defaults in DEFAULTS.items():
        written = values.get(section)
        if written is None or isinstance(written, Mapping):
            filled[section] = {**defaults, **(written or {})}
    return filled


def check_text(settings: Any) -> None:
    """Refuse settings of images beside text, and of text beside images.

    Raises:
        ValueError: names the setting.
    """
    if not is_text(settings.data):
        if settings.text is not None:
            raise ValueError(
                f"[text] is about text, but the data are {settings.data!r}; name text:NAME or leave it out"
            )
        return
    for key in IMAGES_ONLY:
        if getattr(settings, key, None) is not None:
            raise ValueError(f"{key} is about images, but the data are {settings.data!r}; leave it out")
    for key in ("label_smoothing", "mixup"):
        if getattr(settings.optimization, key):
            raise ValueError(f"optimization.{key} is about images, but the data are {settings.data!r}; leave it out")
