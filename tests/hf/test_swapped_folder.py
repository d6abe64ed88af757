"""Folders of swapped models: the base model in plain transformers, the swapped one here, nothing in between."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, MORE, batch, build
from safetensors.torch import load_file, save_file
from torch import nn

from spectralmoe import LinearScorer
from spectralmoe.hf import load_swapped, load_transformers, save_swapped, swap_routers
from spectralmoe.hf.routers.files import write_routers
from spectralmoe.hf.routers.places import swapped_routers
from spectralmoe.hf.routers.swapped import SwappedRouter

transformers = pytest.importorskip("transformers")

SOME = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe")
every_family = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in SOME else pytest.mark.full) for name in (*FAMILIES, *MORE)]
)
ROUTERS, TENSORS = "spectral_routers.json", "spectral_routers.safetensors"
EIGENBASIS = {"type": "eigenbasis", "rank": 4, "temperature": 0.1}


class Doubled(LinearScorer):
    """A scorer of a user's own."""

    def forward(self, x, *, context=None):
        return 2 * super().forward(x, context=context)


@functools.cache
def stock_of(family: str) -> Any:
    """The tiny model, not to be changed."""
    return build(family)


def swapped_of(family: str, *args: Any, **options: Any) -> Any:
    """A copy of it with routers of this library."""
    model = copy.deepcopy(stock_of(family))
    swap_routers(model, *args, **options)
    return model


