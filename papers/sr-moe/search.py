"""Configurations of SR-MoE that differ in kind, each a row of search.json, measured on validation data alone.

``python papers/sr-moe/search.py [--seeds N] [--depth N] [--processes N]``; rows that are there are skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import BATCH, EXPERTS, HIDDEN, WIDTH, Progress, geometry, summary
from rows import BALANCE_RATE, NORM, RANK

from spectralmoe import Balanced, LinearScorer, PrototypeScorer, Router, Soft, SoftBalanced, Term, TopK
from spectralmoe.adaptation import Rule, one_shot_trials
from spectralmoe.data.image_data import ImageData, load_data
from spectralmoe.diagnostics import evaluate
from spectralmoe.experiments.grid import CellJob, run_cells
from spectralmoe.json_files import read_json, write_json
from spectralmoe.models import SRMoE, sr_moe
from spectralmoe.regularizers import load_balance, spectral_norm, stable_rank
from spectralmoe.training.loop import train
from spectralmoe.training.settings import Optimization
from spectralmoe.training.tasks import ImageTask

MATRIX = {"spectral_norm": NORM, "stable_rank": RANK}
SHOWN = ("name", "seed", "validation_accuracy", "interference_mean", "min_load_share", "success")
TRIALS = 60
EPOCHS = 2
ALL = Rule(layers="all", lr=1e-3, max_steps=200)


@dataclass(frozen=True, slots=True)
class Config:
    """One configuration.

    Attributes:
        kind: what it varies.
        gate: "linear" or "prototype".  k: experts a token; None is soft.  bias: balanced by a load bias.
        tau, scale: temperature, and the prototypes' initial norm.
        terms: penalty terms.  network: other arguments of ``sr_moe``.
        prepare: called on the network and the data before training.
        rule: how samples are corrected.
    """

    kind: str
    gate: str = "prototype"
    k: int | None = None
    bias: bool = True
    tau: float = 0.25
    scale: float = 1.0
    terms: Mapping[str, Term] = field(default_factory=lambda: MATRIX)
    network: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[SRMoE, ImageData], None] | None = None
    rule: Rule = ALL

    def router(self, dim: int, experts: int) -> Router:
        """(D, E) -> the router."""
        scorer = LinearScorer(dim, experts) if self.gate == "linear" else self.prototypes(dim, experts)
        if self.bias:
            return Router(scorer, SoftBalanced(rate=BALANCE_RATE) if self.k is None else self.balanced(self.k))
        return Router(scorer, Soft() if self.k is None else TopK(self.k))

    def balanced(self, k: int) -> Balanced:
        """Selection bias for sparse routing."""
        return Balanced(k, score="softmax", normalize=False, rate=BALANCE_RATE)

    def prototypes(self, dim: int, experts: int) -> PrototypeScorer:
        """At the wanted initial norm."""
        scorer = PrototypeScorer(dim, experts, temperature=self.tau, scale=dim**-0.5)
        scorer.prototypes.data *= self.scale
        return scorer


def gates(norm: float, rank: float) -> dict[str, Term]:
    """The terms on the batch's gate matrix."""
    return {
        "spectral_norm": Term(partial(spectral_norm, form="square", matrix="gates"), norm, reduce="sum"),
        "stable_rank": Term(partial(stable_rank, matrix="gates"), rank, reduce="sum"),
    }


def forms(norm: str, rank: str, weight: float) -> dict[str, Term]:
    """Other forms of the terms on the prototypes."""
    return {
        "spectral_norm": Term(partial(spectral_norm, form=norm), weight, reduce="sum"),  # type: ignore[arg-type]
        "stable_rank": Term(partial(stable_rank, form=rank), weight, reduce="sum"),  # type: ignore[arg-type]
    }


@torch.no_grad()
def from_data(model: SRMoE, data: ImageData) -> None:
    """Start every layer's prototypes at tokens of the training data, farthest first."""
    z = model.stem(data.train.images[:1000])
    model.eval()
    for stage in model.stages:
        tokens = stage.processor(z)
        scorer = stage.moe.router.scorer
        chosen = [tokens.norm(dim=1).argmax()]
        while len(chosen) < EXPERTS:
            chosen.append(torch.cdist(tokens, tokens[torch.stack(chosen)]).amin(1).argmax())
        scorer.prototypes.copy_(torch.nn.functional.normalize(tokens[torch.stack(chosen)], dim=1))
        z = stage(z)
    model.train()


