"""``spectralmoe list``: everything that can be named."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import typer

from spectralmoe.cli.console import print_json
from spectralmoe.cli.options import Json

__all__ = ["list_everything"]


def list_everything(json: Json = False) -> None:
    """Data sets, router presets, and the parts that routers are made of.

    Example: spectralmoe list
    """
    from spectralmoe.dispatch import DISPATCHES
    from spectralmoe.experts import EXPERTS
    from spectralmoe.regularizers import REGULARIZERS
    from spectralmoe.scorers import SCORERS
    from spectralmoe.selectors import SELECTORS
    from spectralmoe.training.data import DATASETS
    from spectralmoe.training.routers import ROUTERS

    tables = {
        "data sets": {
            **{name: _first_line(loader) for name, loader in DATASETS.items()},
            "folder:PATH": "an image folder",
        },
        "routers": {name: preset.summary for name, preset in ROUTERS.items()},
    }
    parts: dict[str, Mapping[str, object]] = {
        "scorers": SCORERS,
        "selectors": SELECTORS,
        "experts": EXPERTS,
        "dispatch": DISPATCHES,
        "regularizers": REGULARIZERS,
    }
    tables |= {title: {name: _first_line(item) for name, item in part.items()} for title, part in parts.items()}
    if json:
        print_json(tables)
        return
    for title, table in tables.items():
        typer.echo(f"{title}:")
        for name, line in table.items():
            typer.echo(f"  {name:<20} {line}")


def _first_line(item: object) -> str:
    return (inspect.getdoc(item) or "").split("\n")[0]
