"""Loading and feeding Hugging Face language models; what is broken is said in one line."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, SIZES, batch, build
from safetensors.torch import load_file, save_file

from spectralmoe.checkpoints.inspection import inspect_checkpoint
from spectralmoe.cli.inspect_text import inspect_text
from spectralmoe.errors import UserError
from spectralmoe.hf.language import encode, run, training_facts
from spectralmoe.hf.load import load_transformers
from spectralmoe.hf.watch import watch_transformers
from spectralmoe.training.finetuning.finetune import finetune
from spectralmoe.training.settings.finetuning import FinetuneSettings

transformers = pytest.importorskip("transformers")

family = pytest.mark.parametrize("family", list(FAMILIES))
TEXT = "The cat sat on the mät. " * 20


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each family, as ``save_pretrained`` writes it."""
    base = tmp_path_factory.mktemp("models")
    for name, make in FAMILIES.items():
        make().save_pretrained(base / name)
    return base


@pytest.fixture
def mixtral(folders: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    for file in (folders / "mixtral").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@family
def test_a_folder_is_loaded_and_run(family, folders, capfd):
    loaded = load_transformers(str(folders / family))
    inputs = batch(loaded.model)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(**inputs).logits, FAMILIES[family]()(**inputs).logits)
    assert (loaded.name, loaded.tokenizer, loaded.model.training) == (family, None, False)
    assert len(loaded.notes) == 1
    assert "UTF-8 bytes" in loaded.notes[0]
    batches = encode(loaded, TEXT, 300)
    with watch_transformers(loaded.model) as watching:
        run(loaded, batches)
        calls = watching.drain()
    for layer in watching.layers:
        mine = [call.routing for call in calls if call.layer is layer]
        assert sum(len(routing.indices) for routing in mine) == 300
        assert sum(math.prod(routing.shape) for routing in mine) == 300
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision(dtype, folders):
    loaded = load_transformers(str(folders / "mixtral"), dtype=dtype)
    assert loaded.model.dtype == dtype
    run(loaded, encode(loaded, TEXT, 20))


def test_widths_that_the_grouped_kernel_refuses(tmp_path):
    build("mixtral", hidden_size=18, num_attention_heads=1, num_key_value_heads=1).save_pretrained(tmp_path)
    loaded = load_transformers(str(tmp_path))
    run(loaded, encode(loaded, TEXT, 20))


