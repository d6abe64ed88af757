"""Kill -9 during training at 20 random moments, start again: the final weights are those of an undisturbed run."""

import json
import subprocess
import sys

import pytest

WORKER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch

torch.set_num_threads(1)  # forked children cannot share a pool of threads
from spectralmoe.compare import CompareSettings, run
from spectralmoe import UserError
from spectralmoe.files import read_json
from spectralmoe.training.data import load_data
from spectralmoe.saving import load
import spectralmoe.training.loop as loop

loop._CHECKPOINT_SECONDS = 0.05
out = Path(sys.argv[1])
data = load_data("digits").subset(500)
settings = CompareSettings(
    data="digits", routers=("eigenbasis", "sr-moe"), depths=(2,), seeds=1, trials=2,
    network={"width": 16, "num_experts": 4, "hidden": 8}, optimization={"epochs": 6, "batch_size": 16},
)


def child(folder):
    pid = os.fork()
    if pid == 0:
        try:
            run(settings, data, folder, torch.device("cpu"), lambda text, done: None)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid


def whole(folder):
    started = time.monotonic()
    status = os.waitpid(child(folder), 0)[1]
    assert status == 0, status
    return time.monotonic() - started


seconds = whole(out / "undisturbed")
draw = random.Random(0)
killed = 0
for _ in range(20):
    pid = child(out / "killed")
    time.sleep(draw.uniform(0, 0.1 * seconds))
    os.kill(pid, signal.SIGKILL)
    killed += os.waitpid(pid, 0)[1] == signal.SIGKILL
    for folder in (out / "killed" / "models").glob("*"):
        try:
            load(folder)
        except UserError as error:
            assert "is not a model folder" in str(error), error
whole(out / "killed")
same = all(
    (a / "model.safetensors").read_bytes() == (out / "killed" / "models" / a.name / "model.safetensors").read_bytes()
    for a in (out / "undisturbed" / "models").glob("*")
)
rows = [[c["accuracy"] for c in read_json(out / name / "results.json")["cells"]] for name in ("undisturbed", "killed")]
left = [p.name for p in (out / "killed").rglob("*") if p.name.startswith(".") and p.name != ".lock"]
print(json.dumps({"seconds": seconds, "killed": killed, "same": same, "rows": rows, "left": left}))
"""


@pytest.mark.slow
def test_killed_twenty_times_ends_with_the_same_weights(tmp_path):
    worker = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert worker.returncode == 0, worker.stderr[-3000:]
    found = json.loads(worker.stdout.splitlines()[-1])
    assert found["killed"] >= 10  # most kills met a live run, not a finished one
    assert found["same"]
    assert found["rows"][0] == found["rows"][1]
    assert found["left"] == []
