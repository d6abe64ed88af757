"""Ranks as experts: against the sum over ranks one by one, against LoRA, and inside models of others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spectralmoe import (
    Context,
    ContextScorer,
    FeedForward,
    LinearScorer,
    MoE,
    Monitor,
    Router,
    Term,
    TopK,
    attach,
    experts,
    feed,
    penalty,
    record,
)
from spectralmoe.diagnostics.watch import watch
from spectralmoe.layers import moe_layers
from spectralmoe.models import signal_moe
from spectralmoe.ranks import RankExperts, RankGates, add_ranks
from spectralmoe.regularizers import load_balance, severity_balance
from spectralmoe.scorers import SpectrumScorer

D, WIDE, R, S, Z, K, N = 6, 5, 7, 2, 3, 4, 11


def make(scorer=None, ranks=R, shared=S, zero=Z, k=K, bias=True):
    """A layer whose B is not zero any more."""
    layer = RankExperts(nn.Linear(D, WIDE, bias=bias), ranks=ranks, shared=shared, zero=zero, k=k, scorer=scorer)
    layer.up.data.normal_()
    return layer


def slow(layer, x):
    """y = W0 x + sum_j B_j A_j x + sum_i g_i B_i A_i x, one token and one rank at a time."""
    scores = layer.router.scorer(x)
    rows = []
    for token, logits in zip(x, scores, strict=True):
        y = layer.linear(token)
        for j in range(layer.shared):
            y = y + layer.up[:, j] * (layer.down[j] @ token)
        chosen = logits.argsort(descending=True)[: layer.k].tolist()
        gates = layer.k * torch.stack([logits[i] for i in chosen]).softmax(0)
        for gate, i in zip(gates, chosen, strict=True):
            if i < layer.ranks:
                y = y + gate * layer.up[:, layer.shared + i] * (layer.down[layer.shared + i] @ token)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("shared", [0, S])
@pytest.mark.parametrize("zero", [0, Z])
def test_it_is_the_sum_over_ranks_one_by_one(shared, zero, same):
    layer = make(shared=shared, zero=zero).double()
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    trained = [x, layer.down, layer.up, layer.router.scorer.weight]
    same(layer(x), slow(layer, x), trained)


def test_by_hand():
    """Logits 3, 3, 0: ranks 0 and 1 with gate 1 each, and the shared one."""
    layer = RankExperts(nn.Linear(1, 1), ranks=2, shared=1, zero=1, k=2)
    layer.linear.weight.data, layer.linear.bias.data = torch.tensor([[10.0]]), torch.tensor([0.5])
    layer.router.scorer.weight.data = torch.tensor([[1.0], [1.0], [0.0]])
    layer.down.data, layer.up.data = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[1.0, 10.0, 100.0]])
    assert layer(torch.tensor([[3.0]])).item() == pytest.approx(30.5 + 3 + 60 + 900)


def test_gates_of_one_without_zero_experts_are_lora_of_that_rank(close):
    layer = make(ranks=R, shared=0, zero=0, k=R)
    layer.router.scorer.weight.data.zero_()
    x = torch.randn(N, D)
    close(layer(x), layer.linear(x) + F.linear(F.linear(x, layer.down), layer.up))


def test_it_starts_as_the_linear_layer_and_trains_b_first():
    layer = RankExperts(nn.Linear(D, WIDE), ranks=R, shared=S, zero=Z, k=K)
    x = torch.randn(2, N, D)
    assert torch.equal(layer(x), layer.linear(x))
    layer(x).square().sum().backward()
    assert layer.up.grad.any()
    assert not layer.down.grad.any()
    assert not layer.router.scorer.weight.grad.any()  # there, and zero: DDP misses none
    assert all(p.grad is None for p in layer.linear.parameters())


@pytest.mark.parametrize("k", [1, K, R + Z])
def test_gates_of_zero_experts_have_no_part_in_the_output(k, close):
    layer, x = make(k=k), torch.randn(N, D)
    gates = layer.router(x).gates()
    hidden = F.linear(x, layer.down) * torch.cat([torch.ones(N, S), gates[:, :R]], 1)
    close(layer(x), layer.linear(x) + F.linear(hidden, layer.up))


def test_a_token_of_zero_experts_alone_has_the_shared_ranks_alone(close):
    layer, x = make(k=Z), torch.rand(N, D)
    layer.router.scorer.weight.data = torch.cat([torch.full((R, D), -1.0), torch.ones(Z, D)])
    close(layer(x), layer.linear(x) + F.linear(F.linear(x, layer.down[:S]), layer.up[:, :S]))


@pytest.mark.parametrize("k", [1, K])
def test_zero_experts_that_nobody_chooses_might_as_well_not_be_there(k, close):
    layer, without, x = make(k=k), make(zero=0, k=k), torch.rand(N, D)
    layer.router.scorer.weight.data[R:] = -1e4
    state = layer.state_dict()
    without.load_state_dict({**state, "router.scorer.weight": state["router.scorer.weight"][:R]})
    close(layer(x), without(x))


def test_any_leading_shape_and_no_tokens(close):
    layer, x = make(), torch.randn(2, 3, 4, D)
    close(layer(x).flatten(0, 2), layer(x.flatten(0, 2)))
    close(layer(x)[0, 0, 0], layer(x[0, 0, 0]))
    empty = layer(x[:, :0])
    assert empty.shape == (2, 0, 4, WIDE)
    empty.sum().backward()
    assert not layer.up.grad.any()


def test_gates_have_the_mean_one(close):
    logits = torch.randn(N, R)
    for k in (2, R):
        gates = RankGates(k)
        close(gates.weigh(logits, gates.choose(logits)).mean(1), torch.ones(N))


def test_merged_it_is_the_layer_of_one_severity(close):
    layer = make(ContextScorer(D, R + Z, width=2, hidden=3))
    x, context = torch.randn(1, N, D), Context(samples={"severity": torch.rand(1, 2)})
    with record(layer) as tape:
        y = layer(x, context=context)
    gates = tape[0].routing.gates(R)
    close(gates, gates[:1].expand(N, R))
    close(layer.merged(gates[0])(x), y)


def test_padding_is_inert(gradients):
    layer, mask = make(), torch.arange(N) % 3 > 0
    x = torch.randn(1, N, D)
    broken = torch.where(mask[:, None], x, torch.nan).requires_grad_()
    y = layer(broken, mask=mask[None])
    assert torch.equal(y, layer(x, mask=mask[None]))
    assert not y[0, ~mask].any()
    found = gradients((y * torch.randn_like(y)).sum(), [broken, layer.down, layer.up, layer.router.scorer.weight])
    assert all(g.isfinite().all() and g.any() for g in found)
    assert not found[0][0, ~mask].any()


def test_compiled_checkpointed_copied_and_in_16_bits(close, gradients):
    torch.compiler.reset()
    layer, x = make(), torch.randn(2, N, D)
    trained = [layer.down, layer.up, layer.router.scorer.weight]
    y = layer(x)
    want = gradients(y.square().sum(), trained)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for forward in (compiled, lambda x: checkpoint(layer, x, use_reentrant=False)):
        again = forward(x)
        close(again, y)
        again.square().sum().backward()
        for p, g in zip(trained, want, strict=True):
            close(p.grad, g)
            p.grad = None
    assert torch.equal(copy.deepcopy(layer)(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    close(low.float(), y, torch.bfloat16)
    half = copy.deepcopy(layer).bfloat16()
    assert half.router.scorer.weight.dtype == torch.float32
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_it_is_recorded_replayed_and_regularized():
    model = nn.Sequential(make(ContextScorer(D, R + Z, width=3)), nn.ReLU(), nn.Linear(WIDE, 2))
    x, severity = torch.randn(3, N, D), torch.rand(3, 3)
    terms = {"balance": Term(lambda item: severity_balance(item, "severity", num_real=R), 0.1)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attach(optimizer, model)
    with feed(model, context=Context(samples={"severity": severity})), record(model, terms=terms) as tape:
        loss = model(x).square().mean()
    total, _ = penalty(tape, terms)
    (loss + total).backward()
    optimizer.step()
    item = tape[0]
    assert (item.name, item.routing.shape) == ("0", (3, N))
    assert int((item.routing.indices < R).sum()) == int(item.routing.counts()[:R].sum())
    assert load_balance(item).isfinite()
    with feed(model, context=Context(samples={"severity": 1 - severity}), replay=tape), record(model) as again:
        model(x)
    assert torch.equal(again[0].routing.indices, item.routing.indices)


def test_instruments_see_ranks_as_experts(close):
    model = nn.Sequential(make(), nn.ReLU(), RankExperts(nn.Linear(WIDE, D), ranks=R, zero=Z, k=K))
    x = torch.randn(N, D)
    with watch(model) as seen, Monitor(model) as monitor:
        model(x).sum().backward()
        monitor.step(1)
    first, second = seen.drain()
    assert (first.layer.num_experts, first.layer.top_k, second.layer.name) == (R, K, "2")
    layer, gates = model[0], first.routing.gates(R)
    added = sum(gates[:, e : e + 1] * first.layer.expert(first.tokens, e) for e in range(R))
    shared = F.linear(F.linear(x, layer.down[:S]), layer.up[:, :S])
    close(layer.linear(x) + shared + added, layer(x))
    assert first.layer.expert_weights(2).shape == (D + WIDE,)


class Shared(nn.Module):
    """A model of others: two layers of one name each, and a linear layer that stands in two places."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(D, D), "out": nn.Linear(D, D)}) for _ in "ab")
        self.blocks[1]["out"] = self.blocks[0]["out"]

    def forward(self, x):
        for block in self.blocks:
            x = block["out"](block["q_proj"](x).relu())
        return x


