"""Running suites: files, the busy machine, tables, the picture, the regression check."""

import copy
import math

import pytest
import torch

from spectralmoe import UserError
from spectralmoe.bench import case as case_module
from spectralmoe.bench import check, runner
from spectralmoe.bench.case import Candidate, Case
from spectralmoe.bench.idle import Idle
from spectralmoe.bench.settings import Settings
from spectralmoe.bench.show import as_markdown, ratio_panels, roles
from spectralmoe.draw.panels import Mark
from spectralmoe.json_files import read_json

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, quick=True, threads=1, rounds=6)


class Loaded(Idle):
    """A machine whose others keep these numbers of threads busy, look after look."""

    def __init__(self, *loads):
        super().__init__()
        self.loads = iter(loads)

    def others(self):
        return next(self.loads, 0.0)


IDLE = Loaded()


@pytest.fixture
def suites(monkeypatch):
    """Two suites of made-up candidates, whose work says how many seconds it takes."""
    monkeypatch.setattr(case_module, "pick_stopwatch", lambda device: lambda work: work())

    def cases(settings):
        drift = iter(range(1, 10**6))  # the machine slows down, for all alike

        def work(seconds):
            return lambda: seconds * (1 + next(drift) / 1000)

        candidates = [
            Candidate("ours", work(0.012), "ours", check=lambda: None),
            Candidate("peer <a|b>", work(0.01), "peer", check=lambda: None),
            Candidate("broken", work(0.001), "peer", check=lambda: "x is off"),
            Candidate("floor", work(0.006), "limit", flops=1e6),
            Candidate("high floor", work(0.009), "limit", flops=1e6),
            Candidate("other", work(0.01), "unlike", note="another function"),
        ]
        yield Case("one", "N1", candidates, CPU, skipped={"absent": "not installed"})

    def bytes_(settings):
        candidates = [Candidate(n, lambda: torch.empty(256), "unlike", held=h) for n, h in (("a", 0), ("b", 2048))]
        yield Case("two", "N1", candidates, CPU, unit="bytes", baseline="a")

    one, two = runner.Suite(cases, lambda settings: 1), runner.Suite(bytes_, lambda settings: 1)
    monkeypatch.setattr(runner, "SUITES", {"one": one, "two": two})


@pytest.fixture
def result(suites, tmp_path):
    return runner.run(["one", "two"], SETTINGS, out=tmp_path / "new", idle=IDLE)


def test_results_are_written_with_machine_and_versions(result, tmp_path):
    stored = read_json(tmp_path / "new" / "bench.json")
    assert stored["kind"] == "bench"
    assert stored["machine"]["torch"] == torch.__version__
    assert stored["machine"]["threads"] == 1
    assert stored["settings"]["suites"] == ["one", "two"]
    assert not stored["busy"]
    one, two = stored["cases"]
    ratios = {row["over"]: row for row in one["ratios"]}
    assert list(ratios) == ["limit", "best peer", "peer <a|b>", "other"]
    assert ratios["limit"]["side"] == "floor"
    assert ratios["best peer"]["side"] == "peer <a|b>"
    assert ratios["limit"]["median"] == pytest.approx(2.0, rel=0.02)
    assert ratios["best peer"]["median"] == pytest.approx(1.2, rel=0.02)
    assert ratios["limit"]["low"] <= ratios["limit"]["median"] <= ratios["limit"]["high"]
    times = [c["value"] for c in one["candidates"] if c["name"] == "floor"]
    assert one["candidates"][3]["gflops"] == pytest.approx(1e6 / times[0]["median"] / 1e9)
    assert [c["value"]["median"] for c in two["candidates"]] == [1024, 3072]  # 256 floats, and what b holds


def test_the_table_says_everything_that_a_reader_must_know(result):
    text = as_markdown(result)
    assert "| broken | peer | - |" in text
    assert "failed: x is off" in text
    assert "not gated; another function" in text
    assert "peer <a\\|b>" in text
    assert "- without absent: not installed" in text
    assert "not measured" in text
    assert "busy" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in lines)
    busy = as_markdown(result | {"busy": True, "load_of_others": 2.04})
    assert "**The machine was busy (others: 2.0 threads): not for the record.**" in busy


