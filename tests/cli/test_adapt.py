"""``spectralmoe adapt`` as a user meets it: every form, what it writes, and that MODEL's folder is never touched."""

import base64
import hashlib
import json
import shlex
import struct
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from spectralmoe import load, record
from spectralmoe.adaptation import COPIES, carried
from spectralmoe.data.image_data import ImageData, load_data
from spectralmoe.json_files import read_json
from spectralmoe.saving import save
from spectralmoe.training.loop import train
from spectralmoe.training.network import build_network, model_meta
from spectralmoe.training.settings import Network, Optimization
from spectralmoe.training.tasks import ImageTask
from spectralmoe.training.tasks.image_verbs import _in_name

WRITTEN = ["config.json", "model.safetensors", "receipt.json", "receipt.svg", "update.safetensors"]
GUARD = ["--guard", "digits"]


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data("digits")


@pytest.fixture(scope="module")
def model(data, tmp_path_factory) -> Path:
    """The folder of a small network with spare units and top-2 routing, trained on some of the digits."""
    folder = tmp_path_factory.mktemp("adapt") / "model"
    some = data.subset(300)
    network = build_network(some, Network(width=16, num_experts=4, hidden=8, spare=8, k=2), "prototype", 2, seed=0)
    train(network, ImageTask(some), Optimization(epochs=6, batch_size=32))
    save(network, folder, meta=model_meta(data, "prototype"))
    return folder


@pytest.fixture(autouse=True)
def untouched(model):
    """No test may leave another file, or another byte, in MODEL's folder."""

    def hashes() -> dict[str, str]:
        files = [path for path in model.rglob("*") if path.is_file()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = hashes()
    yield
    assert hashes() == before


@pytest.fixture(scope="module")
def wrong(model, data) -> list[int]:
    """Test samples that the model gets wrong."""
    return (predictions(load(model), data.test.images) != data.test.labels).nonzero().flatten().tolist()


@pytest.fixture
def sample(data, wrong, tmp_path) -> list[object]:
    """Options that name a misclassified test image and its label."""
    return image_options(data.test.images[wrong[0]], int(data.test.labels[wrong[0]]), tmp_path)


def image_options(image: torch.Tensor, label: int, folder: Path) -> list[object]:
    np.save(folder / "image.npy", image[0].numpy())
    return ["--image", folder / "image.npy", "--label", label]


def predictions(network, images) -> torch.Tensor:
    with torch.no_grad():
        return network(images).argmax(-1)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["unit", "low_rank", "sgd"])
def corrected(request, call, model, sample, tmp_path):
    """A guarded correction: (receipt as JSON, folder). Roomy, so that samples do flip."""
    method = [] if request.param == "unit" else ["--method", request.param, "--layers", "all", "--no-carry"]
    out = tmp_path / "out"
    code, text, err = call("adapt", "correct", model, *sample, *GUARD, "--budget", 50, *method, "--out", out, "--json")
    assert code == 0, err
    receipt = json.loads(text)
    assert receipt == read_json(out / "receipt.json")
    assert receipt["settings"]["method"] == request.param
    return receipt, out


def test_receipt_of_a_guarded_correction_by_hand(corrected, model, data, wrong):
    receipt, out = corrected
    assert names(out) == WRITTEN
    old, new = load(model), load(out)
    index, label = wrong[0], int(data.test.labels[wrong[0]])
    x = data.test.images[index : index + 1]
    assert receipt["success"]
    assert receipt["label"] == label == int(predictions(new, x))
    for key, network in (("before", old), ("after", new)):
        share = network(x)[0].softmax(-1).detach()
        found = receipt[key]
        assert found["prediction"] == int(share.argmax())
        assert found["probability"] == pytest.approx(float(share.max()), rel=1e-5)
        assert found["right"] == pytest.approx(float(share[label]), rel=1e-5)
        assert receipt[f"carried_{key}"] == carried(network, x, torch.tensor([label]))
    changed = [(a != b) for a, b in zip(old.parameters(), new.parameters(), strict=True)]
    assert receipt["written"] == sum(int(c.sum()) for c in changed)
    assert receipt["parameters"] == sum(c.numel() for c in changed)
    step = sum(float((a - b).detach().square().sum()) for a, b in zip(old.parameters(), new.parameters(), strict=True))
    assert receipt["change"] == pytest.approx(step**0.5, rel=1e-4)
    assert receipt["settings"]["guard"] == {"data": "digits", "samples": 1079, "budget": 50.0, "max_flips": None}