def test_it_takes_the_place_of_chosen_layers():
    model, x = Shared(), torch.randn(4, D)
    before = model(x)
    made = add_ranks(model, ["*.q_proj", "blocks.?.out"], ranks=R, shared=S, zero=Z, k=K)
    assert made is model
    assert torch.equal(model(x), before)
    assert list(moe_layers(model)) == ["blocks.0.q_proj", "blocks.0.out", "blocks.1.q_proj"]
    assert model.blocks[0]["out"] is model.blocks[1]["out"]
    assert {n.split(".", 3)[3] for n, p in model.named_parameters() if p.requires_grad} == {
        "down",
        "up",
        "router.scorer.weight",
    }
    with record(model) as tape:
        model(x)
    assert len(tape.layer("blocks.0.out")) == 2


def test_a_second_call_leaves_what_is_there():
    model = add_ranks(Shared(), "*.q_proj", ranks=R, zero=0, k=K)
    add_ranks(model, "*", ranks=2, zero=0, k=1, scorer=lambda dim, experts: LinearScorer(dim, experts, bias=True))
    assert [layer.ranks for layer in moe_layers(model).values()] == [R, 2, R]
    assert sum(p.requires_grad for p in model.parameters()) == 3 + 4 + 3


def test_routers_stay_as_they_are(user_error):
    """Their scorers read the weights of linear layers inside them."""
    layer = MoE(Router(SpectrumScorer(D, 3, hidden=4), TopK(1)), FeedForward(3, D, 4))
    model, signals = nn.Sequential(nn.Linear(D, D), layer), torch.randn(4, 16)
    add_ranks(model, "*", ranks=R, zero=0, k=K)
    assert list(moe_layers(model)) == ["0", "1"]
    with feed(model, context=Context(samples={"map": signals})):
        assert model(torch.randn(4, D)).shape == (4, D)
    with user_error("'1.router.*' matches no linear layer"):
        add_ranks(model, "1.router.*")
    network = add_ranks(signal_moe(3, width=4, hidden=8), "*", ranks=R, zero=0, k=K)
    assert list(moe_layers(network)) == ["blocks.0.moe", "head"]
    assert network(torch.randn(2, 80)).shape == (2, 3)


