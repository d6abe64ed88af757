"""``spectralmoe inspect``: own networks and Hugging Face folders, and one clear line for every mistake."""

from __future__ import annotations

import io
import json
import math
import shutil

import pytest
import torch

from spectralmoe import UserError, load, record
from spectralmoe.cli.app import run
from spectralmoe.cli.console import print_json
from spectralmoe.data.image_data import load_data

TEXT = "The gate of a mixture of experts decides who speaks. " * 60


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A saved network of this library."""
    out = tmp_path_factory.mktemp("own") / "runs"
    quick = ["--depths", "1", "--seeds", "1", "--epochs", "1", "--tune", "0", "--trials", "1", "--routers", "sr-moe"]
    assert run(["compare", "--data", "digits", *quick, "--out", str(out)]) == 0
    return next((out / "models").iterdir())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "gate.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved tiny models: family -> folder."""
    pytest.importorskip("transformers")
    from families import build

    out = tmp_path_factory.mktemp("hf")
    for name in ("mixtral", "switch"):
        build(name).save_pretrained(out / name)
    return out


def test_an_own_network_is_inspected_on_its_test_images(network, call, tmp_path):
    code, out, _ = call("inspect", network, "--tokens", 200, "--out", tmp_path / "look", "--json")
    assert code == 0
    document, data = json.loads(out), load_data("digits").test
    assert document == json.loads((tmp_path / "look" / "inspection.json").read_text())
    assert (tmp_path / "look" / "report.html").read_text().startswith("<!doctype html>")
    used = document["data"]["sequences"]
    assert 200 <= used < len(data)
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:used]
    model = load(network)
    with torch.no_grad(), record(model) as tape:
        model(data.images[chosen])
    (layer,) = document["layers"]
    assert layer["load"]["counts"] == tape[0].routing.counts().tolist()
    assert layer["association"]["labels"] == list(load_data("digits").classes)
    assert sum(map(sum, layer["association"]["table"])) == sum(layer["load"]["counts"])
    assert layer["examples"][0][0]["image"].startswith("data:image/png;base64,")


def test_a_table_and_the_findings_are_printed(network, call):
    code, out, _ = call("inspect", network, "--tokens", 200)
    assert code == 0
    assert "MaxVio" in out
    assert "test images of digits" in out


@pytest.mark.parametrize("family", ["mixtral", "switch"])
def test_a_hugging_face_folder_is_run_on_text(folders, text, family, call, tmp_path):
    more = ["--attribute", "a b c"] if family == "mixtral" else []
    code, out, _ = call(
        "inspect", folders / family, "--text", text, "--tokens", 1000, *more, "--out", tmp_path, "--json"
    )
    assert code == 0
    document = json.loads(out)
    for held in document.get("holders", []):
        assert held["pieces"] == list("a b c")
        assert {row["layer"] for row in held["experts"]} == {*range(len(document["layers"]))}
    assert ("holders" in document) == bool(more)
    assert document["data"]["tokens"] == 1000
    assert "bytes" in document["data"]["tokenizer"]
    assert any("UTF-8 bytes" in note for note in document["data"]["notes"])
    assert [finding["kind"] for finding in document["findings"] if finding["layer"] is None][:1] == ["balance_off"]
    for layer in document["layers"]:
        asked = document["data"]["tokens"] * layer["top_k"]
        assert sum(layer["load"]["counts"]) == asked - round(layer["load"]["dropped"]["value"] * asked)
        first = next(examples[0] for examples in layer["examples"] if examples)
        assert first["before"] + first["text"] + first["after"] in TEXT or first["text"] == "(start)"
    (passage,) = document["text"]
    assert "".join(passage["pieces"]) == TEXT[: len(passage["pieces"])]
    for leaning, layer in zip(passage["layers"], document["layers"], strict=True):
        assert len(leaning["experts"]) == len(passage["pieces"]) > 100
        assert (leaning["experts"][-1] is None) >= (layer["stack"] == "decoder")
        assert max(e for e in leaning["experts"] if e is not None) < layer["experts"]


