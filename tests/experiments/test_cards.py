"""The engine of cards: what is there is kept, killed or not; tables, figures and the check come from the cells."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import environment, output_of
from toy_card.plan import card

from spectralmoe.cli.app import run
from spectralmoe.experiments.cards import Desk, check_card, find_card, run_card, try_settings, write_card
from spectralmoe.json_files import read_json
from spectralmoe.training.loop import Diverged
from spectralmoe.training.tasks import Metric

psutil = pytest.importorskip("psutil")
TOY = Path(__file__).parents[1] / "toy_card"


def quiet(text, done):
    pass


def ran(plan, out, processes=1):
    out.mkdir(exist_ok=True)
    return run_card(plan, out, out, processes, quiet)


def begun(out):
    return (out / "begun").read_text().splitlines()


def test_a_card_tunes_measures_and_writes_everything(tmp_path):
    assert ran(card(range(3)), tmp_path) == (2 + 6 + 4, [])
    assert read_json(tmp_path / "tuning.json") == {"plain": {"factor": 1}, "twice as much": {"factor": 2}}
    cells = read_json(tmp_path / "results.json")
    assert [(cell["row"], cell["seed"], cell["value"]) for cell in cells][:3] == [
        ("plain", 0, 10),
        ("twice as much", 0, 20),
        ("plain", 1, 11),
    ]
    assert all(cell.keys() >= {"cpu", "threads", "versions"} for cell in cells)
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.startswith("# Toy: results\n\nWhat stands above.\n\nProcessors: A ")
    assert "| plain | 3 | A | 11.7 ±5.2 |" in text
    assert "### Values: paired differences" in text
    assert "| twice as much | plain | 3 | +11.7 ±5.2 separated |" in text
    assert {path.name for path in tmp_path.glob("values.*")} == {"values.svg", "values.pdf", "values.png"}
    assert not (tmp_path / "cells").exists()


def test_tables_and_figures_are_drawn_again_from_the_cells(tmp_path, user_error):
    with user_error("holds no cells of this card"):
        write_card(card(range(2)), tmp_path, tmp_path)
    ran(card(range(2)), tmp_path)
    lines = (tmp_path / "RESULTS.md").read_text()
    (tmp_path / "RESULTS.md").unlink()
    (tmp_path / "values.svg").unlink()
    begun_before = begun(tmp_path)
    assert write_card(card(range(9)), tmp_path, tmp_path) == []
    assert ((tmp_path / "RESULTS.md").read_text(), begun(tmp_path)) == (lines, begun_before)
    assert (tmp_path / "values.svg").exists()


def test_a_card_grows_and_does_nothing_twice(tmp_path):
    ran(card(range(2)), tmp_path)
    before = read_json(tmp_path / "results.json")
    assert ran(card(range(2)), tmp_path) == (0, [])
    assert ran(card(range(4)), tmp_path)[0] == 4
    assert read_json(tmp_path / "results.json")[: len(before)] == before
    assert len(begun(tmp_path)) == 2 + 8 + 4
    (tmp_path / "results.json").write_text(json.dumps(before[1:]))  # one taken out is run again, at the end
    assert ran(card(range(2)), tmp_path)[0] == 1


def test_settings_that_would_change_cells_are_refused(tmp_path, user_error):
    ran(card(range(1)), tmp_path)
    with user_error("epochs = 1, not 2"):
        ran(card(range(1), epochs=2), tmp_path)


def test_a_kept_folder_is_whole_or_not_there_and_filled_once(tmp_path):
    desk, seen = Desk(tmp_path, {}), []

    def fill(place):
        place.mkdir()
        (place / "half").touch()
        seen.append(place)
        if len(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        desk.kept("one", fill)
    assert not (tmp_path / "one").exists()
    assert desk.kept("one", fill) == desk.kept("one", fill) == tmp_path / "one"
    assert len(seen) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"one", "one.lock"}


def test_a_diverged_cell_is_kept_and_said(tmp_path):
    count, notes = ran(card((0, 99)), tmp_path)
    assert count == 2 + 4 + 4
    assert notes[0] == "diverged: plain, seed 99: the loss is nan"
    assert "| plain | 1, 1 diverged | A | 10.0 |" in (tmp_path / "RESULTS.md").read_text()
    assert ran(card((0, 99)), tmp_path) == (0, notes)


def test_check_runs_again_and_stores_nothing(tmp_path):
    ran(card(range(3)), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.name != "begun"}
    first, *lines = check_card(card(range(3)), tmp_path, 1, quiet)
    assert first.startswith("on ")
    assert lines[0] == "plain: value 10.0000 (1), stored 11.6667 ±5.1716 (3): within"
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("text", ["{}", "3"])
def test_a_file_of_another_kind_is_named(tmp_path, user_error, text):
    ran(card(range(1)), tmp_path)
    (tmp_path / "results.json").write_text(text)
    with user_error(str(tmp_path / "results.json"), "not a file of this card"):
        ran(card(range(1)), tmp_path)


def test_the_verb(no_plan, tmp_path, capsys):
    arguments = ["card", str(TOY), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--processes", "1"]
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"cells": 12, "out": str(tmp_path / "out"), "notes": []}
    assert run(arguments) == 0
    assert "0 cells were run" in capsys.readouterr().out
    assert find_card(TOY, quick=True).title == "Toy"
    for more, words in (
        (["card", str(tmp_path)], "plan.py: no such file; a card is a folder with a plan.py"),
        (["card", str(TOY), "--quick", "--check"], "do not go together"),
    ):
        assert run(more) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "plan.py").write_text("")
    assert run(["card", str(tmp_path)]) == 2
    assert "another module called plan is loaded" in capsys.readouterr().err


WORKER = """
import json, random, sys
from pathlib import Path
from dying import killed
from seeds import shifted
from toy_card.plan import card
from spectralmoe.experiments.cards import run_card