def test_it_is_found_among_the_experts():
    assert experts.RankExperts is RankExperts
    assert not hasattr(experts, "NoExperts")


def test_mistakes_are_named(user_error):
    linear = nn.Linear(D, WIDE)
    with user_error("goes around an nn.Linear", "Conv2d"):
        RankExperts(nn.Conv2d(1, 1, 1))
    with user_error("shared >= 0", "shared=-1"):
        RankExperts(linear, shared=-1)
    with user_error("k must be 1 to ranks + zero = 6, got 8"):
        RankExperts(linear, ranks=4, zero=2)
    with user_error("D=6 and E=ranks + zero=36", "D=6 and E=32"):
        RankExperts(linear, scorer=LinearScorer(D, 32))
    with user_error("one gate for each of 7 ranks", "[10]"):
        make().merged(torch.ones(R + Z))
    with user_error("'*.k_proj' matches no linear layer", "blocks.0.q_proj"):
        add_ranks(Shared(), ["*.q_proj", "*.k_proj"])
    with user_error("attention reads its weight"):
        add_ranks(nn.ModuleDict({"attn": nn.MultiheadAttention(D, 2)}), "*.out_proj")
    with user_error("linear1", "TransformerEncoderLayer reads its weight"):
        add_ranks(nn.ModuleDict({"block": nn.TransformerEncoderLayer(D, 2, 8)}), "*.linear?")
