"""Settings of a finetuning of a Hugging Face MoE."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from spectralmoe.training.settings.base import Positive, Row, Seed, Settings, Several

__all__ = ["FinetuneSettings"]


class FinetuneSettings(Settings):
    """One finetuning, ``spectralmoe finetune``.

    Attributes:
        router: the routers that are put in, a name or a table, see ``find_preset``; None: the model's own stay.
        terms: regularizers by name with their weights, beside those of the router; one of the same name changes it.
        train: "routers", "experts", both, or "all"; None: "all", with ``lora`` "routers".
        layers: the MoE layers that are trained, "all" or the last N, "last2"; the output of the layers before these is
            computed once.
        lora: rank of adapters on the experts; None: no adapters.
        length: tokens of a window; None: 256, or as many as the model reads.
        domain_bytes: of each domain no more than this many bytes are read; None: all.
        held_out: share of each domain that is not trained on, to score the model.
        steps: stop after so many; None: all of the epochs.
        accumulation: batches of a step.
        lr: of AdamW; it warms up over the share ``warmup`` of all steps and falls by a cosine.
        dtype: precision of the weights; "auto": as they were saved.
        autocast: run the forward in bfloat16.
        checkpoint_every, monitor_every: steps between two checkpoints, and two reports on the routers.

    >>> FinetuneSettings().parts, FinetuneSettings(lora=8).parts, FinetuneSettings(train=["routers"]).parts
    (('all',), ('routers',), ('routers',))
    """

    router: Row | None = None
    terms: dict[str, Any] = Field(default_factory=dict)
    train: Several[Literal["routers", "experts", "all"]] | None = None
    layers: str = "all"
    lora: Positive | None = None
    length: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    domain_bytes: Positive | None = None
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    epochs: Positive = 1
    steps: Positive | None = None
    batch_size: Positive = 8
    accumulation: Positive = 1
    lr: Annotated[float, Field(gt=0)] = 1e-4
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    autocast: bool = False
    checkpoint_every: Positive = 100
    monitor_every: Positive = 10
    seed: Seed = 0

    @model_validator(mode="after")
    def _lora_trains_the_experts(self) -> Self:
        if self.lora is not None and self.train is not None and self.train != ("routers",):
            raise ValueError(
                'with lora the experts are trained by adapters; leave train out, or say train = ["routers"]'
            )
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts whose weights are all trained."""
        return self.train or (("all",) if self.lora is None else ("routers",))
