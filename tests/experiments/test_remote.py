"""Cells on other machines: each in a process of its own, refused in one line where something is not shared."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from gloo_ranks import environment
from grid_cells import cell_jobs, refused
from seeds import shifted

from spectralmoe.cli.app import run
from spectralmoe.data.image_data import load_data
from spectralmoe.experiments import compare, one_job
from spectralmoe.experiments.apart import run_apart
from spectralmoe.experiments.grid import Slice, one_version, run_cells
from spectralmoe.experiments.one_job import write_jobs
from spectralmoe.experiments.remote import Dask, Submitit
from spectralmoe.json_files import read_json
from spectralmoe.machine import threads
from spectralmoe.training.settings import pick_device
from spectralmoe.training.tasks import ImageTask

TIMINGS = {"seconds", "seconds_per_epoch", "per_second"}


def quiet(text, done):
    pass


class Here:
    """An engine like the others: an executor of ``concurrent.futures``."""

    name = "this machine"

    @contextmanager
    def running(self, tasks, folder):
        with ThreadPoolExecutor(2) as pool:
            yield [pool.submit(run_apart, *task) for task in tasks]


@pytest.mark.full
def test_any_executor_runs_cells_and_tells_the_line_of_one_that_is_refused(tmp_path, user_error):
    jobs = [*cell_jobs(1, tmp_path / "log"), *cell_jobs(2, tmp_path / "log", refused)[1:]]
    with user_error("number 1 is refused"):
        list(run_cells(tmp_path / "cells", jobs, Here(), quiet))
    cell = read_json(tmp_path / "cells" / "number-0.json")
    assert (cell["square"], cell["threads"]) == (0, 1)
    assert {path.name for path in (tmp_path / "cells").iterdir()} == {"number-0.json"}


def test_a_cell_whose_file_is_there_is_not_run_again(tmp_path):
    (tmp_path / "done.json").write_text('{"square": 4}')
    assert run_apart("no file of jobs", 0, str(tmp_path / "done.json")).result == {"square": 4}
    assert dict(run_cells(tmp_path, cell_jobs(1, tmp_path / "log"), 1, quiet))["number-0"]["square"] == 0
    again = dict(run_cells(tmp_path, cell_jobs(1, tmp_path / "log"), 1, quiet))
    assert (again["number-0"]["square"], (tmp_path / "log").read_text()) == (0, "0\n")


def test_a_machine_that_does_not_see_the_folder_says_so(tmp_path):
    outcome = run_apart(str(tmp_path / "jobs"), 0, str(tmp_path / "cell.json"))
    assert outcome.refusal.endswith(f"does not see {tmp_path}; all machines must share it under this path")


def test_a_machine_with_other_versions_is_refused(tmp_path, user_error, monkeypatch):
    here = one_job.versions()
    monkeypatch.setattr(one_job, "versions", lambda: here | {"torch": "1.0"})
    write_jobs(tmp_path / "jobs", [])
    monkeypatch.undo()
    with user_error(f"has torch {here['torch']}, and the run 1.0", "install the same"):
        one_job._read(tmp_path / "jobs", 0)


def test_cells_of_several_versions_are_not_put_together(tmp_path, user_error):
    cells = [{"host": name, "versions": {"torch": "2.1", "python": f"3.{n}"}} for n, name in enumerate("ab")]
    one_version(tmp_path, cells[:1])
    with user_error(f"{tmp_path} holds cells of python 3.0 (a) and python 3.1 (b)"):
        one_version(tmp_path, cells)
    (tmp_path / "old.json").write_text(json.dumps(cells[0]))
    with user_error("2.1 (a) and torch"):
        list(run_cells(tmp_path, cell_jobs(1, tmp_path / "log"), 1, quiet))
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("remote", "package", "words"),
    [
        (Dask("tcp://127.0.0.1:1"), "distributed", "pip install 'spectralmoe[cluster]'"),
        (Submitit(), "submitit", "pip install 'spectralmoe[slurm]'"),
    ],
)
def test_without_the_extra_a_line_says_how_to_get_it(tmp_path, monkeypatch, user_error, remote, package, words):
    monkeypatch.setitem(sys.modules, package, None)
    with user_error(words):
        list(run_cells(tmp_path, cell_jobs(1, tmp_path / "log"), remote, quiet))


def test_options_that_do_not_go_together(tmp_path, capsys):
    start = ["compare", "--out", str(tmp_path / "out")]
    for more, words in (
        (["--cluster", "tcp://a:1", "--processes", "2"], "--processes and --cluster do not go together"),
        (["--submit", "slurm", "--take", "1/2"], "--submit and --take do not go together"),
        (["--submit-with", "timeout_min=60"], "give --submit slurm, too"),
        (["--submit", "slurm", "--submit-with", "timeout"], "no assignment such as timeout_min=60"),
        (["--submit", "slrum"], "unknown queue 'slrum'; did you mean 'slurm'?"),
        (["--take", "3/2"], "no slice I/N such as 3/16"),
    ):
        assert run([*start, *more]) == 2
        assert words in capsys.readouterr().err
    assert run(["card", "papers/llep", "--check", "--collect"]) == 2
    assert "--check and --collect do not go together" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def small(out, **how):
    """A comparison of 12 tiny networks: 4 tries, 8 cells."""
    settings = compare.CompareSettings(
        data="digits", routers=("linear", "sr-moe"), depths=(1,), seeds=4, trials=1, tune=2, seed=shifted(0),
        network={"width": 8, "num_experts": 4, "hidden": 8}, optimization={"epochs": 1},
    )  # fmt: skip
    arguments = (settings, ImageTask(load_data("digits").subset(60)), out, pick_device("cpu"))
    return arguments if not how else compare.run(*arguments, how.pop("progress", quiet), **how)


def untimed(value):
    if isinstance(value, list):
        return [untimed(item) for item in value]
    if isinstance(value, dict):
        return {key: untimed(item) for key, item in value.items() if key not in TIMINGS}
    return value


def values(out):
    """What a comparison holds, without timings: its cells, tries and networks."""
    cells = {path.stem: untimed(read_json(path)) for path in out.glob("*/*.json")}
    tables = read_json(out / "results.json")["cells"]
    networks = {path.parent.name: path.read_bytes() for path in out.glob("models/*/model.safetensors")}
    order = [(cell["router"], cell["depth"], cell["seed"]) for cell in tables]
    return cells, read_json(out / "tuning.json"), networks, order


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    with threads(1):
        small(out, processes=1)
    return values(out)


@pytest.mark.full
@pytest.mark.slow
def test_slices_come_to_what_one_run_comes_to(tmp_path, undisturbed, user_error):
    with user_error("nothing was collected: 4 of 4 tries are not there", "linear"):
        small(tmp_path, collect=True)

    def slice_of(text):
        with threads(1):
            return compare.take(*small(tmp_path), quiet, part=Slice.parse(text))

    assert slice_of("1/3") == (2, f"2 of 4 tries are not there, the first linear-depth1-seed{shifted(0)}-try1")
    assert [slice_of(text)[0] for text in ("2/3", "3/3", "1/3", "2/3")] == [1, 1 + 2, 3, 3]
    assert not (tmp_path / "results.json").exists()
    assert slice_of("1/3") == (0, "")
    small(tmp_path, collect=True)
    assert values(tmp_path) == undisturbed


@pytest.mark.full
@pytest.mark.slow
def test_a_worker_killed_twenty_times_costs_its_cell_alone(tmp_path, undisturbed):
    """All kills in the first half, at a random moment of a random worker that runs a cell."""
    pytest.importorskip("distributed")
    from dask_cluster import cluster

    draw, kills, seen, pause = Random(shifted(0)), 0, {}, 0
    with cluster(tmp_path, 3) as started:

        def watch(text, done):
            nonlocal kills, pause
            found = {path: path.read_bytes() for path in tmp_path.glob("out/*/*.json")}
            assert all(found[path] == content for path, content in seen.items())  # no cell twice
            seen.update(found)
            pause -= 1
            if pause < 0 and kills < min(20, 3 * (len(found) + 1)) and started.kill_worker(draw):
                kills, pause = kills + 1, draw.randint(0, 10)

        small(tmp_path / "out", progress=watch, processes=Dask(started.address))
    assert kills == 20
    assert values(tmp_path / "out") == undisturbed


@pytest.mark.full
@pytest.mark.slow
def test_a_scheduler_that_goes_is_one_line_and_the_same_command_goes_on(no_plan, tmp_path):
    """On the command line: nothing that Dask logs stands between the lines of the progress."""
    pytest.importorskip("distributed")
    from dask_cluster import cluster

    toy, out = Path(__file__).parents[1] / "toy_card", tmp_path / "out"
    command = [sys.executable, "-m", "spectralmoe", "card", str(toy), "--out", str(out), "--work", str(tmp_path)]
    with cluster(tmp_path, 1) as started:
        asked = subprocess.Popen(
            [*command, "--cluster", started.address], env=environment(), stderr=subprocess.PIPE, text=True
        )
        lines = []
        for line in asked.stderr:
            lines.append(line)
            if re.search("[1-5] of 6 done on", line):
                started.stop_scheduler()
        assert asked.wait() == 1
    assert lines[-1] == f"error: the scheduler at {started.address} is gone; " + (
        "what was finished is kept: start the same command again to go on\n"
    )
    assert all(" done on tcp://" in line or "starting" in line for line in lines[:-1])
    assert list((out / "cells" / "results").glob("*.json"))
    refused = subprocess.run(
        [*command, "--cluster", started.address], env=environment(), capture_output=True, text=True, check=False
    )
    assert (refused.returncode, "no Dask scheduler answers" in refused.stderr.splitlines()[-1]) == (2, True)
    assert run([*command[3:], "--processes", "1"]) == 0
    assert [cell["value"] for cell in read_json(out / "results.json")] == [10, 20, 11, 22, 14, 28]
    assert len((tmp_path / "begun").read_text().splitlines()) <= 12 + 1


@pytest.mark.full
@pytest.mark.slow
def test_submitit_runs_cells_as_jobs(tmp_path, user_error):
    pytest.importorskip("submitit")
    with user_error("--submit local cannot be had", "slurm_colour"):
        list(run_cells(tmp_path, cell_jobs(1, tmp_path / "log"), Submitit("local", {"slurm_colour": 1}), quiet))
    found = dict(run_cells(tmp_path, cell_jobs(2, tmp_path / "log"), Submitit("local", {"timeout_min": 9}), quiet))
    assert {name: cell["square"] for name, cell in found.items()} == {"number-0": 0, "number-1": 1}
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".json" and path.name != "log"]


def test_jobs_are_read_with_the_modules_of_the_run(tmp_path):
    write_jobs(tmp_path / "jobs", [])
    with (tmp_path / "jobs").open("rb") as file:
        _, places = pickle.load(file)
    assert str(Path(__file__).parents[2] / "src") in places
    assert not [place for place in places if place.startswith((sys.prefix, sys.base_prefix))]
