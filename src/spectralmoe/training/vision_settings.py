"""Settings of a run that trains a timm model: a settings file with a section ``[backbone]``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from spectralmoe.training.settings import Positive, Settings, Several

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
        router: "emoe", or the name of a preset (``spectralmoe list``).
        faithful, rank, tau: of "emoe" alone, see ``spectralmoe.vision.EMoESpec``.
        mode: "soft", or how many experts a token.
        blocks: "all", "lastN", or indices: "1,3" or [1, 3].
        experts, bottleneck: E, and the width H of a branch's adapters.
        tokens: "patches" or "all"; None: what the router's form takes ("all", but for the faithful one).
        start: of branches: "model" starts as the backbone itself, "authors" with random adapters; None: what the
            router's form takes ("model", but for the faithful one).
        init: of "replace_mlp": "copy" starts as the dense model and needs mode = "soft"; "random".
    """

    kind: Literal["branches", "replace_mlp"] = "branches"
    router: str = "emoe"
    faithful: bool = False
    rank: Positive | None = None
    tau: Annotated[float, Field(gt=0)] | None = None
    mode: Literal["soft", "top1", "top2"] = "top1"
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
