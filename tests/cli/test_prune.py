"""``spectralmoe prune``: a smaller folder that plain transformers loads; one clear line for every mistake."""

from __future__ import annotations

import json

import pytest
import torch
from families import SIZES, batch, build

from spectralmoe import save
from spectralmoe.hf import prune_experts, save_swapped, swap_routers
from spectralmoe.models import sr_moe

transformers = pytest.importorskip("transformers")

TEXT = "".join(f"{number} and {number + 1} are {2 * number + 1}\n" for number in range(60))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models and texts, not to be changed."""
    folder = tmp_path_factory.mktemp("prune")
    for name in ("mixtral", "deepseek_v3", "switch"):
        build(name).save_pretrained(folder / name)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder / "dense")
    save(sr_moe(10, channels=1), folder / "own")
    swapped = build("mixtral")
    swap_routers(swapped)
    save_swapped(swapped, folder / "swapped")
    (folder / "text.txt").write_text(TEXT)
    (folder / "empty.txt").write_text(" \n")
    (folder / "binary.txt").write_bytes(b"\xff\x00\xfe" * 50)
    (folder / "model.json").write_text("{}")
    return folder


@pytest.fixture
def arguments(place):
    """``arguments(model, keep, *options)``: those of the verb, with a text."""
    short = ("--length", 32, "--tokens", 300)
    return lambda model, keep, *more: (
        "prune",
        place / model,
        "--keep",
        keep,
        "--text",
        place / "text.txt",
        *short,
        *more,
    )


def tokenizer_of(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"?": 0, "and": 5, "are": 6}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)


def test_a_smaller_folder_and_what_it_cost(arguments, call, place, tmp_path):
    model, out = tmp_path / "mixtral", tmp_path / "out"
    build("mixtral").save_pretrained(model)
    tokenizer_of(model)
    code, said, err = call(*arguments(model, 6, "--out", out))
    assert code == 0, err
    assert "6 of 8 experts stay in every layer (by reap)" in said
    assert "model.layers.2.block_sparse_moe" in said  # as the files have it
    assert "bits per byte of held-out text" in said
    assert f"spectralmoe inspect {out} --text FILE" in said
    assert "bits per byte after" in err
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert loaded.config.num_local_experts == 6
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert transformers.AutoTokenizer.from_pretrained(out)("and")["input_ids"] == [5]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("options", [("--by", "frequency"), ("--by", "removal"), ("--merge",)])
@torch.no_grad()
def test_json_says_what_was_done(options, arguments, call, tmp_path, close):
    code, said, err = call(*arguments("mixtral", 5, *options, "--out", tmp_path / "out", "--json"))
    assert (code, [line for line in err.splitlines() if not line.startswith("note")]) == (0, [])
    result = json.loads(said)
    merged = "--merge" in options
    assert (result["experts"], result["keep"], result["merged"]) == (8, 5, merged)
    assert result["by"] == ("frequency" if merged else options[1])
    assert result["parameters"]["after"] < result["parameters"]["before"]
    assert result["bits_per_byte"]["before"].keys() == result["bits_per_byte"]["after"].keys() == {"all"}
    for layer in result["layers"]:
        assert sorted(layer["kept"] + layer["gone"]) == list(range(8))
        assert len(layer["kept"]) == 5
        assert 0 <= layer["load_gone"] < 1
        assert sorted(layer["saliency"], reverse=True)[:5] == sorted(
            (layer["saliency"][e] for e in layer["kept"]), reverse=True
        )
        assert bool(layer["joined"]) == merged
    if not merged:
        model, loaded = (
            transformers.AutoModelForCausalLM.from_pretrained(path) for path in (result["model"], tmp_path / "out")
        )
        names = [f"model.layers.{number}.mlp" for number in range(3)]
        small = prune_experts(model, dict(zip(names, (layer["kept"] for layer in result["layers"]), strict=True)))
        close(loaded(**batch(model)).logits, small(**batch(model)).logits)


def test_all_experts_may_stay(arguments, call, tmp_path):
    code, said, _ = call(*arguments("mixtral", 8, "--out", tmp_path / "out", "--json"))
    assert code == 0
    for layer in json.loads(said)["layers"]:
        assert (layer["kept"], layer["gone"], layer["load_gone"]) == ([*range(8)], [], 0)


@pytest.mark.parametrize(
    ("model", "keep", "options", "words"),
    [
        ("mixtral", 9, (), ["keep", "from 1 to 8", "got 9"]),
        ("mixtral", 1, (), ["keep=1", "less than the 2 experts"]),
        ("deepseek_v3", 6, (), ["keep=6", "4 groups", "multiple of 4"]),
        ("mixtral", 4, ("--by", "reep"), ["unknown --by 'reep'", "'reap'"]),
        ("mixtral", 4, ("--dtype", "float9"), ["unknown --dtype"]),
        ("mixtral", 4, ("--length", 500), ["at most 128 tokens"]),
        ("dense", 2, (), ["dense", "no mixture-of-experts layer"]),
        ("switch", 4, (), ["encoder", "hf.prune_experts"]),
        ("own", 2, (), ["spectralmoe.compression.prune"]),
        ("swapped", 4, (), ["was swapped", "hf.fold_routers"]),
        ("nothing", 2, (), ["no such model folder"]),
        ("model.json", 2, (), ["not a model"]),
    ],
)
def test_mistakes(model, keep, options, words, arguments, refused, tmp_path):
    line = refused(*arguments(model, keep, *options, "--out", tmp_path / "out"))
    assert all(word in line for word in words), line
    assert not (tmp_path / "out" / "config.json").exists()


def test_mistakes_about_text_and_folder(arguments, refused, place, tmp_path):
    for text, words in (("empty.txt", "empty"), ("binary.txt", "is not text"), ("no.txt", "does not exist")):
        line = refused("prune", place / "mixtral", "--keep", 4, "--text", place / text, "--out", tmp_path / "out")
        assert words in line
    assert "--text" in refused("prune", place / "mixtral", "--keep", 4, "--out", tmp_path / "out")
    assert "--out is missing" in refused(*arguments("mixtral", 4))
    assert "is not empty" in refused(*arguments("mixtral", 4, "--out", place))
    assert "it is a file" in refused(*arguments("mixtral", 4, "--out", place / "text.txt"))
    assert "a part of its path is a file" in refused(*arguments("mixtral", 4, "--out", place / "text.txt" / "out"))