def test_what_moved_by_hand(corrected, model, data, wrong):
    receipt, out = corrected
    old, new = load(model), load(out)
    images, labels, moved = data.train.images, data.train.labels, receipt["reference"]
    was, now = predictions(old, images), predictions(new, images)
    assert moved["samples"] == len(labels)
    expected = [
        {"index": int(i), "label": int(labels[i]), "before": int(was[i]), "after": int(now[i])}
        for i in (was != now).nonzero().flatten()
    ]
    assert moved["flipped"] == expected
    gained, lost = int(((now == labels) & (was != labels)).sum()), int(((now != labels) & (was == labels)).sum())
    assert (moved["interference"]["gained"], moved["interference"]["lost"]) == (gained, lost)
    assert moved["interference"]["mean"] == pytest.approx(100 * (gained - lost) / len(labels))
    assert moved["interference"]["low"] < moved["interference"]["mean"] < moved["interference"]["high"]
    routes = {"old": routes_of(old, images), "new": routes_of(new, images)}
    used = torch.zeros(len(labels), dtype=torch.bool)
    for layer, expert in receipt["touched"].items():
        used |= (routes["old"][layer] == expert).any(-1)
    assert moved["reachable"] == int(used.sum()) < len(labels)
    other = torch.stack([(routes["old"][name] != routes["new"][name]).any(-1) for name in routes["old"]]).any(0)
    assert moved["rerouted"] == other.nonzero().flatten().tolist()
    held, own = receipt["test"], wrong[0]
    others = torch.arange(len(data.test)) != own
    was, now = (predictions(network, data.test.images)[others] for network in (old, new))
    right = data.test.labels[others]
    assert held["left_out"] == 1
    assert held["accuracy_before"] == pytest.approx(100 * float((was == right).double().mean()))
    assert held["accuracy_after"] == pytest.approx(100 * float((now == right).double().mean()))
    assert [flip["index"] for flip in held["flipped"]] == (torch.arange(len(data.test))[others])[was != now].tolist()


def routes_of(network, images) -> dict[str, torch.Tensor]:
    with torch.no_grad(), record(network) as tape:
        network(images)
    return {item.name: item.routing.indices.sort(-1).values for item in tape}


def test_picture_holds_the_images(corrected, data, wrong):
    receipt, out = corrected
    root = ElementTree.parse(out / "receipt.svg").getroot()
    assert root.get("aria-label").startswith("One expert corrected: ")
    found = [element.get("href") for element in root.iter("{http://www.w3.org/2000/svg}image")]
    flips = receipt["reference"]["flipped"]
    worse = [f["index"] for f in flips if f["before"] == f["label"]]
    better = [f["index"] for f in flips if f["after"] == f["label"]]
    others = [f["index"] for f in flips if f["index"] not in {*worse, *better}]
    shown = list(dict.fromkeys([*worse, *others, *better, *receipt["reference"]["rerouted"]]))
    wanted = [data.test.images[wrong[0]], *(data.train.images[i] for i in shown[:24])]
    assert len(found) == len(wanted)
    for href, image in zip(found, wanted, strict=True):
        pixels = decoded(href)
        np.testing.assert_array_equal(pixels, (image[0] * 255).round().to(torch.uint8).numpy())


