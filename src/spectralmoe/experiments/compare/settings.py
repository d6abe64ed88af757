"""Settings of a comparison, and the grid of cells that they span."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from spectralmoe.errors import UserError
from spectralmoe.naming import file_name, shown
from spectralmoe.presets import find_preset
from spectralmoe.training.names import DEFAULT_ROUTERS
from spectralmoe.training.settings import Network, Optimization, Positive, Seed, Settings, Several
from spectralmoe.training.settings.restoration import Restore, check_restore, with_restore_defaults
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.settings.text import Text, check_text, with_text_defaults
from spectralmoe.training.settings.views import Views, check_views
from spectralmoe.training.settings.vision import Backbone, MoEParts
from spectralmoe.training.tasks import task_of

__all__ = ["GROWS", "Cell", "CompareSettings", "no_repeats"]

GROWS = ("routers", "depths", "seeds")
"""Settings that change no cell that is there: a comparison may grow by them."""


class Cell(NamedTuple):
    """One network of a comparison: trained once, measured, then adapted."""

    router: str
    depth: int
    seed: int

    @property
    def name(self) -> str:
        """A folder name."""
        return f"{file_name(self.router)}-depth{self.depth}-seed{self.seed}"


def _text(row: object) -> object:
    return shown(row) if isinstance(row, dict) else row


class CompareSettings(Settings):
    """What is compared, on which data, under which budget. Every row gets the same.

    Attributes:
        data: name of a data set, ``folder:PATH``, or ``KIND:NAME`` of another task.
        routers: names of presets, tables (kept as text), or ``pkg:object`` of your own; see ``find_preset``.
        depths: numbers of MoE stages, or of a language model's blocks; of a timm model, its last N blocks get experts.
        seeds: how many seeds, counted from ``seed``.
        image_size: side that the images of a folder are resized to when they are read; None: see ``load_data``.
        train_size: training samples; None: all.
        trials: one-shot adaptation trials a cell (all misclassified test samples where there are fewer).
        tune: settings tried for each row and depth, on the validation part; 0: the presets as they are.
        text: how text is cut and read; with data text:NAME, which have defaults of their own in other sections, too.
        restore: how photographs are cut and degraded; with data restore:NAME, which have defaults of their own, too.
        views: which views of a sample are missing; with data views:NAME.
        network: sizes of an SR-MoE network or a language model, and experts a layer and a token of any.
        backbone: a timm model in its place.
        moe: the form of its MoE parts; router, blocks and numbers of experts are those of the row and of ``network``.
    """

    data: str = "mnist5k"
    routers: Several[Annotated[str, BeforeValidator(_text)]] = DEFAULT_ROUTERS
    depths: Several[Positive] = (2, 4)
    seeds: Positive = 5
    seed: Seed = 0
    image_size: Positive | None = None
    train_size: Positive | None = None
    trials: Positive = 50
    tune: Annotated[int, Field(ge=0)] = 0
    text: Text | None = None
    restore: Restore | None = None
    views: Views | None = None
    network: Network = Network()
    backbone: Backbone | None = None
    moe: MoEParts | None = None
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
    def _one_kind(self) -> Self:
        check_text(self)
        check_restore(self)
        check_views(self)
        return self

    @model_serializer(mode="wrap")
    def _without_others(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the settings for other kinds of data."""
        others = ("text", "restore", "views")
        return {key: value for key, value in handler(self).items() if key not in others or value is not None}

    def check(self) -> None:
        """Check the settings before anything runs, so that no error appears after hours.

        Raises:
            UserError: an unknown or repeated router, or one whose parts do not fit this network; more experts a token
                than there are.
        """
        no_repeats("--routers", self.routers)
        no_repeats("--depths", self.depths)
        k, experts = self.network.k, self.network.num_experts
        if k != "soft" and k > experts:
            raise UserError(f"--k {k} is no number of experts a token from 1 to {experts} (--experts)")
        for name in self.routers:
            preset = find_preset(name)
            if self.backbone is None:  # else the widths are those of the timm model
                sizes, fewest = (self.network.width, experts, self.network.hidden), min(self.depths)
                trial = task_of(self.data).trial(self.run_of(Cell(name, fewest, self.seed)))
                preset.check(name, *sizes, k=k, spare=self.network.spare, trial=trial, depth=fewest)

    def run_of(self, cell: Cell, lr: float = 1.0) -> TrainSettings:
        """The training run of one cell.

        Args:
            lr: factor on the learning rate.
        """
        optimization = self.optimization.model_copy(update={"seed": cell.seed, "lr": self.optimization.lr * lr})
        values: dict[str, Any] = {"data": self.data, "image_size": self.image_size, "train_size": self.train_size}
        values |= {"optimization": optimization, "text": self.text, "restore": self.restore, "views": self.views}
        if self.backbone is None:
            return TrainSettings(**values, router=cell.router, depth=cell.depth, network=self.network)
        form = self.moe or MoEParts(kind="replace_mlp", init="random", bottleneck=self.network.hidden)
        of_row = {"router": cell.router, "blocks": f"last{cell.depth}"}
        sizes = {"experts": self.network.num_experts, "k": self.network.k}
        return TrainSettings(**values, backbone=self.backbone, moe=form.model_copy(update=of_row | sizes))

    def cells(self) -> list[Cell]:
        """All cells, seed by seed, so that a stopped run has about as many of each row."""
        return [
            Cell(router, depth, seed)
            for seed in range(self.seed, self.seed + self.seeds)
            for depth in self.depths
            for router in self.routers
        ]


def no_repeats(option: str, values: Sequence[object]) -> None:
    """Refuse an option that names nothing, or something twice."""
    if not values:
        raise UserError(f"{option} names nothing to compare")
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{option} names {value} twice")
