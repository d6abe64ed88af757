"""What every bank of experts keeps: a new table entry is held to it without a line here.

That every dispatch equals the loop with it stands in tests/dispatch/test_dispatch.py.
"""

from __future__ import annotations

import copy

import pytest
import torch

from spectralmoe import LinearScorer, ModuleExperts, MoE, Router, TopK
from spectralmoe.experts import Answer
from spectralmoe.experts.answer import per_row
from spectralmoe.spec import build, describe
from spectralmoe.units import Sample

D, E = 8, 4
COUNTS = {"even": [3, 3, 3, 3], "empty-expert": [5, 0, 4, 1], "one": [0, 0, 7, 0], "none": [0, 0, 0, 0]}


@pytest.fixture
def bank(make_bank, bank_name):
    return make_bank(bank_name, D, E)


def rows(bank, n, dtype=torch.float32):
    """Random rows of a width that the bank takes: vectors, or maps."""
    return torch.randn(n, D, *[3] * ((bank.row_dims or 1) - 1), dtype=dtype)


def layer_of(bank):
    """The bank behind a router: of vectors, or of whole maps."""
    return MoE(Router(LinearScorer(D, E), TopK(2)), bank, unit=Sample() if bank.row_dims == 3 else None)


@pytest.fixture
def layer(bank):
    return layer_of(bank)


def outputs(bank, x, counts):
    """What the bank makes of rows sorted by expert, gain included."""
    made = bank(x, counts)
    return made.gained if isinstance(made, Answer) else made


@pytest.mark.grid(counts=COUNTS, dtype=[torch.float32, torch.float64])
def test_rows_sorted_by_expert_are_the_experts_one_by_one(bank, counts, dtype, same):
    bank = bank.to(dtype)
    sizes = torch.tensor(COUNTS[counts])
    x = rows(bank, int(sizes.sum()), dtype).requires_grad_()
    one_by_one = torch.cat([bank.expert(block, e) for e, block in enumerate(x.split(sizes.tolist()))])
    same(outputs(bank, x, sizes), one_by_one, [x, *bank.parameters()])


def test_other_stacks_are_those_experts(bank, same):
    """What expert parallelism calls; a bank that is no stack of experts is refused there by name."""
    if {name for name, _ in bank.named_parameters()} != set(bank.expert_parameters(0)):
        pytest.skip("shares parameters, or holds modules")
    x, counts = rows(bank, 5).requires_grad_(), torch.tensor([3, 0, 2])
    answer, _ = bank.on_stacks(x, counts, lambda stacks: {name: stack[[3, 0, 1]] for name, stack in stacks.items()})
    same(answer.gained, torch.cat([bank.expert(x[:3], 3), bank.expert(x[3:], 1)]), [x, *bank.parameters()])


def test_the_dense_form_is_the_weighted_sum(bank, same):
    x, weights = rows(bank, 9).requires_grad_(), torch.rand(9, E, requires_grad=True)
    definition = sum(per_row(weights[:, e], x) * bank.expert(x, e) for e in range(E))
    same(bank.mix(x, weights), definition, [x, weights, *bank.parameters()])


def test_an_expert_without_rows_has_a_gradient_of_zero_and_none_is_missing(bank):
    outputs(bank, rows(bank, 6), torch.tensor([6, 0, 0, 0])).sum().backward()
    for name, parameter in bank.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_hidden_and_project_are_the_two_halves_where_there_are_any(bank, close):
    x, counts = rows(bank, 12), torch.tensor(COUNTS["even"])
    hidden = bank.hidden(x, counts)
    if hidden is not None:
        assert len(hidden) == len(x)
        projected = bank.project(hidden, counts)
        close(projected.gained if isinstance(projected, Answer) else projected, outputs(bank, x, counts))


def test_masked_tokens_are_inert(layer):
    x, mask = rows(layer.experts, 20), torch.rand(20) < 0.6
    mask[0], mask[1] = True, False
    broken = torch.where(per_row(mask, x), x, torch.nan).requires_grad_()
    y = layer(broken, mask=mask)
    (y * torch.randn_like(y)).sum().backward()
    assert not y[~mask].any()
    assert not broken.grad[~mask].any()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    assert torch.equal(y, layer(x, mask=mask))


def test_autocast_stays_near_and_no_tokens_stay_none(layer, close):
    x = rows(layer.experts, 30)
    with torch.autocast("cpu", torch.bfloat16):
        y, empty = layer(x), layer(x[:0])
    assert empty.shape == x[:0].shape
    close(y.float(), layer(x), torch.bfloat16)


def test_large_and_small_tokens_give_finite_outputs_and_gradients(layer, gradients):
    for scale in (1e-20, 0.0, 1e4):
        x = (scale * rows(layer.experts, 20)).requires_grad_()
        y = layer(x)
        assert y.isfinite().all()
        assert all(g.isfinite().all() for g in gradients(y.mean(), [x, *layer.parameters()]))


def test_a_copy_and_a_loaded_state_are_equal(layer, make_bank, bank_name):
    x, loaded = rows(layer.experts, 30), layer_of(make_bank(bank_name, D, E))
    loaded.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), loaded):
        assert torch.equal(twin(x), layer(x))


def test_its_spec_builds_it_again(bank):
    if isinstance(bank, ModuleExperts):
        return  # its modules are the user's own
    again = build(describe(bank))
    assert type(again) is type(bank)
    assert {name: p.shape for name, p in again.named_parameters()} == {n: p.shape for n, p in bank.named_parameters()}


def test_parameters_of_the_experts_are_all_there_are_and_no_two_share_any(bank):
    for name, value in bank.expert_parameters(1).items():
        with torch.no_grad():
            value.add_(1.0)
        assert value.isfinite().all(), name
    x = rows(bank, 5)
    twin = copy.deepcopy(bank)
    for value in twin.expert_parameters(1).values():
        with torch.no_grad():
            value.mul_(3.0)
    for e in (0, 2, 3):
        assert torch.equal(twin.expert(x, e), bank.expert(x, e))


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.full)])
def test_compiled_it_gives_the_same(backend, layer, close):
    torch.compiler.reset()
    x, direction = rows(layer.experts, 20), rows(layer.experts, 20)
    compiled = torch.compile(layer, backend=backend, fullgraph=not isinstance(layer.experts, ModuleExperts))
    results = []
    for forward in (layer, compiled):
        layer.zero_grad()
        y = forward(x)
        (y * direction).sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    for one, two in zip(*results, strict=True):
        close(one, two)