def decoded(href: str) -> np.ndarray:
    """The grey pixels of a PNG as a data URI, rows without filters."""
    raw = base64.b64decode(href.removeprefix("data:image/png;base64,"))
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, colour = struct.unpack(">IIBB", raw[16:26])
    assert (depth, colour) == (8, 0)
    start = raw.index(b"IDAT")
    (length,) = struct.unpack(">I", raw[start - 4 : start])
    rows = np.frombuffer(zlib.decompress(raw[start + 4 : start + 4 + length]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:]


def test_patch_gives_the_same_model(corrected, call, refused, model, tmp_path):
    _, out = corrected
    patch = out / "update.safetensors"
    code, text, _ = call("adapt", "apply", model, patch, "--out", tmp_path / "applied")
    assert code == 0
    assert "applied" in text
    assert (tmp_path / "applied" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert call("evaluate", tmp_path / "applied")[0] == 0
    code, text, _ = call("adapt", "apply", model, patch, "--out", tmp_path / "again", "--json")
    assert json.loads(text)["touched"] == read_json(out / "receipt.json")["touched"]
    assert "applied to this model already" in refused("adapt", "apply", out, patch, "--out", tmp_path / "twice")
    assert "is not a saved update" in refused("adapt", "apply", model, out / "config.json", "--out", tmp_path / "no")
    assert "No such option: --lr" in refused("adapt", "apply", model, patch, "--lr", 1, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.fixture
def patch(call, model, sample, tmp_path) -> Path:
    assert call("adapt", "correct", model, *sample, "--out", tmp_path / "out")[0] == 0
    return tmp_path / "out" / "update.safetensors"


def test_patch_for_another_model(refused, data, patch, tmp_path):
    other = build_network(data, Network(width=16, num_experts=4, hidden=8), "prototype", 2, seed=1)
    save(other, tmp_path / "other", meta=model_meta(data, "prototype"))
    before = (tmp_path / "other" / "model.safetensors").read_bytes()
    assert "is for another model" in refused("adapt", "apply", tmp_path / "other", patch, "--out", tmp_path / "no")
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "no").exists()


def test_text_says_what_a_person_wants_to_know(call, model, sample, tmp_path):
    code, text, _ = call("adapt", "correct", model, *sample, *GUARD, "--guard-size", 500, "--out", tmp_path / "out")
    assert code == 0
    for words in (
        "method unit, the default with --guard: stages.1.moe has spare units",
        "corrected: ",
        "written: expert ",
        "reference: 500 samples, ",
        "test: 538 samples without this one; ",
        "copies right: noisy ",
        ", rotated 10° ",
        "copies of the kind that carried corrections are built from: shifted 1 px ",
        f"written to {tmp_path / 'out'}: model, update.safetensors, receipt.json, receipt.svg",
    ):
        assert words in text
    code, text, _ = call("adapt", "correct", model, *sample, "--out", tmp_path / "plain")
    assert code == 0
    assert "method sgd, the default without --guard" in text
    assert "reference:" not in text
    receipt = read_json(tmp_path / "plain" / "receipt.json")
    assert receipt["reference"] is None
    assert list(receipt["touched"]) == ["stages.0.moe", "stages.1.moe"]


def test_low_rank_is_the_default_without_spare_units(call, data, sample, tmp_path):
    network = build_network(data, Network(width=16, num_experts=2, hidden=8), "linear", 1, seed=0)
    save(network, tmp_path / "model", meta=model_meta(data, "linear"))
    text = call("adapt", "correct", tmp_path / "model", *sample, *GUARD, "--budget", 100, "--out", tmp_path / "out")[1]
    assert "method low_rank, the default with --guard: stages.0.moe has no spare units" in text


def test_refused_correction(call, model, data, tmp_path):
    """The image is in the reference data and right; relabelled it is no reason to refuse, but a wild step is."""
    right = int((predictions(load(model), data.train.images) == data.train.labels).nonzero()[0])
    sample = image_options(data.train.images[right], (int(data.train.labels[right]) + 1) % 10, tmp_path)
    out = tmp_path / "out"
    code, text, err = call("adapt", "correct", model, *sample, *GUARD, "--max-flips", 0, "--budget", 0, "--out", out)
    assert "error" not in err
    assert " without this one, " in text  # the image is in the reference data, and does not count there
    receipt = read_json(out / "receipt.json")
    assert receipt["reference"]["contains_sample"]
    assert receipt["reference"]["samples"] == len(data.train) - 1
    assert code == (0 if receipt["success"] else 1)
    assert right not in [flip["index"] for flip in receipt["reference"]["flipped"]]
    other = tmp_path / "other"
    code, text, _ = call("adapt", "correct", model, *sample, "--lr", 1e30, "--out", other, "--json")
    assert code == 1
    assert json.loads(text)["tried"] == ["sgd in stages.0.moe, stages.1.moe: the samples did not become right"]
    assert names(other) == ["receipt.json"]
    code, text, _ = call(
        "adapt", "correct", model, *sample, "--lr", 1e30, "--out", other
    )  # the same folder may be used
    assert code == 1
    assert "NOT corrected: " in text
    assert "tried: sgd in stages.0.moe, stages.1.moe: the samples did not become right" in text
    receipt = read_json(other / "receipt.json")
    assert not receipt["success"]
    assert receipt["written"] == 0
    assert receipt["before"] == receipt["after"]
    assert names(other) == ["receipt.json"]


def test_sample_of_the_data(call, model, data, wrong, sample, tmp_path):
    """``--sample test:N`` is the image N of the test part with its own label, as ``--image`` with ``--label``."""
    by_number, by_file = tmp_path / "number", tmp_path / "file"
    code, text, err = call("adapt", "correct", model, "--sample", f"test:{wrong[0]}", *GUARD, "--out", by_number)
    assert code == 0, err
    assert "corrected: " in text
    assert call("adapt", "correct", model, *sample, *GUARD, "--out", by_file)[0] == 0
    receipt, other = read_json(by_number / "receipt.json"), read_json(by_file / "receipt.json")
    assert receipt["sample"] == {"data": "digits", "part": "test", "number": wrong[0]}
    assert (receipt["image"], other["sample"]) == (None, None)
    assert receipt["label"] == int(data.test.labels[wrong[0]])
    for key in ("label", "before", "after", "written", "reference", "test", "carried_after"):
        assert receipt[key] == other[key], key
    assert (by_number / "model.safetensors").read_bytes() == (by_file / "model.safetensors").read_bytes()
    right = int((predictions(load(model), data.validation.images) == data.validation.labels).nonzero()[0])
    label = int(data.validation.labels[right])
    assert call("adapt", "correct", model, "--sample", f"val:{right}", "--out", tmp_path / "right")[0] == 0
    assert "update.safetensors" not in names(tmp_path / "right")
    code = call(
        "adapt",
        "correct",
        model,
        "--sample",
        f"val:{right}",
        "--label",
        (label + 1) % 10,
        "--out",
        tmp_path / "relabel",
    )[0]
    assert read_json(tmp_path / "relabel" / "receipt.json")["label"] == (label + 1) % 10
    assert code == 0


def test_other_sizes_and_colours_are_converted_and_said(call, model, data, wrong, tmp_path):
    grey = data.test.images[wrong[0], 0].numpy()
    np.save(tmp_path / "large.npy", np.repeat(grey.repeat(2, 0).repeat(2, 1)[..., None], 3, axis=2))
    label = int(data.test.labels[wrong[0]])
    options = ["--image", tmp_path / "large.npy", "--label", label, "--out", tmp_path / "out"]
    code, _, err = call("adapt", "correct", model, *options)
    assert code in (0, 1), err
    note = "read as 8 x 8 pixels (height x width), grey: "
    assert err.count(note) == 1
    assert "large.npy (16 x 16, colour)" in err
    assert note in call("predict", model, tmp_path / "large.npy")[2]
    assert read_json(tmp_path / "out" / "receipt.json")["converted"].startswith(note)
    before = json.loads(call("predict", model, tmp_path / "large.npy", "--json")[1])[0]
    assert read_json(tmp_path / "out" / "receipt.json")["before"]["prediction"] == before["label"]
    np.save(tmp_path / "same.npy", grey)
    assert (
        call("adapt", "correct", model, "--image", tmp_path / "same.npy", *options[2:4], "--out", tmp_path / "o")[
            2
        ].count("note")
        == 0
    )


def test_wrong_images_are_written_and_can_be_corrected(call, model, data, wrong, tmp_path):
    found, folder = predictions(load(model), data.test.images), tmp_path / "wrong"
    code, text, err = call("evaluate", model, "--wrong", folder)
    assert code == 0, err
    files = {f"test-{i}_label-{int(data.test.labels[i])}_predicted-{int(found[i])}.png": i for i in wrong}
    assert set(names(folder)) == set(files)
    for name, i in list(files.items())[:5]:
        label = int(json.loads(call("predict", model, folder / name, "--json")[1])[0]["label"])
        assert label == int(found[i])
    command = next(line for line in text.splitlines() if line.startswith("correct it: "))
    words = shlex.split(command.removeprefix("correct it: "))
    assert words[:6] == ["spectralmoe", "adapt", "correct", str(model), "--sample", f"test:{wrong[0]}"]
    assert words[-2:] == ["--out", "runs/corrected"]
    assert call(*words[1:-1], tmp_path / "corrected")[0] in (0, 1)
    line = call("evaluate", model, "--wrong", folder)
    assert line[0] == 2
    assert "is not empty" in line[2]
    result = json.loads(call("evaluate", model, "--wrong", tmp_path / "again", "--json")[1])
    assert [entry["sample"] for entry in result["wrong"]] == [f"test:{i}" for i in wrong]
    assert {entry["file"] for entry in result["wrong"]} == set(files)
    assert "wrong" not in json.loads(call("evaluate", model, "--json")[1])


def test_class_names_make_safe_file_names():
    classes = ["a/b: c", "..", "\u00e9t\u00e9", "x" * 99, "CON", "a/b; c", "*", "7", " 8 ", "n\nine"]
    assert [_in_name(classes, label) for label in range(7)] == [
        "a_b_c",
        "1",
        "\u00e9t\u00e9",
        "x" * 20,
        "CON",
        "a_b_c",
        "6",
    ]
    assert [_in_name(classes, label) for label in (7, 8, 9)] == ["7", "8", "n_ine"]


def test_image_that_is_right_already(call, model, data, tmp_path):
    right = int((predictions(load(model), data.test.images) == data.test.labels).nonzero()[0])
    sample = image_options(data.test.images[right], int(data.test.labels[right]), tmp_path)
    code, text, _ = call("adapt", "correct", model, *sample, *GUARD, "--out", tmp_path / "out")
    assert code == 0
    assert "already right" in text
    assert names(tmp_path / "out") == [name for name in WRITTEN if name != "update.safetensors"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_trials_with_a_guard(call, model):
    code, text, _ = call("adapt", "trials", model, "--count", 3, *GUARD, "--guard-size", 300, "--json")
    assert code == 0
    found = json.loads(text)
    assert found["trials"] == len(found["trial_list"]) == 3
    changes = [trial["interference"] for trial in found["trial_list"]]
    assert found["interference"] == pytest.approx(sum(changes) / 3)
    assert found["interference_worst"] == min(changes)
    assert found["carried_after"].keys() == COPIES.keys()
    for kind, share in found["carried_after"].items():
        assert share == pytest.approx(sum(trial["after"][kind] for trial in found["trial_list"]) / 3)
    code, text, _ = call("adapt", "trials", model, "--count", 2)
    assert code == 0
    assert "2 test samples corrected one at a time" in text
    assert "at worst" in text
    assert "copies of the corrected samples that are right: noisy " in text
    assert "copies of the kind that carried corrections are built from: shifted 1 px " in text


def test_stream(call, model, data, tmp_path):
    out = tmp_path / "out"
    options = ["--count", 5, *GUARD, "--guard-size", 300, "--seed", 3]
    code, text, err = call("adapt", "stream", model, *options, "--out", out)
    assert code == 0, err
    assert "5 corrections in a row" in text
    assert names(out) == ["config.json", "model.safetensors", "stream.json", "stream.svg"]
    found, images, labels = read_json(out / "stream.json"), data.test.images, data.test.labels
    assert found["corrections"] == len(found["steps"]) == 5
    old, new = predictions(load(model), images), predictions(load(out), images)
    samples = [step["sample"] for step in found["steps"]]
    made = [step["sample"] for step in found["steps"] if step["success"]]
    assert all(old[samples] != labels[samples])
    assert found["kept"] == pytest.approx(float((new[made] == labels[made]).double().mean()))
    others = torch.ones(len(labels), dtype=torch.bool)
    others[samples] = False
    for key, predicted in (("accuracy_before", old), ("accuracy_after", new)):
        assert found[key] == pytest.approx(100 * float((predicted == labels)[others].double().mean()))
    root = ElementTree.parse(out / "stream.svg").getroot()
    assert root.get("aria-label") == "5 corrections in a row"
    paths = [element.get("d") for element in root.iter("{http://www.w3.org/2000/svg}path")]
    assert [path.count("L") for path in paths] == [5, 4]  # the accuracy line starts before the first correction
    code, text, _ = call("adapt", "stream", model, *options, "--out", tmp_path / "again", "--json")
    assert json.loads(text)["accuracy_after"] == found["accuracy_after"]


def test_new_class(call, refused, data, tmp_path):
    (tmp_path / "c.toml").write_text(
        'data = "digits"\nrouter = "linear"\nhold_out = "7"\ntrain_size = 300\n'
        "[network]\nwidth = 16\nnum_experts = 4\nhidden = 8\nspare = 8\n[optimization]\nepochs = 4\nbatch_size = 32\n"
    )
    folder = tmp_path / "held"
    assert call("train", "--config", tmp_path / "c.toml", "--out", folder)[0] == 0
    assert read_json(folder / "config.json")["meta"]["hold_out"] == "7"
    network, sevens = load(folder), data.test.labels == 7
    assert network.num_classes == 10
    assert not bool((predictions(network, data.test.images) == 7).any())
    options = ["7", "--shots", "1,3", *GUARD, "--guard-size", 200]
    code, text, err = call("adapt", "new-class", folder, *options, "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found["class"] == "7"
    assert found["held_out"] is True
    assert [row["shots"] for row in found["shots"]] == [1, 3]
    for row in found["shots"]:
        assert row["accuracy_before"] == 0
        assert row["accuracy_after"] == pytest.approx(sum(t["accuracy"] for t in row["tries"]) / 5)
        assert row["interference_worst"] == min(t["interference"] for t in row["tries"])
    text = call("adapt", "new-class", folder, "7", "--shots", "1")[1]
    assert "right after" in text
    assert "note:" not in text
    too_many = refused("adapt", "new-class", folder, "7", "--shots", 9999)
    assert f"only {int((data.train.labels == 7).sum())} images" in too_many
    (tmp_path / "d.toml").write_text('data = "digits"\nhold_out = "eleven"\n')
    line = refused("train", "--config", tmp_path / "d.toml", "--out", tmp_path / "none")
    assert "unknown class 'eleven'; known: 0, 1, 2" in line
    assert sevens.any()


def test_class_that_training_saw_is_no_new_class(call, model):
    code, text, _ = call("adapt", "new-class", model, "7", "--shots", "1")
    assert code == 0
    assert "note: the model was trained with class '7'" in text


def test_class_names(data, sample, call, refused, tmp_path):
    """A model whose classes have names takes names and numbers, and the receipt uses the names."""
    network = build_network(data, Network(width=16, num_experts=2, hidden=8), "linear", 1, seed=0)
    meta = model_meta(data, "linear") | {"classes": [f"<b>{'x' * i}" for i in range(10)], "data": "folder:/no/such"}
    save(network, tmp_path / "model", meta=meta)
    sample = [*sample[:3], "<b>xxx"]
    code, text, err = call("adapt", "correct", tmp_path / "model", *sample, "--lr", 0.05, "--out", tmp_path / "out")
    assert code == 0, err
    assert "-> <b>xxx (" in text
    assert "test: none, " in text  # the model's own data cannot be had
    assert "/no/such" in text
    ElementTree.parse(tmp_path / "out" / "receipt.svg")
    assert read_json(tmp_path / "out" / "receipt.json")["label"] == 3
    line = refused("adapt", "correct", tmp_path / "model", *sample[:3], "y", "--out", tmp_path / "no")
    assert "label y is neither a class (<b>, <b>x" in line


IMAGE_OF_ONE = ["--image", "IMAGE", "--label", "1"]
OUT = ["--out", "OUT"]


@pytest.mark.parametrize(
    ("job", "options", "words"),
    [
        ("correct", OUT, "name what to correct"),
        ("correct", ["--sample", "test:3", *IMAGE_OF_ONE, *OUT], "one of them"),
        ("correct", ["--image", "IMAGE", *OUT], "give --label"),
        ("correct", ["--sample", "test:3"], "Missing option '--out'"),
        ("stream", [], "Missing option '--out'"),
        ("apply", ["IMAGE"], "Missing option '--out'"),
        ("trials", OUT, "No such option: --out"),
        ("new-class", ["7", *OUT], "No such option: --out"),
        ("new-class", ["7", "--shots", "one"], "--shots 'one'"),
        ("new-class", ["7", "--shots", "0"], "--shots '0'"),
        ("new-class", ["seven"], "label seven"),
        ("trials", ["--budget", "1"], "--budget is about reference data"),
        ("trials", ["--max-flips", "1"], "--max-flips is about reference data"),
        ("trials", ["--guard-size", "1"], "--guard-size is about reference data"),
        ("trials", ["--method", "unit"], "give --guard"),
        ("trials", ["--method", "magic"], "unknown method 'magic'"),
        ("trials", ["--layers", "some"], "unknown layer 'some'"),
        ("trials", ["--layers", ","], "--layers names nothing"),
        ("trials", ["--guard", "mnist"], "unknown data set 'mnist'"),
        ("trials", ["--guard", "mnist5k"], "does not fit the model"),
        ("correct", ["--image", "IMAGE", "--label", "12", *OUT], "label 12"),
        ("correct", ["--image", "IMAGE", "--label", "-1", *OUT], "label -1"),
        ("correct", [*IMAGE_OF_ONE, *OUT, "--lr", "inf"], "step size"),
        ("correct", ["--image", "none.png", "--label", "1", *OUT], "none.png"),
        ("correct", ["--sample", "43", *OUT], "--sample '43' is not a part and a number such as test:43"),
        ("correct", ["--sample", "test:-1", *OUT], "--sample 'test:-1'"),
        ("correct", ["--sample", "exam:1", *OUT], "parts: train, validation, test"),
        ("correct", ["--sample", "test:539", *OUT], "the test part of digits has the samples 0 to 538"),
        ("correct", ["--sample", "test:3", "--label", "12", *OUT], "label 12"),
        ("correct", [*IMAGE_OF_ONE, "--out", "MODEL"], "holds a model already"),
        ("correct", [*IMAGE_OF_ONE, "--out", "MODEL/new"], "MODEL's own folder"),
        ("correct", [*IMAGE_OF_ONE, "--out", "IMAGE"], "cannot write to"),
        ("stream", ["--count", "2", "--out", "/proc/none"], "cannot write to /proc/none"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(refused, model, tmp_path, job, options, words):
    np.save(tmp_path / "image.npy", np.zeros((8, 8), dtype=np.float32))
    places = {"IMAGE": tmp_path / "image.npy", "OUT": tmp_path / "out"}
    places |= {"MODEL": model, "MODEL/new": model / "new"}
    assert words in refused("adapt", job, model, *(places.get(option, option) for option in options))
    assert names(tmp_path) == ["image.npy"]


def test_a_sample_is_checked_before_a_model_is_read(refused, tmp_path):
    no_model, out = tmp_path / "none", tmp_path / "out"
    assert "such as test:43" in refused("adapt", "correct", no_model, "--sample", "43", "--out", out)


@pytest.mark.parametrize(
    ("options", "job"),
    [
        (["MODEL", "--sample", "test:3"], "correct"),
        (["MODEL", "--guard", "digits", "--image", "x.png"], "correct"),
        (["--label=7", "--image=x.png", "MODEL"], "correct"),
        (["MODEL", "7", "--shots", "5"], "new-class"),
        (["MODEL", "--count", "5"], "JOB"),
        (["runs/model"], "JOB"),
    ],
)
def test_a_call_without_a_job_is_told_which(refused, options, job):
    jobs = ", JOB one of correct, trials, stream, new-class, apply" if job == "JOB" else ""
    assert refused("adapt", *options).endswith(f"spectralmoe adapt {job} MODEL ...{jobs}")


def test_a_misspelt_job_is_one_line(refused):
    assert "unknown job of adapt 'corect'; did you mean 'correct'?" in refused("adapt", "corect")


def test_interrupt_leaves_no_partial_file(call, model, sample, tmp_path, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    for place in ("adaptation.make_receipt", "adaptation.draw_receipt", "files.write_text"):
        with monkeypatch.context() as patched:
            patched.setattr(f"spectralmoe.{place}", interrupted)
            code, _, err = call("adapt", "correct", model, *sample, "--out", out)
        assert code == 130
        assert "Traceback" not in err
        assert out.exists() == (place == "files.write_text")
    assert names(out) == ["update.safetensors"]  # written before, and whole
    assert call("adapt", "apply", model, out / "update.safetensors", "--out", tmp_path / "applied")[0] == 0
    assert call("adapt", "correct", model, *sample, "--out", out)[0] == 0
    assert names(out) == WRITTEN


def test_interrupt_while_a_file_is_written(call, model, sample, tmp_path, monkeypatch):
    def half(tensors: object, path: Path, about: object) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("spectralmoe.adaptation.update.save_file", half)
    assert call("adapt", "correct", model, *sample, "--out", tmp_path / "out")[0] == 130
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("spectralmoe.adaptation.correction_stream", lambda *_, **__: half({}, tmp_path / "x", {}))
    assert call("adapt", "stream", model, "--count", 3, "--out", tmp_path / "out")[0] == 130
    assert not (tmp_path / "out").exists()
