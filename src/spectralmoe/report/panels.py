"""The panels of the page that have data, in their order, with the text of their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spectralmoe.instruments.findings import SEVERITIES
from spectralmoe.report.devices import devices_panel
from spectralmoe.report.documents import Document, ReceiptFile
from spectralmoe.report.holders import holders_panel
from spectralmoe.report.measures import Column, cell, columns, compare, coverage, figure, tiles
from spectralmoe.report.receipts import receipt_panel
from spectralmoe.report.runs import comparison_panel, history_summary
from spectralmoe.report.schema import Found, Inspection, Layer, Passage
from spectralmoe.report.schema_runs import Comparison, History, Monitor

__all__ = ["make_panels"]

SIGNS: dict[str, str] = dict(zip(SEVERITIES, "■▲○", strict=True))


def make_panels(documents: Sequence[Document]) -> dict[str, Any]:
    """``panels`` (id, title, template, about, runs, ...) and ``runs`` of the summary, for the template of the page."""
    bodies = [document.body for document in documents]
    inspections = [body for body in bodies if isinstance(body, Inspection)]
    monitors = [body for body in bodies if isinstance(body, Monitor)]
    histories = [body for body in bodies if isinstance(body, History)]
    comparisons = [body for body in bodies if isinstance(body, Comparison)]
    receipts = [body for body in bodies if isinstance(body, ReceiptFile)]
    panels = [
        _panel("summary", "Summary", "summary.html", "", bool(inspections or monitors or histories)),
        *_layer_panels(inspections, monitors, bool(histories)),
        _panel(
            "comparisons",
            "Comparisons",
            "comparisons.html",
            "",
            bool(comparisons) or len(inspections) > 1,
            titles=[inspection.title for inspection in inspections],
            measures=compare(inspections) if len(inspections) > 1 else [],
            comparisons=[comparison_panel(index, body) for index, body in enumerate(comparisons)],
        ),
        _panel(
            "receipts",
            "One-expert updates",
            "receipts.html",
            "What was written into one expert, and what else moved.",
            bool(receipts),
            runs=[receipt_panel(body) for body in receipts],
        ),
    ]
    summaries = [_summary(index, body) for index, body in enumerate(inspections)]
    return {
        "panels": [panel for panel in panels if panel["shown"]],
        "runs": [*summaries, *map(_monitor_summary, monitors), *map(history_summary, histories)],
    }


def _panel(name: str, title: str, template: str, about: str, shown: bool, **values: Any) -> dict[str, Any]:
    return {"id": name, "title": title, "template": template, "about": about, "shown": shown, **values}


def _layer_panels(inspections: Sequence[Inspection], monitors: Sequence[Monitor], epochs: bool) -> list[dict[str, Any]]:
    def with_layer(has: Any) -> list[dict[str, Any]]:
        return _runs(inspections, lambda body: any(map(has, body.layers)))

    def chart(name: str, title: str, about: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
        return _panel(name, title, "charts.html", about, bool(runs), chart=name, runs=runs)

    loads = with_layer(lambda layer: layer.load is not None and sum(layer.load.counts))
    devices = [panel for body in inspections if (panel := devices_panel(body))]
    history = _runs(monitors, lambda body: body.loads)
    steps = any(body.steps for body in monitors)
    return [
        _panel("load", "Load", "load.html", "Slots of each expert; 1 is an even share.", bool(loads), runs=loads),
        _panel(
            "devices",
            "On several devices",
            "devices.html",
            "Work of the busiest device over the mean of all devices; 1 is even. Planned, not run.",
            bool(devices),
            runs=devices,
        ),
        _panel(
            "training",
            "Through training",
            "training.html",
            "",
            epochs or steps or bool(history),
            runs=history,
            epochs=epochs,
            steps=steps,
        ),
        _panel(
            "layers",
            "Layers",
            "layers.html",
            "Every measure of every layer; the small number says how much data it rests on. Click a heading to sort.",
            bool(inspections),
            runs=[_layer_table(index, body) for index, body in enumerate(inspections)],
        ),
        chart("similarity", "Similarity of experts", "", with_layer(_has_matrices)),
        chart(
            "spectra",
            "Spectra of the routers",
            "Singular values of each routing matrix, largest first.",
            with_layer(lambda layer: layer.geometry is not None and layer.geometry.spectrum),
        ),
        chart(
            "paths",
            "Paths between layers",
            "Tokens that went from an expert of one layer to an expert of the next.",
            _runs(inspections, lambda body: any(path.flows for path in body.paths)),
        ),
        chart(
            "association",
            "Labels and experts",
            "Where the tokens of each class or topic went.",
            with_layer(lambda layer: layer.association is not None and layer.association.labels),
        ),
        chart(
            "text",
            "Running text",
            "Each token has the colour of the expert with the largest combine weight for it.",
            _runs(inspections, lambda body: any(map(_has_text, body.text))),
        ),
        _panel(
            "holders",
            "What each expert adds to a token",
            "holders.html",
            "What each expert added to the log-probability of the marked token, in nats, from the token before it.",
            any(body.holders for body in inspections),
            runs=[panel for body in inspections if (panel := holders_panel(body))],
        ),
        chart(
            "examples", "Examples", "What the experts get; the number is the combine weight.", with_layer(_has_examples)
        ),
    ]


def _runs(bodies: Sequence[Any], has: Any) -> list[dict[str, Any]]:
    return [{"index": index, "title": body.title} for index, body in enumerate(bodies) if has(body)]


def _has_matrices(layer: Layer) -> bool:
    if layer.similarity is None:
        return False
    matrices = layer.similarity.matrices
    return any(m is not None and m.size for m in (matrices.output, matrices.weights, matrices.rows))


def _has_text(passage: Passage) -> bool:
    return any(passage.layers)


def _has_examples(layer: Layer) -> bool:
    return any(layer.examples)


def _summary(index: int, body: Inspection) -> dict[str, Any]:
    checks = coverage(body)
    everywhere, count = [], len(body.layers)
    for column, known, _, _ in checks:
        if known:
            everywhere.append(_named(column) + ("" if known == count else f" (in {known} of {count} layers)"))
    unknown = [f"{_named(column)} ({why})" if why else _named(column) for column, known, _, why in checks if not known]
    places = {layer.name: _row_id(index, place) for place, layer in enumerate(body.layers)}
    numbers = {(layer.stack, layer.layer): _row_id(index, place) for place, layer in enumerate(body.layers)}
    data = body.data
    notes = [*(data.notes if data else ())]
    if data and data.source:
        notes.insert(0, f"data: {data.source}" + (f", tokenizer {data.tokenizer}" if data.tokenizer else ""))
    return {
        "title": body.title,
        "kind": "inspection",
        "groups": _grouped(body.findings, lambda f: places.get(f.name or "") or numbers.get(("", f.layer))),
        "calm": _calm(body.findings),
        "checked": ", ".join(everywhere) or "nothing, for want of data",
        "unknown": ", ".join([*unknown, *_unmeasured(body)]),
        "tiles": tiles(body),
        "notes": notes,
        "coverage": checks,
    }


def _named(column: Column) -> str:
    """The title of a column, behind its group if the title starts with "of"."""
    return f"{column.group} {column.title}" if column.title.startswith("of ") else column.title


def _unmeasured(body: Inspection) -> list[str]:
    """The groups that no layer has, as those of a checkpoint that was not run."""
    groups = ("load", "entropy", "similarity", "stability")
    return [group for group in groups if not any(getattr(layer, group) for layer in body.layers)]


def _monitor_summary(body: Monitor) -> dict[str, Any]:
    last = body.steps[-1].get("step") if body.steps else None
    notes = [f"{len(body.steps)} steps recorded" + (f", the last is step {last}" if last is not None else "")]
    every = {key for row in body.steps for key in row}
    keys = {key for row in body.steps for key, value in row.items() if value is not None}
    checked = sorted(keys - {"kind", "step", "tokens"})
    return {
        "title": body.title,
        "kind": "training run",
        "groups": _grouped(body.findings, lambda finding: None),
        "calm": _calm(body.findings),
        "checked": ", ".join(key.replace("_", " ") for key in checked) or "nothing, for want of data",
        "unknown": ", ".join(key.replace("_", " ") for key in sorted(every - keys)),
        "tiles": [],
        "notes": notes,
        "coverage": [],
    }


def _calm(findings: Sequence[Found]) -> str:
    """A sentence for a page without severe findings and warnings; empty if there are any."""
    if {finding.severity for finding in findings} & {"severe", "warning"}:
        return ""
    return "Nothing severe, and no warnings." if findings else "No findings."


def _grouped(findings: Sequence[Found], link: Any) -> list[dict[str, Any]]:
    """Findings of one kind, severity and cure together; the worst first."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for finding in sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)):
        measure, parts = finding.measure, [f"step {finding.step}"] if finding.step is not None else []
        if measure is not None:
            parts.append(f"{figure(measure.value)} from {measure.data:,} {measure.unit}")
        if finding.threshold is not None:
            parts.append(f"threshold {figure(finding.threshold)}")
        item = {"message": finding.message, "link": link(finding), "note": "; ".join(parts)}
        groups.setdefault((finding.severity, finding.kind, finding.cure), []).append(item)
    return [
        {"severity": severity, "title": kind.replace("_", " "), "cure": cure, "findings": items}
        for (severity, kind, cure), items in groups.items()
    ]


def _layer_table(index: int, body: Inspection) -> dict[str, Any]:
    shown = columns(body.layers)
    counts: dict[str, int] = {}
    for column in shown:
        counts[column.group] = counts.get(column.group, 0) + 1
    rows = []
    for place, layer in enumerate(body.layers):
        about = {finding.severity for finding in body.findings if finding.name == layer.name}
        worst = next((severity for severity in SEVERITIES if severity in about), "")
        rows.append(
            {
                "id": _row_id(index, place),
                "label": layer.label,
                "name": layer.name,
                "severity": worst,
                "sign": SIGNS.get(worst, ""),
                "experts": layer.experts,
                "top_k": layer.top_k,
                "cells": [cell(layer, column) for column in shown],
            }
        )
    return {"index": index, "title": body.title, "columns": shown, "groups": list(counts.items()), "rows": rows}


def _row_id(index: int, place: int) -> str:
    return f"run-{index}-layer-{place}"
