"""Cases: a measurement of several candidates, the gate that checks them, and the result."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from spectralmoe.bench.memory_peak import peak_bytes
from spectralmoe.bench.timing import Interval, Times, median, pick_stopwatch, ratio, take_times
from spectralmoe.errors import first_line

__all__ = ["BEST_PEER", "LIMIT", "Candidate", "Case", "Kind", "Tick", "measure"]

Kind = Literal["ours", "limit", "peer", "unlike", "rate"]
LIMIT, BEST_PEER = "limit", "best peer"
GATES = 0.1
"""Share of a case's progress that its gates stand for."""

Tick = Callable[[float, str], object]
"""Told the share of a case that is done, and what it does."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Candidate:
    """One implementation that a case measures.

    Attributes:
        name: unique in the case.
        work: what is measured.
        kind: "ours"; "peer", which computes the same and must pass the gate; "limit", the arithmetic alone; "unlike",
            which computes something else and is shown, never counted; "rate", the machine's large matmul.
        check: the gate: None where the candidate is right, else what is wrong. "ours" and "peer" must have one.
        reset: frees what a run leaves behind (gradients), before memory is measured.
        flops: of one run; 0: not counted.
        held: bytes that it keeps between runs (for cases that measure memory).
        note: what a reader must know.
    """

    name: str
    work: Callable[[], object]
    kind: Kind
    check: Callable[[], str | None] | None = None
    reset: Callable[[], object] = _nothing
    flops: float = 0.0
    held: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        if self.kind in ("ours", "peer") and self.check is None:
            raise ValueError(f"candidate {self.name!r} is counted, so it needs a check")


@dataclass(frozen=True, slots=True)
class Case:
    """A measurement of several candidates.

    Attributes:
        suite, name: together they name it for targets and stored results.
        baseline: a candidate that the others are divided by, besides the limit and the peers.
        skipped: peer -> why it is not among the candidates.
        unit: "seconds", or "bytes" at the worst moment of one run.
    """

    suite: str
    name: str
    candidates: Sequence[Candidate]
    device: torch.device
    baseline: str | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    unit: Literal["seconds", "bytes"] = "seconds"

    @property
    def key(self) -> str:
        """Suite and name."""
        return f"{self.suite}: {self.name}"


def measure(case: Case, rounds: int, order: random.Random, tick: Tick) -> dict[str, Any]:
    """Gate every candidate, then measure those that passed; a JSON value."""
    gates = {}
    for number, candidate in enumerate(case.candidates):
        tick(GATES * number / len(case.candidates), f"checking {candidate.name}")
        gates[candidate.name] = gate(candidate)
    passed = [candidate for candidate in case.candidates if not gates[candidate.name].startswith("failed")]
    if case.unit == "bytes":
        times = {candidate.name: {0: _bytes(candidate, case.device)} for candidate in passed}
    else:
        sides = {candidate.name: candidate.work for candidate in passed}
        fewer = [candidate.name for candidate in passed if candidate.kind in ("peer", "unlike")]
        watch = pick_stopwatch(case.device)

        def tell(share: float) -> None:
            tick(GATES + (1 - GATES) * share, f"round {round(share * rounds)}/{rounds}")

        times = take_times(sides, rounds, fewer=fewer, stopwatch=watch, order=order, tick=tell)
    middle = {name: median(list(values.values())) for name, values in times.items()}
    rate = max((c.flops / middle[c.name].middle for c in passed if c.kind == "rate"), default=None)
    return {
        "key": case.key,
        "suite": case.suite,
        "name": case.name,
        "unit": case.unit,
        "baseline": case.baseline,
        "candidates": [_row(c, gates[c.name], middle.get(c.name), rate) for c in case.candidates],
        "ratios": _ratios(case, passed, times, middle),
        "skipped": dict(case.skipped),
    }


def gate(candidate: Candidate) -> str:
    """ "passed", "not gated" (it computes something else), or "failed: ..." with what is wrong."""
    try:
        if candidate.check is None:
            candidate.work()
            return "not gated"
        wrong = candidate.check()
    except Exception as error:  # another library's candidate may fail in any way
        return f"failed: {type(error).__name__}: {first_line(error)}"
    return "passed" if wrong is None else f"failed: {wrong}"


def _bytes(candidate: Candidate, device: torch.device) -> float:
    candidate.work()  # what a first run sets up is not what a run needs
    candidate.reset()
    return candidate.held + peak_bytes(candidate.work, device)


def _row(candidate: Candidate, gate: str, middle: Interval | None, rate: float | None) -> dict[str, Any]:
    flops = candidate.flops / middle.middle if middle is not None and candidate.flops else None
    return {
        "name": candidate.name,
        "kind": candidate.kind,
        "gate": gate,
        "note": candidate.note,
        "value": None if middle is None else middle.as_json(),
        "gflops": None if flops is None else flops / 1e9,
        "share_of_matmul": None if flops is None or rate is None else flops / rate,
    }


def _ratios(
    case: Case, passed: Sequence[Candidate], times: Mapping[str, Times], middle: Mapping[str, Interval]
) -> list[dict[str, Any]]:
    """Each of ours over the limit, the fastest peer, the baseline, and every other side that computes."""

    def fastest(kind: Kind) -> str | None:
        names = [candidate.name for candidate in passed if candidate.kind == kind]
        return min(names, key=lambda name: middle[name].middle, default=None)

    roles = {LIMIT: fastest("limit"), BEST_PEER: fastest("peer")}
    roles |= {c.name: c.name for c in passed if c.kind in ("peer", "unlike") or c.name == case.baseline}
    return [
        {"of": ours.name, "over": role, "side": name, **ratio(times[ours.name], times[name]).as_json()}
        for ours in passed
        for role, name in roles.items()
        if ours.kind == "ours" and name is not None and name != ours.name
    ]
