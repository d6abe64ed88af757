"""``spectralmoe card``: run the plan of a reproduction card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectralmoe.cli.console import print_json, show_progress
from spectralmoe.cli.options import Json, say_notes
from spectralmoe.errors import UserError

__all__ = ["card"]


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with a plan.py, such as papers/sr-moe.")],
    quick: Annotated[bool, typer.Option("--quick", help="The small form.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Run a few cells again; do their means lie in the stored intervals?")
    ] = False,
    draw: Annotated[
        bool, typer.Option("--draw", help="Run nothing; write tables and figures of what is there.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the results: DIR itself, of the small form runs/NAME-quick."),
    ] = None,
    work: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the trained networks: runs/NAME, or models in --out.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, one thread each.")] = 2,
    json: Json = False,
) -> None:
    """Run what a card lacks: tune its rows alike, measure its cells, write its tables and figures.

    Example: spectralmoe card papers/sr-moe --quick

    Each finished cell is a file at once; a card that was stopped goes on when it is started again. The plan is Python
    code of the folder and is run.
    """
    from spectralmoe.experiments.cards import check_card, find_card, run_card, write_card

    if check and draw:
        raise UserError("--check and --draw do not go together: the one runs cells, the other runs none")
    if quick and check:
        raise UserError("--quick and --check do not go together: the stored cells are those of the full form")
    plan, name = find_card(folder, quick=quick), folder.resolve().name
    place = out or (Path("runs") / f"{name}-quick" if quick else folder)
    models = work or (place / "models" if quick or out is not None else Path("runs") / name)
    with show_progress(quiet=json) as progress:
        if check:
            lines = check_card(plan, place, jobs, progress)
            print_json(lines) if json else typer.echo("\n".join(lines))
            return
        count, notes = (0, write_card(plan, place, models)) if draw else run_card(plan, place, models, jobs, progress)
    say_notes(notes)
    if json:
        print_json({"cells": count, "out": str(place), "notes": notes})
    else:
        typer.echo(f"{count} cells were run; tables: {place / 'RESULTS.md'}")
    if any(note.startswith("diverged: ") for note in notes):
        raise typer.Exit(1)
