"""Runs suites: check the candidates, measure them, check that the machine was idle, write the result."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import spectralmoe
from spectralmoe.bench.case import Case, measure
from spectralmoe.bench.idle import LIMIT, Idle
from spectralmoe.bench.problem import dtype_name
from spectralmoe.bench.settings import Settings
from spectralmoe.bench.show import as_markdown
from spectralmoe.bench.suites import branch, decode, layer, memory, penalty, router, scaling, step
from spectralmoe.bench.targets import against_targets
from spectralmoe.errors import UserError, one_of
from spectralmoe.files import make_folder, write_text
from spectralmoe.json_files import read_json, write_json
from spectralmoe.machine import describe_machine, threads
from spectralmoe.training.loop import Progress

__all__ = ["SUITES", "run"]


class Suite(NamedTuple):
    """A suite: its cases, made one after the other, and how many there will be."""

    cases: Callable[[Settings], Iterator[Case]]
    count: Callable[[Settings], int]


SUITES: dict[str, Suite] = {
    module.__name__.rpartition(".")[2]: Suite(module.cases, module.count)
    for module in (layer, router, penalty, branch, step, scaling, decode, memory)
}
FILE = "bench.json"
PACKAGES = (
    "torch",
    "transformers",
    "timm",
    "st-moe-pytorch",
    "mixture-of-experts",
    "soft-moe",
    "torchtitan",
    "megablocks",
    "scattermoe",
)


def _nobody(text: str, done: float, detail: str = "") -> None:
    pass


def run(
    suites: Sequence[str],
    settings: Settings,
    *,
    out: Path | None = None,
    allow_busy: bool = False,
    progress: Progress = _nobody,
    idle: Idle | None = None,
) -> dict[str, Any]:
    """The results of ``suites`` as one JSON value; with ``out`` also bench.json and bench.md in that folder.

    The files are written after each case. A run that was stopped is gone on with by the same call: what it has
    measured is not measured again. A finished one is measured anew.

    Args:
        allow_busy: go on where the machine is not idle; the result says so.

    Raises:
        UserError: an unknown suite; a machine that is not idle; a folder that cannot be written, or holds a stopped run
            of another kind.
    """
    for name in suites:
        if name not in SUITES:
            raise one_of("suite", name, SUITES)
    idle = idle or Idle()
    look = (lambda when: idle.others()) if allow_busy else idle.demand
    with threads(settings.threads):
        head, total = _head(suites, settings), sum(SUITES[name].count(settings) for name in suites)
        if out is not None:
            make_folder(out)
        known = {} if out is None else _stopped(out / FILE, head)
        load = look("at the start")
        cases: list[dict[str, Any]] = []
        order = random.Random(0)
        for case in (case for name in suites for case in SUITES[name].cases(settings)):
            if case.key not in known:
                tell = partial(_tell, progress, case.key, (len(cases), total))
                measured = measure(case, settings.rounds, order, tell)
                known[case.key] = measured | {"load_of_others": look(f"during {case.key}")}
            cases.append(known[case.key])
            result = _result(head, [*known.values()], load, settings, complete=len(cases) == total)
            if out is not None:
                _write(out, result)
            del case
    return result


def _tell(progress: Progress, text: str, place: tuple[int, int], share: float, what: str) -> None:
    number, total = place
    progress(f"{text} ({number + 1}/{total})", (number + share) / total, what)


def _stopped(path: Path, head: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The cases of the stopped run in ``path``, by key; none where there is no such run."""
    if not path.exists():
        return {}
    stored = read_json(path)
    if not isinstance(stored, dict) or stored.get("kind") != "bench" or not isinstance(stored.get("cases"), list):
        raise UserError(f"{path} is not a result of spectralmoe bench; choose another --out")
    if stored.get("complete", True):
        return {}
    for key, value in head.items():
        if stored.get(key) != value:
            raise UserError(f"{path} holds a stopped run with other {key}; remove it or choose another --out")
    return {case["key"]: case for case in stored["cases"]}


def _result(
    head: Mapping[str, Any],
    cases: Sequence[dict[str, Any]],
    load: float,
    settings: Settings,
    *,
    complete: bool,
) -> dict[str, Any]:
    """``load`` is that of other processes at the start; None and NaN, an unknown load, do not count as idle."""
    loads = [load, *(case["load_of_others"] for case in cases)]
    worst = math.nan if any(one is None or math.isnan(one) for one in loads) else max(loads)
    return {
        **head,
        "complete": complete,
        "busy": not worst <= LIMIT,
        "load_of_others": worst,
        "targets": against_targets(cases, settings),
        "cases": list(cases),
    }


def _write(out: Path, result: Mapping[str, Any]) -> None:
    write_json(out / FILE, result)
    write_text(out / "bench.md", as_markdown(result))


def _head(suites: Sequence[str], settings: Settings) -> dict[str, Any]:
    return {
        "kind": "bench",
        "format": 1,
        "spectralmoe": spectralmoe.__version__,
        "machine": describe_machine(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "settings": {
            "suites": list(suites),
            "device": settings.device.type,
            "dtypes": [dtype_name(dtype) for dtype in settings.dtypes],
            "quick": settings.quick,
            "threads": settings.threads,
            "rounds": settings.rounds,
            "keep_memory": settings.keep_memory,
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
