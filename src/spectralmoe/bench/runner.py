"""Run suites: gate, measure, look whether the machine was idle, write what was found."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

import spectralmoe
from spectralmoe.bench import branch, decode, layer, memory, penalty, router, scaling, step
from spectralmoe.bench.case import Case, measure
from spectralmoe.bench.idle import LIMIT, Idle
from spectralmoe.bench.problem import dtype_name
from spectralmoe.bench.settings import Settings
from spectralmoe.bench.show import as_markdown, as_picture
from spectralmoe.bench.targets import against_targets
from spectralmoe.errors import one_of
from spectralmoe.files import make_folder, write_json, write_text
from spectralmoe.machine import describe_machine

__all__ = ["SUITES", "run"]

SUITES: dict[str, Callable[[Settings], Iterator[Case]]] = {
    "layer": layer.cases,
    "router": router.cases,
    "penalty": penalty.cases,
    "branch": branch.cases,
    "step": step.cases,
    "scaling": scaling.cases,
    "decode": decode.cases,
    "memory": memory.cases,
}
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


class Watch(Protocol):
    """Who is told how far a run has come."""

    def __call__(self, text: str, done: float) -> None: ...


def run(
    suites: Sequence[str],
    settings: Settings,
    *,
    out: Path | None = None,
    allow_busy: bool = False,
    watch: Watch = lambda text, done: None,
    idle: Idle | None = None,
) -> dict[str, Any]:
    """The results of ``suites`` as one JSON value; with ``out`` also bench.json, bench.md and bench.svg in that folder.

    The files are written after each suite.

    Args:
        allow_busy: go on where the machine is not idle; the result says so.

    Raises:
        UserError: an unknown suite; a machine that is not idle; a folder that cannot be written.
    """
    for name in suites:
        if name not in SUITES:
            raise one_of("suite", name, SUITES)
    if out is not None:
        make_folder(out)
    idle = idle or Idle()
    look = (lambda when: idle.others()) if allow_busy else idle.demand
    loads, cases, order = [look("at the start")], [], random.Random(0)
    with _threads(settings.threads):
        result = _head(suites, settings)
        for number, name in enumerate(suites):
            for case in SUITES[name](settings):
                text, done = case.key, number / len(suites)
                watch(text, done)
                found = measure(case, settings.rounds, order, lambda share, t=text, d=done: watch(t, d))  # type: ignore[misc]
                loads.append(look(f"during {case.key}"))
                cases.append(found | {"load_of_others": loads[-1]})
                del case
            result |= {
                "busy": max(loads) > LIMIT,
                "load_of_others": max(loads),
                "targets": against_targets(cases, settings),
                "cases": cases,
            }
            if out is not None:
                write_json(out / "bench.json", result)
                write_text(out / "bench.md", as_markdown(result))
                write_text(out / "bench.svg", as_picture(result))
    return result


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


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
