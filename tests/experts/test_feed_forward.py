"""Feed-forward banks against their equations, written again as a float64 loop."""

from __future__ import annotations

import math

import pytest
import torch
from seeds import shifted

from spectralmoe import Adapter, FeedForward
from spectralmoe.spec import build, describe

COUNTS = torch.tensor([3, 0, 4])
BANKS = {
    f"{activation}-{name}-{'bias' if bias else 'plain'}": (*widths, activation, bias)
    for activation in ("gelu", "relu", "swiglu")
    for name, widths in {"even": (8, 12), "odd": (7, 5)}.items()
    for bias in (False, True)
}


@pytest.fixture(params=BANKS.values(), ids=BANKS)
def bank(request):
    dim, hidden, activation, bias = request.param
    return FeedForward(3, dim, hidden, activation=activation, bias=bias)


def expert(bank, x, e):
    """W2 a(W1 x + b1) + b2 for one row x, in float64."""
    up, down = bank.up[e].double(), bank.down[e].double()
    h = up @ x.double() + (0 if bank.up_bias is None else bank.up_bias[e].double())
    if bank.activation == "swiglu":
        gate, value = h[: bank.width], h[bank.width :]
        h = gate / (1 + (-gate).exp()) * value
    elif bank.activation == "gelu":
        h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    else:
        h = torch.where(h > 0, h, 0.0)
    return down @ h + (0 if bank.down_bias is None else bank.down_bias[e].double())


