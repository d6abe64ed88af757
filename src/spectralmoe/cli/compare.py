"""``spectralmoe compare``: the main job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from spectralmoe.cli.completion import complete_routers
from spectralmoe.cli.console import count, over_seeds, print_json, print_table, show_progress
from spectralmoe.cli.options import (
    Data,
    DataDir,
    DeviceName,
    Download,
    Json,
    Out,
    Seed,
    say_notes,
    see_own_modules,
    split_names,
    split_numbers,
)
from spectralmoe.errors import UserError
from spectralmoe.training.names import DEFAULT_ROUTERS

__all__ = ["compare"]


def compare(
    out: Out,
    data: Data = "mnist5k",
    routers: Annotated[
        str,
        typer.Option(
            metavar="A,B,...",
            help="Presets (see 'spectralmoe list') or PKG:CLASS of your own.",
            autocompletion=complete_routers,
        ),
    ] = ",".join(DEFAULT_ROUTERS),
    depths: Annotated[str, typer.Option(metavar="N,N,...", help="Numbers of MoE stages.")] = "2,4",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds; the interval is over them.")] = 5,
    seed: Seed = 0,
    k: Annotated[str, typer.Option(metavar="K|soft", help="Experts a token, or soft mixing of all.")] = "2",
    experts: Annotated[int, typer.Option(min=1, help="Experts a layer.")] = 8,
    train_size: Annotated[int | None, typer.Option(min=1, help="Training images; all by default.")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side that the images of folder:PATH are resized to.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training for each network.")] = 8,
    trials: Annotated[int, typer.Option(min=1, help="One-shot corrections for each network.")] = 50,
    tune: Annotated[int, typer.Option(min=0, help="Settings tried for each row on validation data; 0: none.")] = 0,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Networks at a time, one thread each; by default as many as cores.")
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """Train several routers under one budget, adapt each to single samples, show side by side what happened.

    Example: spectralmoe compare --data mnist5k --routers linear,sr-moe --depths 2 --seeds 3 --out runs/first

    A run that was stopped goes on when it is started again with the same settings and --out.
    """
    from spectralmoe.experiments.compare import CompareSettings, run
    from spectralmoe.experiments.compare.columns import COLUMNS, show, summarise, summary_json
    from spectralmoe.training.settings import parse, pick_device
    from spectralmoe.training.tasks import open_task

    names = split_names(routers)
    see_own_modules(names)
    values: dict[str, Any] = {
        "data": data,
        "routers": names,
        "depths": split_numbers("--depths", depths),
        "seeds": seeds,
        "seed": seed,
        "trials": trials,
    }
    values |= {"image_size": image_size, "train_size": train_size, "tune": tune, "optimization": {"epochs": epochs}}
    if k != "soft" and not (k.isdecimal() and 1 <= int(k) <= experts):
        raise UserError(f"--k {k} is neither 'soft' nor a number from 1 to {experts} (--experts)")
    values["network"] = {"k": k if k == "soft" else int(k), "num_experts": experts}
    settings = parse(CompareSettings, values, "compare")
    settings.check()
    where = pick_device(device)
    task = open_task(settings.run_of(settings.cells()[0]), data_dir, download)
    say_notes(task.notes)
    with show_progress(quiet=json) as progress:
        at_a_time = processes or (os.cpu_count() or 1 if where.type == "cpu" else 1)
        rows = summarise(run(settings, task, out, where, progress, processes=at_a_time))
    if json:
        print_json(summary_json(rows))
        return
    title = f"{data}, {count(settings.seeds, 'seed')}, k = {k}: {over_seeds(settings.seeds)}"
    headings = ["router", "depth", *(column.title for column in COLUMNS)]
    fields = [[row.router, str(row.depth), *(show(c, row.values[c.key]) for c in COLUMNS)] for row in rows]
    print_table(title, headings, fields, key=2)
    _tell_files(out)


def _tell_files(out: Path) -> None:
    typer.echo(f"table: {out / 'results.json'}, {out / 'results.csv'}")
    typer.echo(f"picture: {out / 'comparison.svg'}")
    typer.echo(f"models: {out / 'models'}")
