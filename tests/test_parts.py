"""Every part of a layer has one life around the step: scorer, selector, bank and what they wrap."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spectralmoe import (
    Balanced,
    FeedForward,
    LinearScorer,
    ModuleExperts,
    MoE,
    Router,
    Selector,
    TopK,
    after_step,
    attach,
    param_groups,
    record,
    retract,
    save,
)
from spectralmoe.experts import Experts
from spectralmoe.linalg import orthonormality_error
from spectralmoe.manifold import off_manifold
from spectralmoe.parts import Part

N, D, E = 30, 8, 4


class Noting(Part):
    """Notes what it is called with; in front of a scorer, a selector or a bank."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.calls = []

    def statistics(self, tokens, counts):
        return torch.cat([tokens.sum(0).double(), counts.double()])

    def update(self, statistics):
        self.calls.append(statistics)

    def after_step(self):
        super().after_step()
        self.calls.append(torch.is_grad_enabled())


class NotingScorer(Noting, LinearScorer):
    pass


class NotingSelector(Noting, TopK):
    pass


class NotingBank(Noting, FeedForward):
    pass


class Wrapper(Selector):
    """Forwards the choice, and nothing of the life around the step."""

    def __init__(self, selector):
        super().__init__()
        self.selector = selector

    def choose(self, logits, *, mask=None, context=None):
        return self.selector.choose(logits, mask=mask, context=context)


def noting_layer():
    layer = MoE(Router(NotingScorer(D, E), Wrapper(NotingSelector(2))), NotingBank(E, D, 16))
    return layer, [layer.router.scorer, layer.router.selector.selector, layer.experts]


def stepped(layer, forwards, *, hooked=True):
    """One optimizer step on several forwards (tokens, mask, training); their routings."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attachment = attach(optimizer, layer) if hooked else None
    tapes = []
    for x, mask, training in forwards:
        layer.train(training)
        with record(layer) as tape:
            layer(x, mask=mask).square().mean().backward()
        tapes.append(tape)
    optimizer.step()
    if attachment is None:
        after_step(layer, *tapes)
    else:
        attachment.remove()
    return [item.routing for tape in tapes for item in tape]


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("streamer", [0, 2, None], ids=["scorer", "bank", "nobody"])
def test_every_part_gets_the_sums_of_what_its_layer_saw(hooked, streamer, close):
    layer, parts = noting_layer()
    if streamer is not None:
        parts[streamer].streams_tokens = True
    mask = torch.arange(N) % 3 > 0
    forwards = [(torch.randn(N, D), mask, True), (torch.randn(N, D), None, True), (torch.randn(N, D), None, False)]
    first, second, _ = stepped(layer, forwards, hooked=hooked)
    tokens = torch.zeros(D) if streamer is None else forwards[0][0][mask].sum(0) + forwards[1][0].sum(0)
    for part in parts:
        sums, with_gradient = part.calls
        close(sums, torch.cat([tokens, first.counts() + second.counts()]), torch.float32)
        assert not with_gradient


def test_parts_rest_in_evaluation_mode_and_where_they_are_frozen():
    layer, parts = noting_layer()
    x = torch.randn(N, D)
    stepped(layer, [(x, None, False)], hooked=False)
    assert [part.calls for part in parts] == [[False]] * 3
    layer.router.requires_grad_(False)
    stepped(layer, [(x, None, True)])
    assert [len(part.calls) for part in parts] == [1, 1, 3]
    layer.router.requires_grad_(True)
    layer.experts.requires_grad_(False)
    stepped(layer, [(x, None, True)])
    assert [len(part.calls) for part in parts] == [3, 3, 3]


def test_a_layer_inside_another_moves_its_own_parts_once():
    inner, parts = noting_layer()
    outer = MoE(Router(LinearScorer(D, 2), Balanced(1, normalize=False)), ModuleExperts([inner, nn.Linear(D, D)]))
    assert [name for name, _ in outer.parts()] == ["router.scorer", "router.selector", "experts"]
    stepped(outer, [(torch.randn(N, D), None, True)])
    assert [len(part.calls) for part in parts] == [2, 2, 2]


class Rotations(Experts):
    """A bank of orthogonal matrices (E, D, D), and an offset."""

    manifold = ("turn",)

    def __init__(self, num_experts, dim):
        super().__init__(num_experts)
        self.turn = nn.Parameter(torch.eye(dim).repeat(num_experts, 1, 1))
        self.offset = nn.Parameter(torch.zeros(num_experts, dim))

    def expert(self, x, e):
        return x @ self.turn[e].to(x.dtype) + self.offset[e].to(x.dtype)


def rotating_layer():
    return MoE(Router(LinearScorer(D, E), TopK(2)), Rotations(E, D))


@pytest.mark.parametrize("hooked", [False, True])
def test_the_bases_of_a_bank_are_retracted(hooked, close):
    layer = rotating_layer()
    stepped(layer, [(torch.randn(N, D), None, True)], hooked=hooked)
    assert float(orthonormality_error(layer.experts.turn).max()) < 1e-5
    frozen = rotating_layer()
    frozen.experts.turn.data *= 2
    frozen.experts.turn.requires_grad_(False)
    stepped(frozen, [(torch.randn(N, D), None, True)], hooked=hooked)
    close(frozen.experts.turn.data, 2 * torch.eye(D).repeat(E, 1, 1))


def test_each_basis_of_a_bank_keeps_its_bits_where_it_lies_on_the_manifold(close):
    layer = rotating_layer()
    turn = layer.experts.turn
    turn.data[1] *= 0.5
    turn.data[2] = torch.linalg.qr(torch.randn(D, D)).Q
    before = turn.detach().clone()
    assert off_manifold(layer) == {"experts.turn": pytest.approx(0.75)}
    retract(layer)
    assert off_manifold(layer) == {}
    close(turn[1].detach(), torch.eye(D))
    assert torch.equal(turn[[0, 2, 3]], before[[0, 2, 3]])


def test_bases_of_banks_are_known_to_groups_hooks_and_saving(tmp_path, user_error):
    layer = rotating_layer()
    decayed, exempt = param_groups(layer, 0.1)
    assert [len(group["params"]) for group in (decayed, exempt)] == [2, 1]
    assert exempt["params"][0] is layer.experts.turn
    optimizer = torch.optim.SGD(layer.router.parameters(), lr=0.1)
    attach(optimizer, nn.Sequential(layer))
    layer(torch.randn(N, D)).sum().backward()
    with user_error("attach: 0.experts.turn is trained by no optimizer"):
        optimizer.step()
    average = copy.deepcopy(layer)
    average.experts.turn.data *= 2
    with pytest.warns(UserWarning, match=r"experts.turn is 3 off its manifold .*retract\(model\)"):
        save(average, tmp_path)
