"""Targets: what is measured against them, and that the suites measure them all."""

from contextlib import nullcontext

import pytest
import torch

from spectralmoe.bench import peers, runner, subject, targets
from spectralmoe.bench.idle import Idle
from spectralmoe.bench.limit import matmul_rate
from spectralmoe.bench.problem import Sizes
from spectralmoe.bench.settings import Settings
from spectralmoe.bench.suites import decode, layer, memory, penalty, router, scaling
from spectralmoe.bench.targets import TARGETS, Target, against_targets

CPU = Settings(torch.device("cpu"))


def case(key, middle, *, of="spectralmoe", over="limit"):
    row = {
        "of": of,
        "over": over,
        "side": "x",
        "median": middle,
        "low": middle - 0.1,
        "high": middle + 0.1,
        "rounds": 9,
    }
    return {"key": key, "ratios": [row]}


@pytest.fixture
def only(monkeypatch):
    """Evaluate one made-up target."""

    def evaluate(target, cases, settings=CPU):
        monkeypatch.setattr(targets, "TARGETS", [target])
        return against_targets(cases, settings)[0]

    return evaluate


def test_a_target_says_what_was_measured_and_whether_it_is_met(only):
    target = Target("t", "spectralmoe", "limit", ("a",), 1.05)
    row = case("a", 1.04)["ratios"][0]
    bounds = {"low": row["low"], "high": row["high"]}
    assert only(target, [case("a", 1.04)]) == {"what": "t", "at_most": 1.05, "measured": 1.04, **bounds, "met": True}
    assert only(target, [case("a", 1.06)])["met"] is False
    assert only(target, [case("a", 1.05)])["met"] is True
    assert only(target, [case("b", 1.0)])["met"] is None
    assert only(target, [case("a", 1.0, over="best peer")])["measured"] is None


def test_of_several_cases_the_worst_counts_or_the_one_that_the_share_asks_for(only):
    cases = [case(key, middle) for key, middle in zip("abcde", (0.7, 1.3, 0.9, 0.6, 1.1), strict=True)]
    every, half = (Target("t", "spectralmoe", "limit", tuple("abcd"), 0.8, share) for share in (1.0, 0.5))
    assert only(every, cases)["measured"] == 1.3
    assert only(half, cases)["measured"] == 0.7
    assert only(half, cases)["met"] is True
    odd = Target("t", "spectralmoe", "limit", tuple("abcde"), 0.8, 0.5)
    assert only(odd, cases)["measured"] == 0.9  # 2 of 5 are not half
    assert only(half, cases[1:])["measured"] is None  # one of its cases was not run


@pytest.mark.parametrize("settings", [Settings(torch.device("cuda")), Settings(torch.device("cpu"), threads=1)])
def test_targets_are_for_two_threads_of_a_cpu(only, settings):
    target = Target("t", "spectralmoe", "limit", ("a",), 1.05)
    assert only(target, [case("a", 1.0)], settings)["met"] is None


def test_the_targets_are_those_that_were_set():
    found = {}
    for target in TARGETS:
        found.setdefault(target.what.split(",")[0], []).append(target.at_most)
    assert found["layer forward and backward / limit"] == [1.05, 1.10, 1.10, 1.15]
    assert found["layer forward / limit"] == [1.10, 1.15, 1.15, 1.25]
    assert found["layer forward and backward / best peer"] == [1.0, 1.0, 0.8]
    assert sorted({t.at_most for t in TARGETS if "router" in t.what}) == [1.3, 2.0]
    rest = [t.at_most for t in TARGETS if not t.what.startswith("layer") and "router" not in t.what]
    assert rest == [1.02, 1.5, 1.2, 1.0, 1.3, 0.6]
    shapes = {key.split(" gelu")[0] for t in TARGETS for key in t.keys if key.startswith("layer") and "gelu" in key}
    assert shapes == {
        "layer: N4096 D256 H1024 E8 k2",
        "layer: N2048 D512 H1024 E32 k4",
        "layer: N4096 D256 H1024 E64 k2",
        "layer: N8192 D128 H256 E128 k4",
    }


@pytest.fixture
def tiny(monkeypatch):
    """The suites as they are, with sizes that take no time and the naive peer alone."""
    shapes = tuple(Sizes(16 + i, 8, 8, 4, 2) for i in range(4))
    for module in (layer, memory, targets):
        monkeypatch.setattr(module, "SHAPES", shapes)
    monkeypatch.setattr(router, "FULL", (32, 16, 8, 4))
    monkeypatch.setattr(penalty, "FULL", {"depth": 1, "width": 16, "num_experts": 8, "hidden": 8, "batch": 8})
    monkeypatch.setattr(scaling, "BASE", Sizes(8, 8, 4, 8, 2))
    monkeypatch.setattr(scaling, "EXPERTS", (8, 1024))
    monkeypatch.setattr(scaling, "GROWING", {"k": (1, 2)})
    monkeypatch.setattr(scaling, "MIDDLE", Sizes(8, 8, 8, 4, 2))
    monkeypatch.setattr(decode, "SIZES", Sizes(1, 8, 8, 4, 2))
    monkeypatch.setattr(decode, "GATED", ("naive",))
    monkeypatch.setattr(peers, "PEERS", {"naive": peers.PEERS["naive"]})
    monkeypatch.setattr(subject, "matmul_rate", lambda dtype, device, size: matmul_rate(dtype, device, 16))
    monkeypatch.setattr(targets, "TARGETS", targets._targets())
    monkeypatch.setattr(runner, "threads", lambda count: nullcontext())  # one thread, whatever the settings say


@pytest.mark.full
def test_the_suites_measure_every_target(tiny):
    suites = ["layer", "router", "penalty", "scaling", "decode", "memory"]
    found = measured(suites, (torch.float32, torch.bfloat16))
    assert [row["what"] for row in found["targets"] if row["met"] is None] == [
        "compare on mnist5k (benchmarks/compare_speed.py)"
    ]


@pytest.mark.full
def test_the_suites_measure(tiny):
    found = measured(["router", "decode"], (torch.float32,))
    assert {row["met"] for row in found["targets"]} > {None}


def measured(suites, dtypes):
    """The results of a run in which every candidate passes its gate and takes time."""
    found = runner.run(suites, Settings(torch.device("cpu"), dtypes, rounds=1), idle=Idle(lambda: 0.0))
    assert len({c["key"] for c in found["cases"]}) == len(found["cases"])
    failed = [(c["key"], x) for c in found["cases"] for x in c["candidates"] if x["gate"].startswith("failed")]
    assert failed == []
    for one in found["cases"]:
        assert all(x["value"]["median"] > 0 for x in one["candidates"])
    return found


@pytest.mark.full
def test_peak_memory_is_the_same_in_every_run(tiny):
    settings = Settings(torch.device("cpu"))
    values = []
    for _ in range(2):
        found = runner.run(["memory"], settings, idle=Idle(lambda: 0.0))
        values.append([[c["value"]["median"] for c in one["candidates"]] for one in found["cases"]])
    assert values[0] == values[1]
