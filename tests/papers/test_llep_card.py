"""The card of least-loaded plans: loads that rows share, and a tiny run with every row and field."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from spectralmoe.experiments.cards import Desk, run_card

CARD = Path(__file__).parents[2] / "papers" / "llep"


@pytest.fixture(scope="module")
def sizes(card):
    return replace(card.QUICK_SIZES, windows=32, batch=4, tokens=1024)


def test_drawn_loads_have_their_share_and_move_where_they_say(card, sizes):
    from loads import SKEWS, drawn_steps

    sizes = replace(sizes, steps=6)
    for load, share in SKEWS.items():
        steps = drawn_steps(load, 3, sizes)
        assert steps == drawn_steps(load, 3, sizes)
        assert all(sum(counts) == sizes.slots for step in steps for counts in step)
        busiest = [max(range(32), key=counts.__getitem__) for _, counts in steps]
        assert all(max(counts) >= share * sizes.slots for _, counts in steps)
        assert share == 0 or (len(set(busiest)) > 1) == ("another" in load)
        assert all(seen == before for (_, before), (seen, _) in pairwise(steps))


def test_the_rows_do_what_their_names_say_on_a_drawn_load(card, sizes, tmp_path):
    cells = {
        row: card.measure({"row": row, "load": "95% to one", "seed": 0}, Desk(tmp_path, {}), print, sizes=sizes)
        for row in card.PLANS
    }
    assert cells["expert parallel"]["imbalance"] > 7.6
    assert cells["expert parallel"]["copies"] == cells["replicas, seen"]["copies"] == 0
    assert cells["least loaded"]["imbalance"] < cells["random spill"]["imbalance"]
    for row, capacity in (("least loaded", 1.0), ("least loaded, 1.1", 1.1), ("least loaded, 1.3", 1.3)):
        assert cells[row]["imbalance"] == pytest.approx(capacity, abs=2e-3)
    assert cells["least loaded"]["gigabytes"] < cells["expert parallel"]["gigabytes"]


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, sizes, tmp_path):
    for ran in (True, False):  # a rerun does only what is missing
        count, notes = run_card(card.card(sizes), tmp_path, tmp_path / "work", 1, lambda text, done, detail="": None)
        assert ((count > 0), notes) == (ran, [])
    cells = json.loads((tmp_path / "results.json").read_text())
    assert {(cell["row"], cell["load"]) for cell in cells} == {(row, load) for row in card.PLANS for load in card.LOADS}
    assert all(cell.keys() >= {column.key for column in card.COLUMNS} for cell in cells)
