"""Settings of a run that trains a timm model: a settings file with a section ``[backbone]``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from spectralmoe.training.settings.base import Positive, Row, Settings, Several

__all__ = ["Backbone", "MoEParts"]


class Backbone(Settings):
    """A timm model.

    Attributes:
        name: of the model; ``arguments`` go to it.
        pretrained: with timm's weights, where they can be had.
        checkpoint: weights to start from instead: a ``.safetensors`` or ``.pth`` file with timm's names, or the folder
            of a ``VisionMoE`` that was trained here. A classifier of another size stays fresh.
        frozen: train the MoE parts and the head alone.
        gradient_checkpointing: less memory, a second forward.
    """

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    pretrained: bool = False
    checkpoint: str | None = None
    frozen: bool = False
    gradient_checkpointing: bool = False


class MoEParts(Settings):
    """The MoE parts that a backbone gets.

    Attributes:
        kind: "branches" behind the blocks, or "replace_mlp": experts in place of their MLPs.
        router: the name of a preset (``spectralmoe list``), or a table, see ``find_preset``.
        k: how many experts a token, or "soft".
        blocks: "all", "lastN", or indices: "1,3" or [1, 3].
        experts, bottleneck: E, and the width H of a branch's adapters.
        tokens: "patches" or "all"; None: as the router has it, "all" but for "emoe-faithful".
        start: of branches: "model" starts as the backbone itself, "authors" with random adapters; None: as the router
            has it, "model" but for "emoe-faithful".
        init: of "replace_mlp": "copy" starts as the dense model, and needs weights that sum to 1 (k = "soft", or a
            router with normalize = true and k from 2); "random".
    """

    kind: Literal["branches", "replace_mlp"] = "branches"
    router: Row = "emoe"
    k: Positive | Literal["soft"] = 1
    blocks: str | Several[int] = "last6"
    experts: Positive = 8
    bottleneck: Positive = 192
    tokens: Literal["patches", "all"] | None = None
    start: Literal["model", "authors"] | None = None
    init: Literal["copy", "random"] = "copy"

    @field_validator("blocks", mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        listed = isinstance(value, list | tuple) and all(type(index) is int for index in value)
        if not isinstance(value, str) and not listed:
            raise ValueError('"all", "last6", "1,3" or a list of indices')
        return value
