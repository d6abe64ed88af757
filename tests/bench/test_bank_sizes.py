"""The table of bank sizes: every bank has a row, and the numbers are those of the formulas."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

from spectralmoe.experts import EXPERTS

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield import_module("bank_sizes")
    del sys.modules["bank_sizes"]


def test_every_bank_has_rows_in_the_table_and_in_the_file(script, tmp_path, capsys):
    script.main(["--quick", "--out", str(tmp_path / "sizes.json")])
    stored = json.loads((tmp_path / "sizes.json").read_text())
    assert {row["bank"] for row in stored["banks"]} == set(EXPERTS)
    assert stored["sizes"] == {"d": 16, "h": 32, "e": 4}
    lines = (tmp_path / "sizes.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 2 + len(stored["banks"])
    assert capsys.readouterr().out.splitlines() == lines


def test_numbers_are_those_of_the_formulas(script):
    d, h, e = script.FULL
    found = {(row["bank"], row["form"]): row for row in script.rows(script.FULL, ["feed_forward", "eigen", "mpo"])}
    plain = found["feed_forward", ""]
    assert (plain["parameters"], plain["own"], plain["shared"]) == (2 * e * d * h, 2 * d * h, 0)
    assert (plain["bytes"], plain["parameters_share"], plain["bytes_share"]) == (8 * e * d * h, 1.0, 1.0)
    assert found["feed_forward", "swiglu"]["parameters_share"] == 1.5
    assert found["eigen", "rank D/E"]["parameters"] == e * (2 * d + 1) * (d // e)
    outer = 2 * 64 * 64  # D = 8 * 8 * 8 and H = 8 * 16 * 8: both ends of a matrix are orthogonal 64 x 64
    assert found["mpo", "full bonds"]["own"] == 2 * outer
    assert found["mpo", "full bonds"]["shared"] == 2 * d * h
    assert found["mpo", "bond 8"]["parameters"] == 2 * (8 * 128 * 8 + e * 2 * 64 * 8)


def test_a_bank_that_is_not_described_is_an_error(script, monkeypatch, user_error):
    monkeypatch.setitem(EXPERTS, "new", EXPERTS["eigen"])
    with user_error("'new'", "FORMS"):
        script.rows(script.QUICK, ["new"])
    monkeypatch.setattr(script, "FORMS", {"new": {"": lambda sizes: {}}})
    with user_error("'new' needs 'rank'", "FORMS"):
        script.rows(script.QUICK, ["new"])
