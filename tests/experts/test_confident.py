"""Experts with a confidence: the gate by its equation, gain 1, and what the records keep."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spectralmoe import (
    Adapter,
    FeedForward,
    LinearScorer,
    ModuleExperts,
    MoE,
    Router,
    Term,
    TopK,
    load,
    penalty,
    record,
    save,
)
from spectralmoe.dispatch import DISPATCHES
from spectralmoe.experts import ConfidentExperts, Experts, MultilinearExperts

D, E, N = 6, 4, 15


def make_bank(inner=None):
    bank = ConfidentExperts(inner or FeedForward(E, D, 8))
    nn.init.normal_(bank.direction)
    nn.init.normal_(bank.bias)
    return bank


def make_layer(bank, dispatch="auto"):
    return MoE(Router(LinearScorer(D, E), TopK(2)), bank, dispatch=dispatch)


def confidence(bank, y, e):
    """The equation for one row (D,)."""
    centred = y - y.mean()
    normal = centred / (centred.square().mean() + 1e-5).sqrt()
    return 1 / (1 + (-(normal @ bank.direction[e]) - bank.bias[e]).exp())


@pytest.mark.parametrize("dispatch", ["auto", *DISPATCHES])
@pytest.mark.parametrize(
    "inner", [lambda: FeedForward(E, D, 8), lambda: make_bank(Adapter(E, D, 4))], ids=["plain", "twice"]
)
def test_equation(dispatch, inner, same):
    layer = make_layer(make_bank(inner()), dispatch).double()
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    routing, rows = layer.router(x), []
    for t in range(N):
        total = 0
        for weight, e in zip(routing.weights[t], routing.indices[t].tolist(), strict=True):
            y = layer.experts.experts.expert(x[t : t + 1], e)[0]
            total = total + weight * confidence(layer.experts, y, e) * y
        rows.append(total)
    same(layer(x), torch.stack(rows), [x, *layer.parameters()])


def test_gain_one_is_the_plain_sum(close):
    bank = make_bank()
    bank.bias.data.fill_(100.0)
    x = torch.randn(N, D)
    layer = make_layer(bank)
    close(layer(x), MoE(layer.router, bank.experts)(x))


@pytest.mark.parametrize("autocast", [False, True])
def test_records_keep_the_confidence_where_somebody_asks(autocast, close):
    layer, x = make_layer(make_bank()), torch.randn(N, D)
    with record(layer, keep=("confidence", "hidden", "output")) as tape, torch.autocast("cpu", enabled=autocast):
        layer(x)
    item = tape[0]
    said, chosen = item.tensor("confidence"), item.routing.indices.flatten()[item.order]
    assert said.dtype == torch.float32
    ys = [
        layer.experts.experts.expert(x[[s // 2]], int(e))[0] for s, e in zip(item.order.tolist(), chosen, strict=True)
    ]
    want = torch.stack([confidence(layer.experts, y, int(e)) for y, e in zip(ys, chosen, strict=True)])
    close(said, want, torch.bfloat16 if autocast else torch.float32)
    close(item.output.float(), torch.stack(ys) * want[:, None], torch.bfloat16 if autocast else torch.float32)


def test_a_term_reads_the_confidence(user_error):
    layer, x = make_layer(make_bank()), torch.randn(N, D)
    term = Term(lambda item: (item.tensor("confidence") - 1).square().mean(), 1.0, keeps=("confidence",))
    with record(layer, terms={"sure": term}) as tape:
        layer(x)
    penalty(tape, {"sure": term})[0].backward()
    assert layer.experts.direction.grad.any()
    plain = make_layer(FeedForward(E, D, 8))
    with user_error("'confidence'", "tokens, input, hidden, output"), record(plain, keep="confidence"):
        pass


def test_costs_and_saving(tmp_path):
    bank = make_bank()
    with FlopCounterMode(display=False) as counter:
        bank.expert(torch.randn(1, D), 1)
    assert bank.costs().tolist() == [counter.get_total_flops()] * E
    layer, x = make_layer(bank).eval(), torch.randn(N, D)
    save(layer, tmp_path / "one")
    assert torch.equal(load(tmp_path / "one")(x), layer(x))
    assert copy.deepcopy(bank).says == ("confidence", "unweighed")


def test_it_needs_a_width(user_error):
    with user_error("ModuleExperts", "'dim'"):
        ConfidentExperts(ModuleExperts([nn.Linear(D, D)]))


def test_a_bank_defines_expert_or_answer(user_error):
    with pytest.raises(NotImplementedError):
        Experts(2).expert(torch.zeros(1, D), 0)

    class Unknown(Experts):
        def expert(self, x, e):
            return x

    with user_error("Unknown", "costs()"):
        Unknown(2).costs()


def test_a_bank_that_knows_its_own_tensors_is_taken_apart_inside(close):
    bank, x = ConfidentExperts(MultilinearExperts(4, 8, rank=6)), torch.randn(5, 8)
    close(bank.select([2, 0]).expert(x, 0), bank.expert(x, 2))
    assert bank.averaged([[0, 1], [3]]).num_experts == 2


def test_outputs_of_another_width_are_refused(user_error):
    with user_error("ConfidentExperts", "MultilinearExperts", "wide"):
        ConfidentExperts(MultilinearExperts(4, 8, rank=6, out=3))
