"""The page on many machines: its commands have the options that it names, and run here in place of a cluster."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from gloo_ranks import environment

from spectralmoe.cli.app import app
from spectralmoe.json_files import read_json

PAGE = (Path(__file__).parents[1] / "docs" / "machines.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S)
DASK, SUBMIT, ARRAY, AGAIN, COLLECT, LOCKS = BLOCKS
SMALLER = (
    "--data digits --depths 1 --seeds 1 --trials 1 --epochs 1 --train-size 20 "
    "--set network.width=8 --set network.hidden=8 --tune "
)
LIMIT = 300


def test_its_commands_have_the_options_that_it_names():
    verbs = typer.main.get_command(app).commands
    found = 0
    for block in BLOCKS:
        assert subprocess.run(["bash", "-n"], input=block, text=True, check=False).returncode == 0
        for line in block.replace("\\\n", " ").splitlines():
            name, *words = [*shlex.split(line, comments=True), ""]
            if name == "spectralmoe":
                options = {option for parameter in verbs[words[0]].params for option in parameter.opts}
                assert {word for word in words if word.startswith("--")} <= options, line
                found += 1
    assert found == 4


@pytest.fixture
def shell(tmp_path):
    """``shell(block, tries)``: runs a block by bash, small and here."""
    script = tmp_path / "bin" / "spectralmoe"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m spectralmoe "$@" {SMALLER} $TRIES\n')
    script.chmod(0o755)

    def run(block, tries="0", **more):
        text = block.replace("/shared", str(tmp_path)).replace("--submit slurm", "--submit local").replace("/16", "/2")
        paths = os.pathsep.join([str(script.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
        about = environment() | {"PATH": paths, "TRIES": tries} | more
        return subprocess.Popen(["bash", "-e", "-c", text], env=about, cwd=tmp_path, start_new_session=True)

    return run


def cells(folder):
    return {(cell["router"], cell["seed"]) for cell in read_json(folder / "results.json")["cells"]}


WHOLE = {("linear", 0), ("sr-moe", 0)}


@pytest.mark.full
@pytest.mark.slow
def test_slices_and_jobs_run_as_it_says(tmp_path, shell):
    pytest.importorskip("submitit")
    for _ in ("tries", "cells"):
        for number in "12":
            assert shell(ARRAY, "1", SLURM_ARRAY_TASK_ID=number).wait(LIMIT) == 0
    assert not (tmp_path / "third" / "results.json").exists()
    assert shell(COLLECT, "1").wait(LIMIT) == 0
    assert cells(tmp_path / "third") == WHOLE
    assert shell(SUBMIT).wait(LIMIT) == 0
    assert cells(tmp_path / "second") == WHOLE


@pytest.mark.full
@pytest.mark.slow
def test_two_machines_run_as_it_says(tmp_path, shell):
    """The scheduler, the worker and the command, a process each."""
    pytest.importorskip("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    block = DASK.replace("10.0.0.1", "127.0.0.1").replace("8786", port).replace("--nworkers 4", "--nworkers 1")
    scheduler, worker, command = block.strip().splitlines()
    servers = [shell(f"{line} --no-dashboard") for line in (scheduler, worker)]
    try:
        ends = time.monotonic() + LIMIT
        while shell(f"echo > /dev/tcp/127.0.0.1/{port}").wait(LIMIT):
            assert time.monotonic() < ends, "the scheduler has not started"
            time.sleep(0.2)
        assert shell(command).wait(LIMIT) == 0
    finally:
        for server in servers:
            os.killpg(server.pid, 9)
            server.wait()
    assert cells(tmp_path / "first") == WHOLE
