"""Choices that another engine recorded: the same as a replayed tape, and refused where they do not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spectralmoe import (
    Balanced,
    FeedForward,
    LinearScorer,
    MoE,
    NoisyTopK,
    Router,
    TopK,
    after_step,
    feed,
    record,
)
from spectralmoe.regularizers import load_balance

D, E, N = 12, 6, 24


class Net(nn.Module):
    """Two MoE layers, checkpointed or not, with the width of a language model's hidden states (B, S, D)."""

    def __init__(self, selector=lambda: TopK(2), checkpointed=False):
        super().__init__()
        routers = [Router(LinearScorer(D, E), selector()) for _ in range(2)]
        self.layers = nn.ModuleList(MoE(router, FeedForward(E, D, 8)) for router in routers)
        self.checkpointed = checkpointed

    def forward(self, x, **options):
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x, **options))
        return x


def drawn(n=N, k=2):
    """Experts of n tokens as another engine would give them."""
    return torch.stack([torch.randperm(E)[:k] for _ in range(n)])


def choices(net, n=N):
    return {f"layers.{number}": drawn(n) for number in range(len(net.layers))}


def test_they_are_what_a_replayed_tape_is():
    sampler, x = Net(), torch.randn(4, 6, D)
    with record(sampler) as old:
        sampler(x)
    trainer, indices = Net(), {item.name: item.routing.indices for item in old}
    results = []
    for options in (
        {"replay": old},
        {"indices": indices},
        {"indices": {n: v.view(4, 6, 2) for n, v in indices.items()}},
    ):
        twin = copy.deepcopy(trainer)
        with feed(twin, **options), record(twin) as tape:
            y = twin(x)
        (y.square().mean() + sum(load_balance(item.routing) for item in tape)).backward()
        results.append([y, *(p.grad for p in twin.parameters()), *(item.routing.live.indices for item in tape)])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
    assert all(layer.router.scorer.weight.grad.any() for layer in twin.layers)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_weights_are_live_and_every_kind_of_whole_number_goes(dtype, close):
    net, x = Net(), torch.randn(N, D)
    indices = choices(net)
    with feed(net, indices={name: value.to(dtype) for name, value in indices.items()}), record(net) as tape:
        net(x)
    for item in tape:
        assert torch.equal(item.routing.indices, indices[item.name])
        close(item.routing.weights, item.routing.logits.softmax(-1).gather(1, indices[item.name]))


def test_by_hand():
    layer = MoE(Router(LinearScorer(2, 3), TopK(1)), FeedForward(3, 2, 4)).eval()
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    with feed(layer, indices={"": torch.tensor([[2], [0]])}):
        y = layer(x)
    for token, expert in ((0, 2), (1, 0)):
        weight = layer.router.scorer(x[token : token + 1]).softmax(-1)[0, expert]
        torch.testing.assert_close(y[token : token + 1], weight * layer.experts.expert(x[token : token + 1], expert))


def test_a_layer_that_is_not_named_chooses_for_itself():
    net, x = Net(), torch.randn(N, D)
    indices = {"layers.1": drawn()}
    with record(net) as free:
        net(x)
    with feed(net, indices=indices), record(net) as tape:
        net(x)
    assert torch.equal(tape[0].routing.indices, free[0].routing.indices)
    assert tape[0].routing.live is None
    assert torch.equal(tape[1].routing.indices, indices["layers.1"])


def test_they_count_for_nothing():
    net, x = Net(lambda: Balanced(2, rate=0.1)), torch.randn(N, D)
    with feed(net, indices=choices(net)), record(net) as tape:
        net(x).sum().backward()
    after_step(net, tape)
    assert not any(layer.router.selector.bias.any() for layer in net.layers)


def test_padding_and_empty_slots_have_no_expert():
    net, x, mask = Net(), torch.randn(N, D), torch.arange(N) % 3 != 0
    indices = choices(net)
    for value in indices.values():
        value[~mask] = -1
        value[1, 1] = -1
    with feed(net, indices=indices, mask=mask), record(net) as tape:
        y = net(x)
    assert torch.equal(y[~mask], x[~mask])
    for item in tape:
        assert torch.equal(item.routing.indices, indices[item.name])
        assert not item.routing.weights[indices[item.name] < 0].any()


def test_checkpoints_recompute_with_the_same_choice():
    plain, x = Net(lambda: NoisyTopK(2)), torch.randn(N, D)
    indices, twin = choices(plain), copy.deepcopy(plain)
    twin.checkpointed = True
    for net in (plain, twin):
        with feed(net, indices=indices):
            net(x).square().mean().backward()
    for one, two in zip(plain.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_no_token_at_all():
    net = Net()
    with feed(net, indices={"layers.0": torch.empty(0, 2, dtype=torch.int64)}):
        assert net(torch.randn(0, D)).shape == (0, D)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(N), ("whole numbers", "float32 [24]")),
        (torch.rand(N, 2), ("whole numbers", "float32 [24, 2]")),
        ([[0, 1]], ("whole numbers", "list")),
        (torch.tensor([[0, E]]), (f"expert {E}", f"0 to {E - 1}")),
        (torch.tensor([[-2, 1]]), ("expert -2", "-1 for an empty slot")),
        (torch.tensor([[1, 0], [3, 3]]), ("twice", "token 1")),
        (torch.tensor([[1, 0], [-1, -1]]), ("no expert", "token 1", "mask=")),
    ],
)
def test_wrong_indices_are_named(value, words, user_error):
    with user_error("indices", "'layers.1'", *words), feed(Net(), indices={"layers.1": value}):
        pass


def test_mistakes_are_named(user_error):
    net, x = Net(), torch.randn(N, D)
    with user_error("MoE layer", "layer.0", "layers.0"), feed(net, indices={"layer.0": drawn()}):
        pass
    with record(net) as tape:
        net(x)
    with user_error("replay=", "indices="), feed(net, replay=tape, indices=choices(net)):
        pass
    with user_error("N=24", "N=5"), feed(net, indices=choices(net)):
        net(torch.randn(5, D))
    with user_error("more often than the 1 times"), feed(net, indices=choices(net)):
        net(x)
        net(x)
