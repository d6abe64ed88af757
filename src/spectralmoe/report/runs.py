"""Comparisons and finished training runs on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from spectralmoe.report.encode import short
from spectralmoe.report.measures import Cell, Tile, figure
from spectralmoe.report.schema_runs import Comparison, Estimate, History, Row

__all__ = ["comparison_panel", "few_shot_comparison", "history_data", "history_summary"]


def few_shot_comparison(value: Mapping[str, Any]) -> dict[str, Any]:
    """The file of a few-shot run as a comparison: one measure for each number of shots."""
    rows: dict[str, dict[str, Any]] = {}
    columns: dict[str, str] = {}
    for item in value["summary"]:
        shots = f"{item['shots']} shot{'' if item['shots'] == 1 else 's'}"
        columns[shots] = f"test accuracy % after training on {item['shots']} of each class"
        rows.setdefault(str(item["row"]), {})[shots] = item["accuracy"]
    return {
        "title": f"few-shot learning on {value['settings']['data']}",
        "columns": columns,
        "summary": [{"router": name, **estimates} for name, estimates in rows.items()],
    }


def comparison_panel(index: int, body: Comparison) -> dict[str, Any]:
    """The table of a comparison."""
    keys = list(body.columns or dict.fromkeys(key for row in body.summary for key in row.estimates))
    heads = [{"title": key.replace("_", " "), "meaning": body.columns.get(key, "")} for key in keys]
    rows = [
        {"name": _named(row), "depth": row.depth, "cells": [_estimate(row.estimates.get(key)) for key in keys]}
        for row in body.summary
    ]
    depths = any(row.depth is not None for row in body.summary)
    return {"index": index, "title": body.title, "columns": heads, "rows": rows, "depths": depths}


def _named(row: Row) -> str:
    return f"{row.router} ({len(row.diverged)} diverged)" if row.diverged else row.router


def _estimate(value: Estimate | None) -> Cell:
    if value is None or value.mean is None or not math.isfinite(value.mean):
        return Cell("no data", "", "not measured", None)
    mean, half, seeds = value.mean, value.half, len(value.values)
    note = f"± {figure(half)}" if half is not None else "1 seed" if seeds == 1 else ""
    return Cell(figure(mean), note, f"{mean:.6g}, {seeds} seeds", mean)


def history_data(history: History) -> dict[str, Any]:
    """Loss and validation score by epoch."""
    epochs = history.epochs
    return {
        "title": history.title,
        "steps": [*range(1, len(epochs) + 1)],
        "keys": {
            "loss": [short(epoch.loss) for epoch in epochs],
            f"validation_{history.metric.key}": [short(value) for value in history.validation],
        },
    }


def history_summary(history: History) -> dict[str, Any]:
    """Where the run ended, for the summary."""
    last, metric = history.epochs[-1], history.metric
    seconds = [epoch.seconds for epoch in history.epochs if epoch.seconds is not None]
    tiles = [
        Tile("loss", figure(last.loss), "mean over the last epoch"),
        Tile(f"validation {metric.title}", metric.show(history.validation[-1]), "after the last epoch"),
        Tile(f"test {metric.title}", metric.show(history.test), "of the trained model"),
        Tile("seconds an epoch", figure(sum(seconds) / len(seconds) if seconds else None), "training alone"),
    ]
    count = len(history.epochs)
    return {
        "title": history.title,
        "kind": "training history",
        "groups": [],
        "calm": "",
        "checked": "",
        "unknown": "",
        "tiles": tiles,
        "notes": [f"{count} epoch{'' if count == 1 else 's'}"],
        "coverage": [],
    }
