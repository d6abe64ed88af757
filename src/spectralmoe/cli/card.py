"""``spectralmoe card``: run the plan of a reproduction card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectralmoe.cli.console import print_json, show_progress
from spectralmoe.cli.elsewhere import Cluster, Collect, Submit, SubmitWith, Take, elsewhere, one_at_most, say_taken
from spectralmoe.cli.options import Json, say_notes
from spectralmoe.errors import UserError

__all__ = ["card"]


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with a plan.py, such as papers/sr-moe.")],
    quick: Annotated[bool, typer.Option("--quick", help="Run the small form, which shows that the card runs.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Run a few cells again; do their means lie in the stored intervals?")
    ] = False,
    draw: Annotated[
        bool, typer.Option("--draw", help="Run nothing; write tables and figures of what is there.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the results; by default DIR itself, with --quick runs/NAME-quick."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the trained networks; by default runs/NAME, or models in --out."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Cells at a time, each on one thread.", show_default="2")
    ] = None,
    cluster: Cluster = None,
    submit: Submit = None,
    submit_with: SubmitWith = None,
    take: Take = None,
    collect: Collect = False,
    json: Json = False,
) -> None:
    """Run a reproduction card, a folder that tests a paper's claim: tune its rows alike, measure the cells (trained
    networks) that are missing, write its tables and figures.

    Example: spectralmoe card papers/sr-moe --quick

    Each finished cell is written at once; a card that was stopped goes on when it is started again. The plan is Python
    code of the folder and is run. Several machines share the work with --cluster, --submit or --take, and folders that
    all of them see.
    """
    from spectralmoe.experiments.cards import check_card, find_card, run_card, take_card, write_card
    from spectralmoe.experiments.grid import Slice

    if check and draw:
        raise UserError("--check and --draw do not go together: the one runs cells, the other runs none")
    remote = elsewhere(processes, cluster, submit, submit_with)
    processes = processes or 2
    one_at_most({"--check": check, "--draw": draw, "--cluster": cluster is not None, "--submit": submit is not None,
                 "--take": take is not None, "--collect": collect})  # fmt: skip
    part = None if take is None else Slice.parse(take)
    if quick and check:
        raise UserError("--quick and --check do not go together: the stored cells are those of the full form")
    plan, name = find_card(folder, quick=quick), folder.resolve().name
    place = out or (Path("runs") / f"{name}-quick" if quick else folder)
    models = work or (place / "models" if quick or out is not None else Path("runs") / name)
    with show_progress(quiet=json) as progress:
        if check:
            lines = check_card(plan, place, processes, progress)
            print_json(lines) if json else typer.echo("\n".join(lines))
            return
        if part is not None:
            taken = take_card(plan, place, models, processes, progress, part=part)
        elif draw:
            count, notes = 0, write_card(plan, place, models)
        else:
            count, notes = run_card(plan, place, models, remote or processes, progress, collect=collect)
    if part is not None:
        say_taken(part, taken, json)
        return
    say_notes(notes)
    if json:
        print_json({"cells": count, "out": str(place), "notes": notes})
    else:
        typer.echo(f"{count} cells were run; tables: {place / 'RESULTS.md'}")
    if any(note.startswith("diverged: ") for note in notes):
        raise typer.Exit(1)
