"""Router: its precision, its shapes, its errors; under FSDP2."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record, shard_routers
from spectralmoe.regularizers import load_balance, orthonormality, spectral_norm, stable_rank
from spectralmoe.sharding import full


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    "cast", [lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half()], ids=["to", "bfloat16", "half"]
)
def test_casting_a_model_down_leaves_the_router_bit_for_bit(make_router, scorer_name, selector_name, cast):
    model = nn.Sequential(nn.Linear(12, 12), MoE(make_router(scorer_name, selector_name), FeedForward(6, 12, 8)))
    model[1].router.selector.update(torch.arange(6))
    before = state(model[1].router)
    cast(model)
    assert model[0].weight.dtype != torch.float32
    assert model[1].experts.up.dtype != torch.float32
    after = state(model[1].router)
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())


def test_a_router_is_cast_to_double_and_back(make_router, scorer_name, selector_name):
    router = make_router(scorer_name, selector_name)
    before = state(router)
    router.double()
    numbers = [value for value in router.state_dict().values() if value.is_floating_point()]  # a counter stays int64
    assert {value.dtype for value in numbers} == {torch.float64}
    router.to(torch.bfloat16)
    after = state(router)
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())


def test_it_moves_to_another_device(make_router, scorer_name, selector_name):
    router = make_router(scorer_name, selector_name).to("meta", torch.bfloat16)
    assert {v.device.type for v in router.state_dict().values()} == {"meta"}
    assert {v.dtype for v in router.state_dict().values() if v.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_tokens_are_scored_in_fp32(make_router, scorer_name, dtype):
    router, x = make_router(scorer_name, "topk"), torch.randn(20, 12).to(dtype)
    one, two = router(x), router(x.float())
    assert one.logits.dtype == torch.float32
    assert torch.equal(one.logits, two.logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(x).logits, two.logits)


def test_leading_dimensions_are_flattened_and_remembered():
    router = Router(LinearScorer(8, 4), TopK(2))
    x, mask = torch.randn(2, 3, 5, 8), torch.rand(2, 3, 5) < 0.5
    routing, flat = router(x, mask=mask), router(x.reshape(-1, 8), mask=mask.flatten())
    assert routing.shape == (2, 3, 5)
    assert torch.equal(routing.mask, mask.flatten())
    assert torch.equal(routing.indices, flat.indices)
    assert router(x[0, 0, 0]).indices.shape == (1, 2)


def test_masks_may_be_numbers():
    router, x = Router(LinearScorer(8, 4), TopK(2)), torch.randn(5, 8)
    routing = router(x, mask=torch.tensor([1, 1, 0, 1, 0]))
    assert routing.indices[:, 0].lt(0).tolist() == [False, False, True, False, True]


def test_a_replay_obeys_the_new_mask():
    router, x = Router(LinearScorer(8, 4), TopK(2)), torch.randn(5, 8)
    mask = torch.tensor([True, False, True, True, False])
    first = router(x)
    again = router(x, mask=mask, replay=first)
    assert torch.equal(again.indices[mask], first.indices[mask])
    assert (again.indices[~mask] == -1).all()


def test_context_reaches_scorer_and_selector():
    seen = []

    class Curious(LinearScorer):
        def forward(self, x, *, context=None):
            seen.append(context)
            return super().forward(x)

    class Choosy(TopK):
        def choose(self, logits, *, mask=None, context=None):
            seen.append(context)
            return super().choose(logits, mask=mask)

    given = {"domain": 3}
    Router(Curious(8, 4), Choosy(2))(torch.randn(5, 8), context=given)
    assert seen == [given, given]


def test_the_choice_is_made_without_gradient():
    class Watching(TopK):
        def choose(self, logits, *, mask=None, context=None):
            assert not logits.requires_grad
            return super().choose(logits, mask=mask)

    assert Router(LinearScorer(8, 4), Watching(2))(torch.randn(5, 8)).weights.requires_grad


def test_mistakes_are_named(user_error):
    router = Router(LinearScorer(8, 4), TopK(2))
    with user_error("Router", "7", "D=8"):
        router(torch.randn(5, 7))
    with user_error("Router", "mask", "(4,)", "(5,)"):
        router(torch.randn(5, 8), mask=torch.ones(4))
    with user_error("Router", "mask", "(5, 1)", "(5,)"):
        router(torch.randn(5, 8), mask=torch.ones(5, 1))
    with user_error("Router", "replayed", "N=6", "N=5"):
        router(torch.randn(5, 8), replay=router(torch.randn(6, 8)))
    with user_error("Router", "replayed", "E=6", "E=4"):
        router(torch.randn(5, 8), replay=Router(LinearScorer(8, 6), TopK(2))(torch.randn(5, 8)))
    with user_error("Router", "replayed", "N=6", "N=5"):
        router(torch.randn(5, 8), replay=torch.zeros(6, 2, dtype=torch.int64))
    for wrong in (4, -2):
        with user_error("Router", "replayed", f"expert {wrong}", "0 to 3", "-1 for an empty slot"):
            router(torch.randn(1, 8), replay=torch.tensor([[0, wrong]]))
    for indices in (torch.zeros(5, 2), torch.zeros(5, 2).bool(), torch.zeros(5).long(), torch.zeros(5, 1, 2).long()):
        with user_error("Router", "replayed", "whole numbers (N, K)", str(tuple(indices.shape))):
            router(torch.randn(5, 8), replay=indices)


def test_indices_of_any_integer_type_are_replayed():
    router, x, indices = Router(LinearScorer(8, 4), TopK(2)), torch.randn(2, 8), torch.tensor([[3, -1], [0, 2]])
    for dtype in (torch.int8, torch.int32, torch.int64):
        routing = router(x, replay=indices.to(dtype))
        assert torch.equal(routing.indices, indices)
        assert torch.equal(routing.weights, router(x, replay=indices).weights)


@pytest.fixture
def shard(one_process):
    """Shard a layer as a user would: routers first, then the rest in bf16."""

    def shard(layer):
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        shard_routers(layer, mesh=mesh)
        return fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))

    return shard


def test_sharded_routers_stay_fp32_in_a_group_of_their_own(shard, make_router, scorer_name, close):
    layer = MoE(make_router(scorer_name, "topk"), FeedForward(6, 12, 8))
    x = torch.randn(10, 12)
    expected = layer.router(x.bfloat16())
    with record(shard(layer)) as tape:
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert tape[0].routing.logits.dtype == torch.float32
    close(tape[0].routing.logits, expected.logits)
    (y.float().square().sum() + load_balance(tape[0])).backward()
    for parameter in layer.router.parameters():
        assert isinstance(parameter.grad, DTensor)
        assert full(parameter.grad).dtype == torch.float32
        assert full(parameter.grad).any()


def test_spectral_terms_and_retractions_work_on_sharded_routers(shard, make_router, scorer_name, gradients, close):
    layer = MoE(make_router(scorer_name, "topk"), FeedForward(6, 12, 8))
    twin = copy.deepcopy(layer)
    results = []
    for one in (twin, shard(layer)):
        with record(one) as tape:
            one(torch.ones(3, 12))
        if one.router.scorer.matrix is None:
            loss = full(next(one.router.parameters())).square().sum()
        else:
            loss = spectral_norm(tape[0], bound=0.0) + stable_rank(tape[0]) + orthonormality(tape[0])
        results.append([loss, *gradients(loss, one.router.parameters())])
        one.router.scorer.after_step()
        results[-1] += [p.detach() for p in one.router.parameters()]
        results[-1] += [torch.tensor(one.router.scorer.lipschitz() or 0.0)]
    for expected, sharded in zip(*results, strict=True):
        close(full(sharded), expected)
