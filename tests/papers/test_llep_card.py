"""The card of least-loaded plans: loads that rows share, and a tiny run with every row and field."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from seeds import shifted

from spectralmoe.errors import UserError
from spectralmoe.experiments.cards import Desk, run_card
from spectralmoe.parallel import plan_least_loaded, plan_native

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


def test_a_random_spill_is_seeded_and_balances_less(card):
    load = [249_033, *[423] * 31]  # 95% to one
    plan = card.plan_random_spill(load, 8, seed=shifted(1))
    assert plan == card.plan_random_spill(load, 8, seed=shifted(1))
    assert plan != card.plan_random_spill(load, 8, seed=shifted(2))
    assert plan_native(load, 8).imbalance() > plan.imbalance() > plan_least_loaded(load, 8).imbalance()


def test_a_random_spill_gives_every_token_one_place(card):
    for load, devices in (([9_999, 0, 3, 5], 2), ([20_000, 700, 1, 0, 5_000, 0, 9, 80], 8), ([0] * 8, 4)):
        plan = card.plan_random_spill(load, devices, chunk=64, seed=shifted(0))
        for number, parts in zip(load, plan.intervals, strict=True):
            assert [part.start for part in parts] == [0, *[part.end for part in parts[:-1]]][: len(parts)]
            assert sum(part.end - part.start for part in parts) == number
        assert sum(plan.device_load()) == sum(load)
    assert card.plan_random_spill([9_000, 0, 1], 1) == plan_native([9_000, 0, 1], 1)
    with pytest.raises(UserError, match="chunk must be"):
        card.plan_random_spill([1], 1, chunk=0)


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
