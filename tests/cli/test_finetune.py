"""``spectralmoe finetune``: a model, its history and its page in one folder; one clear line for every mistake."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from families import build

SMALL = ("--length", 32, "--set", "lr=1e-2", "--set", "batch_size=4", "--set", "steps=3", "--set", "monitor_every=1")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "mixtral"
    build("mixtral").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A file, and a folder of files."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "cats.txt").write_text("the cat sat on the mat\n" * 40)
    (folder / "digits").mkdir()
    for number in range(4):
        (folder / "digits" / f"{number}.txt").write_text(f"{number} and {number + 1}\n" * 20)
    return folder


@pytest.fixture
def tune(call, mixtral, texts):
    return lambda *options: call("finetune", mixtral, "--text", texts / "cats.txt", *SMALL, *options)


def test_a_model_and_what_is_known_of_it_stand_in_one_folder(tune, call, texts, tmp_path):
    out = tmp_path / "out"
    code, said, _ = tune("--text", texts / "digits", "--out", out)
    assert code == 0
    assert "bits per byte" in said
    assert "3 steps" in said
    assert all(word in said for word in ("all", "cats", "digits", f"model saved to {out}"))
    assert {"config.json", "model.safetensors", "history.json", "monitor.jsonl"} < {path.name for path in out.iterdir()}
    assert not (out / "checkpoints").exists()
    page = (out / "report.html").read_text()
    assert "finetuning of mixtral" in page
    assert "bits per byte" in page
    assert call("inspect", out, "--text", texts / "cats.txt", "--tokens", 100)[0] == 0
    assert tune("--text", texts / "digits", "--out", out, "--json")[0] == 0  # there is nothing left to do


def test_json(tune, tmp_path):
    code, said, _ = tune("--out", tmp_path / "out", "--json")
    assert code == 0
    found = json.loads(said)
    assert found["model"] == str(tmp_path / "out")
    assert found["after"]["all"] < found["before"]["all"]
    assert found == {"model": str(tmp_path / "out"), **json.loads((tmp_path / "out" / "history.json").read_text())}


def test_settings_come_from_a_file_and_are_changed_by_options(call, mixtral, tmp_path):
    (tmp_path / "f.toml").write_text('layers = "last2"\nlr = 1e-3\n[terms]\nload_balance = 0.1\n')
    options = ("--set", "lr=2e-3", "--terms", "router_z=1e-3,load_balance=0.01", "--train", "routers,experts")
    options += ("--seed", 5, "--set", "seed=3")  # --set goes before both
    code, said, _ = call("finetune", mixtral, "--config", tmp_path / "f.toml", *options, "--print-config", "--json")
    assert code == 0
    found = json.loads(said)
    assert (found["layers"], found["lr"], found["seed"]) == ("last2", 2e-3, 3)
    assert found["train"] == ["routers", "experts"]
    assert found["terms"] == {"load_balance": 0.01, "router_z": 0.001}
    code, said, _ = call("finetune", mixtral, "--config", tmp_path / "f.toml", *options, "--print-config")
    (tmp_path / "g.toml").write_text(said)
    assert call("finetune", mixtral, "--config", tmp_path / "g.toml", "--print-config")[1] == said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--terms", "load_balnce=1e-2"), ["unknown term 'load_balnce'", "did you mean 'load_balance'"]),
        (("--terms", "load_balance"), ["has no weight", "load_balance=0.01"]),
        (("--router", "sr_moe"), ["unknown router 'sr_moe'", "did you mean 'sr-moe'"]),
        (("--router", "dense"), ["'dense' is one network without a choice"]),
        (("--router", "synergy"), ["term 'activation_overlap' reads 'hidden'"]),
        (("--train", "router"), ["train"]),
        (("--set", "learning_rate=1"), ["unknown key 'learning_rate'"]),
        (("--lora", "4", "--train", "experts"), ["with lora the experts are trained by adapters"]),
    ],
)
def test_wrong_words(refused, mixtral, texts, tmp_path, options, words):
    line = refused("finetune", mixtral, "--text", texts, "--out", tmp_path / "out", *options)
    assert all(word in line for word in words), line


def test_wrong_text(refused, mixtral, texts, tmp_path):
    def line(*options):
        return refused("finetune", mixtral, "--out", tmp_path / "out", *options)

    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\x89PNG\xff")
    (tmp_path / "zeros").write_bytes(b"text\0text")
    (tmp_path / "short.txt").write_text("one two three")
    (tmp_path / "none").mkdir()
    assert "give a file or a folder with --text" in line()
    assert "empty.txt' is empty" in line("--text", tmp_path / "empty.txt")
    assert "is not UTF-8 text: byte 0 is 0x89" in line("--text", tmp_path / "binary")
    assert "is not text: byte 4 is NUL" in line("--text", tmp_path / "zeros")
    assert "has no text" in line("--text", tmp_path / "none")
    assert "does not exist" in line("--text", tmp_path / "nowhere.txt")
    assert "shorter than one window of 128 tokens" in line("--text", tmp_path / "short.txt")
    assert "is too short" in line("--text", tmp_path / "short.txt", "--set", "domain_bytes=1")
    assert "--out is missing" in refused("finetune", mixtral, "--text", texts)


def test_wrong_models_and_folders(refused, call, texts, tmp_path, mixtral):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=260, **sizes)).save_pretrained(tmp_path / "llama")
    line = refused("finetune", tmp_path / "llama", "--text", texts, "--out", tmp_path / "a")
    assert "is a dense model" in line
    assert f"spectralmoe upcycle {tmp_path / 'llama'}" in line
    assert "was not written by this command" in refused(
        "finetune", mixtral, "--text", texts, "--out", tmp_path / "llama"
    )
    small = ("--length", 16, "--set", "steps=1")
    assert call("finetune", mixtral, "--text", texts, "--out", tmp_path / "b", *small)[0] == 0
    line = refused("finetune", mixtral, "--text", texts, "--out", tmp_path / "b", *small, "--seed", 1)
    assert "holds a run with seed = 0, not 1" in line


def test_a_model_in_float16_is_not_trained_in_it(refused, texts, tmp_path):
    """AdamW divides by squares of gradients, which are 0 there."""
    build("mixtral").half().save_pretrained(tmp_path / "half")
    options = ("--text", texts, "--out", tmp_path / "out", *SMALL, "--set", "dtype=auto")
    line = refused("finetune", tmp_path / "half", *options)
    assert "is in float16" in line
    assert "bfloat16" in line


def test_configs_that_do_not_fit_their_weights(call, refused, texts, tmp_path):
    """A start token that the vocabulary does not have is not used; more experts a token than there are is an error."""
    model, options = build("mixtral"), ("--text", texts / "cats.txt", *SMALL)
    model.config.bos_token_id = model.config.vocab_size + 7
    model.config.eos_token_id = model.config.vocab_size
    model.save_pretrained(tmp_path / "start")
    assert call("finetune", tmp_path / "start", "--out", tmp_path / "a", *options)[0] == 0
    model.config.num_experts_per_tok = model.config.num_local_experts + 1
    model.save_pretrained(tmp_path / "many")
    assert "cannot be run" in refused("finetune", tmp_path / "many", "--out", tmp_path / "b", *options)


def test_before_and_after_are_scored_in_one_precision(tune, tmp_path):
    """A step of no size changes nothing, in bfloat16 either."""
    code, said, _ = tune("--out", tmp_path / "out", "--json", "--set", "autocast=true", "--set", "lr=1e-30")
    assert code == 0
    history = json.loads(said)
    assert history["after"] == pytest.approx(history["before"], rel=1e-6)


def test_a_report_of_a_training_is_not_overwritten(tune, call, refused, texts, tmp_path):
    """And the weights alone show the gates from before, which the document says."""
    out = tmp_path / "out"
    assert tune("--out", out, "--router", "cosine")[0] == 0
    assert "holds a training" in refused("inspect", out, "--text", texts, "--out", out)
    code, said, _ = call("inspect", out, "--router-only", "--json")
    assert code == 0
    assert "spectral_routers.json" in json.loads(said)["data"]["notes"][-1]


def test_lora_without_peft(refused, mixtral, texts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    line = refused("finetune", mixtral, "--text", texts, "--lora", 4, "--out", tmp_path / "out")
    assert "pip install spectralmoe[lora]" in line


def test_a_run_that_is_refused_leaves_the_folder_to_others(refused, call, mixtral, texts, tmp_path):
    (tmp_path / "short.txt").write_text("one two three")
    assert "shorter" in refused("finetune", mixtral, "--text", tmp_path / "short.txt", "--out", tmp_path / "out")
    assert call("finetune", mixtral, "--text", texts / "cats.txt", *SMALL, "--out", tmp_path / "out")[0] == 0