def test_byte_order_marks_and_line_ends_are_no_part_of_a_text(folders, call, refused, tmp_path):
    lines = "The cat sat.\nThe dog ran.\n" * 5
    texts = {"plain": lines.encode(), "windows": b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode()}
    seen = {}
    for name, raw in texts.items():
        (tmp_path / name).write_bytes(raw)
        code, out, _ = call("inspect", folders / "mixtral", "--text", tmp_path / name, "--json")
        assert code == 0
        document = json.loads(out)
        seen[name] = document["data"]["tokens"], [layer["load"]["counts"] for layer in document["layers"]]
    assert seen["windows"] == seen["plain"]
    for encoding in ("utf-16", "utf-32-be", "utf-16-be"):
        (tmp_path / encoding).write_bytes(("\ufeff" * encoding.endswith("be") + lines).encode(encoding))
        line = refused("inspect", folders / "mixtral", "--text", tmp_path / encoding)
        assert "UTF-16" in line
        assert "save it as UTF-8" in line


def test_several_texts_are_topics(folders, text, call, tmp_path):
    other = tmp_path / "digits.txt"
    other.write_text("0123456789 " * 300)
    code, out, _ = call("inspect", folders / "mixtral", "--text", text, "--text", other, "--tokens", 1000, "--json")
    assert code == 0
    (found,) = {tuple(layer["association"]["labels"]) for layer in json.loads(out)["layers"]}
    assert found == (text.stem, "digits")
    assert [passage["title"] for passage in json.loads(out)["text"]] == [text.stem, "digits"]


def test_a_folder_and_a_text_by_name_are_read_as_in_other_verbs(folders, text, call, tmp_path):
    """The subfolders are topics; a file that is no text is passed over, and the document says so."""
    for topic in ("cats", "dogs"):
        (tmp_path / topic).mkdir()
        (tmp_path / topic / "a.txt").write_text(f"{topic} run. " * 60)
    (tmp_path / "dogs" / "b.txt").write_bytes(b"\0")
    code, out, _ = call("inspect", folders / "mixtral", "--text", tmp_path, "--tokens", 400, "--json")
    assert code == 0
    document = json.loads(out)
    assert document["layers"][0]["association"]["labels"] == ["cats", "dogs"]
    assert "passed over" in document["data"]["notes"][0]
    code, out, _ = call("inspect", folders / "mixtral", "--text", "text:pydoc", "--tokens", 200, "--json")
    assert (code, json.loads(out)["data"]["tokens"]) == (0, 200)


def test_weights_alone(folders, call):
    for option in ("--router-only", "--gates-only"):
        code, out, _ = call("inspect", folders / "mixtral", option, "--json")
        assert code == 0
        document = json.loads(out)
        assert document["model"]["mode"] == "router-only"
        for layer in document["layers"]:
            assert layer["load"] is None
            assert (layer["similarity"]["weight_cosine"]["value"] is None) == (option == "--gates-only")


def test_copies_are_found_in_weights_alone(folders, call, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders / "mixtral", tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".layers.1." in name and ".experts.5." in name]:
        tensors[name] = tensors[name.replace(".experts.5.", ".experts.2.")].clone()
    save_file(tensors, file)
    code, out, _ = call("inspect", tmp_path / "copy", "--router-only", "--json")
    assert code == 0
    found = [finding for finding in json.loads(out)["findings"] if finding["kind"] == "homogeneous"]
    assert [finding["layer"] for finding in found] == [1]
    assert "experts 2 and 5" in found[0]["message"]


