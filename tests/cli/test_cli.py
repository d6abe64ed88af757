"""The command line as a user meets it: results, and one clear line with exit code 2 for every mistake."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from seeds import shifted

from spectralmoe.cli.app import run
from spectralmoe.json_files import read_json

SMALL = ["--data", "digits", "--depths", "1", "--seeds", "2", "--epochs", "2", "--train-size", "200", "--trials", "5"]
SMALL += ["--processes", "1", "--columns", "accuracy,interference"]  # few panels are quick to draw


EXPLOSIVE = """
from spectralmoe import LinearScorer


class Explosive(LinearScorer):
    def forward(self, x, *, context=None):
        return super().forward(x, context=context) * float("nan")
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """The folder of a small finished comparison."""
    out = tmp_path_factory.mktemp("cli") / "out"
    assert run(["compare", *SMALL, "--routers", "linear,sr-moe", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def model(compared) -> Path:
    return compared / "models" / "sr-moe-depth1-seed0"


def test_compare_writes_everything(compared):
    results = read_json(compared / "results.json")
    assert [(c["router"], c["depth"], c["seed"]) for c in results["cells"]] == [
        ("linear", 1, 0),
        ("sr-moe", 1, 0),
        ("linear", 1, 1),
        ("sr-moe", 1, 1),
    ]
    accuracies = [c["accuracy"] for c in results["cells"] if c["router"] == "linear"]
    assert results["summary"][0]["accuracy"]["mean"] == pytest.approx(sum(accuracies) / 2)
    assert results["summary"][0]["accuracy"]["half"] == pytest.approx(12.706 * abs(accuracies[0] - accuracies[1]) / 2)
    rows = (compared / "results.csv").read_text().splitlines()
    assert len(rows) == 5
    assert float(rows[1].split(",")[3]) == accuracies[0]
    assert "<svg" in (compared / "comparison.svg").read_text()
    assert sorted(p.name for p in (compared / "models").iterdir()) == [
        "linear-depth1-seed0",
        "linear-depth1-seed1",
        "sr-moe-depth1-seed0",
        "sr-moe-depth1-seed1",
    ]


def test_compare_again_trains_nothing_and_prints_the_same(compared, call):
    before = {p: p.stat().st_mtime_ns for p in (compared / "models").rglob("*") if p.is_file()}
    code, out, _ = call("compare", *SMALL, "--routers", "linear,sr-moe", "--out", compared, "--json")
    assert code == 0
    assert json.loads(out) == read_json(compared / "results.json")["summary"]
    assert before == {p: p.stat().st_mtime_ns for p in (compared / "models").rglob("*") if p.is_file()}


def test_compare_prints_a_table_and_names_the_files(compared, call, tmp_path):
    """Its settings come from a file, options and --set; they are those of the finished run, so nothing is run."""
    (tmp_path / "c.toml").write_text(
        'data = "digits"\nrouters = ["linear", "sr-moe"]\ndepths = [1]\nseeds = 1\ntrain_size = 200\n'
        "[optimization]\nepochs = 9\n"
    )
    options = ["--seeds", 2, "--trials", 5, "--set", "optimization.epochs=2", "--columns", "accuracy,interference"]
    code, out, err = call("compare", "--config", tmp_path / "c.toml", *options, "--out", compared)
    assert code == 0, err
    assert "interference" in out
    for name in (
        "results.json",
        "results.csv",
        "summary.csv",
        "table.tex",
        "comparison.svg",
        "differences.pdf",
        "models",
    ):
        assert str(compared / name) in out
    assert "minus linear, paired by seed" in out
    assert "two seeds" in out
    assert "100%" in err


def test_compare_refuses_other_settings(compared, refused):
    """Whatever would have made the finished cells others."""
    for change, words in (
        (["--k", "1"], "network.k = 2, not 1"),
        (["--epochs", "3"], "optimization.epochs = 2, not 3"),
        (["--seed", "1"], "seed = 0, not 1"),
        (["--set", "optimization.lr=1e-4"], "optimization.lr = 0.003, not 0.0001"),
    ):
        assert words in refused("compare", *SMALL, "--routers", "linear,sr-moe", *change, "--out", compared)
    assert read_json(compared / "settings.json")["routers"] == ["linear", "sr-moe"]


def test_a_comparison_grows(copied, call):
    """More routers, depths and seeds: what was there is not run again, and everything is shown."""
    before = {path: path.read_bytes() for path in (copied / "cells").iterdir()}
    options = [*SMALL, "--routers", "cosine,linear", "--seeds", 3, "--processes", 1]
    code, out, err = call("compare", *options, "--baseline", "sr-moe", "--columns", "gini,accuracy", "--out", copied)
    assert code == 0, err
    assert {path: path.read_bytes() for path in before} == before
    results = read_json(copied / "results.json")
    assert [(row["router"], row["seeds"]) for row in results["summary"]] == [
        ("linear", [0, 1, 2]),
        ("sr-moe", [0, 1]),
        ("cosine", [0, 1, 2]),
    ]
    assert results["settings"]["routers"] == ["linear", "sr-moe", "cosine"]
    assert len(results["summary"][2]["differences"]["gini"]["values"]) == 2  # the seeds that both have
    assert "minus sr-moe" in out
    assert "MaxVio" not in out
    assert out.index("Gini") < out.index("accuracy %")
    assert all({"cpu", "threads", "versions"} <= cell.keys() for cell in results["cells"])


@pytest.mark.parametrize(
    ("option", "words"), [("--baseline", "unknown baseline 'x'"), ("--columns", "unknown column 'x'")]
)
def test_what_is_shown_is_checked_before_anything_runs(refused, tmp_path, option, words):
    assert words in refused("compare", *SMALL, "--routers", "linear", option, "x", "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "models").exists()


def test_a_diverged_row_says_so_and_the_others_go_on(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = ["--data", "digits", "--depths", 1, "--seeds", 1, "--train-size", 100, "--trials", 1, "--processes", 1]
    options += ["--routers", "explosive:Explosive,linear", "--epochs", 1, "--out", tmp_path / "out", "--json"]
    options += ["--columns", "accuracy"]
    (tmp_path / "explosive.py").write_text(EXPLOSIVE)
    for _ in range(2):  # the second time nothing is run
        code, out, err = call("compare", *options)
        assert code == 1
        assert "explosive:Explosive, depth 1, seed 0 diverged: " in err
        first, second = json.loads(out)
        assert (first["seeds"], first["diverged"], first["accuracy"]) == ([], [0], None)
        assert (second["seeds"], second["diverged"]) == ([0], [])
    assert "1 diverged" in (tmp_path / "out" / "table.md").read_text()
    assert call("report", tmp_path / "out", "--out", tmp_path / "r.html")[0] == 0
    assert "1 diverged" in (tmp_path / "r.html").read_text()


def test_evaluate_agrees_with_the_comparison(compared, model, call):
    code, out, _ = call("evaluate", model, "--json")
    assert code == 0
    cell = next(c for c in read_json(compared / "results.json")["cells"] if c["router"] == "sr-moe" and c["seed"] == 0)
    found = json.loads(out)
    assert found["accuracy"] == pytest.approx(cell["accuracy"])
    assert found["layers"]["stages.0.moe"]["max_vio"] == pytest.approx(cell["max_vio"])
    assert call("evaluate", model)[0] == 0


def test_predict(model, call, tmp_path):
    from spectralmoe.data.image_data import load_data

    data = load_data("digits")
    for index in range(3):
        np.save(tmp_path / f"{index}.npy", data.test.images[index, 0].numpy())
    code, out, _ = call("predict", model, *(tmp_path / f"{index}.npy" for index in range(3)), "--json")
    assert code == 0
    found = json.loads(out)
    from spectralmoe import load

    expected = load(model)(data.test.images[:3])
    assert [row["label"] for row in found] == expected.argmax(-1).tolist()
    assert [row["probability"] for row in found] == pytest.approx(expected.softmax(-1).amax(-1).tolist(), rel=1e-4)
    code, out, _ = call("predict", model, tmp_path / "0.npy")
    assert "0.npy: " in out


def test_predict_says_what_it_converts(model, call, tmp_path):
    np.save(tmp_path / "fits.npy", np.zeros((8, 8)))
    assert call("predict", model, tmp_path / "fits.npy")[2] == ""
    Image.new("RGB", (640, 480)).save(tmp_path / "photo.jpg")
    code, out, err = call("predict", model, tmp_path / "fits.npy", tmp_path / "photo.jpg", "--json")
    assert (code, len(json.loads(out))) == (0, 2)
    photo = tmp_path / "photo.jpg"
    assert err == f"note: read as 8 x 8 pixels (height x width), grey: {photo} (480 x 640, colour)\n"


def test_predict_turns_a_photograph_upright(model, call, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    Image.fromarray(pixels).save(tmp_path / "upright.png")
    Image.fromarray(pixels[::-1, ::-1].copy()).save(tmp_path / "phone.png", exif=exif)
    Image.fromarray(pixels[::-1, ::-1].copy()).save(tmp_path / "turned.png")
    files = [tmp_path / f"{name}.png" for name in ("upright", "phone", "turned")]
    upright, phone, turned = (row["probability"] for row in json.loads(call("predict", model, *files, "--json")[1]))
    assert phone == pytest.approx(upright, rel=1e-5)
    assert turned != upright


def test_the_size_of_own_images_can_be_chosen(call, refused, tmp_path):
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(5):
            np.save(tmp_path / "set" / name / f"{index}.npy", np.random.default_rng(index).random((70, 80)))
    options = ["--depths", 1, "--seeds", 1, "--epochs", 1, "--trials", 1, "--routers", "linear", "--image-size", 12]
    options += ["--columns", "accuracy"]
    data = f"folder:{tmp_path / 'set'}"
    code, _, err = call("compare", "--data", data, *options, "--out", tmp_path / "out")
    assert code == 0
    said = "10 images of 2 classes, split at random into 70% for training, 10% for validation and 20% for testing"
    assert err.count(f"note: {tmp_path / 'set'}: {said}, read as 12 x 12 (stored: 70 x 80), grey\n") == 1
    made = tmp_path / "out" / "models" / "linear-depth1-seed0"
    assert read_json(made / "config.json")["meta"]["image_size"] == [12, 12]
    assert call("evaluate", made)[0] == 0  # reads the folder in the model's size
    text = f'data = "{data}"\nimage_size = 10\n[optimization]\nepochs = 1\n'
    (tmp_path / "c.toml").write_text(text)
    assert call("train", "--config", tmp_path / "c.toml", "--out", tmp_path / "m")[0] == 0
    assert read_json(tmp_path / "m" / "config.json")["meta"]["image_size"] == [10, 10]
    line = refused("compare", "--data", "digits", *options, "--out", tmp_path / "other")
    assert "image size 12" in line
    assert "'digits'" in line
    (tmp_path / "c.toml").write_text(text.replace(data, "digits"))
    assert "image size 10" in refused("train", "--config", tmp_path / "c.toml", "--out", tmp_path / "n")


def test_adapt_trials_agree_with_the_comparison(compared, model, call):
    code, out, _ = call("adapt", "trials", model, "--count", 5, "--json")
    assert code == 0
    cell = next(c for c in read_json(compared / "results.json")["cells"] if c["router"] == "sr-moe" and c["seed"] == 0)
    assert json.loads(out)["interference"] == pytest.approx(cell["interference"], abs=1e-5)


def test_train_from_the_example_file(call, tmp_path):
    text = (Path(__file__).parents[2] / "examples" / "train.toml").read_text()
    text = text.replace("mnist5k", "digits").replace("epochs = 8", "epochs = 1")
    (tmp_path / "c.toml").write_text(text)
    code, out, _ = call("train", "--config", tmp_path / "c.toml", "--out", tmp_path / "m", "--json")
    assert code == 0
    assert json.loads(out)["test_accuracy"] == read_json(tmp_path / "m" / "history.json")["test_accuracy"]
    assert call("evaluate", tmp_path / "m")[0] == 0
    assert call("train", "--config", tmp_path / "c.toml", "--out", tmp_path / "m")[0] == 0  # goes on: nothing to do


def test_list_names_everything(call):
    code, out, _ = call("list", "--json")
    assert code == 0
    tables = json.loads(out)
    assert {"mnist5k", "digits", "fashion-mnist", "folder:PATH"} <= tables["data sets"].keys()
    assert {
        "linear",
        "linear+load_balance",
        "linear+balanced",
        "cosine",
        "prototype",
        "sr-moe",
        "eigenbasis",
    } <= tables["presets"].keys()
    assert all(line for table in tables.values() for line in table.values())
    assert "prototype" in call("list")[1]


@pytest.mark.parametrize("verb", ["compare", "train", "evaluate", "predict", "adapt", "list"])
def test_help_has_an_example(call, verb):
    code, out, _ = call(verb, "--help")
    assert code == 0
    assert f"spectralmoe {verb}" in out


@pytest.mark.full
def test_routers_of_your_own(call, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom spectralmoe import LinearScorer\n\n\nclass Signs(LinearScorer):\n"
        "    def forward(self, x, *, context=None):\n        return super().forward(x.sign())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    parts = '{scorer="linear", selector="topp", p=0.7}'
    code, _, err = call("compare", *SMALL, "--routers", f"mine:Signs,{parts}", "--out", tmp_path / "out")
    assert code == 0, err
    assert {cell["router"] for cell in read_json(tmp_path / "out" / "results.json")["cells"]} == {"mine:Signs", parts}
    model = tmp_path / "out" / "models" / "mine_Signs-depth1-seed0"
    assert "allow=['mine:Signs']" in call("evaluate", model)[2]
    assert call("evaluate", model, "--allow", "mine:Signs")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "--routers", "liner"], ["unknown router 'liner'", "linear"]),
        (["compare", "--routers", "linear,linear"], ["linear twice"]),
        (["compare", "--routers", ""], ["--routers names nothing"]),
        (["compare", "--routers", "no_such_module:X"], ["no_such_module"]),
        (
            ["compare", "--routers", "spectralmoe:MoE"],
            ["'spectralmoe:MoE' is not a subclass of spectralmoe.Scorer", "nor a preset"],
        ),
        (["compare", "--data", "mnist"], ["unknown data set 'mnist'", "mnist5k"]),
        (["compare", "--data", "folder:/no/such/place"], ["/no/such/place"]),
        (["compare", "--depths", "two"], ["--depths 'two'"]),
        (["compare", "--depths", "0"], ["depths", "0"]),
        (["compare", "--k", "9"], ["--k 9", "from 1 to 8"]),
        (["compare", "--k", "some"], ["--k some", "'soft'"]),
        (["compare", "--k", "0"], ["--k 0", "'soft'"]),
        (["compare", "--seeds", "none"], ["--seeds", "integer"]),
        (["compare", "--epoch", "3"], ["--epoch"]),
        (["compare", "--data", "digits", "--train-size", "99999"], ["99999", "1079"]),
        (["compare", "--device", "tpu"], ["device", "tpu"]),
        (["comparee"], ["comparee"]),
        (["train", "--config", "/no/such.toml"], ["/no/such.toml"]),
    ],
    ids=lambda value: "-".join(value[1:])[:40] if value[0] in ("compare", "train", "comparee") else "",
)
def test_mistakes_are_one_clear_line(refused, tmp_path, arguments, words):
    out = tmp_path / "out"
    line = refused(*arguments, *([] if arguments == ["comparee"] else ["--out", out]))
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('data = "digits"\ndepht = 3\n', ["unknown key 'depht'", "depth"]),
        ('data = "digits"\n[network]\nwidht = 3\n', ["unknown key 'widht'", "width"]),
        ('data = "digits"\ndepth = "deep"\n', ["depth", "'deep'"]),
        ('data = "digits"\n[optimization]\nlr = -1\n', ["optimization.lr", "-1"]),
        ("depth = 3\n", ["data"]),
        ("data = digits\n", ["not a readable TOML file"]),
        ('data = "digits"\noptimization = 3\n', ["optimization"]),
        ('data = "digits"\n[network]\nk = 9\n', ["k=9", "E=8"]),
    ],
)
def test_config_mistakes(refused, tmp_path, text, words):
    (tmp_path / "c.toml").write_text(text)
    for extra in ([], ["--seed", "1"]):
        line = refused("train", "--config", tmp_path / "c.toml", "--out", tmp_path / "m", *extra)
        for word in words:
            assert word in line