def test_logging_and_progress_bars_are_left_as_they_were(folders):
    from transformers.utils import logging as settings

    names = ("transformers", "huggingface_hub")
    loggers = [logging.getLogger(name) for name in names]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    bars = settings.is_progress_bar_enabled()
    load_transformers(str(folders / "olmoe"))
    with pytest.raises(UserError):
        load_transformers("./no/such/folder")
    assert before == [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    assert bars == settings.is_progress_bar_enabled()


# --- text


def test_bytes_are_the_tokens_of_a_model_without_a_tokenizer(folders):
    loaded = load_transformers(str(folders / "mixtral"))
    raw = list(TEXT.encode("utf-8"))
    batches = encode(loaded, TEXT, 300)  # 128 positions: two whole sequences, one of 44
    assert [tuple(one["input_ids"].shape) for one in batches] == [(2, 128), (1, 44)]
    assert torch.cat([one["input_ids"].flatten() for one in batches]).tolist() == raw[:300]
    assert sum(one["input_ids"].numel() for one in encode(loaded, TEXT, 10**9)) == len(raw)


def test_a_decoder_gets_the_start_token_and_the_text(folders):
    loaded = load_transformers(str(folders / "switch"))
    loaded.model.config.decoder_start_token_id = 7
    (one,) = encode(loaded, TEXT, 50)
    raw = list(TEXT.encode("utf-8"))[:50]
    assert one["input_ids"].tolist() == [raw]
    assert one["decoder_input_ids"].tolist() == [[7, *raw[:-1]]]


def words(folder: Path, ids: dict[str, int]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)


def test_a_tokenizer_is_used_and_a_long_text_is_read_as_far_as_needed(mixtral):
    words(mixtral, {"?": 0, "cat": 5, "mat": 6})
    loaded = load_transformers(str(mixtral))
    assert loaded.notes == []
    assert encode(loaded, "cat mat dog cat", 3)[0]["input_ids"].tolist() == [[5, 6, 0]]
    sparse = "cat" + " " * 5000 + "mat"
    assert encode(loaded, sparse, 2)[0]["input_ids"].tolist() == [[5, 6]]


def test_a_tokenizer_of_another_model(mixtral, user_error):
    words(mixtral, {"?": 0, "cat": 999})
    with user_error("999", "260", "another model"):
        encode(load_transformers(str(mixtral)), "cat", 3)


def test_a_tokenizer_that_cannot_read_the_text(mixtral, user_error):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"cat": 5}, unk_token="?")).save(str(mixtral / "tokenizer.json"))
    (mixtral / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with user_error(mixtral.name, "its tokenizer cannot read this text"):
        encode(load_transformers(str(mixtral)), "dog", 3)


@pytest.mark.parametrize("text", ["", " \n"])
def test_no_text(text, folders, user_error):
    with user_error("no text"):
        encode(load_transformers(str(folders / "mixtral")), text, 5)


def test_a_vocabulary_too_small_for_bytes(tmp_path, user_error):
    build("mixtral", vocab_size=200).save_pretrained(tmp_path)
    with user_error("no tokenizer", "200", "256"):
        encode(load_transformers(str(tmp_path)), TEXT, 5)


# --- what training does about balance


@family
def test_training_facts_are_what_the_model_does(family, folders):
    model = FAMILIES[family]()
    facts = training_facts(model)
    with torch.no_grad():
        found = model(**batch(model), output_router_logits=True)
    losses = [name for name in found if name.endswith("aux_loss") and found[name] is not None]
    assert facts["computes_aux_loss"] == bool(losses)
    assert facts["output_router_logits"] is False
    assert facts["correction_bias"] == (family == "deepseek_v3")
    assert facts["top_k"] == (3 if family == "qwen2_moe" else 1 if family in {"llama4", "switch"} else 2)
    assert (facts["router_aux_loss_coef"] is None) == (family == "deepseek_v3")
    json.dumps(facts)


# --- what is broken


def test_a_folder_that_is_no_model(tmp_path, user_error):
    with user_error(str(tmp_path), "not a model folder", "config.json"):
        load_transformers(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_folder_that_is_not_there(name, user_error):
    with user_error(name, "no such model folder"):
        load_transformers(name)


def test_a_name_that_the_hub_does_not_give(monkeypatch, user_error):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files, and\ncouldn't find them")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with user_error("owner/model", "no such folder", "hub", "network"):
        load_transformers("owner/model")


def test_a_dense_model_is_refused_before_its_weights_are_read(tmp_path, user_error):
    transformers.LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with user_error(str(tmp_path), "no mixture-of-experts layer", "dense"):
        load_transformers(str(tmp_path))


def test_the_config_chooses_no_implementation(mixtral):
    change(mixtral, attn_implementation="someone/kernel", experts_implementation="someone", _attn_implementation="x/y")
    loaded = load_transformers(str(mixtral))
    assert loaded.model.config._attn_implementation in ("sdpa", "eager")
    assert loaded.model.config._experts_implementation == "eager"
    run(loaded, encode(loaded, TEXT, 20))


ROTARY = {"rope_type": "default", "rope_theta": 1e4}
TEXT_PART = {**SIZES, "head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VISION_PART = {"hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
LLAMA4_TEXT = {"num_local_experts": 4, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 2}
LLAMA4_VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
LLAMA4_VISION |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32}

# model, its config's text and vision parts
MULTIMODAL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Qwen3VLMoe": (
        "Qwen3VLMoe",
        {**TEXT_PART, "rope_parameters": {**ROTARY, "mrope_section": [2, 1, 1]}},
        {**VISION_PART, "deepstack_visual_indexes": [0]},
    ),
    "Llama4": (
        "Llama4",
        {**TEXT_PART, **LLAMA4_TEXT, "num_experts_per_tok": 1, "rope_parameters": ROTARY},
        {**LLAMA4_VISION, "projector_output_dim": 32},
    ),
}


