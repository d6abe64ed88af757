"""What the card runs: sizes of the full and the quick form, and the list of networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rows import ADAPTED, ALL_EXPERTS, ALL_PARAMETERS, MAIN, ROWS

WIDTH, EXPERTS, HIDDEN, SPARE = 64, 8, 32, 40
BATCH = 128


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of one form of the card.

    Attributes:
        epochs: by data set.  train_size: images; None: all.
        depths, seeds: of the main rows.  few_depths, few_seeds: of the others.
        baseline_seeds: of the corrections that write more than one expert a layer, at the few depths.
        trials: one-shot trials a cell.  stream: corrections in a row, on so many seeds.
        tries: settings that each row tries.  tune_depth, tune_size, tune_epochs, rule_trials: where they are tried.
        reference, stream_reference: images of the guard, from the training part; more where costs add up.
    """

    datasets: tuple[str, ...]
    epochs: dict[str, int]
    train_size: int | None
    depths: tuple[int, ...]
    seeds: int
    few_depths: tuple[int, ...]
    few_seeds: int
    baseline_seeds: int
    trials: int
    stream: int
    stream_seeds: int
    tries: int
    tune_depth: int
    tune_size: int
    tune_epochs: int
    rule_trials: int
    reference: int
    stream_reference: int


FULL = Plan(
    datasets=("fashion-mnist", "mnist5k"),
    epochs={"fashion-mnist": 1, "mnist5k": 8},
    train_size=None,
    depths=(2, 4, 8, 16),
    seeds=5,
    few_depths=(2, 8),
    few_seeds=3,
    baseline_seeds=1,
    trials=100,
    stream=100,
    stream_seeds=1,
    tries=6,
    tune_depth=4,
    tune_size=10_000,
    tune_epochs=2,
    rule_trials=40,
    reference=20_000,
    stream_reference=55_000,
)

QUICK = Plan(
    datasets=("mnist5k",),
    epochs={"mnist5k": 4},
    train_size=None,
    depths=(2,),
    seeds=1,
    few_depths=(2,),
    few_seeds=1,
    baseline_seeds=1,
    trials=10,
    stream=10,
    stream_seeds=1,
    tries=1,
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
    baselines = network.depth in plan.few_depths and network.seed < plan.baseline_seeds
    found = ADAPTED.get(network.row, ("",))
    return [way for way in found if baselines or way not in (ALL_EXPERTS, ALL_PARAMETERS)]
