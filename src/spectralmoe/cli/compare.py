"""``spectralmoe compare``: the main job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from spectralmoe.cli.completion import complete_routers
from spectralmoe.cli.console import count, over_seeds, print_json, print_table, watching
from spectralmoe.cli.options import (
    Data,
    DataDir,
    DeviceName,
    Download,
    Json,
    Out,
    Seed,
    read_data,
    read_k,
    refuse_image_size,
    see_own_modules,
    split_names,
    split_numbers,
)
from spectralmoe.training.names import DEFAULT_ROUTERS

__all__ = ["compare"]


def compare(
    out: Out,
    data: Data = "mnist5k",
    routers: Annotated[
        str,
        typer.Option(
            "--routers",
            "--router",
            metavar="A,B,...",
            help="Presets or tables of parts (see 'spectralmoe list'), or PKG:OBJECT of your own.",
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
    values["network"] = {"k": read_k(k, experts), "num_experts": experts}
    settings = parse(CompareSettings, values, "compare")
    settings.check()
    refuse_image_size(data, image_size)
    where = pick_device(device)
    images = read_data(data, data_dir, download, image_size)
    with watching(quiet=json) as watch:
        at_a_time = processes or (os.cpu_count() or 1 if where.type == "cpu" else 1)
        rows = summarise(run(settings, images, out, where, watch, processes=at_a_time))
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