LINEAR = Config("reference", gate="linear", bias=False, terms={})

CONFIGS: dict[str, Config] = {
    "linear": LINEAR,
    "linear top-2": Config("reference", gate="linear", bias=False, terms={}, k=2),
    "linear top-1": Config("reference", gate="linear", bias=False, terms={}, k=1),
    "base": Config("base"),
    "tau 0.125": Config("temperature", tau=0.125),
    "tau 0.5": Config("temperature", tau=0.5),
    "prototypes start at norm 3": Config("initial scale", scale=3.0),
    "prototypes start at data": Config("initialisation from data", prepare=from_data),
    "no residual": Config("residual path", network={"residual": False}),
    "uncentred": Config("centring", network={"centred": False}),
    "top-2": Config("k", k=2),
    "top-1": Config("k", k=1),
    "top-1, gates terms": Config("k", k=1, bias=False, terms=gates(0.15, 0.05)),
    "top-2, tau 0.5": Config("k", k=2, tau=0.5),
    "top-2, tau 1": Config("k", k=2, tau=1.0),
    "top-2, tau 2": Config("k", k=2, tau=2.0),
    "top-2, tau 1, no terms": Config("k", k=2, tau=1.0, terms={}),
    "top-2, from data": Config("k", k=2, prepare=from_data),
    "top-2, tau 0.5, from data": Config("k", k=2, tau=0.5, prepare=from_data),
    "top-2, tau 0.5, weak gates terms": Config("k", k=2, tau=0.5, bias=False, terms=gates(0.05, 0.02)),
    "top-2, gates terms": Config("k", k=2, bias=False, terms=gates(0.15, 0.05)),
    "terms on gates": Config("matrix", bias=False, terms=gates(0.15, 0.05)),
    "terms on gates, weak": Config("matrix", bias=False, terms=gates(0.1, 0.03)),
    "terms on gates, bias": Config("matrix", terms=gates(0.1, 0.03)),
    "two-sided, inverse": Config("form", terms=forms("two-sided", "inverse", 0.1)),
    "weak terms": Config("strength", terms=forms("hinge", "deficit", 0.01)),
    "no bias": Config("balance", bias=False),
    "load_balance instead of bias": Config(
        "balance", bias=False, terms={**MATRIX, "load": Term(load_balance, 0.1, reduce="sum")}
    ),
    "last layer": Config("update rule", rule=Rule(layers="last", lr=1e-2, max_steps=200)),
    "margin steps": Config("update rule", rule=Rule(layers="all", lr=1e-3, max_steps=50, method="margin")),
}


def run_config(name: str, depth: int, seed: int, progress: Progress) -> dict[str, Any]:
    """Train one configuration and correct validation samples."""
    torch.set_num_threads(1)
    config, data = CONFIGS[name], load_data("fashion-mnist")
    torch.manual_seed(seed)
    options: dict[str, Any] = {"width": WIDTH, "depth": depth, "num_experts": EXPERTS, "hidden": HIDDEN}
    model = sr_moe(10, router=config.router, mean=[0.286], std=[0.353], **options, **config.network)
    if config.prepare is not None:
        config.prepare(model, data)
    budget = Optimization(epochs=EPOCHS, batch_size=BATCH, lr=2e-3, weight_decay=0.0, seed=seed)
    train(model, ImageTask(data), budget, terms=config.terms)
    model.eval()
    part = data.validation
    trials = one_shot_trials(model, part.images, part.labels, trials=TRIALS, rule=config.rule, seed=seed)
    about = {"kind": config.kind, "validation_accuracy": evaluate(model, part.images, part.labels).accuracy}
    return {**about, **geometry(model, data), **summary(trials)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--only", default=";".join(CONFIGS), help="names, separated by semicolons")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "search.json")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    rows = read_json(options.out) if options.out.exists() else []
    done = {(row["name"], row["depth"], row["seed"]) for row in rows}
    wanted = [(name, options.depth, seed) for seed in range(options.seeds) for name in options.only.split(";")]
    jobs = [
        CellJob(f"{index}", dict(zip(("name", "depth", "seed"), one, strict=True)), str(one), run_config, one)
        for index, one in enumerate(wanted)
        if one not in done
    ]
    with TemporaryDirectory() as folder:
        for _, row in run_cells(Path(folder), jobs, options.processes, lambda text, done, detail="": None):
            rows.append(row)
            write_json(options.out, rows)
            print({key: row.get(key) for key in SHOWN}, flush=True)


if __name__ == "__main__":
    main()
