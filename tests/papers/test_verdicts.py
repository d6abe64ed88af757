"""RESULTS.md of each card is what its stored cells give, and every interval in a README stands in RESULTS.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from spectralmoe.experiments.cards import Cells, find_card
from spectralmoe.experiments.cards.results import result_lines
from spectralmoe.json_files import read_json

PAPERS = Path(__file__).parents[2] / "papers"
CARDS = sorted(path.parent.name for path in PAPERS.glob("*/RESULTS.md"))
INTERVAL = re.compile(r"((?<![\w.])[+-])?(\d+(?:\.\d+)?) ±(\d+(?:\.\d+)?)")
"""Sign, mean and half width."""
OWN_TESTS = ("sr-moe", "emoe")  # whose sentences are computed anew in test_stored_sentences.py


@pytest.fixture
def find(monkeypatch):
    """A card by name, whose modules are gone afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield lambda name: find_card(PAPERS / name)
    for name in set(sys.modules) - before:
        if str(PAPERS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def content(path, step):
    return read_json(path) if path.exists() else [] if isinstance(step, Cells) else {}


@pytest.mark.parametrize("name", CARDS)
def test_results_are_those_of_the_stored_cells(find, name):
    card, folder = find(name), PAPERS / name
    stored = {step.file: content(folder / f"{step.file}.json", step) for step in card.steps}
    lines = result_lines(card.title, card.about, card.sections(stored))
    assert (folder / "RESULTS.md").read_text(encoding="utf-8").splitlines() == lines


@pytest.mark.parametrize("name", [name for name in CARDS if name not in OWN_TESTS])
def test_intervals_in_sentences_are_those_of_the_results(name):
    """With its sign; of a separated difference the words may say the direction: "behind by 1.5 ±0.5"."""
    results = set(INTERVAL.findall((PAPERS / name / "RESULTS.md").read_text(encoding="utf-8")))
    said = INTERVAL.findall(" ".join((PAPERS / name / "README.md").read_text(encoding="utf-8").split()))
    assert [interval for interval in said if not results & set(meant(*interval))] == []


def meant(sign, mean, half):
    """What an interval of a sentence may be in the results."""
    signs = sign or (["", "+", "-"] if float(mean) > float(half) else ["", "+"])
    return [(each, mean, half) for each in signs]


def test_of_differences_that_are_not_separated_the_sign_counts():
    assert ("-", "0.9", "1.6") not in meant("", "0.9", "1.6")
    assert ("-", "1.5", "0.5") in meant("", "1.5", "0.5")
    assert meant("-", "1.5", "0.5") == [("-", "1.5", "0.5")]
    assert INTERVAL.findall("-0.4 ±1.9, K-2 ±1") == [("-", "0.4", "1.9"), ("", "2", "1")]
