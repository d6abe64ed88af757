"""Language models on the command line: train, evaluate, predict, inspect, report; one clear line for mistakes."""

from __future__ import annotations

import io
import json
import math
import re

import numpy as np
import pytest
import torch

from spectralmoe import load, record, save
from spectralmoe.cli.app import run
from spectralmoe.data.vocabulary import SEPARATOR
from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.models import sr_moe
from spectralmoe.training.loop import _Run
from spectralmoe.training.tasks import TextTask
from spectralmoe.training.tasks.text_verbs import continue_text

WORDS = {
    "prose": ["the", "cat", "sat", "on", "a", "mat", "and", "slept", "until", "night", "fell", "over", "it"],
    "sums": ["1", "2", "3", "4", "5", "+", "-", "=", "7", "9"],
}
SETTINGS = """
depth = 2
router = "linear+load_balance"
[text]
length = 32
heads = 2
measured = 12
[network]
width = 16
hidden = 8
num_experts = 4
[optimization]
epochs = 2
batch_size = 16
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two domains of small documents; what falls into which part depends on their content alone."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for domain, words in WORDS.items():
        (folder / domain).mkdir()
        for number in range(60):
            (folder / domain / f"{number}.txt").write_text(" ".join(rng.choice(words, 40)) + ".\n")
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    file = tmp_path_factory.mktemp("settings") / "tiny.toml"
    file.write_text(SETTINGS)
    return file


@pytest.fixture(scope="module")
def model(corpus, settings, tmp_path_factory):
    """A trained model, its monitor beside it."""
    out = tmp_path_factory.mktemp("models") / "tiny"
    arguments = ["--config", settings, "--data", f"text:{corpus}", "--monitor", "--every", "5", "--out", out]
    assert run(["train", *map(str, arguments)]) == 0
    return out


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "m"
    meta = {"data": "digits", "classes": list("0123456789"), "channels": 1, "image_size": [8, 8], "router": "linear"}
    save(sr_moe(10, width=16, depth=1, num_experts=4, hidden=8), folder, meta=meta)
    return folder


def task_of(model, corpus):
    meta = json.loads((model / "config.json").read_text())["meta"]
    return TextTask.reopen(TextTask.read_meta(load(model), meta, model), f"text:{corpus}")


def test_training_says_bits_per_byte_and_writes_them(corpus, settings, call, tmp_path):
    out = tmp_path / "m"
    code, said, err = call(
        "train",
        "--config",
        settings,
        "--data",
        f"text:{corpus}",
        "--log",
        "csv",
        "--set",
        "optimization.epochs=1",
        "--out",
        out,
    )
    assert code == 0
    assert "bits/byte, test " in said
    assert "bits/byte" in err
    history = json.loads((out / "history.json").read_text())
    assert history["metric"]["key"] == "bits_per_byte"
    assert 0 < history["test_bits_per_byte"] < 12
    assert {"test_bits_per_byte_prose", "test_bits_per_byte_sums"} <= set(history)
    assert "validation_bits_per_byte" in (out / "log.csv").read_text().splitlines()[0]


def test_data_alone_say_what_to_train(corpus, call):
    code, out, _ = call(
        "train", "--data", f"text:{corpus}", "--router", "sr-moe", "--seed", 3, "--print-config", "--json"
    )
    assert code == 0
    values = json.loads(out)
    assert (values["data"], values["router"], values["optimization"]["seed"]) == (f"text:{corpus}", "sr-moe", 3)
    assert values["text"]["vocab"] == "bytes"
    code, out, _ = call("train", "--data", "digits", "--print-config", "--json")
    assert (code, json.loads(out)["data"]) == (0, "digits")


def test_a_stopped_run_goes_on_to_the_same_model(model, corpus, settings, call, monkeypatch, tmp_path):
    step = _Run.one_step

    def dies_in_the_second_epoch(self, chosen):
        if (self.epoch, self.batch) == (1, 2):
            raise KeyboardInterrupt
        return step(self, chosen)

    arguments = ["train", "--config", settings, "--data", f"text:{corpus}", "--monitor", "--every", "5"]
    with monkeypatch.context() as patched:
        patched.setattr(_Run, "one_step", dies_in_the_second_epoch)
        assert call(*arguments, "--out", tmp_path / "m")[0] == 130
    assert (tmp_path / "m" / "training.safetensors").exists()
    assert call(*arguments, "--out", tmp_path / "m")[0] == 0
    for one, other in zip(load(model).parameters(), load(tmp_path / "m").parameters(), strict=True):
        assert torch.equal(one, other)


def test_evaluate_agrees_with_training(model, corpus, call):
    code, out, _ = call("evaluate", model, "--json")
    assert code == 0
    result, history = json.loads(out), json.loads((model / "history.json").read_text())
    assert result["data"] == f"text:{corpus}"
    for key in ("bits_per_byte", "bits_per_byte_prose", "bits_per_byte_sums"):
        assert result[key] == pytest.approx(history[f"test_{key}"], rel=1e-5)
    assert result["windows"] == len(task_of(model, corpus).parts["test"])
    assert {"max_vio", "dead_experts"} <= set(result["layers"]["blocks.0.moe"])
    code, out, _ = call("evaluate", model)
    assert f"{result['bits_per_byte']:.3f} bits/byte in {result['windows']} test windows" in out
    assert f"  sums: {result['bits_per_byte_sums']:.3f} bits/byte" in out
    assert "MaxVio" in out


def test_evaluate_on_other_text(model, call, tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "book.txt").write_text("\n\n".join(" ".join(rng.choice(WORDS["sums"], 500)) for _ in range(80)))
    code, out, _ = call("evaluate", model, "--data", f"text:{tmp_path / 'book.txt'}", "--json")
    assert code == 0
    assert json.loads(out)["data"].endswith("book.txt")
    assert not [key for key in json.loads(out) if key.startswith("bits_per_byte_")]


def test_a_text_goes_on(model, call, tmp_path, monkeypatch):
    code, out, _ = call("predict", model, "the cat", "--tokens", 50, "--json")
    assert code == 0
    ((found),) = json.loads(out)
    assert found["prompt"] == "the cat"
    assert 0 < len(found["continuation"]) <= 50
    assert json.loads(call("predict", model, "the cat", "--tokens", 50, "--json")[1]) == [found]
    other = json.loads(call("predict", model, "the cat", "--tokens", 50, "--seed", 1, "--json")[1])
    assert other[0]["continuation"] != found["continuation"]
    said = call("predict", model, "the cat", "--tokens", 50)[1]
    assert said == re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", "the cat" + found["continuation"]) + "\n"
    file = tmp_path / "begin.txt"
    file.write_text("the cat")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"the cat")))
    sources = json.loads(call("predict", model, file, "-", "--tokens", 50, "--temperature", 0, "--json")[1])
    assert [source["file"] for source in sources] == [str(file), "-"]
    assert sources[0]["continuation"] == sources[1]["continuation"]


def test_a_text_longer_than_a_window_goes_on_from_its_end(model, corpus):
    network, vocabulary, read = load(model), task_of(model, corpus).vocabulary, []
    network.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].shape[1]))

    def written(prompt, tokens):
        how = {"length": 32, "tokens": tokens, "temperature": 0.0}
        return continue_text(network, vocabulary, prompt, draws=torch.Generator().manual_seed(0), **how)

    end = " the cat sat on"
    assert written("1 + 2 = " * 40 + end, 10) == written(end, 10) or len(end) + 10 < 32
    assert len(written(end, 100).encode()) >= 100
    assert max(read) <= 32


def test_predictions_are_those_of_the_model(model, corpus):
    network, vocabulary = load(model), task_of(model, corpus).vocabulary
    draws = torch.Generator().manual_seed(0)
    said = continue_text(network, vocabulary, "a mat", length=32, tokens=6, temperature=0.0, draws=draws)
    tokens = torch.tensor([[0, *b"a mat"]])
    for _ in range(6):  # the likeliest token, one at a time and without a cache
        with torch.no_grad(), evaluation_mode(network):
            tokens = torch.cat([tokens, network(tokens)[:, -1:].argmax(-1)], 1)
    assert said == vocabulary.decode(tokens[0, 6:].tolist())


def test_inspect_looks_at_held_out_text(model, corpus, call, tmp_path):
    code, out, _ = call("inspect", model, "--tokens", 400, "--out", tmp_path / "look", "--json")
    assert code == 0
    document, task = json.loads(out), task_of(model, corpus)
    windows = task.inputs("test")
    used = document["data"]["sequences"]
    assert document["data"]["tokens"] == 32 * used >= 400 or used == len(windows)
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:used]
    network = load(model)
    with torch.no_grad(), record(network) as tape:
        network(windows[chosen])
    for layer, item in zip(document["layers"], tape, strict=True):
        assert layer["load"]["counts"] == item.routing.counts().tolist()
        for group, key in (("load", "max_vio"), ("load", "dead"), ("entropy", "tokens"), ("similarity", "output_cos2")):
            assert layer[group][key]["value"] is not None
        assert layer["association"]["labels"] == ["prose", "sums"]
        assert sum(map(sum, layer["association"]["table"])) == sum(layer["load"]["counts"])
        assert layer["examples"][0][0]["text"]
    assert document["paths"][0]["flows"]
    assert {passage["title"] for passage in document["text"]} == {"prose", "sums"}
    parts = "".join(vocabulary_text(task, window) for window in windows)
    assert all("".join(passage["pieces"]) in parts for passage in document["text"])
    assert 'id="text"' in (tmp_path / "look" / "report.html").read_text()


def vocabulary_text(task, window):
    return task.vocabulary.decode(window.tolist())


def test_running_text_is_what_the_layers_do_with_it(model, corpus, call):
    document, task = json.loads(call("inspect", model, "--json")[1]), task_of(model, corpus)
    network, passage = load(model), document["text"][0]
    ids = next(w for w in task.inputs("test") if vocabulary_text(task, w) == "".join(passage["pieces"]))
    with torch.no_grad(), record(network) as tape:
        network(ids[None])
    for leaning, item in zip(passage["layers"], tape, strict=True):
        assert leaning["experts"] == item.routing.top_expert().tolist()
        assert leaning["weights"] == pytest.approx(item.routing.weights.amax(-1).tolist(), abs=1e-3)


def test_who_holds_the_last_token_of_a_text(model, corpus, call):
    text = "the cat sat"
    code, out, _ = call("inspect", model, "--attribute", text, "--json")
    assert code == 0
    (held,) = json.loads(out)["holders"]
    assert "".join(held["pieces"]).endswith(text)
    ids = torch.tensor([SEPARATOR, *task_of(model, corpus).vocabulary.encode(text)])
    network = load(model).eval()
    with torch.no_grad():
        log_p = network(ids[None, :-1])[0, -1].log_softmax(-1)[ids[-1]]
    assert held["log_prob"] == pytest.approx(float(log_p), abs=1e-4)
    gains = [row["gain"] for row in held["experts"]]
    assert gains == sorted(gains, reverse=True)
    assert {row["layer"] for row in held["experts"]} == {row["layer"] for row in held["layers"]}
    printed = call("inspect", model, "--attribute", text)[1]
    assert "what experts add to" in printed


def test_one_page_of_training_and_inspection(model, call, tmp_path):
    assert call("inspect", model, "--out", tmp_path / "look")[0] == 0
    code, out, _ = call("report", tmp_path / "look", model, "--out", tmp_path / "page.html", "--json")
    assert code == 0
    assert {item["kind"] for item in json.loads(out)["documents"]} == {"inspection", "monitor", "history"}
    page = (tmp_path / "page.html").read_text()
    assert "test bits/byte" in page
    assert not math.isnan(json.loads((model / "history.json").read_text())["test_bits_per_byte"])


def test_a_folder_without_domains_has_no_association(settings, call, tmp_path):
    rng = np.random.default_rng(2)
    (tmp_path / "one.txt").write_text("\n\n".join(" ".join(rng.choice(WORDS["prose"], 500)) for _ in range(60)))
    assert (
        call(
            "train",
            "--config",
            settings,
            "--data",
            f"text:{tmp_path / 'one.txt'}",
            "--set",
            "train_size=16",
            "--out",
            tmp_path / "m",
        )[0]
        == 0
    )
    document = json.loads(call("inspect", tmp_path / "m", "--tokens", 200, "--json")[1])
    assert document["layers"][0]["association"] is None
    assert len(document["text"]) == 4


def test_mistakes_are_one_line(model, image_model, corpus, refused, tmp_path):
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "short.txt").write_text("too short. " * 9)
    assert "a settings file with --config, or the data with --data" in refused("train", "--out", tmp_path / "m")
    assert "too few documents" in refused("train", "--data", f"text:{tmp_path / 'short.txt'}", "--out", tmp_path / "m")
    assert "text:NAME" in refused("evaluate", model, "--data", "digits")
    assert "does not exist" in refused("evaluate", model, "--data", f"text:{tmp_path / 'none'}")
    assert "--wrong: not for a network that continues text" in refused("evaluate", model, "--wrong", tmp_path / "w")
    assert not (tmp_path / "w").exists()
    assert "is empty" in refused("predict", model, tmp_path / "empty.txt")
    assert "is not text" in refused("predict", model, tmp_path / "binary.txt")
    assert "there is no file 'none.txt'" in refused("predict", model, "none.txt")
    assert "the text is empty" in refused("predict", model, " ")
    assert "two tokens or more" in refused("inspect", model, "--attribute", "")
    assert "text:FILE for a language model" in refused("inspect", model, "--text", tmp_path / "short.txt")
    assert "continues text; adapt and fewshot are for" in refused("adapt", "trials", model)
    assert "continues text; adapt and fewshot are for" in refused(
        "fewshot", model, "--data", "digits", "--out", tmp_path / "f"
    )


def test_an_image_model_given_text(image_model, corpus, refused):
    assert "there is no file 'some text'; the model classifies images" in refused("predict", image_model, "some text")
    assert "--tokens is for language models" in refused("predict", image_model, "a.png", "--tokens", 5)
    assert "text" in refused("evaluate", image_model, "--data", f"text:{corpus}")
    assert "--attribute is for language models" in refused("inspect", image_model, "--attribute", "some text")
    assert "text" in refused("inspect", image_model, "--data", "text:pydoc")


def test_a_model_without_the_words_of_its_training(model, refused, tmp_path):
    network = load(model)
    meta = json.loads((model / "config.json").read_text())["meta"]
    save(network, tmp_path / "bare")
    assert "not an image network" in refused("predict", tmp_path / "bare", "text")
    save(network, tmp_path / "other", meta={**meta, "vocabulary": {"merges": [[97, 98]]}})
    assert "does not fit the network" in refused("evaluate", tmp_path / "other")
    save(network, tmp_path / "broken", meta={**meta, "vocabulary": {"merges": 3}})
    assert "no list of merges" in refused("evaluate", tmp_path / "broken")
    save(sr_moe(10, width=16, depth=1, num_experts=4, hidden=8), tmp_path / "image", meta=meta)
    assert "that of a language model" in refused("evaluate", tmp_path / "image")
