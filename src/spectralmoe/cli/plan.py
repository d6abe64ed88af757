"""``spectralmoe plan``: what a recorded load would do to experts on several devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectralmoe.cli.console import count, print_json, print_table, say
from spectralmoe.cli.options import Json
from spectralmoe.errors import UserError

__all__ = ["plan"]

NAME, WRITER = "inspection.json", "'spectralmoe inspect MODEL --out DIR' writes one"


def plan(
    inspection: Annotated[
        Path, typer.Argument(metavar="INSPECTION", help="What inspect wrote: its folder, inspection.json or --json.")
    ],
    devices: Annotated[int, typer.Option("--devices", min=1, help="Devices that share the experts of a layer.")] = 8,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens on each device in a step.")] = 8192,
    capacity: Annotated[
        float, typer.Option("--capacity", min=1.0, help="Least loaded: most tokens of a device, over the mean.")
    ] = 1.0,
    chunk: Annotated[
        int, typer.Option("--chunk", min=1, help="Least loaded: fewest tokens that are worth a copy of an expert.")
    ] = 1024,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0.0, help="Least loaded: with a busiest device below it, nothing moves.")
    ] = 1.3,
    json: Json = False,
) -> None:
    """Print for each layer the work of the busiest of several devices over their mean, under expert parallelism,
    replicas and a least-loaded plan; 1 is even.

    The load in the inspection gives the shares of the experts in a step. Nothing is run or timed.

    Example: spectralmoe plan runs/look --devices 8
    """
    from spectralmoe.report import read_documents
    from spectralmoe.report.devices import layer_plans
    from spectralmoe.report.schema import Inspection

    file = inspection / NAME if inspection.is_dir() else inspection
    if inspection.is_dir() and not file.is_file():
        raise UserError(f"{inspection} holds no {NAME}; {WRITER}")
    (document,) = read_documents([file])
    if not isinstance(document.body, Inspection):
        raise UserError(f"{file} is a {document.kind}, not an inspection; {WRITER}")
    options = {"capacity": capacity, "chunk": chunk, "threshold": threshold}
    rows = layer_plans(document.body, devices, tokens=tokens, **options)
    if json:
        about = {"inspection": str(file), "title": document.body.title, "devices": devices, "tokens": tokens}
        print_json({**about, **options, "layers": rows})
        return
    say(f"{document.body.title}: {count(devices, 'device')}, {count(tokens, 'token')} on each in a step", indent="  ")
    show(rows)


def show(rows: list[dict[str, Any]]) -> None:
    """A line a layer."""
    from spectralmoe.report.devices import PLANS

    lines = []
    for row in rows:
        plans = row["plans"]
        cells = (
            [
                *(f"{plans[name]['imbalance']:.2f}" for name in PLANS),
                str(plans["replicas"]["replicas"]),
                str(plans["least_loaded"]["copies"]),
                str(plans["least_loaded"]["forced"]),
            ]
            if plans
            else ["no data"] * (len(PLANS) + 3)
        )
        lines.append([row["name"], str(row["experts"]), *cells])
    headings = [heading for heading, _ in PLANS.values()]
    print_table(
        "busiest device over the mean; replicas held, copies sent in a step, slots over the capacity",
        ["layer", "experts", *headings, "replicas held", "copies sent", "over"],
        lines,
    )
