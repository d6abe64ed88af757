"""Settings of a run that restores photographs: the section ``[restore]``, and what it has in place of the defaults."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from spectralmoe.data.degradations import KINDS
from spectralmoe.errors import one_of
from spectralmoe.training.settings.base import Positive, Settings, Several

__all__ = ["Restore", "check_restore", "is_restore", "with_restore_defaults"]

DEFAULTS: dict[str, dict[str, Any]] = {
    "network": {"width": 32, "num_experts": 4, "hidden": 64},
    "optimization": {"epochs": 6, "batch_size": 32, "lr": 2e-3},
    "restore": {},
}
VALUES: dict[str, Any] = {"depth": 1, "depths": [1], "train_size": 4_000}
IMAGES_ONLY = ("image_size", "hold_out", "backbone", "moe", "text")


def _kind(name: str) -> str:
    if name not in KINDS:
        raise one_of("degradation", name, KINDS)
    return name


class Restore(Settings):
    """How photographs are cut and degraded, and what the layers of the network route.

    Attributes:
        patch: side of the square patches.
        kinds: degradations of the training part, in equal numbers; the other parts always have all of them.
        measured: how many patches of each kind the validation and the test part are measured on.
        unit: what is routed: every position of the coarse maps, as "pixel" or as a "token", or a whole "sample".
        scale: pixels a side of a position; it divides ``patch``.
        stem: channels of the network beside its coarse maps.
    """

    patch: Annotated[int, Field(ge=16, le=1024)] = 32
    kinds: Annotated[Several[Annotated[str, AfterValidator(_kind)]], Field(min_length=1)] = KINDS
    measured: Positive = 100
    unit: Literal["pixel", "sample", "token"] = "pixel"
    scale: Annotated[int, Field(ge=1, le=8)] = 2
    stem: Positive = 16

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.patch % self.scale:
            raise ValueError(f"a scale that divides the patch of {self.patch}, got {self.scale}")
        return self


def is_restore(data: Any) -> bool:
    """Whether data of this name are photographs to restore."""
    return isinstance(data, str) and data.startswith("restore:")


def with_restore_defaults(values: Any, fields: Collection[str]) -> Any:
    """``values`` laid over the defaults of restoration, as far as there are such ``fields``, if they are about it."""
    if not isinstance(values, Mapping) or not is_restore(values.get("data")):
        return values
    filled = {**{key: value for key, value in VALUES.items() if key in fields}, **values}
    for section, defaults in DEFAULTS.items():
        written = values.get(section)
        if written is None or isinstance(written, Mapping):
            filled[section] = {**defaults, **(written or {})}
    return filled


def check_restore(settings: Any) -> None:
    """Refuse settings of other data beside photographs to restore, and of restoration beside others.

    Raises:
        ValueError: names the setting.
    """
    if not is_restore(settings.data):
        if settings.restore is not None:
            raise ValueError(
                f"[restore] is about photographs, but the data are {settings.data!r}; name restore:photos or leave it "
                "out"
            )
        return
    for key in IMAGES_ONLY:
        if getattr(settings, key, None) is not None:
            raise ValueError(f"{key} is not for restoration, but the data are {settings.data!r}; leave it out")
    for key in ("label_smoothing", "mixup"):
        if getattr(settings.optimization, key):
            raise ValueError(f"optimization.{key} is about classes, but the data are {settings.data!r}; leave it out")
    if settings.network.spare and settings.restore.unit == "sample":
        raise ValueError("network.spare is for experts on vectors, and those on whole samples have no spare units")
