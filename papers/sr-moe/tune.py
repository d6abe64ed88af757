"""Tuning, once a row, with the same number of tries for each, on validation data alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from measure import MAX_STEPS, Progress, Sizes, fit, summary
from rows import ALL_EXPERTS, ALL_PARAMETERS

from spectralmoe.adaptation import Rule, one_shot_trials
from spectralmoe.data.image_data import load_data
from spectralmoe.experiments.cards import Desk, try_settings
from spectralmoe.experiments.compare.tuning import candidates
from spectralmoe.models import SRMoE

BASE_LR = 2e-3
RULE_LRS = {
    "one-expert": (1e-3, 2e-3, 4e-3, 8e-3),
    "all-experts": (5e-4, 1e-3, 2e-3, 4e-3),
    "all-parameters": (5e-6, 2e-5, 1e-4, 5e-4),
}
LEAST_SUCCESS = 0.95
HAIR = 0.02


def tune_row(
    row: str, desk: Desk, progress: Progress, *, sizes: Sizes, ways: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    """The setting of ``row`` with the best validation accuracy, then the step size of each of its ways to correct.

    The first try is the row as written; the others scale learning rate and terms by the same draws for every row. The
    step size is that of ``choose`` on misclassified validation samples.

    Args:
        ways: row -> how its networks are corrected besides by steps on one expert a layer.
    """
    torch.set_num_threads(1)
    data = load_data(sizes.tune_on).subset(sizes.tune_size)
    settings = [{"lr": BASE_LR * one.lr, "strength": one.strength} for one in candidates(sizes.tries)]

    def train(setting: Mapping[str, Any]) -> tuple[float, SRMoE]:
        model, accuracy, _ = fit(row, data, sizes.tune_depth, 0, sizes.tune_epochs, dict(setting))
        return accuracy, model

    tried = try_settings(settings, train, progress)
    found = {}
    for way in ("", *ways[row]):
        scope = {"": "one-expert", ALL_EXPERTS: "all-experts", ALL_PARAMETERS: "all-parameters"}[way]
        rules = []
        for lr in RULE_LRS[scope]:
            rule = Rule(layers="all", lr=lr, max_steps=MAX_STEPS, scope=scope)  # type: ignore[arg-type]
            part = data.validation
            trials = one_shot_trials(tried.made, part.images, part.labels, trials=sizes.rule_trials, rule=rule)
            rules.append({"lr": lr, **{key: summary(trials)[key] for key in ("success", "interference_mean", "steps")}})
        found[row + way] = {
            "setting": tried.setting,
            "tries": tried.tries,
            "rules": rules,
            "rule_lr": choose(rules)["lr"],
        }
    return found


def choose(rules: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the rules that succeed often enough the fastest within a hair of the gentlest; else the most successful."""
    enough = [rule for rule in rules if rule["success"] >= LEAST_SUCCESS]
    if not enough:
        return max(rules, key=lambda rule: rule["success"])
    gentlest = max(rule["interference_mean"] for rule in enough)
    return max((rule for rule in enough if rule["interference_mean"] >= gentlest - HAIR), key=lambda rule: rule["lr"])
