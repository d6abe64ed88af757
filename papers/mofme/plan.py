"""What the card runs: experts as modulations, as networks and as one; linear routers, uncertain ones, tempered ones."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from blocks import Recipe, make_place
from gates import fit_temperature, gate_measures, look, tempered
from torch import nn

from spectralmoe.data.degradations import KINDS
from spectralmoe.diagnostics import max_vio
from spectralmoe.diagnostics.evaluation import Counted
from spectralmoe.draw.panels import Panel
from spectralmoe.experiments.cards import (
    Card,
    Cells,
    Desk,
    Section,
    Tuning,
    difference_panels,
    try_settings,
)
from spectralmoe.experiments.cards.small_runs import small_restoration
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.compare.look import active_flops
from spectralmoe.training.loop import train
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks import RestorationTask

RATES = (2.0, 1.0, 4.0)
TEMPERED = ", tempered"
RECIPES: Mapping[str, Recipe] = {
    "networks, 4": Recipe("networks", 4),
    "modulated, 4": Recipe("linear", 4),
    "vectors, 4": Recipe("vector", 4),
    "one network, 4": Recipe("one", 4),
    "uncertain, 4": Recipe("linear", 4, "shrink"),
    "whitened, 4": Recipe("linear", 4, "whiten"),
    "networks, 16": Recipe("networks", 16),
    "modulated, 16": Recipe("linear", 16),
    "one network, 16": Recipe("one", 16),
    "uncertain, 16": Recipe("linear", 16, "shrink"),
}
LINEAR = ("modulated, 4", "modulated, 16")
ROWS = [*RECIPES, *(row + TEMPERED for row in LINEAR)]
PAIRS = (
    *((f"modulated, {e}", f"{other}, {e}") for e in (4, 16) for other in ("networks", "one network")),
    ("vectors, 4", "modulated, 4"),
    *((f"uncertain, {e}", f"modulated, {e}") for e in (4, 16)),
    *((f"uncertain, {e}", f"modulated, {e}{TEMPERED}") for e in (4, 16)),
    ("whitened, 4", "modulated, 4"),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one form of the card: the run, the number of learning rates that each row tries, the number of seeds."""

    run: TrainSettings
    tries: int
    seeds: int


def trained(sizes: Sizes, row: str, rate: float, seed: int, share: Any = None) -> tuple[nn.Module, dict[str, float]]:
    """The network of a recipe, and its PSNR on the validation part; under one seed all else starts alike."""
    torch.set_num_threads(1)
    task = opened(sizes.run.model_dump_json(include={"data", "train_size", "restore"}))
    optimization = sizes.run.optimization.model_copy(update={"seed": seed, "lr": sizes.run.optimization.lr * rate})
    run = sizes.run.model_copy(update={"optimization": optimization})
    network = task.build(run)
    for block in network.blocks:
        block.moe = make_place(RECIPES[row], run.network.width, run.network.k)
    history = train(network, task, run.optimization, progress=share)
    return network.eval(), {"validation_psnr": history.validation}


@cache
def opened(settings: str) -> RestorationTask:
    """The task of a run, read once a process."""
    return RestorationTask.open(TrainSettings.model_validate_json(settings))


def tune(row: str, desk: Desk, progress: Any, *, sizes: Sizes) -> dict[str, Any]:
    """The factor on the learning rate that the validation part prefers."""
    settings = [{"lr": rate} for rate in RATES[: sizes.tries]]
    tried = try_settings(
        settings,
        lambda setting: (trained(sizes, row, setting["lr"], 0)[1]["validation_psnr"], None),
        progress,
        RestorationTask.metrics[0],
    )
    return {row: {**tried.setting, "tries": tried.tries}}


