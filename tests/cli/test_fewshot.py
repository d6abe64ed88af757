"""Timm models on the command line: train, evaluate, predict, few-shot; one clear line for every mistake."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from grids import first_of

from spectralmoe import load
from spectralmoe.cli.app import run
from spectralmoe.data.image_data import load_data
from spectralmoe.experiments.few_shot.grid import FewShotSettings, recipe
from spectralmoe.experiments.few_shot.learning import FEW_SHOT, draw_shots, few_shot, few_shot_network
from spectralmoe.json_files import read_json, write_json

EXAMPLE = Path(__file__).parents[2] / "examples" / "emoe-vit.toml"
QUICK = ["--data", "digits", "--shots", "1,3", "--seeds", "2", "--epochs", "3", "--bottleneck", "4", "--experts", "4"]


def small(text: str) -> str:
    """The example, for 8 x 8 images and a second or two."""
    for old, new in (
        ('"fashion-mnist"', '"digits"'),
        ("train_size = 20000", "train_size = 600"),
        ("img_size = 28", "img_size = 8"),
        ("patch_size = 7", "patch_size = 4"),
        ("embed_dim = 64", "embed_dim = 32"),
        ("epochs = 6", "epochs = 4"),
    ):
        assert old in text, old
        text = text.replace(old, new)
    return text


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two trained folders: "dense" and "emoe"."""
    out = tmp_path_factory.mktemp("vision")
    text = small(EXAMPLE.read_text())
    dense = text[: text.index("[moe]")] + text[text.index("[optimization]") :]
    for name, config in (("emoe", text), ("dense", dense)):
        (out / f"{name}.toml").write_text(config)
        assert run(["train", "--config", str(out / f"{name}.toml"), "--out", str(out / name)]) == 0
    return out


