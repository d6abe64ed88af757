"""Settings of a run on samples of several views: the section ``[views]``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from spectralmoe.training.settings.base import Positive, Settings, Several

__all__ = ["Views", "check_views", "is_views"]

IMAGES_ONLY = ("image_size", "hold_out", "backbone", "moe")

Share = Annotated[float, Field(ge=0, lt=1)]


def _different(rates: tuple[float, ...]) -> tuple[float, ...]:
    if not rates or len(set(rates)) < len(rates):
        raise ValueError("one or more different rates")
    return rates


class Views(Settings):
    """Which views are missing, what stands in their place, and what the experts' confidence is taught by.

    Attributes:
        missing: the rate at which a view is missing in training.
        rates: those at which the network is measured, each with a metric of its own.
        placeholder: the values of a missing view: "zeros", its mean; "noise", normal with its mean and deviation;
            "pool", the mean of some training samples' (``PoolImputer``).
        samples: how many training samples "pool" takes.
        keep: from how many tokens a ``SparseCrossImputer`` in each block fills a missing view; 0: there is no imputer.
        confidence: weight of ``confidence_loss``, for layers of ``ConfidentExperts``.
        heads: of each attention.
    """

    missing: Share = 0.5
    rates: Annotated[Several[Share], AfterValidator(_different)] = (0.0, 0.3, 0.5, 0.7)
    placeholder: Literal["zeros", "noise", "pool"] = "pool"
    samples: Positive = 10
    keep: Annotated[int, Field(ge=0, le=3)] = 1
    confidence: Annotated[float, Field(ge=0)] = 1.0
    heads: Positive = 4


def is_views(data: Any) -> bool:
    """Whether data of this name are samples of several views."""
    return isinstance(data, str) and data.startswith("views:")


def check_views(settings: Any) -> None:
    """Refuse settings of images beside views, and of views beside other data.

    Raises:
        ValueError: names the setting.
    """
    if not is_views(settings.data):
        if settings.views is not None:
            raise ValueError(f"[views] is about several views, but the data are {settings.data!r}; name views:digits")
        return
    for key in IMAGES_ONLY:
        if getattr(settings, key, None) is not None:
            raise ValueError(f"{key} is about images, but the data are {settings.data!r}; leave it out")
    for key in ("label_smoothing", "mixup"):
        if getattr(settings.optimization, key):
            raise ValueError(f"optimization.{key} is about images, but the data are {settings.data!r}; leave it out")