def test_the_picture_has_every_ratio(result):
    target = {"what": "a < b", "at_most": 1.5, "measured": 1.2, "low": 1.1, "high": 1.3, "met": True}
    first, second = ratio_panels(result | {"targets": [target]})[:2]
    assert first.marks == [Mark("a < b", "targets", 1.2, 1.1, 1.3, (), 1.5)]
    assert [mark.label for mark in second.marks] == ["N1: ours / limit", "N1: ours / best peer"]
    assert all(mark.low <= mark.middle <= mark.high for mark in second.marks)
    assert first.ratio


def test_a_case_is_about_limit_best_peer_and_baseline():
    rows = [{"of": "a", "over": over} for over in ("limit", "best peer", "peer 1", "plain", "plain again")]
    assert [row["over"] for row in roles({"ratios": rows, "baseline": "plain"})] == ["limit", "best peer", "plain"]
    assert [row["over"] for row in roles({"ratios": rows, "baseline": None})] == ["limit", "best peer"]
    assert roles({"ratios": rows[3:], "baseline": None}) == rows[3:]


def test_nothing_is_reported_from_a_busy_machine(suites, tmp_path):
    with pytest.raises(UserError, match=r"not idle at the start: others keep 3\.0 threads"):
        runner.run(["one"], SETTINGS, out=tmp_path, idle=Loaded(3.0))
    with pytest.raises(UserError, match="not idle during one: N1"):
        runner.run(["one"], SETTINGS, out=tmp_path, idle=Loaded(0.0, 3.0))
    assert not (tmp_path / "bench.json").exists()
    found = runner.run(["one"], SETTINGS, allow_busy=True, idle=Loaded(0.0, 3.0))
    assert found["busy"] is True
    assert found["load_of_others"] == 3.0


def test_a_machine_that_does_not_say_is_not_idle(suites):
    with pytest.raises(UserError, match="nothing here says whether the machine is idle"):
        runner.run(["one"], SETTINGS, idle=Loaded(math.nan))
    found = runner.run(["one"], SETTINGS, allow_busy=True, idle=Loaded(math.nan, 0.0))
    assert found["busy"] is True


def test_a_stopped_run_keeps_its_cases_and_goes_on(suites, tmp_path):
    with pytest.raises(UserError, match="not idle during two: N1"):
        runner.run(["one", "two"], SETTINGS, out=tmp_path, idle=Loaded(0.0, 0.25, 3.0))
    stopped = read_json(tmp_path / "bench.json")
    assert [case["key"] for case in stopped["cases"]] == ["one: N1"]
    assert not stopped["complete"]
    assert "the same command goes on" in (tmp_path / "bench.md").read_text()
    seen = []
    whole = runner.run(
        ["one", "two"], SETTINGS, out=tmp_path, progress=lambda text, done, detail: seen.append((text, done)), idle=IDLE
    )
    assert whole["complete"]
    assert whole["load_of_others"] == 0.25
    assert read_json(tmp_path / "bench.json")["cases"][0] == stopped["cases"][0]  # not measured again
    assert [case["key"] for case in whole["cases"]] == ["one: N1", "two: N1"]
    assert {text for text, _ in seen} == {"two: N1 (2/2)"}
    assert all(0.5 <= done <= 1 for _, done in seen)
    assert "goes on" not in (tmp_path / "bench.md").read_text()


def test_a_finished_run_is_measured_anew(result, tmp_path):
    runner.run(["two"], SETTINGS, out=tmp_path / "new", idle=IDLE)
    assert read_json(tmp_path / "new" / "bench.json")["settings"]["suites"] == ["two"]


