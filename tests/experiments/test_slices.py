"""Slices of a card's cells: killed at random moments and put together, they come to what one run comes to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import output_of
from toy_card.plan import card

from spectralmoe.cli.app import run
from spectralmoe.experiments.cards import run_card, take_card
from spectralmoe.experiments.grid import Slice
from spectralmoe.experiments.run_folder import run_folder
from spectralmoe.json_files import read_json

TOY = Path(__file__).parents[1] / "toy_card"


def quiet(text, done):
    pass


def test_slices_are_all_cells_once_and_do_not_move(user_error):
    cells = list(range(10))
    slices = [Slice(place, 4).of(cells) for place in range(1, 5)]
    assert sorted(cell for one in slices for cell in one) == cells
    assert slices[1] == [1, 5, 9]
    for text in ("0/4", "5/4", "4", "a/b", "-1/4"):
        with user_error("no slice I/N"):
            Slice.parse(text)


def test_what_comes_after_the_tuning_waits_for_all_of_it(tmp_path, user_error):
    """Two slices: each tunes one of the two rows."""
    plan, out = card(range(2)), tmp_path / "out"

    def take(place):
        return take_card(plan, out, tmp_path, 1, quiet, part=Slice(place, 2))

    assert take(2) == (1, "1 of 2 cells of tuning are not there, the first plain")
    with user_error("nothing was collected: 1 of 2 cells of tuning are not there"):
        run_card(plan, out, tmp_path, 1, quiet, collect=True)
    assert take(1) == (1 + 2 + 2, "")
    with user_error("nothing was collected: 2 of 4 cells of results are not there, the first twice_as_much-0"):
        run_card(plan, out, tmp_path, 1, quiet, collect=True)
    assert take(2) == (4, "")
    assert take(2) == (0, "")
    assert not (out / "results.json").exists()
    assert run_card(plan, out, tmp_path, 1, quiet, collect=True)[0] == 0
    assert [cell["value"] for cell in read_json(out / "results.json")] == [10, 20, 11, 22]
    assert not (out / "cells").exists()


def test_slices_share_a_folder_and_a_whole_run_does_not(tmp_path, user_error):
    with run_folder(tmp_path, {"epochs": 1}, (), shared=True):
        with run_folder(tmp_path, {"epochs": 1}, (), shared=True):
            pass
        with user_error("epochs = 1, not 2"), run_folder(tmp_path, {"epochs": 2}, (), shared=True):
            pass
        with user_error("another run is writing"), run_folder(tmp_path, {"epochs": 1}, ()):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", ".lock"}


def test_the_verb_says_what_a_slice_came_to(no_plan, tmp_path, capsys):
    start = ["card", str(TOY), "--out", str(tmp_path / "out"), "--work", str(tmp_path), "--processes", "1"]
    assert run([*start, "--take", "1/2"]) == 0
    told = capsys.readouterr()
    assert told.out == "slice 1/2: 1 cell run\n"
    assert "note: 1 of 2 cells of tuning are not there, the first twice_as_much; the cells after them wait" in told.err
    assert run([*start, "--take", "2/2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"take": "2/2", "cells": 1 + 3 + 2, "missing": ""}
    assert run([*start[:-2], "--collect"]) == 2
    assert "3 of 6 cells of results are not there" in capsys.readouterr().err


WORKER = """
import json, random, sys
from pathlib import Path
from dying import killed
from seeds import shifted
from toy_card.plan import card
from spectralmoe.experiments.cards import run_card, take_card
from spectralmoe.experiments.grid import Slice

folder, seeds, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
plan, out, work = card(range(seeds)), folder / "slices", folder / "work"
work.mkdir()
slices, draw = [Slice(place, 3) for place in (1, 2, 3)], random.Random(shifted(0))


def take(part):
    return lambda progress: take_card(plan, out, work, 1, progress, part=part)


done, changed, seen = 0, 0, {}
while done < kills:  # a slice that waits for another's tuning ends before its moment
    done += killed(draw.randint(1, 4), take(draw.choice(slices)))
    now = {path: path.read_bytes() for path in out.glob("cells/*/*.json")}
    changed += sum(now.get(path) != text for path, text in seen.items())
    seen = now
for part in slices * 2:  # the tuning, then the others
    assert not killed(None, take(part))
begun = (work / "begun").read_text().splitlines()
run_card(plan, out, work, 1, lambda *_: None, collect=True)
again = (work / "begun").read_text().splitlines()
(folder / "whole").mkdir()
run_card(plan, folder / "whole", folder / "whole", 1, lambda *_: None)
files = ("tuning.json", "results.json", "others.json")
print(json.dumps({"killed": done, "changed": changed, "begun": len(begun), "again": len(again) - len(begun),
                  "same": [(out / name).read_text() == (folder / "whole" / name).read_text() for name in files],
                  "left": [path.name for path in out.rglob("*") if "part" in path.name or path.suffix == ".lock"]}))
"""


@pytest.mark.parametrize(("seeds", "kills"), [pytest.param(60, 60, marks=pytest.mark.full)])
def test_slices_killed_at_random_moments_come_to_what_one_run_comes_to(tmp_path, seeds, kills):
    """Tuning, results and others of a card; each kill costs at most the cell that was running."""
    found = json.loads(output_of(WORKER, tmp_path, seeds, kills).splitlines()[-1])
    assert (found["changed"], found["again"], found["same"], found["left"]) == (0, 0, [True] * 3, [])
    assert found["killed"] == kills
    total = 2 + 2 * seeds + 4
    assert total <= found["begun"] <= total + kills
