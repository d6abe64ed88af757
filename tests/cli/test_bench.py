"""``spectralmoe bench`` as a user meets it."""

import json
import shutil

import pytest

from spectralmoe.bench import idle
from spectralmoe.cli.app import run
from spectralmoe.json_files import read_json


@pytest.fixture
def busy(monkeypatch):
    monkeypatch.setattr(idle.Idle, "others", lambda self: 9.0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder that one run of the verb wrote, in as many rounds as an interval takes."""
    out = tmp_path_factory.mktemp("bench")
    quick = ("--quick", "--rounds", "6", "--threads", "1", "--allow-busy", "--out", str(out))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(idle.Idle, "others", lambda self: 9.0)
        assert run(["bench", "router", *quick]) == 0
    return out


@pytest.fixture
def stored(measured, busy, tmp_path):
    return shutil.copytree(measured, tmp_path / "out") / "bench.json"


def test_bench_writes_json_table_and_picture(stored):
    assert sorted(path.name for path in stored.parent.iterdir()) == [
        f"bench.{kind}" for kind in ("json", "md", "pdf", "png", "svg")
    ]
    found = read_json(stored)
    assert found["busy"] is True
    assert {case["suite"] for case in found["cases"]} == {"router"}
    assert all(c["gate"] == "passed" for case in found["cases"] for c in case["candidates"] if c["kind"] == "ours")
    assert all(row["met"] is None for row in found["targets"])  # small sizes never meet a target


def test_bench_prints_a_table_or_json(call, busy):
    arguments = ("bench", "router", "--quick", "--rounds", 2, "--threads", 1, "--allow-busy")
    code, out, _ = call(*arguments)
    assert code == 0
    assert "not for the record" in out
    assert "| eigenbasis | ours |" in out
    code, out, err = call(*arguments, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["settings"]["rounds"] == 2


@pytest.mark.full
def test_memory_is_kept_when_asked_and_again_in_the_check(call, busy, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr("spectralmoe.bench.allocator.keep_freed_memory", lambda: kept.append(True))
    quick = ("--quick", "--rounds", 1, "--threads", 1, "--allow-busy", "--out", tmp_path)
    assert call("bench", "router", *quick, "--keep-memory")[0] == 0
    assert read_json(tmp_path / "bench.json")["settings"]["keep_memory"] is True
    assert "freed memory kept" in (tmp_path / "bench.md").read_text()
    assert call("bench", "--check", tmp_path / "bench.json")[0] == 0
    assert kept == [True, True]


def test_bench_refuses_a_busy_machine(refused, busy):
    assert "not idle at the start" in refused("bench", "router", "--quick")


def test_mistakes_are_one_line(refused, tmp_path):
    assert "unknown suite 'layers'" in refused("bench", "layers", "--quick")
    assert "unknown dtype 'fp8'" in refused("bench", "--dtype", "fp8")
    assert "no such file" in refused("bench", "--check", tmp_path / "none.json")


def test_check_warns_and_never_fails(call, stored):
    found = read_json(stored)
    for case in found["cases"]:
        for row in case["ratios"]:
            row |= {"median": row["median"] * 1e6, "high": row["high"] * 1e6}
    stored.write_text(json.dumps(found))
    code, out, _ = call("bench", "--check", stored)
    assert (code, out) == (0, "no stored ratio has grown\n")
    for case in found["cases"]:
        for row in case["ratios"]:
            row |= {"median": row["median"] * 1e-12, "high": row["high"] * 1e-12}
    stored.write_text(json.dumps(found))
    code, out, _ = call("bench", "--check", stored)
    assert code == 0
    assert "warning: router: " in out
    assert "of the stored ratios have grown" in out
