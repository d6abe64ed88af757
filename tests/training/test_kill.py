"""Kill -9 at random moments of a comparison, start again: the final weights are those of an undisturbed run."""

import json

import pytest
from forked import output_of

WORKER = """
import json, os, random, signal, sys
from pathlib import Path
import torch

torch.set_num_threads(1)  # forked children cannot share a pool of threads
from seeds import shifted
from spectralmoe.experiments.compare import CompareSettings, run
from spectralmoe import UserError
from spectralmoe.json_files import read_json
from spectralmoe.data.image_data import load_data
from spectralmoe.saving import load
import spectralmoe.training.loop as loop
from spectralmoe.training.tasks import ImageTask

loop._CHECKPOINT_SECONDS = 0  # after every batch
out, kills = Path(sys.argv[1]), int(sys.argv[2])
task = ImageTask(load_data("digits").subset(120))
settings = CompareSettings(
    data="digits", routers=("eigenbasis", "sr-moe"), depths=(2,), seeds=1, trials=2,
    network={"width": 16, "num_experts": 4, "hidden": 8}, optimization={"epochs": 2, "batch_size": 16},
)
replace, moments = Path.replace, 0


def moment(last):
    # One of the moments at which a run may die: a batch, or either side of a file that takes its name.
    global moments
    moments += 1
    if moments == last:
        os.kill(os.getpid(), signal.SIGKILL)


def child(folder, last=None):
    # The status of a run in a process of its own that dies at a moment, and how many moments an undisturbed one has.
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            def observed(path, target):
                moment(last)
                result = replace(path, target)
                moment(last)
                return result

            Path.replace = observed
            run(settings, task, folder, torch.device("cpu"), lambda text, done: moment(last), columns=["accuracy"])
            os.write(writing, str(moments).encode())
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    return os.waitpid(pid, 0)[1], int(text or 0)


status, total = child(out / "undisturbed")
assert status == 0, status
draw, killed = random.Random(shifted(0)), 0
for _ in range(kills):  # they do less than the whole together
    killed += child(out / "killed", draw.randint(1, total // kills - 1))[0] == signal.SIGKILL
    for folder in (out / "killed" / "models").glob("*"):
        try:
            load(folder)
        except UserError as error:
            assert "is not a model folder" in str(error), error
assert child(out / "killed")[0] == 0
same = all(
    (a / "model.safetensors").read_bytes() == (out / "killed" / "models" / a.name / "model.safetensors").read_bytes()
    for a in (out / "undisturbed" / "models").glob("*")
)
rows = [[c["accuracy"] for c in read_json(out / name / "results.json")["cells"]] for name in ("undisturbed", "killed")]
left = [p.name for p in (out / "killed").rglob("*") if p.name.startswith(".") and p.name != ".lock"]
print(json.dumps({"total": total, "killed": killed, "same": same, "rows": rows, "left": left}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kills", [pytest.param(20, marks=pytest.mark.full)])
def test_killed_many_times_ends_with_the_same_weights(kills, tmp_path):
    found = json.loads(output_of(WORKER, tmp_path, kills).splitlines()[-1])
    assert found["total"] > 5 * kills
    assert found["killed"] == kills
    assert found["same"]
    assert found["rows"][0] == found["rows"][1]
    assert found["left"] == []
