"""Settings of one training run: the data, the network, and how it is trained."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from spectralmoe.naming import shown
from spectralmoe.presets import Preset, find_preset
from spectralmoe.training.settings.base import Network, Optimization, Positive, Row, Settings, laid_over
from spectralmoe.training.settings.restoration import Restore, check_restore, with_restore_defaults
from spectralmoe.training.settings.text import Text, check_text, with_text_defaults
from spectralmoe.training.settings.views import Views, check_views
from spectralmoe.training.settings.vision import Backbone, MoEParts

__all__ = ["TrainSettings"]

_IMAGES = ("image_size", "hold_out")
_NO_EXPERTS = Preset("a timm model without experts", {}, dense=True)
_SR_MOE, _TIMM = ("router", "experts", "depth", "network"), ("backbone", "moe")


class TrainSettings(Settings):
    """One training run, ``spectralmoe train --config F.toml``: of a language model on text, of a timm model where there
    is a section ``[backbone]``, else of an SR-MoE network.

    Attributes:
        router, depth, network: of an SR-MoE network or a language model: a name or a table, see ``find_preset``; how
            many MoE stages or blocks; their sizes.
        experts: of an SR-MoE network: the bank by name, or a table with its arguments; None: that of the router, if it
            brings one, or else of the network.
        backbone, moe: a timm model and its MoE parts; without parts it is dense, and others can start from it.
        terms: regularizers by name with their weights, beside those of the router; one of the same name changes it.
        image_size: images are resized to this side; those of a folder when they are read. None: as the data have them.
        text: how text is cut and read; with data text:NAME, which have defaults of their own in other sections, too.
        restore: how photographs are cut and degraded; with data restore:NAME, which have defaults of their own, too.
        views: which views of a sample are missing; with data views:NAME.
        train_size: training samples; None: all.
        hold_out: name of a class that training and validation do not see; the network can be taught it later.

    >>> TrainSettings(data="digits").label, TrainSettings(data="digits", backbone={"name": "vit_small"}).label
    ('sr-moe', 'vit_small')
    """

    data: str
    router: Row = "sr-moe"
    experts: Row | None = None
    terms: dict[str, Any] = Field(default_factory=dict)
    depth: Positive = 2
    backbone: Backbone | None = None
    moe: MoEParts | None = None
    text: Text | None = None
    restore: Restore | None = None
    views: Views | None = None
    image_size: Positive | None = None
    train_size: Positive | None = None
    hold_out: str | None = None
    network: Network = Network()
    optimization: Optimization = Optimization()

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, values: Any) -> Any:
        return with_text_defaults(values)

    @model_validator(mode="before")
    @classmethod
    def _of_restore(cls, values: Any) -> Any:
        return with_restore_defaults(values, cls.model_fields)

    @model_validator(mode="after")
    def _one_network(self) -> Self:
        check_text(self)
        check_restore(self)
        check_views(self)
        if self.backbone is None and self.moe is not None:
            raise ValueError("[moe] are parts of a timm model, but there is no section [backbone]")
        for key in _SR_MOE:
            if self.backbone is not None and key in self.model_fields_set:
                raise ValueError(f"{key} belongs to an SR-MoE network; a timm model has [backbone] and [moe]")
        return self

    @model_serializer(mode="wrap")
    def _without_the_other(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What describes another kind of network is left out."""
        kinds = ("text", "restore", "views")
        absent = {*(_TIMM if self.backbone is None else _SR_MOE), *(key for key in kinds if getattr(self, key) is None)}
        absent |= set(_IMAGES) if any(getattr(self, key) is not None for key in kinds) else set()
        return {key: value for key, value in handler(self).items() if key not in absent}

    @property
    def row(self) -> Row:
        """Router, experts and terms as one row; "none" for a dense backbone."""
        if self.backbone is None:
            return laid_over(self.router, experts=self.experts, terms=self.terms)
        return "none" if self.moe is None else laid_over(self.moe.router, terms=self.terms)

    @property
    def preset(self) -> Preset:
        """The row as it is read; that of a dense backbone has no terms and no optimizer.

        Raises:
            UserError: as ``find_preset``.
        """
        return _NO_EXPERTS if self.backbone is not None and self.moe is None else find_preset(self.row)

    @property
    def num_experts(self) -> int | None:
        """E of each MoE layer; None: the network is dense."""
        if self.moe is not None:
            return self.moe.experts
        preset = self.preset
        return None if preset.dense else preset.sizes(self.network.num_experts, self.network.hidden, self.network.k)[0]

    @property
    def label(self) -> str:
        """What is trained, for people."""
        if self.backbone is None:
            return shown(self.row)
        return self.backbone.name if self.moe is None else f"{self.backbone.name}, {shown(self.row)}"
