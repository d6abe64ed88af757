"""``spectralmoe adapt trials``: what corrections cost and how far they carry, one at a time, nothing written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralmoe.cli.adapt.options import AdaptOptions
from spectralmoe.cli.console import print_json, show_progress
from spectralmoe.errors import UserError

if TYPE_CHECKING:
    from spectralmoe.adaptation import Carried, Trial

__all__ = ["NOTHING_WRONG", "carried_means", "trials"]

NOTHING_WRONG = "the model makes no mistake on the test part: there is nothing to correct"


def trials(
    options: AdaptOptions,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="How many corrections.")] = 50,
) -> None:
    """Correct N test samples that MODEL gets wrong, one at a time, and print what that cost.

    Example: spectralmoe adapt trials MODEL --count 50 --guard mnist5k
    """
    from spectralmoe.adaptation import one_shot_trials
    from spectralmoe.adaptation.receipt.text import carried_lines
    from spectralmoe.cli.adapt.setup import prepare
    from spectralmoe.diagnostics import evaluate

    with show_progress(quiet=options.json) as progress:
        progress("reading model and data", 0.0)
        prepared = prepare(options)
        network, test = prepared.network, prepared.data().test
        before = evaluate(network, test.images, test.labels).accuracy
        made = one_shot_trials(
            network,
            test.images,
            test.labels,
            trials=count,
            rule=prepared.rule,
            guard=prepared.guard,
            seed=options.seed,
            progress=lambda share: progress("correcting one at a time", share),
        )
    if not made:
        raise UserError(NOTHING_WRONG)
    result = _summary(made, before)
    if options.json:
        print_json({**result, "settings": prepared.settings, "trial_list": [asdict(trial) for trial in made]})
        return
    typer.echo(prepared.chosen)
    typer.echo(
        f"{len(made)} test samples corrected one at a time, {result['success']:.0%} with success, "
        f"{result['seconds']:.2f} s each"
    )
    typer.echo(
        f"accuracy on all others: {result['interference']:+.3f} points on average, "
        f"{result['interference_worst']:+.2f} at worst (before: {before:.2f}%)"
    )
    about = "copies of the corrected samples that are right"
    for line in carried_lines(result["carried_before"], result["carried_after"], about):
        typer.echo(line)


def _summary(made: Sequence[Trial], before: float) -> dict[str, Any]:
    return {
        "trials": len(made),
        "success": fmean(trial.success for trial in made),
        "accuracy_before": before,
        "interference": fmean(trial.interference for trial in made),
        "interference_worst": min(trial.interference for trial in made),
        "seconds": fmean(trial.seconds for trial in made),
        "carried_before": carried_means([trial.before for trial in made]),
        "carried_after": carried_means([trial.after for trial in made]),
    }


def carried_means(values: Sequence[Carried]) -> Carried:
    """Mean share of right copies of each kind."""
    return {kind: fmean(value[kind] for value in values) for kind in values[0]}
