"""What the card runs: sizes of the full and the quick form, and the list of networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rows import ADAPTED, ALL_EXPERTS, ALL_PARAMETERS, GUARD, MAIN, ROWS

WIDTH, EXPERTS, HIDDEN, SPARE = 64, 8, 32, 40
BATCH = 128


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of one form of the card.

    Attributes:
        epochs: by data set.  train_size: images; None: all.
        depths, seeds: of the main rows.  few_depths, few_seeds: of the others.
        trials: one-shot trials a cell.  stream: corrections in a row, on so many seeds.
        tries: settings that each row tries.  tune_depth, tune_size, rule_trials: where they are tried.
        reference: images of the guard, from the training part.
    """

    datasets: tuple[str, ...]
    epochs: dict[str, int]
    train_size: int | None
    depths: tuple[int, ...]
    seeds: int
    few_depths: tuple[int, ...]
    few_seeds: int
    trials: int
    stream: int
    stream_seeds: int
    tries: int
    tune_depth: int
    tune_size: int
    rule_trials: int
    reference: int


FULL = Plan(
    datasets=("fashion-mnist", "mnist5k"),
    epochs={"fashion-mnist": 2, "mnist5k": 10},
    train_size=None,
    depths=(2, 4, 8, 16),
    seeds=5,
    few_depths=(2, 8),
    few_seeds=3,
    trials=100,
    stream=100,
    stream_seeds=1,
    tries=6,
    tune_depth=4,
    tune_size=10_000,
    rule_trials=40,
    reference=20_000,
)

QUICK = Plan(
    datasets=("mnist5k",),
    epochs={"mnist5k": 4},
    train_size=None,
    depths=(2,),
    seeds=1,
    few_depths=(2,),
    few_seeds=1,
    trials=10,
    stream=10,
    stream_seeds=1,
    tries=1,
    tune_depth=2,
    tune_size=2_000,
    rule_trials=10,
    reference=2_500,
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


def networks(plan: Plan) -> list[Network]:
    """All networks, seed by seed, so that a stopped run holds every row alike."""
    found = []
    for dataset in plan.datasets:
        for seed in range(plan.seeds):
            for depth in plan.depths:
                for row in ROWS:
                    few = depth in plan.few_depths and seed < plan.few_seeds
                    if row in MAIN or few:
                        found.append(Network(row, dataset, depth, seed))
    return found


def ways(network: Network, plan: Plan) -> list[str]:
    """How this network is corrected: suffixes of its row's name."""
    few = network.depth in plan.few_depths and network.seed < plan.few_seeds
    found = ADAPTED.get(network.row, ("",))
    return [way for way in found if way in ("", GUARD) or (few and way in (ALL_EXPERTS, ALL_PARAMETERS))]
