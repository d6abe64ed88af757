"""Muon: the equation in float64, one matrix at a time; torch's own for single matrices; a stack is its matrices."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spectralmoe import Balanced, FeedForward, MoE, Router, UserError, attach
from spectralmoe.linalg import orthonormality_error
from spectralmoe.optim import Muon, Together, make_optimizer
from spectralmoe.optim.muon import orthogonalised
from spectralmoe.scorers import EigenbasisScorer

SETTINGS = SimpleNamespace(lr=0.02, weight_decay=0.1)


def slow(weight, gradients, lr, decay, mu):
    """The steps of one matrix with these gradients."""
    momentum, tall = torch.zeros_like(weight), weight.shape[0] > weight.shape[1]
    for gradient in gradients:
        momentum = mu * momentum + (1 - mu) * gradient
        x = (1 - mu) * gradient + mu * momentum
        x = (x.T if tall else x) / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        x = x.T if tall else x
        weight = (1 - lr * decay) * weight - 0.2 * lr * max(weight.shape) ** 0.5 * x
    return weight


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (3, 4, 6), (3, 6, 4)], ids=str)
def test_equation(shape, close):
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    gradients, start = torch.randn(4, *shape, dtype=torch.float64), weight.detach().clone()
    optimizer = Muon([weight], lr=0.1, weight_decay=0.3, momentum=0.8)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    if len(shape) == 2:
        close(weight.detach(), slow(start, gradients, 0.1, 0.3, 0.8))
    else:
        for e in range(shape[0]):
            close(weight[e].detach(), slow(start[e], gradients[:, e], 0.1, 0.3, 0.8))


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)], ids=str)
def test_single_matrices_move_as_with_torch(shape):
    ours, theirs = (nn.Parameter(value) for value in torch.randn(1, *shape).repeat(2, 1, 1))
    start, options = ours.detach().clone(), {"lr": 0.05, "weight_decay": 0.2, "momentum": 0.9}
    one, two = Muon([ours], **options), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape)
        one.step()
        two.step()
    moved = float((ours.detach() - start).abs().max())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.03 * moved)  # theirs runs in bf16


def test_orthogonalised_by_hand():
    singular = torch.linalg.svdvals(orthogonalised(torch.diag(torch.tensor([5.0, 2.0, 1.0, 0.5]))))
    assert ((singular > 0.6) & (singular < 1.3)).all()
    assert not orthogonalised(torch.zeros(2, 3, 4)).any()
    assert orthogonalised(torch.eye(3).bfloat16()).dtype == torch.float32


def test_other_shapes_are_refused(user_error):
    with user_error("Muon", "(3,)", "AdamW"):
        Muon([nn.Parameter(torch.ones(3))])


def layer():
    return MoE(Router(EigenbasisScorer(8, 4, rank=4), Balanced(2)), FeedForward(4, 8, 12, bias=True))


def test_matrices_and_experts_get_muon_and_the_rest_adamw():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), layer(), nn.LayerNorm(8))
    optimizer = make_optimizer("muon", model, SETTINGS)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = ([names[id(p)] for g in part.param_groups for p in g["params"]] for part in optimizer.parts)
    assert sorted(muon) == ["1.experts.down", "1.experts.up", "1.router.scorer.mask_logits"]
    assert sorted([*muon, *adamw]) == sorted(names.values())
    assert "1.router.scorer.basis" in adamw  # it lies on a manifold
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    plain = make_optimizer("muon", nn.LayerNorm(8), SETTINGS)
    assert type(plain) is torch.optim.AdamW


def steps(model, optimizer, x, count):
    for i in range(count):
        optimizer.zero_grad()
        model(x + i).square().mean().backward()
        optimizer.step()
    return [value.detach().clone() for value in model.state_dict().values()]


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_together_goes_on_from_its_state(way):
    """As its parts do by themselves."""
    model, x = layer(), torch.randn(20, 8)
    optimizer = make_optimizer("muon", model, SETTINGS)
    steps(model, optimizer, x, 3)
    if way == "state_dict":
        twin = layer()
        twin.load_state_dict(model.state_dict())
        again = make_optimizer("muon", twin, SETTINGS)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        twin, again = (
            copy.deepcopy((model, optimizer)) if way == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
        )
    for one, two in zip(steps(model, optimizer, x, 3), steps(twin, again, x, 3), strict=True):
        assert torch.equal(one, two)
    for part in again.parts:
        assert part.state is again.state
        assert all(any(group is other for other in again.param_groups) for group in part.param_groups)


def test_together_is_its_parts_one_after_the_other():
    first = nn.Linear(3, 3)
    second, x = copy.deepcopy(first), torch.randn(5, 3)
    together = Together(torch.optim.SGD([first.weight], lr=0.1), torch.optim.AdamW([first.bias], lr=0.1))
    alone = torch.optim.SGD([second.weight], lr=0.1), torch.optim.AdamW([second.bias], lr=0.1)
    schedulers = [torch.optim.lr_scheduler.StepLR(each, 1, gamma=0.5) for each in (together, *alone)]
    calls = []

    def closure():
        calls.append(1)
        together.zero_grad()
        loss = first(x).square().mean()
        loss.backward()
        return loss

    for _ in range(4):
        value = together.step(closure)
        loss = second(x).square().mean()
        for each in alone:
            each.zero_grad()
        loss.backward()
        for each in alone:
            each.step()
        for scheduler in schedulers:
            scheduler.step()
        assert float(value.detach()) == float(loss.detach())
    assert len(calls) == 4
    for one, two in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, two)


def test_attach_takes_it_as_one():
    model, x = layer(), torch.randn(40, 8)
    optimizer = make_optimizer("muon", model, SETTINGS)
    attach(optimizer, model)
    steps(model, optimizer, x, 3)
    assert orthonormality_error(model.router.scorer.basis) < 1e-5
    assert model.router.selector.bias.any()


def test_a_group_that_no_part_would_train_is_refused():
    optimizer = Together(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(UserError, match="no part would train"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