@pytest.mark.parametrize("name", first_of(1, ["dense", "emoe"]))
def test_evaluate_and_predict_read_what_train_wrote(models, name, call, tmp_path):
    data, network = load_data("digits"), load(models / name)
    logits = network(data.test.images).detach()
    accuracy = 100 * float((logits.argmax(-1) == data.test.labels).float().mean())
    assert accuracy > 30
    assert read_json(models / name / "history.json")["test_accuracy"] == pytest.approx(accuracy)
    assert read_json(models / name / "config.json")["meta"]["results"]["test_accuracy"] == pytest.approx(
        accuracy, abs=0.01
    )
    code, out, _ = call("evaluate", models / name, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["accuracy"] == pytest.approx(accuracy)
    assert len(found["layers"]) == (2 if name == "emoe" else 0)
    assert call("evaluate", models / name)[0] == 0
    np.save(tmp_path / "a.npy", data.test.images[0, 0].numpy())
    code, out, _ = call("predict", models / name, tmp_path / "a.npy", "--json")
    assert code == 0
    row = json.loads(out)[0]
    assert row["label"] == int(logits[0].argmax())
    assert row["probability"] == pytest.approx(float(logits[0].softmax(-1).amax()), rel=1e-4)
    assert len(row["experts"]) == (2 if name == "emoe" else 0)
    assert "a.npy: " in call("predict", models / name, tmp_path / "a.npy")[1]


def test_training_again_does_nothing_and_other_settings_are_refused(models, call, refused):
    before = (models / "emoe" / "model.safetensors").read_bytes()
    assert call("train", "--config", models / "emoe.toml", "--out", models / "emoe")[0] == 0
    assert (models / "emoe" / "model.safetensors").read_bytes() == before
    assert "seed" in refused("train", "--config", models / "emoe.toml", "--out", models / "emoe", "--seed", 5)


def test_few_shot_table_file_and_rerun(models, call, refused, tmp_path):
    rows = ["--rows", "emoe,linear-probe,adapter,linear+load_balance"]
    command = ["fewshot", models / "dense", *QUICK, *rows, "--out", tmp_path]
    code, out, _ = call(*command)
    assert code == 0
    assert "linear+load_balance" in out
    held = read_json(tmp_path / "fewshot.json")
    assert len(held["cells"]) == 4 * 2 * 2
    first = held["summary"][0]
    values = [c["accuracy"] for c in held["cells"] if (c["row"], c["shots"]) == (first["row"], first["shots"])]
    assert first["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
    assert first["accuracy"]["half"] == pytest.approx(12.706 * abs(values[0] - values[1]) / 2)
    for path in (tmp_path / "cells").iterdir():
        cell = read_json(path)
        if cell["row"] == "adapter":
            path.unlink()
        elif cell["row"] == "emoe":
            write_json(path, {**cell, "accuracy": 1.0})
    code, out, _ = call(*command, "--json")
    assert code == 0
    again = read_json(tmp_path / "fewshot.json")["cells"]
    assert {c["accuracy"] for c in again if c["row"] == "emoe"} == {1.0}  # finished cells are not run again
    old, new = (sorted((c["shots"], c["seed"], c["accuracy"]) for c in cells if c["row"] == "adapter")
                for cells in (held["cells"], again))  # fmt: skip
    assert old == new  # those that were missing come out the same
    assert [item["row"] for item in json.loads(out)][:2] == ["emoe", "emoe"]
    assert "optimization.lr" in refused(*command, "--lr", "0.5")
    code, out, _ = call(*command[:-1], tmp_path, "--rows", "linear", "--seeds", 1, "--json")
    assert code == 0
    assert [item["row"] for item in json.loads(out)][-1] == "linear"  # it grows
    assert len(read_json(tmp_path / "fewshot.json")["cells"]) == 4 * 2 * 2 + 2


def test_the_cell_is_the_plain_function(models, call, tmp_path):
    assert call("fewshot", models / "dense", *QUICK, "--rows", "linear", "--out", tmp_path)[0] == 0
    cell = read_json(tmp_path / "fewshot.json")["cells"][-1]
    data = load_data("digits")
    settings = FewShotSettings(data="digits", experts=4, bottleneck=4)
    spec, terms, *_ = recipe("linear", settings)
    train = draw_shots(data.train, cell["shots"], 10, cell["seed"])
    budget = FEW_SHOT.model_copy(update={"epochs": 3, "seed": cell["seed"]})
    found = few_shot(load(models / "dense"), spec, train, data.test, 10, settings=budget, terms=terms)
    assert found == cell["accuracy"]


@pytest.mark.parametrize(
    ("name", "row"), [("dense", "emoe"), ("dense", "omoe"), ("dense", "linear-probe"), ("emoe", "own")]
)
def test_everything_but_branches_and_head_stays_to_the_bit(models, name, row):
    model, data = load(models / name), load_data("digits")
    spec, terms, optimizer, own = recipe(row, FewShotSettings(data="digits", experts=4, bottleneck=4))
    budget = FEW_SHOT.model_copy(update={"epochs": 3})
    train = draw_shots(data.train, 2, 10, 0)
    network = few_shot_network(model, spec, train, 10, settings=budget, terms=terms, optimizer=optimizer, own=own)
    moved = set()
    for key, value in model.state_dict().items():
        if not torch.equal(network.state_dict()[key], value):
            moved.add("head" if ".head." in key else "moe" if "moe_branch" in key else key)
    assert moved == ({"head", "moe"} if row == "own" else {"head"})


def test_a_linear_probe_is_a_linear_model_on_the_features(models):
    model, data = load(models / "dense"), load_data("digits")
    train = draw_shots(data.train, 2, 10, 0)
    network = few_shot_network(model, None, train, 10, settings=FEW_SHOT.model_copy(update={"epochs": 2}))
    model.backbone.reset_classifier(0)
    expected = network.backbone.head(model(data.test.images[:9]))
    torch.testing.assert_close(network.eval()(data.test.images[:9]), expected)


def test_shots_are_drawn_from_the_training_part_by_seed():
    split = load_data("digits").train
    three, five = (draw_shots(split, k, 10, 4) for k in (3, 5))
    assert five.labels.bincount().tolist() == [5] * 10
    known = {image.numpy().tobytes() for image in split.images}
    chosen = [{image.numpy().tobytes() for image in part.images} for part in (three, five)]
    assert len(chosen[1]) == 50
    assert chosen[0] < chosen[1] <= known
    assert not torch.equal(draw_shots(split, 3, 10, 5).images, three.images)


def test_adapter_has_the_compute_of_what_a_token_meets():
    for k, width in ((1, 6), (2, 12), ("soft", 24)):
        settings = FewShotSettings(data="digits", experts=4, bottleneck=6, k=k)
        layer = recipe("adapter", settings).spec.make_moe(8)
        assert layer.experts.up.shape == (1, width, 8)
        torch.nn.init.normal_(layer.experts.down)  # it starts at zero
        tokens = torch.randn(5, 8)
        assert torch.allclose(layer(tokens), layer.experts.expert(tokens, 0), atol=1e-6)


def test_all_rows_start_as_the_backbone():
    settings = FewShotSettings(data="digits", experts=4, bottleneck=6)
    for row in ("adapter", "emoe", "emoe-faithful", "linear", "sr-moe", '{scorer = "cosine", temperature = 0.2}'):
        assert not recipe(row, settings).spec.make_moe(8).experts.down.any(), row


def test_mistakes_are_one_line(models, refused, tmp_path):
    few = ["fewshot", models / "dense", *QUICK, "--out", tmp_path / "f"]
    assert "unknown row 'emo'" in refused(*few, "--rows", "emo")
    assert "names linear twice" in refused(*few, "--rows", "linear,linear")
    assert "row 'phyg-moe': SpectrumScorer reads 'map'" in refused(*few, "--rows", "linear,phyg-moe")
    assert "row 'own'" in refused(*few, "--rows", "own")
    assert "--shots 'x'" in refused("fewshot", models / "dense", "--data", "digits", "--shots", "x", "--out", tmp_path)
    assert "blocks='last9'" in refused(*few, "--rows", "emoe", "--blocks", "last9")
    assert "refuses images of 28 x 28" in refused(
        "fewshot", models / "dense", "--data", "mnist5k", "--out", tmp_path / "g"
    )
    assert "999 shots" in refused(*few[:2], "--data", "digits", "--shots", "999", "--out", tmp_path / "h")
    assert "has a branch already" in refused(
        "fewshot", models / "emoe", *QUICK, "--rows", "emoe", "--out", tmp_path / "i"
    )
    assert "has no MoE layers" in refused("adapt", "trials", models / "dense", "--count", 1)


@pytest.mark.full
def test_a_vision_model_is_corrected_too(models, call, tmp_path):
    """One adapter of one branch changes, the sample becomes right, and the saved update gives the same model."""
    data, old, out = load_data("digits"), load(models / "emoe"), tmp_path / "out"
    wrong = (old(data.test.images).argmax(-1) != data.test.labels).nonzero().flatten().tolist()
    options = ["--sample", f"test:{wrong[0]}", "--guard", "digits", "--guard-size", 100, "--budget", 50, "--no-carry"]
    code, text, err = call("adapt", "correct", models / "emoe", *options, "--out", out)
    assert code == 0, (text, err)
    assert "method low_rank, the default with --guard: backbone.blocks.3.moe_branch.moe has no spare units" in text
    new = load(out)
    assert int(new(data.test.images[wrong[:1]]).argmax()) == int(data.test.labels[wrong[0]])
    moved = [name for name, value in new.state_dict().items() if not torch.equal(value, old.state_dict()[name])]
    assert moved
    assert all(name.startswith("backbone.blocks.3.moe_branch.moe.experts.") for name in moved)
    assert read_json(out / "config.json")["meta"] == read_json(models / "emoe" / "config.json")["meta"]
    again = tmp_path / "again"
    assert call("adapt", "apply", models / "emoe", out / "update.safetensors", "--out", again)[0] == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    code, text, err = call("adapt", "trials", models / "emoe", "--count", 1, "--json")
    assert code == 0, err
    assert json.loads(text)["trials"] == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("vit_tiny_patch16_224", "vit_tny_patch16_224", "unknown timm model"),
        ("img_size = 8", "img_size = 12", "refuses images of 8 x 8"),
        ("patch_size = 4", "patch_sise = 4", "refuses its arguments"),
        ('router = "emoe"', 'router = "emo"', "unknown router 'emo'"),
        ("k = 1", 'k = "top1"', "moe.k"),
        ("bottleneck = 32", "bottleneck = 0", "moe.bottleneck"),
        ('blocks = "last2"', 'blocks = "last22"', "last22"),
        ("label_smoothing", "label_smoothness", "unknown key 'label_smoothness'"),
        ("epochs = 4", 'epochs = 4\nprecision = "fp16"', "fp16"),
    ],
)
def test_settings_that_cannot_be_are_one_line(old, new, words, refused, tmp_path):
    text = small(EXAMPLE.read_text())
    assert old in text
    (tmp_path / "c.toml").write_text(text.replace(old, new))
    assert words in refused("train", "--config", tmp_path / "c.toml", "--out", tmp_path / "m", "--device", "cpu")


def test_an_option_of_timm_models_needs_one(refused, tmp_path):
    (tmp_path / "c.toml").write_text('data = "digits"\n')
    command = ["train", "--config", tmp_path / "c.toml", "--out", tmp_path / "m", "--pretrained"]
    assert "[backbone]" in refused(*command)
