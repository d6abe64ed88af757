"""A result as Markdown tables and as panels of a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spectralmoe.bench.case import BEST_PEER, LIMIT
from spectralmoe.draw.panels import Intervals, Mark
from spectralmoe.draw.tables import markdown_table

__all__ = ["as_markdown", "ratio_panels", "roles", "target_cells"]

Row = Mapping[str, Any]


def as_markdown(result: Row) -> str:
    """Machine, targets, and a table for each case."""
    settings, machine = result["settings"], result["machine"]
    lines = ["# Benchmark", ""]
    if result["busy"]:
        lines += [f"**The machine was busy (others: {result['load_of_others']:.1f} threads): not for the record.**", ""]
    if not result.get("complete", True):
        lines += ["**This run was stopped: the same command goes on with it.**", ""]
    about = ", ".join(f"{key} {value}" for key, value in {**machine, **result["packages"]}.items() if value is not None)
    how = f"{settings['rounds']} rounds, {settings['threads']} threads, {settings['device']}"
    how += ", quick sizes" * settings["quick"] + ", freed memory kept" * settings["keep_memory"]
    lines += [f"{about}. {how}.", "", "## Targets", ""]
    lines += markdown_table(["what", "at most", "measured", "met"], [target_cells(row) for row in result["targets"]])
    for suite in dict.fromkeys(case["suite"] for case in result["cases"]):
        lines += ["", f"## {suite}"]
        for case in result["cases"]:
            if case["suite"] == suite:
                lines += ["", *_case(case)]
    return "\n".join(lines) + "\n"


def target_cells(row: Row) -> list[str]:
    """The target, the measured value, and whether the target is met."""
    met = {None: "not measured", True: "yes", False: "**no**"}[row["met"]]
    return [row["what"], f"{row['at_most']:g}", "-" if row["measured"] is None else _interval(row, "measured"), met]


def roles(case: Row) -> list[Row]:
    """The main ratios of a case: over the limit, the best peer, the baseline; all ratios if it has none of these."""
    about = [row for row in case["ratios"] if row["over"] in (LIMIT, BEST_PEER, case["baseline"])]
    return about or list(case["ratios"])


def ratio_panels(result: Row) -> list[Intervals]:
    """The ratios of all cases, a panel a suite; those with a target first, the target as a tick."""
    groups: dict[str, list[Mark]] = {}
    for row in result["targets"]:
        if row["measured"] is not None:
            mark = _mark(row["what"], "targets", row, "measured")
            groups.setdefault("targets (black: at most)", []).append(mark._replace(at_most=row["at_most"]))
    for case in result["cases"]:
        for row in roles(case):
            label = f"{case['name']}: {row['of']} / {row['over']}"
            groups.setdefault(case["suite"], []).append(_mark(label, case["suite"], row, "median"))
    return [
        Intervals(f"{name}, ratio", marks, better="lower", guides=(1.0,), ratio=True) for name, marks in groups.items()
    ]


def _mark(label: str, group: str, row: Row, key: str) -> Mark:
    return Mark(label, group, row[key], row["low"], row["high"])


def _case(case: Row) -> list[str]:
    scale, unit = (1e3, "ms") if case["unit"] == "seconds" else (2**-20, "MiB")
    rows = []
    for item in case["candidates"]:
        value = item["value"]
        scaled = {k: None if v is None else v * scale for k, v in (value or {}).items()}
        rate = "" if item["gflops"] is None else f"{item['gflops']:.0f}"
        share = "" if item["share_of_matmul"] is None else f"{item['share_of_matmul']:.2f}"
        said = item["gate"] if not item["note"] else f"{item['gate']}; {item['note']}"
        rows.append([item["name"], item["kind"], _interval(scaled) if value else "-", rate, share, said])
    lines = [f"### {case['name']}", ""]
    lines += markdown_table(["candidate", "kind", unit, "GFLOP/s", "of large matmul", "gate"], rows) if rows else []
    lines += ["", *(f"- {row['of']} / {_side(row)}: {_interval(row)}" for row in roles(case))]
    return lines + [f"- without {name}: {why}" for name, why in case["skipped"].items()]


def _side(row: Row) -> str:
    return f"{row['over']} ({row['side']})" if row["over"] in (LIMIT, BEST_PEER) else str(row["over"])


def _interval(row: Row, key: str = "median") -> str:
    low = "" if row["low"] is None else f" ({row['low']:.3g} to {row['high']:.3g})"
    return f"{row[key]:.3g}{low}"