def test_a_stopped_run_of_another_kind_is_not_mixed_in(suites, tmp_path):
    with pytest.raises(UserError, match="not idle"):
        runner.run(["one", "two"], SETTINGS, out=tmp_path, idle=Loaded(0.0, 0.0, 3.0))
    before = (tmp_path / "bench.json").read_text()
    with pytest.raises(UserError, match=r"bench\.json holds a stopped run with other settings; remove it"):
        runner.run(["one"], SETTINGS, out=tmp_path, idle=IDLE)
    assert (tmp_path / "bench.json").read_text() == before
    (tmp_path / "bench.json").write_text("[1]")
    with pytest.raises(UserError, match="is not a result of spectralmoe bench"):
        runner.run(["one"], SETTINGS, out=tmp_path, idle=IDLE)


def test_progress_tells_each_gate_and_each_round(suites):
    seen = []
    runner.run(["one", "two"], SETTINGS, progress=lambda *told: seen.append(told), idle=IDLE)
    shares = [done for _, done, _ in seen]
    assert shares == sorted(shares)
    first = [detail for text, _, detail in seen if text == "one: N1 (1/2)"]
    assert first[:2] == ["checking ours", "checking peer <a|b>"]
    assert first[-6:] == [f"round {number}/6" for number in range(1, 7)]
    assert [done for text, done, detail in seen if detail == "round 6/6"] == [0.5]


@pytest.mark.parametrize("name", ["router", "penalty", "layer", "scaling"])
def test_every_suite_knows_how_many_cases_it_has(name):
    suite = runner.SUITES[name]
    assert suite.count(SETTINGS) == sum(1 for _ in suite.cases(SETTINGS))


def test_threads_are_set_for_a_run_alone(suites):
    before = torch.get_num_threads()
    found = runner.run(["two"], Settings(CPU, threads=2), idle=IDLE)
    assert found["machine"]["threads"] == 2
    assert torch.get_num_threads() == before


@pytest.mark.gpu
@pytest.mark.parametrize("suite", ["layer", "router", "penalty", "step", "scaling", "decode", "memory"])
def test_the_suites_run_on_a_gpu(suite):
    settings = Settings(torch.device("cuda"), (torch.bfloat16,), quick=True, threads=1, rounds=6)
    found = runner.run([suite], settings, allow_busy=True)
    gates = {c["gate"] for case in found["cases"] for c in case["candidates"] if c["kind"] == "ours"}
    assert gates == {"passed"}
    assert all(row["median"] > 0 for case in found["cases"] for row in case["ratios"])
    assert all(row["met"] is None for row in found["targets"])


def test_an_unknown_suite_is_named(suites):
    with pytest.raises(UserError, match="unknown suite 'three'; known: one, two"):
        runner.run(["one", "three"], SETTINGS, idle=IDLE)


def test_the_check_warns_of_ratios_that_grew_and_of_what_is_gone(result):
    assert check.warnings(result, result) == []
    slower = copy.deepcopy(result)
    limit = slower["cases"][0]["ratios"][0]
    limit["median"] = 2 * max(limit["median"], limit["high"])
    old = result["cases"][0]["ratios"][0]["median"]
    assert check.warnings(result, slower) == [f"one: N1: ours / limit was {old:.2f}, now {limit['median']:.2f}"]
    assert check.warnings(slower, result) == []  # faster is no warning
    limit["median"] = 1.2 * old
    assert check.warnings(result, slower) == []  # within MORE
    broken = copy.deepcopy(result)
    broken["cases"][0]["candidates"][0]["gate"] = "failed: up is off"
    broken["cases"][0]["ratios"] = []
    assert (
        check.warnings(result, broken)[0] == f"one: N1: ours / limit was {old:.2f}, now not measured: failed: up is off"
    )


def test_the_check_repeats_the_stored_run(result, tmp_path):
    stored, suites, settings = check.read_stored(tmp_path / "new" / "bench.json")
    assert suites == ["one", "two"]
    assert settings == SETTINGS
    assert check.warnings(stored, result) == []


@pytest.mark.parametrize("text", ["[]", "{}", '{"kind": "bench", "settings": {"quick": false, "device": "cpu"}}'])
def test_the_check_refuses_other_files(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json is not "):
        check.read_stored(tmp_path / "a.json")
