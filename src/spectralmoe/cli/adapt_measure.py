"""``spectralmoe adapt --trials`` and ``--new-class``: what corrections cost and how far they carry, nothing written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import typer

from spectralmoe.adaptation import Carried, Shots, Trial, add_class, one_shot_trials
from spectralmoe.adaptation.receipt_text import carried_lines
from spectralmoe.cli.adapt_setup import Task, Wishes, find_label, prepare
from spectralmoe.cli.console import print_json, print_table, show_progress
from spectralmoe.diagnostics import evaluate
from spectralmoe.errors import UserError

__all__ = ["carried_means", "mean", "measure_new_class", "measure_trials"]


def measure_trials(wishes: Wishes, trials: int) -> None:
    """Correct ``trials`` test samples that the model gets wrong, one at a time, and print what that cost.

    Raises:
        UserError: the model makes no mistake on the test part.
    """
    with show_progress(quiet=wishes.json) as progress:
        progress("reading model and data", 0.0)
        task = prepare(wishes)
        test = task.data(wishes.data).test
        before = evaluate(task.network, test.images, test.labels).accuracy
        found = one_shot_trials(
            task.network,
            test.images,
            test.labels,
            trials=trials,
            rule=task.rule,
            guard=task.guard,
            seed=wishes.seed,
            progress=lambda share: progress("correcting one at a time", share),
        )
    if not found:
        raise UserError("the model makes no mistake on the test part: there is nothing to correct")
    result = _trial_summary(found, before)
    if wishes.json:
        print_json({**result, "settings": task.settings, "trial_list": [asdict(trial) for trial in found]})
        return
    typer.echo(task.said)
    typer.echo(
        f"{len(found)} test samples corrected one at a time, {result['success']:.0%} with success, "
        f"{result['seconds']:.2f} s each"
    )
    typer.echo(
        f"accuracy on all others: {result['interference']:+.3f} points on average, "
        f"{result['interference_worst']:+.2f} at worst (before: {before:.2f}%)"
    )
    for line in carried_lines(
        result["carried_before"], result["carried_after"], "copies of the corrected samples that are right"
    ):
        typer.echo(line)


def _trial_summary(found: Sequence[Trial], before: float) -> dict[str, Any]:
    return {
        "trials": len(found),
        "success": mean([float(trial.success) for trial in found]),
        "accuracy_before": before,
        "interference": mean([trial.interference for trial in found]),
        "interference_worst": min(trial.interference for trial in found),
        "seconds": mean([trial.seconds for trial in found]),
        "carried_before": carried_means([trial.before for trial in found]),
        "carried_after": carried_means([trial.after for trial in found]),
    }


def mean(values: Sequence[float]) -> float:
    """Of at least one number."""
    return sum(values) / len(values)


def carried_means(values: Sequence[Carried]) -> Carried:
    """Mean share of right copies of each kind."""
    return {kind: mean([value[kind] for value in values]) for kind in values[0]}


def measure_new_class(wishes: Wishes, name: str, shots: Sequence[int]) -> None:
    """Teach a class from a few training images of the model's data, and print what that gave on the test part.

    Raises:
        UserError: no such class; fewer training images of it than shots.
    """
    with show_progress(quiet=wishes.json) as progress:
        progress("reading model and data", 0.0)
        task = prepare(wishes, new_class=name)
        label = find_label(name, task.meta, "--new-class")
        rows = _teach(task, label, shots, lambda share: progress("teaching the class", share))
    held_out = task.meta.hold_out == task.meta.classes[label]
    if wishes.json:
        about = {"class": task.meta.classes[label], "held_out": held_out, "settings": task.settings}
        print_json({**about, "shots": [_shots_summary(row) | {"tries": [asdict(t) for t in row]} for row in rows]})
        return
    typer.echo(task.said)
    if not held_out:
        seen = f"the model was trained with class {task.meta.classes[label]!r}, so it is not new to it"
        typer.echo(f"note: {seen}; set hold_out in the TOML file of 'spectralmoe train'")
    headings = ["samples", "success", "right before", "right after", "other classes", "at worst"]
    title = f"class {task.meta.classes[label]!r} of the test part in %; accuracy on all other classes in points"
    print_table(f"{title}; {len(rows[0])} draws each", headings, [_fields(_shots_summary(row)) for row in rows])


def _teach(task: Task, label: int, shots: Sequence[int], progress: Callable[[float], None]) -> list[list[Shots]]:
    data, rows = task.data(task.wishes.data), []
    support = data.train.images[data.train.labels == label]
    if max(shots) > len(support):
        raise UserError(f"--shots {max(shots)}: the training part has only {len(support)} images of this class")
    for done, k in enumerate(shots):
        progress(done / len(shots))
        rows.append(
            add_class(
                task.network,
                support,
                data.test.images,
                data.test.labels,
                label,
                shots=k,
                rule=task.rule,
                guard=task.guard,
                seed=task.wishes.seed,
            )
        )
    return rows


def _shots_summary(tries: Sequence[Shots]) -> dict[str, Any]:
    return {
        "shots": tries[0].shots,
        "success": mean([float(t.success) for t in tries]),
        "accuracy_before": mean([t.before for t in tries]),
        "accuracy_after": mean([t.accuracy for t in tries]),
        "interference": mean([t.interference for t in tries]),
        "interference_worst": min(t.interference for t in tries),
    }


def _fields(summary: dict[str, Any]) -> list[str]:
    return [
        str(summary["shots"]),
        f"{summary['success']:.0%}",
        f"{summary['accuracy_before']:.1f}",
        f"{summary['accuracy_after']:.1f}",
        f"{summary['interference']:+.2f}",
        f"{summary['interference_worst']:+.2f}",
    ]
