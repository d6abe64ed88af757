"""``spectralmoe upcycle``: a dense folder becomes a folder of a stock MoE; every mistake is one line."""

from __future__ import annotations

import json

import pytest
import torch

from spectralmoe.hf import load_transformers
from spectralmoe.hf.upcycling import METHODS, STARTS, TARGETS

tf = pytest.importorskip("transformers")

TEXT = "The gate of a mixture of experts decides who speaks. Water flows downhill; 3 + 4 = 7. " * 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved tiny models: name -> folder."""
    from dense_models import dense_model
    from families import build

    out = tmp_path_factory.mktemp("hf")
    for name in ("llama", "qwen3"):
        dense_model(name)[0].save_pretrained(out / name)
    build("mixtral").save_pretrained(out / "mixtral")
    tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=300)).save_pretrained(out / "gpt2")
    return out


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """A folder of text of two domains."""
    out = tmp_path_factory.mktemp("texts")
    for name, text in (("letters", TEXT), ("numbers", "12 + 30 = 42; 1 + 1 = 2. " * 80)):
        (out / name).mkdir()
        (out / name / "a.txt").write_text(text)
    return out


def logits_of(folder):
    ids = torch.arange(4, 60)[None]
    return tf.AutoModelForCausalLM.from_pretrained(folder)(ids).logits.detach()


def test_a_folder_that_plain_transformers_loads(folders, call, tmp_path):
    out = tmp_path / "deep" / "moe"
    code, printed, err = call("upcycle", folders / "llama", "--experts", 8, "--k", 2, "--out", out)
    assert code == 0, err
    torch.testing.assert_close(logits_of(out), logits_of(folders / "llama"), atol=1e-4, rtol=0)
    assert "MixtralForCausalLM, 8 experts in 3 layers, 2 a token" in printed
    assert "note: method 'copy' makes experts that are alike" in " ".join(printed.split())
    assert f"spectralmoe finetune {out}" in " ".join(printed.split())
    assert len(load_transformers(str(out)).model.model.layers) == 3


def test_what_it_made_as_json(folders, call, tmp_path):
    options = ["--method", "drop", "--ratio", 0.25, "--layers", "0,-1", "--seed", 3, "--dtype", "float16", "--json"]
    code, printed, _ = call("upcycle", folders / "qwen3", *options, "--out", tmp_path / "moe")
    made = json.loads(printed)
    assert (code, made["class"], made["layers"], made["notes"]) == (0, "Qwen3MoeForCausalLM", [0, 2], [])
    sizes, mlp = made["parameters"], 3 * 32 * 48
    assert sizes["all"] - sizes["dense"] == 2 * (3 * mlp + 4 * 32)  # three more MLPs and a router in two layers
    assert sizes["active"] - sizes["dense"] == 2 * (mlp + 4 * 32)
    assert 0 < made["logits"]["difference"] < made["logits"]["largest"]
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert (model.dtype, model.config.num_experts, model.config.mlp_only_layers) == (torch.float16, 4, [1])


def test_routers_start_from_text(folders, domains, call, tmp_path):
    gates = {}
    for name, options in {"prompts": ["--experts", 2, "--k", 1], "principal": ["--method", "virtual"]}.items():
        arguments = [*options, "--router", name, "--text", domains, "--tokens", 512, "--out", tmp_path / name, "--json"]
        code, printed, _ = call("upcycle", folders / "llama", *arguments)
        assert code == 0, printed
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        gates[name] = model.model.layers[1].mlp.gate.weight.detach()
    torch.testing.assert_close(gates["prompts"][1], -gates["prompts"][0])  # two means about their middle
    torch.testing.assert_close(gates["principal"][2:], -gates["principal"][:2])


def test_the_tokenizer_comes_along(folders, call, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    for file in (folders / "llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    words = Tokenizer(models.WordLevel({"<unk>": 0, "gate": 1, "of": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
    assert call("upcycle", tmp_path, "--out", tmp_path / "moe")[0] == 0
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "moe")("gate of gate")["input_ids"] == [1, 2, 1]


def test_mistakes_are_one_line(folders, domains, refused, tmp_path):
    llama, new = folders / "llama", ["--out", tmp_path / "new"]
    assert "--out is missing" in refused("upcycle", llama)
    assert "MixtralForCausalLM has 8 experts already" in refused("upcycle", folders / "mixtral", *new)
    assert "replace_mlp" in refused("upcycle", folders / "gpt2", *new)
    assert "experts (6) does not divide" in refused(
        "upcycle", llama, "--method", "virtual", "--experts", 6, "--k", 4, *new
    )
    assert "qwen3_moe: it normalises" in refused("upcycle", llama, "--target", "qwen3_moe", *new)
    assert "did you mean 'drop'?" in refused("upcycle", llama, "--method", "drob", *new)
    assert "unknown --dtype" in refused("upcycle", llama, "--dtype", "int8", *new)
    assert "--layers '0,x'" in refused("upcycle", llama, "--layers", "0,x", *new)
    assert "'principal' needs calibration" in refused("upcycle", llama, "--router", "principal", *new)
    assert "--text is read by" in refused("upcycle", llama, "--text", domains, *new)
    assert "4, got 2" in refused("upcycle", llama, "--router", "prompts", "--text", domains, *new)
    assert "no such" in refused("upcycle", tmp_path / "nothing", *new)
    assert not list((tmp_path / "new").iterdir())


def test_nothing_is_written_over(folders, refused, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    assert "not empty" in refused("upcycle", folders / "llama", "--out", tmp_path)
    assert "not empty" in refused("upcycle", folders / "llama", "--out", folders / "llama")
    assert "it is a file" in refused("upcycle", folders / "llama", "--out", tmp_path / "mine.txt")
    assert "a part of its path is a file" in refused(
        "upcycle", folders / "llama", "--out", tmp_path / "mine.txt" / "moe"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_the_help_names_what_the_tables_hold(call):
    help_text = call("upcycle", "--help")[1]
    for names in (("auto", *TARGETS), METHODS, STARTS):
        assert "|".join(names) in help_text
