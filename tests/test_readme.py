"""The README's example runs, and what it names exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import environment
from PIL import Image

from spectralmoe import save
from spectralmoe.cli.app import run
from spectralmoe.data.image_data import load_data
from spectralmoe.layers import moe_layers
from spectralmoe.recording import Recordable
from spectralmoe.training.loop import train
from spectralmoe.training.network import build_network
from spectralmoe.training.settings import Network, Optimization
from spectralmoe.training.tasks import ImageTask

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_library_example_runs_and_ends_without_a_word():
    code = EXAMPLES[0]
    assert len(code.splitlines()) <= 20
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert "sigma" in done.stdout
    assert not done.stderr


def test_vision_example_runs():
    pytest.importorskip("timm")
    names = {}
    exec(compile(EXAMPLES[1], "README.md", "exec"), names)
    assert {name.split(".")[1] for name in moe_layers(names["vit"])} == {"10", "11"}


def test_language_example_runs(close):
    pytest.importorskip("transformers")
    from families import build

    model = build("mixtral").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    names = {"model": model, "optimizer": optimizer, "batch": {"input_ids": torch.arange(20).view(2, 10)}}
    expected = model(**names["batch"]).logits
    exec(compile(EXAMPLES[2].replace("model(**batch)", "logits = model(**batch).logits"), "README.md", "exec"), names)
    close(names["logits"], expected)  # it starts as the model itself
    assert [item.name for item in names["tape"]] == names["swapped"].layers
    assert not any(isinstance(module, Recordable) for module in model.modules())


def test_correction_example_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load_data("digits").subset(400)
    model = build_network(data, Network(width=16, num_experts=4, hidden=8, spare=8), "linear", 2, seed=0)
    train(model, ImageTask(data), Optimization(epochs=12, batch_size=32))
    wrong = int((model.eval()(data.test.images).argmax(-1) != data.test.labels).nonzero()[0])
    names = {"model": model, "images": data.train.images, "labels": data.train.labels}
    names |= {"image": data.test.images[wrong : wrong + 1], "label": int(data.test.labels[wrong])}
    exec(compile(EXAMPLES[3], "README.md", "exec"), names)
    assert re.search(r"corrected: .*\nwritten: expert .*\nreference: 400 samples, ", capsys.readouterr().out)
    assert (tmp_path / "update.safetensors").is_file()
    assert len(EXAMPLES) == 4


def photos(folder, count):
    """An image folder of two classes with ``count`` coloured images each."""
    for kind in ("cats", "dogs"):
        (folder / kind).mkdir(parents=True)
        for n in range(count):
            Image.effect_noise((20, 20), 40 + n).convert("RGB").save(folder / kind / f"{n}.png")


def test_vision_pages_examples_run(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    patches, one, two = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "vision.md").read_text(), re.S)
    names = {}
    exec(compile(one, "vision.md", "exec"), names)
    assert names["logits"].shape == (2, 10)
    photos(tmp_path / "photos", 10)
    exec(compile(patches, "vision.md", "exec"), shown := {})
    assert shown["images"].shape == (4, 3, 224, 224)
    assert shown["experts"].shape == (4, 14, 14)
    assert (tmp_path / "runs" / "patches.png").is_file()
    pytest.importorskip("huggingface_hub")
    save(names["model"], "runs/emoe-vit", meta={"data": "photos", "results": {"test_accuracy": 50.0}})
    exec(compile(two, "vision.md", "exec"), names)
    assert set(moe_layers(names["again"])) == set(moe_layers(names["model"]))
    assert "test accuracy" in (tmp_path / "runs" / "shared" / "README.md").read_text()


@pytest.mark.parametrize(("number", "end"), [(0, "[]"), (1, "])"), (2, "[]")])
def test_instrument_examples_run(number, end, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "inspect.md").read_text(), re.S)
    assert len(examples) == 3
    exec(compile(examples[number], "inspect.md", "exec"), {})
    assert capsys.readouterr().out.rstrip().endswith(end)


def test_verbs_in_the_readme_exist(capsys):
    for verb in re.findall(r"^\| `(\w+)", README, re.M):
        if verb != "verb":
            assert run([verb, "--help"]) == 0