def rows_of(bank, x):
    experts = [e for e, count in enumerate(COUNTS.tolist()) for _ in range(count)]
    return torch.stack([expert(bank, row, e) for row, e in zip(x, experts, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_sorted_by_expert(bank, dtype, same):
    bank = bank.to(dtype)
    x = torch.randn(7, bank.dim, dtype=dtype, requires_grad=True)
    same(bank(x, COUNTS), rows_of(bank, x), [x, *bank.parameters()])


def test_one_expert_alone(bank, close):
    x = torch.randn(4, bank.dim)
    for e in range(3):
        close(bank.expert(x, e), torch.stack([expert(bank, row, e) for row in x]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mixing(bank, dtype, same):
    bank = bank.to(dtype)
    x = torch.randn(5, bank.dim, dtype=dtype, requires_grad=True)
    weights = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    rows = [sum(w[e].double() * expert(bank, row, e) for e in range(3)) for row, w in zip(x, weights, strict=True)]
    same(bank.mix(x, weights), torch.stack(rows), [x, weights, *bank.parameters()])


def test_bf16(bank, close):
    x = torch.randn(7, bank.dim).bfloat16()
    y = bank.bfloat16()(x, COUNTS)
    assert y.dtype == torch.bfloat16
    close(y, rows_of(bank, x))


def test_hidden_and_project_are_the_two_halves(bank):
    x = torch.randn(7, bank.dim)
    hidden = bank.hidden(x, COUNTS)
    assert hidden.shape == (7, bank.width)
    assert torch.equal(bank.project(hidden, COUNTS), bank(x, COUNTS))


def test_by_hand():
    bank = FeedForward(2, 1, 1, activation="relu", bias=True)
    bank.up.data = torch.tensor([[[2.0]], [[-1.0]]])
    bank.up_bias.data = torch.tensor([[1.0], [0.5]])
    bank.down.data = torch.tensor([[[3.0]], [[10.0]]])
    bank.down_bias.data = torch.tensor([[0.25], [-1.0]])
    assert bank(torch.tensor([[1.0], [1.0], [-1.0]]), torch.tensor([1, 2])).tolist() == [[9.25], [-1.0], [14.0]]


def test_expert_parameters_are_views_of_one_expert(bank):
    x, e = torch.randn(7, bank.dim), 2
    before = bank(x, COUNTS).detach()
    views = bank.expert_parameters(e)
    assert set(views) == {name for name, _ in bank.named_parameters()}
    with torch.no_grad():
        for view in views.values():
            view.mul_(2)
    after = bank(x, COUNTS).detach()
    assert torch.equal(before[:3], after[:3])
    assert not torch.isclose(before[3:], after[3:]).all(-1).any()


def test_experts_start_as_linear_layers_do():
    bank = FeedForward(2, 64, 100, bias=True)
    for weight, bound in ((bank.up, 1 / 8), (bank.up_bias, 1 / 8), (bank.down, 1 / 10), (bank.down_bias, 1 / 10)):
        largest = float(weight.detach().abs().max())
        assert 0.9 * bound < largest <= bound


def test_an_adapter_is_a_narrow_gelu_bank_without_bias(close):
    adapter = Adapter(3, 8, bottleneck=2)
    x = torch.randn(7, 8)
    assert set(dict(adapter.named_parameters())) == {"up", "down"}
    assert adapter.up.shape == (3, 2, 8)
    close(adapter(x, COUNTS), rows_of(adapter, x))


def with_and_without(activation, bias):
    """A bank with 3 spare units, and the same one without."""
    banks = []
    for spare in (3, 0):
        torch.manual_seed(shifted(4))
        banks.append(FeedForward(3, 8, 5, activation=activation, bias=bias, spare=spare))
    return banks


def spare_parts(bank):
    """The numbers of the units behind the first H, taken apart by hand."""
    halves = 2 if bank.activation == "swiglu" else 1
    total = bank.width + bank.spare
    rows = [half * total + unit for half in range(halves) for unit in range(bank.width, total)]
    return [
        bank.up[:, rows],
        bank.down[..., bank.width :],
        *([] if bank.up_bias is None else [bank.up_bias[:, rows]]),
    ]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_spare_units_change_no_output_and_no_gradient(activation, bias, close):
    spare, plain = with_and_without(activation, bias)
    assert (spare.up.shape[1] - plain.up.shape[1], spare.down.shape[2]) == (6 if activation == "swiglu" else 3, 8)
    x, weights = torch.randn(7, 8), torch.rand(7, 3)
    close(spare(x, COUNTS), plain(x, COUNTS))
    close(spare.mix(x, weights), plain.mix(x, weights))
    for e in range(3):
        close(spare.expert(x, e), plain.expert(x, e))
    direction = torch.randn(7, 8)
    for bank in (spare, plain):
        (bank(x, COUNTS) * direction).sum().backward()
    close(spare.down.grad[..., :5], plain.down.grad)
    if bias:
        close(spare.down_bias.grad, plain.down_bias.grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_training_leaves_spare_units_at_zero(activation, bias, close):
    spare, plain = with_and_without(activation, bias)
    x, goal = torch.randn(7, 8), torch.randn(7, 8)
    for bank in (spare, plain):
        optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            (bank(x, COUNTS) - goal).square().mean().backward()
            optimizer.step()
    assert all(not part.detach().any() for part in spare_parts(spare))
    assert all(spare.free_units(e) == [5, 6, 7] for e in range(3))
    close(spare(x, COUNTS), plain(x, COUNTS))
    assert float((spare.down - with_and_without(activation, bias)[0].down).detach().abs().max()) > 0.1


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_a_unit_is_free_while_all_its_numbers_are_zero(activation):
    for part, place in (("up", 0), ("up", -1), ("up_bias", 0), ("up_bias", -1), ("down", 0)):
        bank = FeedForward(2, 4, 3, activation=activation, bias=True, spare=2)
        assert [bank.free_units(e) for e in range(2)] == [[3, 4], [3, 4]]
        halves = 2 if activation == "swiglu" else 1
        with torch.no_grad():
            own = getattr(bank, part)[1]
            if part == "down":
                own[2, 4] = 1e-30
            else:
                own.unflatten(0, (halves, 5))[place, 4] = 1e-30
        assert [bank.free_units(e) for e in range(2)] == [[3, 4], [3]]
    assert FeedForward(2, 4, 3, activation=activation).free_units(0) == []


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_spare_units_added_later_are_those_of_the_start(activation):
    from_start, plain = with_and_without(activation, True)
    for units in (1, 0, 2):
        plain.add_spare(units)
    assert plain.spare == 3
    for name, value in from_start.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_spare_units_are_part_of_the_spec(activation):
    bank = FeedForward(2, 4, 3, activation=activation, bias=True, spare=2)
    with torch.no_grad():
        bank.down[1, :, 3] = 1.0  # one is in use
    again = build(describe(bank))
    again.load_state_dict(bank.state_dict())
    assert (again.spare, again.width, again.activation) == (2, 3, activation)
    assert [again.free_units(e) for e in range(2)] == [[3, 4], [4]]
    x = torch.randn(5, 4)
    assert torch.equal(again(x, torch.tensor([2, 3])), bank(x, torch.tensor([2, 3])))


def test_mistakes_are_named(user_error):
    with user_error("FeedForward", "spare", "-1"):
        FeedForward(2, 4, 4, spare=-1)
    with user_error("FeedForward", "spare", "-2"):
        FeedForward(2, 4, 4).add_spare(-2)
    with user_error("activation", "'tanh'", "swiglu"):
        FeedForward(2, 4, 4, activation="tanh")
    with user_error("FeedForward", "num_experts", "0"):
        FeedForward(0, 4, 4)
    with user_error("FeedForward", "H", "0"):
        FeedForward(2, 4, 0)
    with user_error("Adapter", "D", "0"):
        Adapter(2, 0, 4)
