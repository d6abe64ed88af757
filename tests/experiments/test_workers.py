"""Jobs give the same results here and in processes; a failure, a stop and a killed parent leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from worker_jobs import count_threads, die, fail, square

from spectralmoe import UserError
from spectralmoe.experiments.workers import Job, WorkerLost, run_jobs

psutil = pytest.importorskip("psutil")


@pytest.mark.parametrize("processes", [1, 2])
def test_every_job_gives_its_result(processes):
    seen = []
    jobs = [Job(n, f"job {n}", square, (n,)) for n in range(5)]
    found = dict(run_jobs(jobs, processes, lambda text, done: seen.append((text, done))))
    assert {key: value for key, (value, _) in found.items()} == {n: n**2 for n in range(5)}
    assert ({pid for _, pid in found.values()} == {os.getpid()}) == (processes == 1)
    assert all(0 <= done <= 1 for _, done in seen)
    assert all(text.startswith("job ") and text.endswith("/5)") for text, _ in seen)


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 3])
def test_a_job_has_one_thread_however_many_there_are(count):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        threads = dict(run_jobs([Job(n, "", count_threads, ()) for n in range(count)], 2, lambda text, done: None))
        assert (set(threads.values()), torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


def test_no_jobs_are_no_results():
    assert list(run_jobs([], 2, lambda text, done: None)) == []


@pytest.mark.full
def test_a_failure_ends_the_others_and_keeps_its_line():
    with pytest.raises(UserError, match="number 1 is refused"):
        list(run_jobs([Job(n, "", fail, (n,)) for n in range(3)], 2, lambda text, done: None))
    assert not [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.full
def test_a_killed_process_is_one_line(user_error):
    with user_error("a process was killed", "start the same command again"):
        list(run_jobs([Job(n, "", die, (n,)) for n in range(2)], 2, lambda text, done: None))
    assert WorkerLost.exit_code == 1


ORPHANS = """
import sys, time
sys.path.insert(0, sys.argv[1])
from worker_jobs import fail
from spectralmoe.experiments.workers import Job, run_jobs
if __name__ == "__main__":
    def watch(text, done):
        if done > 0:
            print("running", flush=True)
    list(run_jobs([Job(n, "", fail, (n,)) for n in (2, 3)], 2, watch))
"""


@pytest.mark.slow
def test_a_killed_parent_takes_its_processes_along(tmp_path):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    parent = subprocess.Popen([sys.executable, str(script), str(Path(__file__).parents[1])], stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"running\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