def test_mistakes_are_one_line(network, folders, text, refused, tmp_path):
    mixtral = folders / "mixtral"
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("")
    latin.write_bytes(b"caf\xe9 " * 40)
    assert "config.json" in refused("inspect", tmp_path, "--text", text)
    assert "MODEL is empty" in refused("inspect", "", "--text", text)
    (tmp_path / "nothing").mkdir()
    assert "has no text" in refused("inspect", mixtral, "--text", tmp_path / "nothing")
    assert "no such" in refused("inspect", tmp_path / "gone", "--text", text)
    assert "--text" in refused("inspect", mixtral)
    assert "is empty" in refused("inspect", mixtral, "--text", empty)
    assert "does not exist" in refused("inspect", mixtral, "--text", tmp_path / "nothing.txt")
    assert "UTF-8" in refused("inspect", mixtral, "--text", latin)
    assert "--data" in refused("inspect", mixtral, "--text", text, "--data", "digits")
    assert "--text" in refused("inspect", network, "--text", text)
    assert "--router-only" in refused("inspect", mixtral, "--text", text, "--router-only")
    assert "--attribute" in refused("inspect", mixtral, "--attribute", "a b", "--router-only")
    assert "has an encoder" in refused("inspect", folders / "switch", "--text", text, "--attribute", "a b")
    assert "float64" in refused("inspect", mixtral, "--text", text, "--dtype", "float64")


def test_text_from_standard_input(folders, text, refused, call, monkeypatch):
    def stdin(raw):
        monkeypatch.setattr("sys.stdin", raw and io.TextIOWrapper(io.BytesIO(raw)))

    mixtral = folders / "mixtral"
    stdin(b"caf\xe9 \xff")
    assert "standard input is not UTF-8" in refused("inspect", mixtral, "--text", "-")
    stdin(None)  # closed
    assert "standard input is empty" in refused("inspect", mixtral, "--text", "-")
    stdin(TEXT.replace(" ", "\r\n").encode())
    code, out, _ = call("inspect", mixtral, "--text", "-", "--tokens", 200, "--json")
    assert code == 0
    assert json.loads(out)["data"]["source"] == "200 tokens of standard input"


def test_the_folder_is_tried_before_the_run(folders, text, refused, monkeypatch):
    monkeypatch.setattr("spectralmoe.cli.inspect_text.inspect_text", lambda *_, **__: pytest.fail("run"))
    assert f"cannot write to {text}" in refused("inspect", folders / "mixtral", "--text", text, "--out", text)


def test_a_page_that_cannot_be_made_leaves_no_half(folders, refused, monkeypatch, tmp_path):
    def fail(*_):
        raise UserError("no page")

    monkeypatch.setattr("spectralmoe.report.render_report", fail)
    assert "no page" in refused("inspect", folders / "mixtral", "--router-only", "--out", tmp_path / "look")
    assert list((tmp_path / "look").iterdir()) == []


def test_printed_json_has_no_numbers_that_json_lacks(capsys):
    print_json({"x": [math.nan, math.inf, 1.5]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"x": [None, None, 1.5]}


def test_broken_models_are_one_line(folders, text, refused, tmp_path):
    from safetensors.torch import load_file, save_file

    def changed(name, change):
        shutil.copytree(folders / "mixtral", tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def without_a_tensor(folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.1.block_sparse_moe.gate.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    def truncated(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])

    def of_no_family(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))

    def without_words(folder):
        from transformers import MixtralConfig, MixtralForCausalLM

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        MixtralForCausalLM(MixtralConfig(vocab_size=40, num_key_value_heads=1, **sizes)).save_pretrained(folder)

    def dense(folder):
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(folder)

    cases = {
        without_a_tensor: ("gate.weight",),
        truncated: ("model.safetensors", "whole"),
        of_no_family: ("family",),
        without_words: ("tokenizer", "40"),
        dense: ("dense",),
    }
    for change, words in cases.items():
        folder = changed(change.__name__, change)
        line = refused("inspect", folder, "--text", text)
        assert all(word in line for word in words), line
        if change in (without_a_tensor, truncated, dense):
            assert str(folder) in refused("inspect", folder, "--router-only")