@pytest.fixture(scope="session")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each multimodal family."""
    base = tmp_path_factory.mktemp("multimodal")
    for name, (prefix, text, vision) in MULTIMODAL.items():
        config = getattr(transformers, f"{prefix}Config")(text_config=text, vision_config=vision)
        getattr(transformers, f"{prefix}ForConditionalGeneration")(config).save_pretrained(base / name)
    return base


@pytest.mark.parametrize("name", list(MULTIMODAL))
def test_a_multimodal_model_is_run_on_text(name, multimodal):
    change(multimodal / name, attn_implementation="someone/kernel")
    loaded = load_transformers(str(multimodal / name))
    assert ("a multimodal model: it is run on text alone" in loaded.notes) == (
        name != "Llama4"
    )  # of that the text part
    parts = [
        loaded.model.config,
        *(getattr(loaded.model.config, key, None) for key in ("text_config", "vision_config")),
    ]
    assert {part._attn_implementation for part in parts if part is not None} <= {"sdpa", "eager"}
    with watch_transformers(loaded.model) as watching:
        run(loaded, encode(loaded, TEXT, 200))
        calls = watching.drain()
    for layer in watching.layers:
        assert sum(len(call.routing.indices) for call in calls if call.layer is layer) == 200


def test_a_multimodal_model_is_finetuned_on_text(multimodal, tmp_path):
    pytest.importorskip("accelerate")
    loaded, settings = load_transformers(str(multimodal / "Qwen3VLMoe")), FinetuneSettings(length=16, steps=1)
    history = finetune(loaded, {"text": [TEXT]}, settings, tmp_path / "out", lambda *_: None)
    assert history["before"]["all"] > 0
    assert "Vision" in type(load_transformers(str(tmp_path / "out")).model.model.visual).__name__


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "switch", "granitemoe", *MULTIMODAL])
def test_layers_have_one_name_whether_a_model_is_run_or_not(name, folders, multimodal, tmp_path):
    folder = (multimodal if name in MULTIMODAL else folders) / name
    (tmp_path / "text").write_text(TEXT)
    run_on = {"texts": [str(tmp_path / "text")], "tokens": 100, "dtype": "auto", "seed": 0}
    seen = inspect_text(str(folder), torch.device("cpu"), **run_on)["layers"]
    read = inspect_checkpoint(folder, experts=False)["layers"]
    keys = ("name", "layer", "stack", "experts")
    assert [[layer[key] for key in keys] for layer in seen] == [[layer[key] for key in keys] for layer in read]


def test_an_unknown_family(mixtral, user_error):
    change(mixtral, model_type="brandnew")
    with user_error("a model family that this version of transformers does not know"):
        load_transformers(str(mixtral))


def test_code_beside_the_weights_is_not_run(mixtral, user_error):
    change(
        mixtral, model_type="brandnew", auto_map={"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Net"}
    )
    (mixtral / "theirs.py").write_text(f"open({str(mixtral / 'ran')!r}, 'w')")
    with user_error("a model family that this version of transformers does not know"):
        load_transformers(str(mixtral))
    assert not (mixtral / "ran").exists()


def test_a_config_that_is_no_language_model(tmp_path, user_error):
    transformers.ViTConfig().save_pretrained(tmp_path)
    with user_error("'vit' is a family that transformers does not know as a language model"):
        load_transformers(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "mixtral", "hidden_size": "wide"}'])
def test_a_broken_config(text, mixtral, user_error):
    (mixtral / "config.json").write_text(text)
    with user_error(str(mixtral)):
        load_transformers(str(mixtral))


def test_a_config_value_of_another_kind_is_told_with_its_cause(mixtral, user_error):
    change(mixtral, num_experts_per_tok="two")
    with user_error(str(mixtral), "num_experts_per_tok", "int", "str"):
        load_transformers(str(mixtral))


def test_more_experts_asked_for_than_there_are(mixtral, user_error):
    change(mixtral, num_experts_per_tok=99)
    loaded = load_transformers(str(mixtral))
    with user_error(mixtral.name, "cannot be run", "config.json"):
        run(loaded, encode(loaded, TEXT, 20))


def test_a_user_error_and_a_full_memory_pass_through_a_run(folders, monkeypatch):
    loaded = load_transformers(str(folders / "mixtral"))
    batches = encode(loaded, TEXT, 20)
    for error in (UserError("mine"), torch.OutOfMemoryError("x"), RuntimeError("can't allocate memory: x")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(loaded.model, "forward", fail)
        with pytest.raises(type(error), match=str(error)) as caught:
            run(loaded, batches)
        assert caught.value is error


def test_a_truncated_file(mixtral, user_error):
    file = mixtral / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with user_error(str(file), "safetensors"):
        load_transformers(str(mixtral))


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        ("model.layers.1.block_sparse_moe.gate.weight", "layers.1.mlp.gate.weight"),
        ("model.layers.1.block_sparse_moe.experts.3.", "layers.1.mlp.experts"),
        ("model.layers.1.block_sparse_moe.experts.3.w2", "layers.1.mlp.experts"),
        ("model.norm.weight", "model.norm.weight"),
    ],
)
def test_missing_tensors(left_out, named, mixtral, user_error, capfd):
    file = mixtral / "model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if not name.startswith(left_out)}
    save_file(tensors, file, metadata={"format": "pt"})
    with user_error("tensors are missing or do not fit", named):
        load_transformers(str(mixtral))
    assert capfd.readouterr() == ("", "")


def test_tensors_of_another_shape(mixtral, user_error):
    file = mixtral / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = torch.zeros(100, 32)
    save_file(tensors, file, metadata={"format": "pt"})
    with user_error("tensors are missing or do not fit", "lm_head.weight"):
        load_transformers(str(mixtral))


def test_tensors_that_are_no_part_of_the_model_are_told(mixtral):
    file = mixtral / "model.safetensors"
    save_file({**load_file(file), "extra.weight": torch.zeros(3)}, file, metadata={"format": "pt"})
    assert any("no place for: 1" in note for note in load_transformers(str(mixtral)).notes)


def test_weights_that_are_no_safetensors(mixtral, user_error):
    file = mixtral / "model.safetensors"
    torch.save(load_file(file), mixtral / "pytorch_model.bin")
    file.unlink()
    with user_error(str(mixtral), "safetensors"):
        load_transformers(str(mixtral))
