"""The ranks of a model alone: saved, loaded into the model that they belong to, and refused elsewhere."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from spectralmoe import Context, ContextScorer, feed, load, save, shard_routers
from spectralmoe.layers import moe_layers
from spectralmoe.ranks import add_ranks
from spectralmoe.saving import load_ranks, save_ranks

D = 6


@pytest.fixture
def base():
    """A model with a linear layer in two places."""
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D, bias=False), nn.Tanh(), nn.Linear(D, D))
    model[4] = model[0]
    return model


def with_ranks(base):
    model = copy.deepcopy(base)
    add_ranks(model, ["0", "4"], ranks=5, zero=2, k=3, scorer=lambda dim, e: ContextScorer(dim, e, width=2, hidden=3))
    add_ranks(model, "2", ranks=4, shared=0, zero=0, k=4)
    for layer in (model[0], model[2]):
        layer.up.data.normal_()
    return model


def test_loaded_they_are_what_they_were(base, tmp_path):
    model = with_ranks(base)
    save_ranks(model, tmp_path, meta={"data": "photos"})
    loaded = load_ranks(tmp_path, copy.deepcopy(base))
    x, context = torch.randn(3, D), Context(samples={"severity": torch.rand(3, 2)})
    outputs = []
    for each in (model, loaded):
        with feed(each, context=context):
            outputs.append(each(x))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], base(x))
    assert loaded[0] is loaded[4]
    trained = [{name for name, p in each.named_parameters() if p.requires_grad} for each in (model, loaded)]
    assert trained[0] == trained[1]
    files = load_file(tmp_path / "parts.safetensors")
    assert not [name for name in files if ".linear." in name]
    assert json.loads((tmp_path / "config.json").read_text())["meta"] == {"data": "photos"}
    save_ranks(loaded, tmp_path)  # once more, over the first
    assert {n: v.tolist() for n, v in load_file(tmp_path / "parts.safetensors").items()} == {
        n: v.tolist() for n, v in files.items()
    }


def test_a_whole_model_with_ranks_is_saved_as_any_other(base, tmp_path):
    model, fresh = with_ranks(base), with_ranks(base)
    fresh[0].down.data.zero_()
    save(model, tmp_path)
    load(tmp_path, into=fresh)
    for one, two in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, two)


def test_they_are_not_put_into_another_model(base, tmp_path, user_error):
    save_ranks(with_ranks(base), tmp_path)
    other = copy.deepcopy(base)
    other[2].weight.data += 1
    with user_error("for another model", "SHA-256"):
        load_ranks(tmp_path, other)
    with user_error("has ranks already"):
        load_ranks(tmp_path, with_ranks(base))
    with user_error("holds no RankExperts", "add_ranks"):
        save_ranks(base, tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ranks": 10**9}, "holds other tensors for 2"),
        ({"scorer": {"type": "os:system"}}, "was not allowed"),
        ({"scorer": 3}, "does not hold the ranks"),
    ],
)
def test_a_config_that_was_tampered_with_is_refused(base, tmp_path, user_error, change, words):
    save_ranks(with_ranks(base), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layers"]["2"] |= change
    if "ranks" in change:
        config["layers"]["2"]["scorer"]["num_experts"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(config))
    with user_error(words):
        load_ranks(tmp_path, copy.deepcopy(base))
    (tmp_path / "config.json").write_text("{}")
    with user_error("holds no ranks"):
        load_ranks(tmp_path, base)


def test_statistics_that_norms_collect_do_not_make_another_model(tmp_path):
    """They move while ranks are trained, and where the model itself is used on."""
    base = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, 2))
    model = add_ranks(copy.deepcopy(base), "2", ranks=4, zero=0, k=2)
    model(torch.randn(9, D))
    base(torch.randn(7, D))
    assert not torch.equal(model[1].running_mean, base[1].running_mean)
    save_ranks(model, tmp_path)
    loaded = load_ranks(tmp_path, base)
    assert torch.equal(loaded[2].down, model[2].down)
    assert not torch.equal(loaded[1].running_mean, model[1].running_mean)


def test_wrappers_are_seen_through_or_refused(base, tmp_path, one_process, user_error):
    """A compiled model, and one whose parts are checkpointed, get their ranks at the same places."""
    model, x = with_ranks(base), torch.randn(3, D)
    save_ranks(model, tmp_path)
    wrapped = copy.deepcopy(base)
    wrapped[2] = checkpoint_wrapper(wrapped[2])
    compiled = torch.compile(wrapped, backend="eager")
    assert load_ranks(tmp_path, compiled) is compiled
    assert list(moe_layers(compiled)) == list(moe_layers(model)) == ["0", "2"]
    with feed(model, context=(side := Context(samples={"severity": torch.rand(3, 2)}))):
        want = model(x)
    with feed(wrapped, context=side):
        assert torch.equal(wrapped(x), want)
    again = add_ranks(nn.Sequential(checkpoint_wrapper(nn.Sequential(nn.Linear(D, D)))), "0.0", ranks=2, zero=0, k=1)
    assert list(moe_layers(again)) == ["0.0"]
    sharded = copy.deepcopy(base)
    fully_shard(sharded)
    for parallel, words in ((sharded, "sharded"), (DistributedDataParallel(copy.deepcopy(base)), "under DDP")):
        with user_error("load_ranks", words):
            load_ranks(tmp_path, parallel)
        with user_error("add_ranks", words):
            add_ranks(parallel, "*")


def test_a_sharded_model_trains_and_is_gathered(base, tmp_path, one_process, close):
    model = with_ranks(base)
    twin, x = copy.deepcopy(model), torch.randn(3, D)
    context = Context(samples={"severity": torch.rand(3, 2)})
    shard_routers(model)
    fully_shard(model)
    for each in (model, twin):
        with feed(each, context=context):
            each(x).square().sum().backward()
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.requires_grad == two.requires_grad == (two.grad is not None)
        if one.requires_grad:
            close(one.grad.full_tensor(), two.grad)
    save_ranks(model, tmp_path)
    save_ranks(twin, tmp_path / "twin")
    assert (tmp_path / "parts.safetensors").read_bytes() == (tmp_path / "twin" / "parts.safetensors").read_bytes()


def test_under_ddp_no_parameter_is_missed(base, one_process):
    model = with_ranks(base)
    model[0].up.data.zero_()  # as it starts: no gradient but zeros reaches A and the router
    parallel, context = DistributedDataParallel(model), Context(samples={"severity": torch.rand(3, 2)})
    for _ in range(2):  # DDP tells of unused parameters at the second forward
        with feed(parallel, context=context):
            parallel(torch.randn(3, D)).square().sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
