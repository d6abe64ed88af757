"""What every router keeps, whatever its scorer and selector: a new table entry is held to it without a line here."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seeds import shifted

from spectralmoe import FeedForward, MoE
from spectralmoe.regularizers import load_balance, router_z

D, E = 12, 6
SIZES = [0, 1, 63, 100]
COUPLED = {"expert_choice", "capacity"}  # the choice of one token depends on the others


def filled(indices: torch.Tensor) -> list[list[int]]:
    return [[e for e in row if e >= 0] for row in indices.tolist()]


@pytest.fixture
def router(make_router, scorer_name, selector_name):
    return make_router(scorer_name, selector_name, D, E)


@pytest.fixture
def layer(router):
    return MoE(router, FeedForward(E, D, 8))


@pytest.mark.grid(n=SIZES, autocast=[False, True])
def test_routing_is_valid(router, n, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = router(torch.randn(n, D))
    rows = filled(routing.indices)
    assert routing.indices.dtype == torch.int64
    assert all(0 <= e < E for row in rows for e in row)
    assert all(len(set(row)) == len(row) for row in rows)
    assert not routing.weights[routing.indices < 0].any()
    assert routing.counts().tolist() == [sum(row.count(e) for row in rows) for e in range(E)]
    assert float(routing.load().sum()) == pytest.approx(1.0 if n else 0.0)
    for values in (routing.logits, routing.weights, routing.scores, routing.probs):
        assert values.dtype == torch.float32
        assert values.isfinite().all()


@pytest.mark.grid(n=SIZES, autocast=[False, True])
def test_layer_equals_the_fp32_loop(layer, close, n, autocast):
    layer.eval()  # no noise
    x = torch.randn(n, D)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    layer.dispatch = "loop"
    close(y.float(), layer(x), torch.bfloat16 if autocast else torch.float32)


@pytest.mark.grid(n=SIZES[2:])  # one token alone may be left with experts whose scores are constant
def test_the_task_loss_trains_every_router_parameter(layer, n):
    (layer(torch.randn(n, D)) * torch.randn(n, D)).sum().backward()
    for name, parameter in layer.router.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.grid(n=SIZES)
def test_replay_gives_equal_weights(router, n):
    x = torch.randn(n, D)
    first = router(x)
    again = router(x, replay=first)
    assert torch.equal(again.indices, first.indices)
    assert torch.equal(again.weights, first.weights)


def test_replay_recomputes_the_weights_from_live_logits(router, gradients):
    first = router(torch.randn(9, D))
    x = torch.randn(9, D)
    again = router(x, replay=first)
    assert torch.equal(again.indices, first.indices)
    assert torch.equal(again.weights, router.selector.weigh(router.scorer(x), first.indices))
    assert gradients((again.weights * torch.randn_like(again.weights)).sum(), router.parameters())[0].any()


@pytest.mark.grid(n=SIZES[1:])
def test_masked_tokens_are_inert(layer, n):
    x, mask = torch.randn(n, D), torch.rand(n) < 0.6
    other = torch.where(mask[:, None], x, 30 * torch.randn(n, D))
    routings, outputs = [], []
    for tokens in (x, other):
        torch.manual_seed(shifted(1))
        routings.append(layer.router(tokens, mask=mask))
        torch.manual_seed(shifted(1))
        outputs.append(layer(tokens, mask=mask))
    one, two = routings
    assert (one.indices[~mask] == -1).all()
    assert not one.weights[~mask].any()
    assert not outputs[0][~mask].any()
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(one.weights[mask], two.weights[mask])
    assert torch.equal(one.counts(), two.counts())
    assert torch.equal(outputs[0], outputs[1])


def test_masked_rows_can_be_left_out(layer, close):
    layer.eval()  # noise would be drawn for other rows
    x, mask = torch.randn(40, D), torch.rand(40) < 0.6
    whole, alone = layer.router(x, mask=mask), layer.router(x[mask])
    assert torch.equal(whole.indices[mask], alone.indices)
    assert torch.equal(whole.counts(), alone.counts())
    close(whole.load(), alone.load())
    close(whole.weights[mask], alone.weights)
    close(layer(x, mask=mask)[mask], layer(x[mask]))


def test_masked_tokens_give_no_gradient(layer, gradients):
    x, mask = torch.randn(20, D, requires_grad=True), torch.rand(20) < 0.6
    (grad,) = gradients((layer(x, mask=mask) * torch.randn(20, D)).sum(), [x])
    assert not grad[~mask].any()
    assert grad[mask].any()


def test_nan_in_masked_tokens_goes_nowhere(layer, gradients):
    x, mask = torch.randn(20, D), torch.rand(20) < 0.6
    broken = x.masked_fill(~mask[:, None], torch.nan).requires_grad_()
    routing = layer.router(broken, mask=mask)
    loss = layer(broken, mask=mask).square().sum() + load_balance(routing) + router_z(routing)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(loss, [broken, *layer.parameters()]))


def test_nothing_is_left_when_all_tokens_are_masked(layer):
    x, mask = torch.randn(7, D), torch.zeros(7, dtype=torch.bool)
    assert not layer.router(x, mask=mask).counts().any()
    assert not layer(x, mask=mask).any()


def test_a_copy_and_a_loaded_state_are_equal(layer, make_router, scorer_name, selector_name):
    layer.eval()
    layer.router.scorer.after_step()
    layer.router.selector.update(torch.arange(E))
    x = torch.randn(30, D)
    loaded = MoE(make_router(scorer_name, selector_name, D, E), FeedForward(E, D, 8)).eval()
    loaded.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), loaded):
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("cast", [False, True], ids=["fp32-parameters", "float64-parameters"])
def test_float64_in_gives_float64(layer, close, cast):
    layer.eval()
    x = torch.randn(20, D, dtype=torch.float64)
    layer = layer.double() if cast else layer
    routing, y = layer.router(x), layer(x)
    assert {routing.logits.dtype, routing.weights.dtype, routing.scores.dtype, y.dtype} == {torch.float64}
    close(y, copy.deepcopy(layer).double()(x))  # nothing on the way was rounded to fp32


@given(order=st.permutations(range(7)))
def test_permuted_tokens_are_routed_alike(make_router, scorer_name, selector_name, order):
    if selector_name in COUPLED:
        return
    torch.manual_seed(shifted(0))
    layer = MoE(make_router(scorer_name, selector_name, D, E), FeedForward(E, D, 8)).eval()
    x = torch.randn(7, D)
    one, two = layer.router(x), layer.router(x[order])
    assert torch.equal(one.indices[order], two.indices)
    assert torch.equal(one.counts(), two.counts())
    torch.testing.assert_close(layer(x)[order], layer(x[order]), rtol=1e-5, atol=1e-5)
