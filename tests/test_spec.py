"""Specs: every part described as JSON and built again; only what is known or allowed is built."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from spectralmoe import Adapter, Dense, FeedForward, Grouped, LinearScorer, Loop, ModuleExperts, MoE, Router, TopK
from spectralmoe.models import MODELS, sr_moe
from spectralmoe.spec import PARTS, build, describe, find_class

D, E = 12, 6


class Tanh(nn.Module):
    """A user's own expert."""

    def __init__(self, dim, *, scale=1.0):
        super().__init__()
        self.dim, self.scale = dim, scale

    def forward(self, x):
        return self.scale * x.tanh()


class Forgetful(nn.Module):
    def __init__(self, dim):
        super().__init__()


OWN = f"{__name__}:Tanh"


def check(part, **options):
    spec = describe(part, tables=options.get("tables"))
    again = json.loads(json.dumps(spec))
    assert again == spec
    built = build(again, **options)
    assert type(built) is type(part)
    assert describe(built, tables=options.get("tables")) == spec
    return built


def test_every_scorer_and_selector(make_router, scorer_name, selector_name):
    layer = MoE(make_router(scorer_name, selector_name), FeedForward(E, D, 8))
    built = check(layer)
    shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (layer, built)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    "part",
    [
        FeedForward(E, D, 8, activation="swiglu", bias=True),
        Adapter(E, D, 3),
        ModuleExperts([Tanh(D), Tanh(D, scale=2.0)]),
        Loop(),
        Dense(),
        Grouped(),
        MoE(Router(LinearScorer(D, 2), TopK(1)), ModuleExperts([Tanh(D)] * 2), dispatch="loop", shared=Tanh(D)),
    ],
    ids=lambda part: type(part).__name__,
)
def test_other_parts(part):
    check(part, allow=[OWN])


def test_whole_networks():
    net = check(sr_moe(5, channels=2, depth=2, mean=[0.1, 0.2], residual=False), tables={**PARTS, **MODELS})
    assert net.stem.mean == [0.1, 0.2]
    assert not net.stages[1].residual


def test_by_hand():
    spec = {
        "type": "moe",
        "router": {"type": "router", "scorer": {"type": "linear", "dim": 4, "num_experts": 3}, "selector": None},
        "experts": {"type": "feed_forward", "num_experts": 3, "dim": 4, "hidden": 5},
    }
    spec["router"]["selector"] = {"type": "capacity", "selector": {"type": "topk", "k": 2}, "factor": 1.5}
    layer = build(spec)
    assert layer.router.scorer.weight.shape == (3, 4)
    assert (layer.router.selector.factor, layer.router.selector.selector.k) == (1.5, 2)
    assert layer.experts.up.shape == (3, 5, 4)
    assert layer.dispatch == "auto"
    assert describe(layer)["experts"] == {**spec["experts"], "activation": "gelu", "bias": False, "spare": 0}


def test_wrappers_are_looked_through(one_process):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    layer = MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 8))
    spec = describe(layer)
    layer.experts = checkpoint_wrapper(layer.experts)
    assert describe(torch.compile(layer)) == spec
    fully_shard(layer.router)
    assert describe(fully_shard(layer)) == spec


@pytest.mark.parametrize("value", [None, True, 3, 0.5, "x", [1, [2]], {"a": {"b": None}}])
def test_plain_values(value):
    assert describe(value) == value
    assert build(value) == value


def test_unknown_arguments(user_error):
    with user_error("unknown argument of 'topk' 'top'", "known: k, normalize, score"):
        build({"type": "topk", "top": 2})
    with user_error("'linear' needs the argument 'num_experts'"):
        build({"type": "linear", "dim": 2})


@pytest.mark.parametrize("kind", ["tpk", "os:system", OWN, 5, None, ["topk"], {}])
def test_types_that_were_not_allowed(user_error, kind):
    for allow in ((), ["x:Y"], OWN + "os:system"):
        with user_error(repr(kind), "not allowed"):
            build({"type": kind}, allow=allow)


def test_an_allowed_class():
    assert build({"type": OWN, "dim": 2, "scale": 3.0}, allow=[OWN]).scale == 3.0


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("Tanh", "not of the form"),
        (":Tanh", "not of the form"),
        ("torch:", "not of the form"),
        ("no_such_module:X", "cannot import 'no_such_module'"),
        (".relative:X", "cannot import '.relative'"),
        ("torch:NoSuchClass", "has no 'NoSuchClass'"),
        ("torch:nn.NoSuchClass", "has no 'nn.NoSuchClass'"),
    ],
)
def test_paths_that_name_no_class(user_error, path, word):
    with user_error(repr(path), word):
        find_class(path)
    with user_error(repr(path), word):
        build({"type": path}, allow=[path])


def test_find_class():
    assert find_class(OWN) is Tanh
    assert find_class("torch:nn.Linear") is nn.Linear


def test_what_cannot_be_described(user_error):
    with user_error("Forgetful cannot be described", "'dim'"):
        describe(Forgetful(2))
    with user_error("Sequential cannot be described"):
        describe(nn.Sequential())
    with user_error("Tensor"):
        describe(torch.zeros(2))
    with user_error("has no readable constructor"):
        build({"type": "builtins:dict"}, allow=["builtins:dict"])
