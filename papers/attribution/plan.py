"""What the card runs: models of facts, without the experts that attribution names and without others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

import torch
from facts import (
    EXPERTS,
    Facts,
    Seen,
    Sizes,
    accuracy,
    by_layer,
    log_probs,
    most,
    network,
    one_of_the_used,
    same_choice,
)

from spectralmoe.attribution import attribute_experts, block
from spectralmoe.attribution.blocking import Mode
from spectralmoe.draw.panels import Panel
from spectralmoe.experiments.cards import Card, Cells, Desk, Section, difference_panels
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.evidence import select
from spectralmoe.models import LanguageMoE

MODES: tuple[Mode, ...] = get_args(Mode)
FACT_ROWS = ("whole", "attributed", "random used", "largest weight")
RELATION_ROWS = ("attributed", "equal usage", "most used")
PART_ROWS = ("whole", "routed only", "shared only", "dense twin")
PREDICTORS = ("gain", "usage")
COUNTS = (1, 3, 5)

Measures = dict[str, float | None]
Trial = Callable[[Mapping[str, Any], LanguageMoE, Facts], Measures]


def fact_trial(cell: Mapping[str, Any], model: LanguageMoE, facts: Facts) -> Measures:
    """Each fact without one expert a layer of those that serve it."""
    known, log_p = accuracy(model, facts), log_probs(model, facts.tokens).gather(1, facts.target[:, None])[:, 0]
    if cell["row"] != "whole":
        seen = Seen.of(model, facts)
        chosen = one_of_the_used(cell["row"], seen, torch.Generator().manual_seed(cell["seed"]))
        for choice, places in same_choice(chosen):
            some = Facts(*(values[places] for values in facts))
            experts = {name: [e] for name, e in zip(seen.layers, choice, strict=True)}
            with block(model, experts, mode=cell["mode"]):
                known[places] = accuracy(model, some)
                log_p[places] = log_probs(model, some.tokens).gather(1, some.target[:, None])[:, 0]
    return {"accuracy": known.mean().item(), "log_p": log_p.mean().item()}


def relation_trial(cell: Mapping[str, Any], model: LanguageMoE, facts: Facts) -> Measures:
    """The facts of each relation, and those of the others, without some experts of all layers; mean over relations."""
    draw, sums = torch.Generator().manual_seed(cell["seed"]), torch.zeros(3)
    relations = facts.relation.unique()
    for relation in relations:
        mine = Facts(*(values[facts.relation == relation] for values in facts))
        seen = Seen.of(model, mine)
        experts, usage = most(cell["row"], cell["count"], seen, draw)
        with block(model, by_layer(experts, seen.layers), mode=cell["mode"]):
            known = accuracy(model, facts)
        own = facts.relation == relation
        sums += torch.stack([known[own].mean(), known[~own].mean(), torch.tensor(usage)])
    accuracy_own, others, usage = (sums / len(relations)).tolist()
    return {"accuracy": accuracy_own, "others": others, "usage": usage}


def part_trial(cell: Mapping[str, Any], model: LanguageMoE, facts: Facts) -> Measures:
    """The model, its routed or its shared experts alone, or the dense twin; and what each layer gains."""
    row, layers = cell["row"], [f"blocks.{place}.moe" for place in range(len(model.blocks))]
    if row == "routed only":
        model = copy.deepcopy(model)
        for part in model.blocks:
            part.moe.shared = None
    out = {name: range(EXPERTS) for name in layers} if row == "shared only" else {}
    with block(model, out, mode="zero"):
        known = accuracy(model, facts).mean().item()
        gains = attribute_experts(model, facts.tokens, facts.target, level="layer").of_layers().mean(0)
    return {
        "accuracy": known,
        "efficiency": gains.mean().item(),
        **{f"gain_{place}": gain for place, gain in enumerate(gains.tolist())},
    }


def predictor_trial(cell: Mapping[str, Any], model: LanguageMoE, facts: Facts) -> Measures:
    """Over all experts and relations: how what blocking one costs goes with its gain, or with its use."""
    seen, costs, told = Seen.of(model, facts), [], []
    before = log_probs(model, facts.tokens).gather(1, facts.target[:, None])[:, 0]
    measure = seen.gain if cell["row"] == "gain" else seen.used.float()
    for number in range(len(seen.layers) * EXPERTS):
        with block(model, by_layer([number], seen.layers), mode=cell["mode"]):
            after = log_probs(model, facts.tokens).gather(1, facts.target[:, None])[:, 0]
        for relation in facts.relation.unique():
            own = facts.relation == relation
            costs.append((before - after)[own].mean())
            told.append(measure.flatten(1)[own, number].mean())
    return {"correlation": torch.corrcoef(torch.stack([torch.stack(costs), torch.stack(told)]))[0, 1].item()}


def measure(cell: Mapping[str, Any], desk: Desk, progress: Any, *, sizes: Sizes, trial: Trial) -> Measures:
    """One cell, on the trained model of its seed."""
    kind = "dense" if cell["row"] == "dense twin" else "moe"
    return trial(cell, network(kind, cell["seed"], desk, sizes), Facts.draw(cell["seed"], sizes))


ABOUT = """
Written by `spectralmoe card papers/attribution`: mean and 95% interval over seeds. Facts are learned by heart, so all
of them are measured; they choose nothing but the blocked experts. "mask": routers choose among the others;
"zero": the expert's output counts as 0. Usage: share of a relation's slots that the blocked experts hold. Differences
are paired by seed: the same facts and the same model; "separated" where their 95% interval leaves out 0.
"""
ACCURACY = Column("accuracy", "accuracy %", 1, "facts that are known", 100.0, better="higher")
LOG_P = Column("log_p", "log p", 2, "of the object, in nats", better="higher")
FACT_COLUMNS = (ACCURACY, LOG_P)
RELATION_COLUMNS = (
    ACCURACY,
    Column("others", "others %", 1, "facts of the other relations that are known", 100.0, better="higher"),
    Column("usage", "usage %", 1, "of the relation's slots", 100.0),
)
PART_COLUMNS = (
    ACCURACY,
    Column("efficiency", "gain a layer", 2, "nats that a layer adds to log p of the object, mean"),
    Column("gain_0", "first layer", 2, "its gain"),
    Column("gain_1", "second layer", 2, "its gain"),
)
CORRELATION = (Column("correlation", "correlation", 2, "with what blocking an expert costs", better="higher"),)
FACT_PAIRS = [("attributed", "random used"), ("attributed", "largest weight"), ("attributed", "whole")]
RELATION_PAIRS = [("attributed", "equal usage"), ("attributed", "most used")]
PART_PAIRS = [("routed only", "whole"), ("shared only", "whole"), ("dense twin", "whole")]


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """One fact and one expert a layer; a relation and several experts; parts of the model; what gains predict."""
    made = []
    for mode in MODES:
        cells = select(stored["facts"], mode=mode)
        made.append(Section(f"## One expert a layer, {mode}", cells, FACT_COLUMNS, pairs=FACT_PAIRS))
    for mode in MODES:
        for count in COUNTS:
            cells = select(stored["relations"], mode=mode, count=count)
            title = f"## {count} of {2 * EXPERTS} experts, {mode}"
            made.append(Section(title, cells, RELATION_COLUMNS, pairs=RELATION_PAIRS))
    made.append(Section("## Parts", stored["parts"], PART_COLUMNS, pairs=PART_PAIRS))
    for mode in MODES:
        cells = select(stored["predictors"], mode=mode)
        made.append(Section(f"## What predicts the cost of blocking, {mode}", cells, CORRELATION, pairs=[PREDICTORS]))
    return made


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Each choice less the random one, where one expert a layer is blocked."""
    panels: list[Panel] = []
    for mode in MODES:
        cells = [cell for cell in select(stored["facts"], mode=mode) if cell["row"] != "whole"]
        column = Column("accuracy", f"accuracy %, {mode}", 1, ACCURACY.meaning, 100.0, better="higher")
        panels += difference_panels(cells, [column], "random used")
    return {"blocked": panels}