def measure(cell: Mapping[str, Any], desk: Desk, progress: Any, *, sizes: Sizes) -> dict[str, float | None]:
    """One network on the test part; a tempered row is that of a linear router with weights softened afterwards."""
    row, seed, rate = cell["row"].removesuffix(TEMPERED), cell["seed"], desk.tuned["tuning"]
    task = opened(sizes.run.model_dump_json(include={"data", "train_size", "restore"}))
    name = f"{row.replace(', ', '-').replace(' ', '-')}-seed{seed}"
    network, notes = desk.network(name, lambda: trained(sizes, row, rate[row]["lr"], seed, progress))
    place = next(iter(network.blocks)).moe
    values: dict[str, float | None] = {
        **notes,
        "numbers": sum(parameter.numel() for parameter in place.parameters()) / 1e3,
        "mflop": active_flops(network, task.example()) / 1e6,
    }
    torch.manual_seed(seed)
    routed = RECIPES[row].kind != "one"
    if row != cell["row"]:
        network = tempered(network, fit_temperature(look(network, task.parts["validation"]).single))
    counted = Counted(network)
    values |= task.score(counted, "test")
    if routed:
        values["max_vio"] = statistics.fmean(map(max_vio, counted.loads.values()))
        values |= gate_measures(network, task)
    return values


def card(sizes: Sizes) -> Card:
    """One form of the card."""
    tuning = Tuning("tuning", list(RECIPES), partial(tune, sizes=sizes))
    wanted = [{"row": row, "seed": seed} for seed in range(sizes.seeds) for row in ROWS]
    settings = {"run": sizes.run.model_dump(mode="json"), "tries": sizes.tries}
    steps = [tuning, Cells("results", wanted, partial(measure, sizes=sizes))]
    return Card("MoFME", ABOUT, settings, steps, sections, figures)


ABOUT = """
Written by `spectralmoe card papers/mofme`: mean and 95% interval over seeds; the test part chose nothing. Numbers: of
the block's MoE place, in thousands. MFLOP: of the whole network on one patch, by its active experts. PSNR in dB, mean
over kinds, and of each. Kind: images whose degradation is what the gate says, by what each expert got of the validation
part; ECE: expected calibration error of that; with passes: both with 20 passes with dropout at test. Spread:
variance of the scores over these passes, and how much larger it is on mixtures than on one degradation. Differences are
paired: the same seed, so the same start of all else and the same order of images, on the same processor; "separated"
where their 95% interval leaves out 0. Single cells are not stable across processors, means over seeds are.
"""

PSNR = Column("psnr", "PSNR", 2, "mean over kinds", better="higher", unit="dB")
OF_KINDS = tuple(Column(f"psnr_{kind}", kind, 2, f"PSNR of {kind}", better="higher", unit="dB") for kind in KINDS)
COST = (
    Column("numbers", "numbers k", 1, "parameters of the place", better="lower"),
    Column("mflop", "MFLOP", 2, "of one patch", better="lower"),
)
GATE = (
    Column("max_vio", "MaxVio", 2, "largest load over mean load minus 1", better="lower"),
    Column("temperature", "temperature", 2, "under which the kinds of validation images are likeliest"),
    Column("kinds_right", "kind %", 1, "images whose kind the gate says", 100.0, better="higher"),
    Column("ece", "ECE %", 1, "expected calibration error of the kind", 100.0, better="lower"),
    Column("kinds_right_passes", "kind % with passes", 1, "the same with passes with dropout", 100.0, better="higher"),
    Column("ece_passes", "ECE % with passes", 1, "the same with passes with dropout", 100.0, better="lower"),
    Column("spread", "spread", 4, "variance of the scores over passes"),
    Column("spread_ratio", "mixtures / single", 2, "of the spread", better="higher"),
)
COLUMNS = (PSNR, *OF_KINDS, *COST, *GATE)
COMPARED = (PSNR, *OF_KINDS, *GATE[2:6], GATE[-1])


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """A table by row, and the differences."""
    return [Section("## Blocks and routers", stored["results"], COLUMNS, pairs=PAIRS, differences=COMPARED)]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Every row less the one network with the numbers of four modulations."""
    return {"blocks": difference_panels(stored["results"], [PSNR, *OF_KINDS], "one network, 4")}


FULL = card(Sizes(small_restoration(1_000, 4, network={"k": 2}, measured=60), tries=3, seeds=5))
QUICK = card(Sizes(small_restoration(64, 1, network={"k": 2}, measured=8), tries=1, seeds=1))