def test_bad_images(refused, model, tmp_path):
    np.save(tmp_path / "nan.npy", np.full((8, 8), np.nan, dtype=np.float32))
    assert "nan.npy" in refused("predict", model, tmp_path / "nan.npy")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "cut.png" in refused("predict", model, tmp_path / "cut.png")
    assert "none.png" in refused("predict", model, tmp_path / "none.png")
    (tmp_path / "set").mkdir()
    assert str(tmp_path / "set") in refused("compare", "--data", f"folder:{tmp_path / 'set'}", "--out", tmp_path / "o")
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir()
        for index in range(10):
            np.save(tmp_path / "set" / name / f"{index}.npy", np.random.default_rng(shifted(index)).random((8, 8)))
    for index in range(8):
        np.save(tmp_path / "set" / "b" / f"{index}.npy", np.full((8, 8), np.nan))
    assert "0.npy" in refused("compare", "--data", f"folder:{tmp_path / 'set'}", "--out", tmp_path / "o")


@pytest.mark.full
def test_other_images_under_the_same_name(refused, call, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(20):
            np.save(tmp_path / "set" / name / f"{index}.npy", np.random.default_rng(shifted(index)).random((8, 8)))
    arguments = ["compare", "--data", f"folder:{tmp_path / 'set'}", "--depths", 1, "--seeds", 1, "--epochs", 1]
    arguments += ["--trials", 1, "--routers", "linear", "--out", tmp_path / "out"]
    assert call(*arguments)[0] == 0
    assert call(*arguments)[0] == 0
    np.save(tmp_path / "set" / "a" / "3.npy", np.zeros((8, 8), dtype=np.float32))
    assert "images" in refused(*arguments)


def test_bad_models(refused, model, tmp_path):
    assert "is not a model folder" in refused("evaluate", tmp_path)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((model / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-100])
    assert "model.safetensors" in refused("evaluate", broken)
    (broken / "config.json").write_text('{"architectures": ["BertModel"]}')
    assert "another program" in refused("predict", broken, tmp_path / "x.npy")
    assert "channels" in refused("evaluate", model, "--data", f"folder:{_rgb(tmp_path)}")


def test_out_that_cannot_be_written(refused, model, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / "file") in refused("compare", *SMALL, "--out", tmp_path / "file")
    assert "/proc/none" in refused("compare", *SMALL, "--out", "/proc/none")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "results.json").write_text("[1, 2]")
    assert "results.json" in refused("compare", *SMALL, "--out", tmp_path / "results")
    assert (tmp_path / "results" / "results.json").read_text() == "[1, 2]"
    assert [path.name for path in (tmp_path / "results").iterdir() if path.name != ".lock"] == ["results.json"]
    (tmp_path / "c.toml").write_text('data = "digits"')
    (tmp_path / "model.safetensors").write_text("mine")
    assert "model.safetensors" in refused("train", "--config", tmp_path / "c.toml", "--out", tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "mine"


@pytest.mark.full
@pytest.mark.skipif(not Path("/dev/shm").is_dir() or os.geteuid() != 0, reason="needs root to mount a small disk")
def test_full_disk_keeps_what_was_there(refused, call, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "none", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here")
    try:
        (disk / "notes.txt").write_text("mine")
        line = refused("compare", *SMALL, "--routers", "linear,cosine", "--out", disk / "out")
        assert "No space left" in line
        assert (disk / "notes.txt").read_text() == "mine"
        assert not list(disk.rglob("*part"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_runs_in_one_folder(compared, refused):
    import fcntl

    with (compared / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another run is writing" in refused("compare", *SMALL, "--routers", "linear,sr-moe", "--out", compared)


def test_version_and_broken_pipe():
    command = f"{sys.executable} -m spectralmoe"
    shown = subprocess.run([*command.split(), "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("spectralmoe 0.")
    piped = subprocess.run(f"{command} list | head -1", shell=True, capture_output=True, text=True, check=True)
    assert "Traceback" not in piped.stderr


def _image(folder: Path) -> Path:
    np.save(folder / "image.npy", np.zeros((8, 8), dtype=np.float32))
    return folder / "image.npy"


def _rgb(folder: Path) -> Path:
    for name in "abcdefghij":
        (folder / "rgb" / name).mkdir(parents=True)
        for index in range(10):
            np.save(folder / "rgb" / name / f"{index}.npy", np.random.default_rng(shifted(index)).random((8, 8, 3)))
    return folder / "rgb"


@pytest.fixture
def copied(compared, tmp_path) -> Path:
    """A copy of the finished comparison, to be damaged."""
    return Path(shutil.copytree(compared, tmp_path / "copied"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cells/linear-depth1-seed0.json", "[1]"),
        ("cells/linear-depth1-seed0.json", '{"router": "linear"}'),
        ("cells/linear-depth1-seed0.json", "{"),
        ("settings.json", "[]"),
        ("settings.json", '{"editor.fontSize": 12}'),
        ("tries/linear-depth1-try0.json", "3"),
        ("tries/linear-depth1-try0.json", '{"a": 1}'),
    ],
)
def test_damaged_results_are_named_and_kept(copied, refused, name, text):
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_text(text)
    shutil.rmtree(copied / "models")
    assert name in refused("compare", *SMALL, "--routers", "linear,sr-moe", "--out", copied)
    assert (copied / name).read_text() == text


def test_a_deleted_model_is_trained_again_in_a_run_of_an_earlier_version(copied, call):
    settings = read_json(copied / "settings.json")
    del settings["image_size"]  # it had no such option
    (copied / "settings.json").write_text(json.dumps(settings))
    weights = copied / "models" / "linear-depth1-seed1" / "model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(weights.parent)
    assert call("compare", *SMALL, "--routers", "linear,sr-moe", "--out", copied)[0] == 0
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"image_size": "ab"},
        {"image_size": [0, 0]},
        {"image_size": [300000, 8]},
        {"classes": 3},
        {"channels": 3},
        {"data": 5},
    ],
    ids=str,
)
def test_hostile_meta(model, tmp_path, refused, change):
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    config["meta"] |= change
    (broken / "config.json").write_text(json.dumps(config))
    assert "config.json" in refused("predict", broken, _image(tmp_path))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("def __init__(self, other): super().__init__(8, 4)", "needs the argument 'other'"),
        ("def __init__(self, dim, num_experts): super().__init__(dim, num_experts); 1 / 0", "does not work as"),
        ("def forward(self, x): return x[:, :4]", "does not work as"),
        ("def forward(self, x, *, context=None): return x", "of shape (2, 8)"),
        ("def __init__(self, dim, num_experts, *, k=1): super().__init__(dim, num_experts)", "'k'"),
    ],
)
def test_own_router_that_cannot_work_is_found_before_training(tmp_path, monkeypatch, refused, body, words):
    module = f"own_{abs(hash(body))}"
    (tmp_path / f"{module}.py").write_text(
        f"from spectralmoe import LinearScorer\n\n\nclass Own(LinearScorer):\n    {body}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert words in refused("compare", *SMALL, "--routers", f"{module}:Own", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_data_than_the_models(model, refused):
    assert "image size of (28, 28)" in refused("evaluate", model, "--data", "mnist5k")


def test_brackets_and_odd_bytes_in_names(tmp_path, call):
    folder = tmp_path / "a[/b]" / "s\udcffet"
    for name in ("one", "two"):
        (folder / name).mkdir(parents=True)
        for index in range(20):
            np.save(folder / name / f"{index}.npy", np.random.default_rng(shifted(index)).random((8, 8)))
    options = [
        "--depths",
        1,
        "--seeds",
        1,
        "--epochs",
        1,
        "--trials",
        1,
        "--routers",
        "linear",
        "--columns",
        "accuracy",
    ]
    code, _, err = call("compare", "--data", f"folder:{folder}", *options, "--out", tmp_path / "out")
    assert code == 0, err


def test_interrupt_says_so(call, tmp_path, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spectralmoe.experiments.compare.cell.train", interrupted)
    code, _, err = call("compare", *SMALL, "--routers", "linear", "--processes", 1, "--out", tmp_path / "out")
    assert code == 130
    assert err.splitlines()[-1] == "error: interrupted; what was finished is kept"
    assert "Traceback" not in err