out, seeds, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
plan = card(range(seeds))


def work(progress):
    run_card(plan, out, out, 1, progress)


draw, kills_done, lost, files = random.Random(shifted(0)), 0, 0, {}
for _ in range(kills):
    kills_done += killed(draw.randint(1, 6 * seeds // kills), work)
    content = {name: json.loads((out / f"{name}.json").read_text()) if (out / f"{name}.json").exists() else []
               for name in ("results", "others")}
    cells = {(name, cell["row"], cell["seed"]): cell for name, known in content.items() for cell in known}
    for path in out.glob("cells/*/*.json"):
        if path.parent.name != "tuning":
            cell = json.loads(path.read_text())
            cells[path.parent.name, cell["row"], cell["seed"]] = cell
    lost += sum(cells.get(key) != cell for key, cell in files.items())
    files = cells
assert not killed(None, work)
begun = (out / "begun").read_text().splitlines()
results = json.loads((out / "results.json").read_text())
print(json.dumps({
    "killed": kills_done, "lost": lost, "begun": len(begun),
    "right": sorted((c["row"], c["seed"], c["value"]) for c in results)
    == sorted((row, seed, (1 + place) * (10 + seed**2)) for place, row in enumerate(("plain", "twice as much"))
              for seed in range(seeds)),
    "left": [path.name for path in out.rglob("*") if "part" in path.name or path.name == "cells"],
}))
"""


@pytest.mark.parametrize(("seeds", "kills"), [(40, 20), pytest.param(80, 40, marks=pytest.mark.full)])
def test_a_card_killed_at_random_moments_loses_nothing_and_does_nothing_twice(tmp_path, seeds, kills):
    found = json.loads(output_of(WORKER, tmp_path, seeds, kills).splitlines()[-1])
    assert (found["killed"], found["lost"], found["right"], found["left"]) == (kills, 0, True, [])
    total = 2 + 2 * seeds + 4
    assert total <= found["begun"] <= total + kills


@pytest.mark.full
@pytest.mark.slow
def test_a_killed_card_leaves_no_process(tmp_path):
    command = ["card", str(TOY), "--quick", "--out", str(tmp_path / "out"), "--work", str(tmp_path), "--processes", "2"]
    parent = subprocess.Popen(
        [sys.executable, "-m", "spectralmoe", *command], env=environment(), stderr=subprocess.PIPE
    )
    for line in parent.stderr:
        if b"seed 100" in line:  # two cells that work for an hour
            break
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive


def test_a_try_that_diverges_counts_as_one_and_is_never_the_best(user_error):
    def train(setting):
        if setting["lr"] > 1:
            raise Diverged("the loss is nan")
        return 90.0, setting["lr"]

    tried = try_settings([{"lr": 5.0}, {"lr": 0.1}, {"lr": 0.2}], train, lambda share: None)
    assert [one["validation_accuracy"] for one in tried.tries] == [None, 90.0, 90.0]
    assert (tried.setting, tried.made) == ({"lr": 0.1}, 0.1)  # the first of equal ones
    with user_error("diverged with every setting", "5.0"):
        try_settings([{"lr": 5.0}], train, lambda share: None)


def test_tries_take_the_lowest_where_lower_is_better():
    bits = Metric("bits", "bits", "bits per byte", "lower")
    tried = try_settings([{"lr": 3.0}, {"lr": 2.0}], lambda s: (s["lr"], None), lambda share: None, bits)
    assert (tried.setting, tried.tries[0]) == ({"lr": 2.0}, {"lr": 3.0, "validation_bits": 3.0})