def card(sizes: Sizes) -> Card:
    """One form of the card."""
    seeds = range(sizes.seeds)
    wanted: dict[str, tuple[Trial, list[dict[str, Any]]]] = {
        "facts": (fact_trial, [{"row": r, "mode": m, "seed": s} for s in seeds for m in MODES for r in FACT_ROWS]),
        "relations": (
            relation_trial,
            [
                {"row": row, "count": count, "mode": mode, "seed": seed}
                for seed in seeds
                for mode in MODES
                for count in COUNTS
                for row in RELATION_ROWS
            ],
        ),
        "parts": (part_trial, [{"row": row, "seed": seed} for seed in seeds for row in PART_ROWS]),
        "predictors": (
            predictor_trial,
            [{"row": row, "mode": mode, "seed": seed} for seed in seeds for mode in MODES for row in PREDICTORS],
        ),
    }
    steps = [Cells(file, cells, partial(measure, sizes=sizes, trial=trial)) for file, (trial, cells) in wanted.items()]
    settings = {key: value for key, value in asdict(sizes).items() if key != "seeds"}
    return Card("Knowledge attribution", ABOUT, settings, steps, sections, figures)


FULL = card(Sizes())
QUICK = card(Sizes(subjects=20, objects=10, steps=40, batch=64, seeds=1))
