"""``train --parallel`` as torchrun starts it: two machines are as one process, and one that dies ends the others.

Run as a script, this file is what torchrun starts.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import environment

from spectralmoe.cli.app import run
from spectralmoe.json_files import read_json
from spectralmoe.training import loop
from spectralmoe.training.distributed import heartbeat
from spectralmoe.training.distributed.ranks import read_parallel

CONFIG = """
data = "text:pydoc"
router = "linear+load_balance"
depth = 2
train_size = 30

[text]
length = 12
heads = 2
measured = 4

[network]
width = 8
hidden = 6
num_experts = 4

[optimization]
epochs = 3
batch_size = 8
"""
SECONDS = 400


@pytest.mark.parametrize(
    ("text", "experts", "world", "words"),
    [
        ("dpp", 4, 2, ("unknown --parallel 'dpp'", "ddp", "fsdp2,ep=K")),
        ("ddp,ep=2", 4, 2, ("only fsdp2", "ep=K")),
        ("fsdp2,ep=0", 4, 2, ("ep=K",)),
        ("fsdp2,tp=2", 4, 2, ("ep=K",)),
        ("fsdp2,ep=3", 4, 3, ("4 experts", "3 processes")),
        ("fsdp2,ep=4", 8, 6, ("6 processes", "groups of 4", "start 2 more")),
        ("fsdp2,ep=2", None, 2, ("no experts", "leave out ep=2")),
    ],
)
def test_numbers_that_do_not_divide_are_refused(text, experts, world, words, monkeypatch, user_error):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with user_error(*words):
        read_parallel(text, experts)


@pytest.mark.parametrize(
    ("text", "found"), [("ddp", ("ddp", 1)), ("fsdp2", ("fsdp2", 1)), ("fsdp2,ep=2", ("fsdp2", 2))]
)
def test_parallel_is_read(text, found, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert read_parallel(text, 4) == found


def test_a_process_that_is_silent_is_named_once(monkeypatch):
    """Three processes as threads: the second dies, the third leaves."""
    ends, store = {}, dist.HashStore()

    def end(beating, cause, *, told):
        ends[beating.rank] = (cause, told)

    monkeypatch.setattr(heartbeat, "_BEAT", 0.01)
    monkeypatch.setattr(heartbeat._Heartbeat, "_end", end)
    first, second, third = (heartbeat._Heartbeat(store, rank, 3) for rank in range(3))
    for beating in (first, second, third):
        beating.start()
    second.stopped.set()
    first.join(60)
    third.join(60)
    cause = f"rank 1 of 3 (process {os.getpid()} on {socket.gethostname()}) died"
    assert ends == {0: (cause, False), 2: (cause, True)}


def test_a_process_that_leaves_is_not_dead(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(heartbeat, "_BEAT", 0.01)
    first, second = (heartbeat._Heartbeat(store, rank, 2) for rank in range(2))
    first.start()
    second.start()
    second.leave()
    while int(store.get("beat/0").decode()) < 3 * heartbeat._SILENCE:
        assert first.is_alive()
        time.sleep(0.01)
    first.leave()
    assert not store.check(["cause"])


def torchrun(*options, words):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, __file__, *words],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def said_by(process):
    try:
        return process.communicate(timeout=SECONDS)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def two_machines():
    """Options of the two agents that meet on this host, each with one process."""
    meet = [
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        "one",
        "--max-restarts",
        "0",
    ]
    return [*meet, "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]


def about(folder):
    history = read_json(folder / "history.json")
    epochs = [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in history["epochs"]]
    return [*(value for epoch in epochs for value in epoch.values()), history["test_bits_per_byte"]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The command without --out, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "f.toml").write_text(CONFIG)
    command = ["train", "--device", "cpu", "--config", str(folder / "f.toml")]
    assert run([*command, "--out", str(folder / "one")]) == 0
    return command, about(folder / "one")


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error:")]


@pytest.mark.full
@pytest.mark.slow
def test_two_agents_are_as_one_process(alone, tmp_path):
    command, expected = alone
    options, words = two_machines(), ["-1", *command, "--out", str(tmp_path), "--parallel", "fsdp2,ep=2"]
    said = [said_by(agent) for agent in [torchrun(*options, words=words) for _ in range(2)]]
    assert about(tmp_path) == pytest.approx(expected, rel=1e-4), "\n".join(said)
    assert sum(text.count("model saved to") for text in said) == 1


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_one_that_dies_ends_the_others_and_the_run_goes_on(machines, alone, tmp_path):
    """The second process kills itself at its sixth step; one process alone ends the run."""
    command, expected = alone
    words = ["6", *command, "--out", str(tmp_path), "--parallel", "fsdp2,ep=2"]
    options = two_machines() if machines == 2 else ["--standalone", "--nproc-per-node", "2"]
    agents = [torchrun(*options, words=words) for _ in range(machines)]
    text = "".join(said_by(agent) for agent in agents)
    assert all(agent.returncode for agent in agents)
    (line,) = errors(text)
    assert "rank 1 of 2 (process" in line, text
    assert "died; start the same command again" in line
    assert any((tmp_path / "training.shards").iterdir())
    assert run([*command, "--out", str(tmp_path)]) == 0
    assert about(tmp_path) == pytest.approx(expected, rel=1e-4)


@pytest.mark.full
@pytest.mark.slow
def test_torchrun_starts_them_again(alone, tmp_path):
    command, expected = alone
    words = ["6", *command, "--out", str(tmp_path), "--parallel", "fsdp2,ep=2"]
    agent = torchrun("--standalone", "--nproc-per-node", "2", "--max-restarts", "1", words=words)
    text = said_by(agent)
    assert agent.returncode == 0, text
    assert len(errors(text)) == 1, text
    assert about(tmp_path) == pytest.approx(expected, rel=1e-4)


@pytest.mark.full
@pytest.mark.slow
def test_a_number_that_does_not_divide_is_one_line(alone, tmp_path):
    command, _ = alone
    words = ["-1", *command, "--out", str(tmp_path / "out"), "--parallel", "fsdp2,ep=3"]
    text = said_by(torchrun("--standalone", "--nproc-per-node", "3", words=words))
    assert len(errors(text)) == 1, text
    assert "4 experts cannot be shared out evenly over 3 processes" in errors(text)[0]
    assert not (tmp_path / "out").exists()


def main(last, words):
    """What torchrun starts: the command line, with a checkpoint after every step; rank 1 dies at step ``last``,
    but not when torchrun has started it again."""
    torch.set_num_threads(1)
    loop._CHECKPOINT_SECONDS = 0
    step, steps = loop._Run.one_step, 0

    def counted(running, chosen):
        nonlocal steps
        steps += 1
        if steps == last and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(running, chosen)

    loop._Run.one_step = counted
    return run(words)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