@torch.no_grad()
def logits_of(model: Any, seed: int = 0) -> torch.Tensor:
    return model(**batch(model, seed=seed)).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral with routers of its own kind and others, in a folder that is not to be changed."""
    model = swapped_of("mixtral", EIGENBASIS, init="fresh", layers="model.layers.[01].mlp")
    swap_routers(model, "linear", "balanced", layers="model.layers.2.mlp")
    with torch.no_grad():
        swapped_routers(model)["model.layers.2.mlp"].router.selector.bias.normal_()
    folder = tmp_path_factory.mktemp("swapped") / "model"
    save_swapped(model, folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return shutil.copytree(saved, tmp_path / "copy")


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / ROUTERS).read_text())
    (folder / ROUTERS).write_text(json.dumps(config | values))


def alike(found, wanted):
    """But for rounding: weights that transformers maps from a file lie elsewhere in memory, which changes last bits."""
    torch.testing.assert_close(found, wanted)


@every_family
def test_plain_transformers_loads_the_base_model_and_we_the_swapped_one(family, tmp_path):
    model = swapped_of(family, EIGENBASIS, init="fresh")
    wanted = logits_of(model)
    save_swapped(model, tmp_path / "model")
    plain = type(model).from_pretrained(tmp_path / "model").eval()
    alike(logits_of(plain), logits_of(stock_of(family)))
    assert not torch.equal(wanted, logits_of(plain))
    loaded = load_swapped(tmp_path / "model")
    alike(logits_of(loaded), wanted)
    kept, found = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(found[name], value) for name, value in kept.items())
    assert load_swapped(tmp_path / "model", base=plain) is plain
    alike(logits_of(plain), wanted)
    alike(logits_of(model), wanted)
    names = {name for path in (tmp_path / "model").glob("model*.safetensors") for name in load_file(path)}
    assert not any("router.scorer" in name for name in names)


def test_the_auto_class_loads_the_base_model(saved):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values())
    alike(logits_of(model.eval()), logits_of(stock_of("mixtral")))


def test_half_precision_and_other_heads_come_back(tmp_path):
    kind = transformers.MixtralForSequenceClassification
    kind(stock_of("mixtral").config).save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()  # .to() would round the rotary angles too
    swap_routers(model, "prototype", init="fresh")
    save_swapped(model, tmp_path / "model")
    loaded = load_swapped(tmp_path / "model")
    assert type(loaded) is type(model)
    assert loaded.dtype == torch.bfloat16
    assert {p.dtype for each in swapped_routers(loaded).values() for p in each.router.parameters()} == {torch.float32}
    alike(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_fp32_comes_back_in_half_precision(saved, dtype):
    """The gates that are rounded on loading are still those of the folder."""
    loaded = load_transformers(str(saved), dtype=dtype).model
    assert loaded.dtype == dtype
    assert len(swapped_routers(loaded)) == 3


def test_what_was_trained_comes_back_and_is_trained_on(tmp_path):
    model = swapped_of("mixtral", EIGENBASIS, init="fresh").train()
    ids = batch(model)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    for each in swapped_routers(model).values():
        each.router.scorer.retract()
    save_swapped(model.eval(), tmp_path / "model")
    loaded = load_swapped(tmp_path / "model")
    alike(logits_of(loaded), logits_of(model))
    assert not loaded.training
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, _ in model.named_parameters()}
    save_swapped(loaded, tmp_path / "again")
    alike(logits_of(load_swapped(tmp_path / "again")), logits_of(model))


def test_layers_keep_what_they_have(saved):
    loaded = load_swapped(saved)
    kinds = {name: type(each.router.scorer).__name__ for name, each in swapped_routers(loaded).items()}
    assert list(kinds.values()) == ["EigenbasisScorer", "EigenbasisScorer", "LinearScorer"]
    assert swapped_routers(loaded)["model.layers.2.mlp"].router.selector.bias.any()
    part = swapped_of("mixtral", "cosine", layers="model.layers.1.*")
    save_swapped(part, saved.parent / "part")
    assert list(swapped_routers(load_swapped(saved.parent / "part"))) == ["model.layers.1.mlp"]


def test_another_folder_or_a_model_is_the_base(saved, tmp_path):
    stock = copy.deepcopy(stock_of("mixtral"))
    with torch.no_grad():
        stock.model.layers[0].mlp.experts.down_proj *= 1.5  # another model, behind the same gates
    stock.save_pretrained(tmp_path)
    one, two = load_swapped(saved, base=tmp_path), load_swapped(saved, base=stock)
    alike(logits_of(one), logits_of(two))
    assert not torch.equal(logits_of(one), logits_of(load_swapped(saved)))


def test_inspection_sees_the_swapped_routers(saved):
    loaded = load_transformers(str(saved))
    assert len(swapped_routers(loaded.model)) == 3
    assert any("save_swapped" in note for note in loaded.notes)
    torch.testing.assert_close(logits_of(loaded.model), logits_of(load_swapped(saved)), rtol=1e-4, atol=1e-4)


def test_a_save_replaces_the_model_and_leaves_what_others_wrote(folder):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "history.json").write_text("{}")
    write_routers(load_swapped(folder), folder)  # beside what others wrote, as a training does
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("mine")
    model = swapped_of("granitemoe")
    save_swapped(model, folder)
    save_swapped(model, str(folder))
    alike(logits_of(load_swapped(folder)), logits_of(model))
    assert (folder / "tokenizer.json").read_text() == (folder / "history.json").read_text() == "{}"
    assert (folder / "notes" / "a.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_links_and_empty_folders_are_kept(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    save_swapped(swapped_of("mixtral"), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / ROUTERS).is_file()


@pytest.mark.parametrize("number", range(1, 5))
def test_a_save_that_fails_leaves_the_model_that_was_there(number, folder, monkeypatch, user_error):
    before, model = logits_of(load_swapped(folder)), swapped_of("granitemoe")
    calls = []

    def failing(function):
        def call(*args, **kwargs):
            calls.append(function)
            if len(calls) == number:
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr("spectralmoe.hf.routers.files.save_file", failing(save_file))
    monkeypatch.setattr("spectralmoe.hf.routers.folder.flush", failing(lambda path: None))
    monkeypatch.setattr(Path, "rename", failing(Path.rename))
    monkeypatch.setattr("spectralmoe.hf.routers.folder.exchange", lambda one, other: False)  # of other systems
    if number > 2:  # the two renames alone
        monkeypatch.setattr("spectralmoe.hf.routers.files.save_file", save_file)
        monkeypatch.setattr("spectralmoe.hf.routers.folder.flush", lambda path: None)
        number -= 2
    with user_error("cannot write", "No space left"):
        save_swapped(model, folder)
    alike(logits_of(load_swapped(folder)), before)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_folders_that_cannot_be_written(tmp_path, saved, user_error):
    model = swapped_of("mixtral")
    (tmp_path / "file").write_text("mine")
    with user_error("file", "not a folder"):
        save_swapped(model, tmp_path / "file")
    with user_error("file"):
        save_swapped(model, tmp_path / "file" / "model")
    with user_error(str(tmp_path), "holds file", "another folder"):
        save_swapped(model, tmp_path)
    stock_of("mixtral").save_pretrained(tmp_path / "stock")
    with user_error("stock", "holds config.json", "another folder"):
        save_swapped(model, tmp_path / "stock")
    assert (tmp_path / "file").read_text() == "mine"
    if os.geteuid():
        (tmp_path / "locked").mkdir(0o500)
        with user_error("locked", "cannot write"):
            save_swapped(model, tmp_path / "locked" / "model")


def test_models_that_are_none_of_ours(tmp_path, user_error):
    with user_error("no swapped router"):
        save_swapped(stock_of("mixtral"), tmp_path / "model")
    with user_error("Linear", "no model of transformers"):
        save_swapped(nn.Linear(2, 2), tmp_path / "model")
    with user_error("no swapped routers", ROUTERS):
        load_swapped(tmp_path / "absent")
    stock_of("mixtral").save_pretrained(tmp_path / "stock")
    with user_error("no swapped routers", ROUTERS):
        load_swapped(tmp_path / "stock")


def test_another_base_is_refused(saved, tmp_path, user_error):
    other = build("mixtral", hidden_size=64)
    with user_error("belong to another model", "shape"):
        load_swapped(saved, base=other)
    with user_error("belong to another model", "extra"):
        load_swapped(saved, base=stock_of("granitemoe"))
    same_shapes = copy.deepcopy(stock_of("mixtral"))
    with torch.no_grad():
        same_shapes.model.layers[1].mlp.gate.weight[0, 0] += 1e-3
    with user_error("belong to another model", "gate of model.layers.1.mlp", "SHA-256"):
        load_swapped(saved, base=same_shapes)
    swapped = swapped_of("mixtral")
    with user_error("belong to another model", "model.layers.0.mlp"):
        load_swapped(saved, base=swapped)
    with user_error("no such model folder"):
        load_swapped(saved, base=tmp_path / "absent")
    for model in (other, same_shapes, stock_of("granitemoe")):
        assert not any(isinstance(module, SwappedRouter) for module in model.modules())


def test_damaged_folders(folder, user_error):
    def refused(*words: str) -> None:
        with user_error(*words):
            load_swapped(folder)

    config = json.loads((folder / ROUTERS).read_text())
    first, layers = "model.layers.0.mlp", config["layers"]
    gate, spec = layers[first]["gate"], layers[first]["router"]

    def described(router: Any) -> dict[str, Any]:
        return {**layers, first: {"gate": gate, "router": router}}

    change(folder, layers=described({**spec, "scorer": {"type": "os:system"}}))
    refused("os:system", "not allowed")
    change(folder, layers=described({"type": "topk", "k": 2}))
    refused(ROUTERS, first)
    change(folder, layers=described({**spec, "scorer": {**spec["scorer"], "rank": 5}}))
    refused(ROUTERS, first, "shape")
    change(folder, layers={**layers, "model.layers.7.mlp": layers[first]})
    refused("model.layers.7.mlp")
    change(folder, layers={**layers, first: spec})
    refused(ROUTERS, "without its router and gate")
    change(folder, layers=layers, spectralmoe_routers=99)
    refused(ROUTERS, "format 1")
    change(folder, spectralmoe_routers=1, shapes=None)
    refused(ROUTERS, "lacks")
    (folder / ROUTERS).write_text("{")
    refused(ROUTERS, "JSON")
    (folder / ROUTERS).write_text(json.dumps(config))
    tensors = load_file(folder / TENSORS)
    save_file({name: value + 1 for name, value in tensors.items()}, folder / TENSORS)
    refused(TENSORS, "SHA-256")
    (folder / TENSORS).write_bytes(b"no tensors")
    refused(TENSORS)
    (folder / TENSORS).unlink()
    refused(TENSORS)


def test_the_stock_model_is_checked_too(folder, user_error):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("MixtralForCausalLM", "OurForCausalLM"))
    with user_error("OurForCausalLM", "transformers does not have"):
        load_swapped(folder)
    (folder / "config.json").write_text(text)
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with user_error("missing", "lm_head.weight"):
        load_swapped(folder)


def test_a_class_of_ones_own_needs_leave(tmp_path, user_error):
    model = swapped_of("mixtral", Doubled, init="fresh")
    save_swapped(model, tmp_path / "model")
    name = f"{Doubled.__module__}:Doubled"
    with user_error(name, "allow="):
        load_swapped(tmp_path / "model")
    alike(logits_of(load_swapped(tmp_path / "model", allow=[name])), logits_of(model))


def test_adapters_are_merged_first(tmp_path, user_error):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(swapped_of("mixtral"), peft.LoraConfig(target_modules=["q_proj"]))
    with user_error("PEFT", "merge_and_unload"):
        save_swapped(model, tmp_path / "model")
    merged = model.merge_and_unload()
    save_swapped(merged, tmp_path / "model")
    alike(logits_of(load_swapped(tmp_path / "model")), logits_of(merged))


def test_a_sharded_model_is_gathered(one_process, tmp_path):
    from torch.distributed.fsdp import fully_shard

    from spectralmoe import shard_routers

    model = swapped_of("mixtral", EIGENBASIS, init="fresh")
    wanted = logits_of(model)
    shard_routers(model)
    fully_shard(model)
    save_swapped(model, tmp_path / "model")
    alike(logits_of(load_swapped(tmp_path / "model")), wanted)
