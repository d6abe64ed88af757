"""``spectralmoe adapt new-class``: a class learned from a few samples, nothing written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralmoe.cli.adapt.options import AdaptOptions
from spectralmoe.cli.console import print_json, print_table, show_progress
from spectralmoe.cli.options import split_numbers
from spectralmoe.errors import UserError

if TYPE_CHECKING:
    from spectralmoe.adaptation import Shots
    from spectralmoe.cli.adapt.setup import Prepared

__all__ = ["new_class"]


def new_class(
    options: AdaptOptions,
    name: Annotated[str, typer.Argument(metavar="CLASS", help="The class, by name or number.")],
    shots: Annotated[
        str, typer.Option(metavar="K,K,...", help="How many training images of it the model is shown.")
    ] = "1,5,10",
) -> None:
    """Teach a class from a few training images of MODEL's data, and print the accuracy on it and on all other classes.

    Example: spectralmoe adapt new-class MODEL 7 --shots 1,5,10 --guard mnist5k
    """
    from spectralmoe.cli.adapt.sample import find_label
    from spectralmoe.cli.adapt.setup import prepare

    counts = split_numbers("--shots", shots)
    if not counts or min(counts) < 1:
        raise UserError(f"--shots {shots!r} is not a list of positive numbers such as 1,5,10")
    with show_progress(quiet=options.json) as progress:
        progress("reading model and data", 0.0)
        prepared = prepare(options, new_class=name)
        classes, label = prepared.meta.classes, find_label(name, prepared.meta, "CLASS")
        rows = _teach(prepared, label, counts, lambda share: progress("teaching the class", share))
    held_out = prepared.meta.hold_out == classes[label]
    if options.json:
        about = {"class": classes[label], "held_out": held_out, "settings": prepared.settings}
        print_json({**about, "shots": [_summary(row) | {"tries": [asdict(t) for t in row]} for row in rows]})
        return
    typer.echo(prepared.chosen)
    if not held_out:
        seen = f"the model was trained with class {classes[label]!r}, so it is not new to it"
        typer.echo(f"note: {seen}; set hold_out in the TOML file of 'spectralmoe train'")
    headings = ["samples", "success", "right before", "right after", "other classes", "at worst"]
    title = f"class {classes[label]!r} of the test part in %; accuracy on all other classes in points"
    print_table(f"{title}; {len(rows[0])} draws each", headings, [_fields(_summary(row)) for row in rows])


def _teach(
    prepared: Prepared, label: int, shots: Sequence[int], progress: Callable[[float], None]
) -> list[list[Shots]]:
    from spectralmoe.adaptation import add_class

    data, rows = prepared.data(), []
    support = data.train.images[data.train.labels == label]
    if max(shots) > len(support):
        raise UserError(f"--shots {max(shots)}: the training part has only {len(support)} images of this class")
    for done, k in enumerate(shots):
        progress(done / len(shots))
        rows.append(
            add_class(
                prepared.network,
                support,
                data.test.images,
                data.test.labels,
                label,
                shots=k,
                rule=prepared.rule,
                guard=prepared.guard,
                seed=prepared.options.seed,
            )
        )
    return rows


def _summary(tries: Sequence[Shots]) -> dict[str, Any]:
    return {
        "shots": tries[0].shots,
        "success": fmean(t.success for t in tries),
        "accuracy_before": fmean(t.before for t in tries),
        "accuracy_after": fmean(t.accuracy for t in tries),
        "interference": fmean(t.interference for t in tries),
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
