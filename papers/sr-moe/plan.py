"""What the card runs: sizes of the full, the quick and the checking form, and the list of networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rows import ALL_EXPERTS, ALL_PARAMETERS, DECIDING, GUARD, STREAM

WIDTH, EXPERTS, HIDDEN, SPARE = 64, 8, 32, 40
BATCH = 128


class Part(NamedTuple):
    """Rows of one data set that are measured alike.

    Attributes:
        ways: how each network is corrected: suffixes of its row's name; "" is gradient steps on one expert a layer.
    """

    dataset: str
    rows: tuple[str, ...]
    depths: tuple[int, ...]
    seeds: int
    ways: tuple[str, ...] = ("",)


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of one form of the card.

    Attributes:
        parts: what is measured, in this order: what decides comes first.
        epochs: by data set.  train_size: images; None: all.
        trials, guard_trials: one-shot trials a cell, and a cell with a guard, where each takes longer.
        stream: corrections in a row.
        tries: settings that each row tries.  tune_on, tune_depth, tune_size, tune_epochs, rule_trials: where.
        reference, stream_reference: images of the guard, from the training part; more where costs add up.
    """

    parts: tuple[Part, ...]
    epochs: dict[str, int]
    train_size: int | None
    trials: int
    guard_trials: int
    stream: int
    tries: int
    tune_on: str
    tune_depth: int
    tune_size: int
    tune_epochs: int
    rule_trials: int
    reference: int
    stream_reference: int

    @property
    def rows(self) -> list[str]:
        """All rows, each once."""
        return list(dict.fromkeys(row for part in self.parts for row in part.rows))

    def ways(self, row: str) -> list[str]:
        """All ways in which networks of ``row`` are corrected."""
        return list(dict.fromkeys(way for part in self.parts if row in part.rows for way in part.ways))


DEPTHS, FEW, OTHERS = (2, 4, 8, 16), (2, 8), (4, 16)
ONE_TERM = ("SR-MoE spectral_norm", "SR-MoE stable_rank")
MORE = ("linear+spectral", "prototype", *ONE_TERM)
WIDER = (ALL_EXPERTS, ALL_PARAMETERS)

FULL = Plan(
    parts=(
        Part("mnist5k", DECIDING, FEW, 10),
        Part("mnist5k", ("SR-MoE",), FEW, 5, (GUARD,)),
        Part("fashion-mnist", DECIDING, FEW, 5),
        Part("mnist5k", ("linear soft", "linear top-1"), FEW, 5),
        Part("mnist5k", DECIDING, OTHERS, 10),
        Part("fashion-mnist", ("SR-MoE",), FEW, 5, (GUARD,)),
        Part("mnist5k", ("SR-MoE",), FEW, 1, (STREAM,)),
        Part("fashion-mnist", ("SR-MoE",), FEW, 1, (STREAM,)),
        Part("mnist5k", ("SR-MoE",), OTHERS, 5, (GUARD,)),
        Part("mnist5k", ("linear+load_balance",), DEPTHS, 5),
        Part("fashion-mnist", ("linear+load_balance",), FEW, 5),
        Part("fashion-mnist", ("linear", "linear+load_balance", "SR-MoE"), OTHERS, 5),
        Part("fashion-mnist", ("SR-MoE",), OTHERS, 5, (GUARD,)),
        *(Part(data, ("SR-MoE",), OTHERS, 1, (STREAM,)) for data in ("mnist5k", "fashion-mnist")),
        *(Part(data, MORE, FEW, 3) for data in ("mnist5k", "fashion-mnist")),
        *(Part(data, ("linear", "SR-MoE"), FEW, 1, WIDER) for data in ("mnist5k", "fashion-mnist")),
    ),
    epochs={"fashion-mnist": 1, "mnist5k": 8},
    train_size=None,
    trials=100,
    guard_trials=50,
    stream=100,
    tries=6,
    tune_on="fashion-mnist",
    tune_depth=4,
    tune_size=10_000,
    tune_epochs=2,
    rule_trials=40,
    reference=20_000,
    stream_reference=55_000,
)

CHECKED = Part("mnist5k", ("linear", "SR-MoE"), (2,), 10)
"""What ``--check`` runs again."""

QUICK = Plan(
    parts=(
        Part("mnist5k", (*DECIDING, "linear soft", "linear top-1", "linear+load_balance", *MORE), (2,), 1),
        Part("mnist5k", ("SR-MoE",), (2,), 1, (GUARD, STREAM)),
        Part("mnist5k", ("linear", "SR-MoE"), (2,), 1, WIDER),
    ),
    epochs={"mnist5k": 4},
    train_size=None,
    trials=10,
    guard_trials=10,
    stream=10,
    tries=1,
    tune_on="mnist5k",
    tune_depth=2,
    tune_size=2_000,
    tune_epochs=4,
    rule_trials=10,
    reference=2_500,
    stream_reference=2_500,
)


class Network(NamedTuple):
    """One trained network; several cells correct it in different ways."""

    row: str
    dataset: str
    depth: int
    seed: int

    @property
    def name(self) -> str:
        """A folder name."""
        return f"{self.row.replace(' ', '_')}-{self.dataset}-depth{self.depth}-seed{self.seed}"


def networks(part: Part) -> list[Network]:
    """The networks of a part, seed by seed, so that a stopped run holds every row alike."""
    return [
        Network(row, part.dataset, depth, seed)
        for seed in range(part.seeds)
        for depth in part.depths
        for row in part.rows
    ]
