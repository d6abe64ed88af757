"""Cells in files of their own: nothing lost and nothing twice, however often a run is killed; rows that diverge."""

from __future__ import annotations

import json

import pytest
from forked import output_of
from grid_cells import cell_jobs, diverging, run_missing, square

from spectralmoe.experiments.grid import CellJob, finished_cells, run_cells
from spectralmoe.experiments.run_folder import run_folder
from spectralmoe.json_files import read_json


def quiet(text, done):
    pass


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
def test_cells_are_files_that_record_where_they_ran(tmp_path, processes):
    found = run_missing(tmp_path / "cells", 3, tmp_path / "log", processes)
    assert {cell["number"]: cell["square"] for cell in found.values()} == {0: 0, 1: 1, 2: 4}
    for name, cell in found.items():
        assert cell == read_json(tmp_path / "cells" / f"{name}.json")
        assert cell.keys() == {"number", "square", "host", "cpu", "threads", "versions"}
        assert cell["threads"] == 1 or processes == 1
    grown = run_missing(tmp_path / "cells", 5, tmp_path / "log", processes)
    assert len(grown) == 5
    assert sorted((tmp_path / "log").read_text().split()) == list("01234")  # each began once


def test_a_cell_that_diverges_is_a_cell_and_the_others_go_on(tmp_path):
    jobs = [*cell_jobs(1, tmp_path / "log", diverging), *cell_jobs(3, tmp_path / "log")[1:]]
    found = dict(run_cells(tmp_path, jobs, 1, quiet))
    assert found["number-0"]["diverged"] == "number 0 is not finite"
    assert [found[f"number-{n}"]["square"] for n in (1, 2)] == [1, 4]


def test_two_cells_of_one_file_are_refused(tmp_path, user_error):
    jobs = [CellJob("same", {"row": row}, row, square, (0, str(tmp_path / "log"))) for row in "ab"]
    with user_error("same.json", "'row': 'b'"):
        list(run_cells(tmp_path, jobs, 1, quiet))


@pytest.mark.parametrize("text", ["[1]", '{"number": 1}', "{"])
def test_a_damaged_cell_is_named(tmp_path, user_error, text):
    (tmp_path / "one.json").write_text(text)
    with user_error(str(tmp_path / "one.json")):
        finished_cells(tmp_path, ("number", "cpu"))


def test_settings_that_grow_are_united_and_others_refused(tmp_path, user_error):
    first = {"rows": ["b", "a"], "seeds": 3, "epochs": 2}
    with run_folder(tmp_path, first, (), grows=("rows", "seeds")) as claimed:
        assert claimed == first
    with run_folder(tmp_path, {"rows": ["c", "a"], "seeds": 2, "epochs": 2}, (), grows=("rows", "seeds")) as claimed:
        assert claimed == {"rows": ["b", "a", "c"], "seeds": 3, "epochs": 2}
    assert read_json(tmp_path / "settings.json") == claimed
    with (
        user_error("epochs = 2, not 4"),
        run_folder(tmp_path, {"rows": ["d"], "seeds": 9, "epochs": 4}, (), grows=("rows", "seeds")),
    ):
        pass
    assert read_json(tmp_path / "settings.json") == claimed


def test_a_setting_that_was_added_is_taken_over_once(tmp_path, user_error):
    old, new = {"epochs": 2}, {"epochs": 2, "late": {"layers": 2}}
    with run_folder(tmp_path, old, ()):
        pass
    with user_error("not from a run"), run_folder(tmp_path, new, ()):
        pass
    with run_folder(tmp_path, new, (), adds=("late",)):
        assert read_json(tmp_path / "settings.json") == new
    changed = {"epochs": 2, "late": {"layers": 3}}
    with user_error("late.layers = 2, not 3"), run_folder(tmp_path, changed, (), adds=("late",)):
        pass


WORKER = """
import json, random, sys
from pathlib import Path
from dying import killed
from grid_cells import run_missing
from seeds import shifted

out, count, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
cells, log = out / "cells", out / "log"


def work(progress):
    run_missing(cells, count, log, 1, progress)


draw, lost, kills_done, files = random.Random(shifted(0)), 0, 0, {}
for _ in range(kills):  # three moments a cell; they do less than the whole together
    kills_done += killed(draw.randint(1, 3 * count // kills - 1), work)
    now = {path.name: path.read_bytes() for path in cells.glob("*.json")}
    lost += sum(now.get(name) != text for name, text in files.items())
    files = now
assert not killed(None, work)
begun = log.read_text().split()
finished = {path.stem: json.loads(path.read_text())["square"] for path in cells.glob("*.json")}
print(json.dumps({"killed": kills_done, "lost": lost, "begun": len(begun), "distinct": len(set(begun)),
                  "right": finished == {f"number-{n}": n**2 for n in range(count)}}))
"""


@pytest.mark.parametrize(("count", "kills"), [(60, 20), pytest.param(1000, 200, marks=pytest.mark.full)])
def test_killed_at_random_moments_nothing_is_lost_and_nothing_done_twice(tmp_path, count, kills):
    """Twenty times: at most the cell that was running is begun again."""
    found = json.loads(output_of(WORKER, tmp_path, count, kills).splitlines()[-1])
    assert (found["killed"], found["lost"], found["right"]) == (kills, 0, True)
    assert found["distinct"] == count
    assert count <= found["begun"] <= count + kills
