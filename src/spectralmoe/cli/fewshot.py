"""``spectralmoe fewshot``: a new task from a few images a class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralmoe.cli.completion import complete_few_shot_rows
from spectralmoe.cli.console import count, over_seeds, print_json, print_table, show_progress
from spectralmoe.cli.options import (
    Allow,
    Data,
    DataDir,
    DeviceName,
    Download,
    Json,
    Model,
    Out,
    Seed,
    load_network,
    read_data,
    read_k,
    say_notes,
    see_own_modules,
    split_names,
    split_numbers,
)
from spectralmoe.errors import UserError
from spectralmoe.training.names import FRESH_ROWS, OWN_ROWS

if TYPE_CHECKING:
    from spectralmoe.experiments.few_shot.grid import FewShotSettings

__all__ = ["fewshot"]


def fewshot(
    model: Model,
    data: Data,
    out: Out,
    shots: Annotated[str, typer.Option(metavar="K,K,...", help="Training images a class.")] = "1,5,10",
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help=f"own, linear-probe, adapter, or a router as in 'compare'. "
            f"By default {','.join(FRESH_ROWS)}; for a model with branches {','.join(OWN_ROWS)}.",
            autocompletion=complete_few_shot_rows,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds; the interval is over them.")] = 3,
    seed: Seed = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs over the few images.")] = 200,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 5e-3,
    experts: Annotated[int, typer.Option(min=1, help="Experts a branch.")] = 8,
    bottleneck: Annotated[int, typer.Option(min=1, help="Width of an expert.")] = 32,
    k: Annotated[str, typer.Option(metavar="K|soft", help="Experts a token, or soft mixing of all.")] = "1",
    blocks: Annotated[str, typer.Option(metavar="all|lastN|1,3", help="Blocks that get a branch.")] = "last2",
    data_dir: DataDir = None,
    download: Download = False,
    allow: Allow = None,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """Train MoE branches and a new head on K images a class of other data, with MODEL as a frozen backbone, and print
    the accuracy on the test part.

    Example: spectralmoe fewshot runs/vit --data mnist5k --shots 1,5,10 --out runs/fewshot

    A run that was stopped goes on when it is started again with the same --out. More rows, shots and seeds go into the
    same --out, too; what is there is not run again.
    """
    from spectralmoe.experiments.few_shot.grid import FewShotSettings, FewShotTask, run_few_shot
    from spectralmoe.experiments.few_shot.learning import FEW_SHOT
    from spectralmoe.saving import read_config
    from spectralmoe.training.settings import parse, pick_device
    from spectralmoe.vision.model import VisionMoE

    network, meta = load_network(model, pick_device(device), allow)
    if not isinstance(network, VisionMoE):
        raise UserError(f"{model} is not a timm model; train one from a settings file with a section [backbone]")
    names = (OWN_ROWS if network.parts() else FRESH_ROWS) if rows is None else split_names(rows)
    see_own_modules(names)
    values: dict[str, Any] = {"data": data, "rows": names, "shots": split_numbers("--shots", shots)}
    values |= {"seeds": seeds, "seed": seed, "experts": experts, "bottleneck": bottleneck, "k": read_k(k)}
    values |= {"blocks": blocks, "optimization": {**FEW_SHOT.model_dump(), "epochs": epochs, "lr": lr}}
    settings = parse(FewShotSettings, values, "fewshot")
    images = read_data(data, data_dir, download, meta.side)
    with show_progress(quiet=json) as progress:
        summary = run_few_shot(settings, FewShotTask(network, read_config(model)["sha256"], images), out, progress)
    failed = [f"{item['row']}, {item['shots']} shots" for item in summary if item["diverged"]]
    say_notes([f"{row}: training diverged" for row in failed])
    _tell(summary, settings, out, json)
    if failed:
        raise typer.Exit(1)


def _tell(summary: list[dict[str, Any]], settings: FewShotSettings, out: Path, json: bool) -> None:
    if json:
        print_json(summary)
        return
    shots = list(dict.fromkeys(item["shots"] for item in summary))
    by_row = {item["row"]: [other for other in summary if other["row"] == item["row"]] for item in summary}
    seeds = max(len(item["accuracy"]["values"]) if item["accuracy"] else 0 for item in summary)
    fields = [[row, *(_show(item["accuracy"]) for item in items)] for row, items in by_row.items()]
    title = f"{settings.data}, test accuracy %, {count(seeds, 'seed')}: {over_seeds(seeds)}"
    print_table(title, ["row", *(count(k, "shot") for k in shots)], fields)
    typer.echo(f"table: {out / 'fewshot.json'}")


def _show(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    half = "" if value["half"] is None else f" ±{value['half']:.2f}"
    return f"{value['mean']:.2f}{half}"
