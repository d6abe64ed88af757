"""The gate on side information against its equation, and a layer that is routed by severity alone."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from spectralmoe import Balanced, Context, ContextScorer, FeedForward, MoE, Router, TopK, attach, load, record, save

N, D, E, P = 9, 6, 4, 3


def slow(scorer, x, c):
    """s_ne = b_e + sum_p C_ep c_np + sum_d W_ed x_nd, one number at a time."""
    tokens = [0.0] * E if scorer.token_weight is None else scorer.token_weight

    def logit(row, value, e):
        value = value if scorer.hidden is None else F.gelu(scorer.hidden_weight @ value + scorer.hidden_bias)
        side = sum(a * b for a, b in zip(scorer.weight[e], value, strict=True))
        rest = 0 if scorer.token_weight is None else sum(a * b for a, b in zip(tokens[e], row, strict=True))
        return scorer.bias[e] + side + rest

    return torch.stack([torch.stack([logit(*pair, e) for e in range(E)]) for pair in zip(x, c, strict=True)])


@pytest.mark.parametrize(("token", "hidden"), [(False, None), (True, None), (False, 5), (True, 5)])
def test_value_and_gradient_are_those_of_the_equation(token, hidden, same):
    scorer = ContextScorer(D, E, key="weather", width=P, token=token, hidden=hidden).double()
    scorer.bias.data += torch.randn(E)
    x, c = (torch.randn(N, width, dtype=torch.float64, requires_grad=True) for width in (D, P))
    same(scorer(x, context={"weather": c}), slow(scorer, x, c), [x, c, *scorer.parameters()])
    assert gradcheck(lambda x, c, *_: scorer(x, context={"weather": c}), (x, c, *scorer.parameters()))


def test_by_hand():
    scorer = ContextScorer(1, 2, token=True)
    scorer.weight.data, scorer.token_weight.data = torch.tensor([[2.0], [-1.0]]), torch.tensor([[0.5], [1.0]])
    scorer.bias.data = torch.tensor([0.25, 0.0])
    assert scorer(torch.tensor([[4.0]]), context={"severity": torch.tensor([3.0])}).tolist() == [[8.25, 1.0]]


def test_matrix_has_a_row_for_each_expert():
    assert ContextScorer(D, E, width=P).matrix.shape == (E, P)
    assert ContextScorer(D, E, width=P, token=True).matrix.shape == (E, P + D)
    assert ContextScorer(D, E, width=P, token=True, hidden=2).matrix.shape == (E, 2 + D)


def test_what_is_left_of_it_has_the_logits_that_it_had(close):
    scorer, c = ContextScorer(D, E, width=P, hidden=5), {"severity": torch.randn(N, P)}
    x = torch.zeros(N, D)
    close(scorer.select([2, 0])(x, context=c), scorer(x, context=c)[:, [2, 0]])


def test_a_hidden_layer_tells_a_middle_severity_from_both_ends():
    scorer = ContextScorer(D, 2, hidden=2)
    scorer.hidden_weight.data, scorer.hidden_bias.data = torch.tensor([[9.0], [-9.0]]), torch.tensor([-6.0, 3.0])
    scorer.weight.data, scorer.bias.data = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([0.0, 0.5])
    severity = torch.tensor([0.0, 0.5, 1.0])
    assert scorer(torch.zeros(3, D), context={"severity": severity}).argmax(1).tolist() == [0, 1, 0]


def test_mistakes_are_named(user_error):
    with user_error("ContextScorer", "width must be at least 1, got 0"):
        ContextScorer(D, E, width=0)
    with user_error("ContextScorer", "hidden must be at least 1, got 0"):
        ContextScorer(D, E, hidden=0)
    with user_error("ContextScorer reads 'severity'", "2 wide, not 3"):
        ContextScorer(D, E, width=P)(torch.randn(N, D), context={"severity": torch.randn(N, 2)})


def test_all_tokens_of_a_sample_go_where_its_severity_says():
    layer = MoE(Router(ContextScorer(D, 2), TopK(1)), FeedForward(2, D, 5))
    layer.router.scorer.weight.data, layer.router.scorer.bias.data = torch.tensor([[1.0], [-1.0]]), torch.zeros(2)
    with record(layer) as tape:
        layer(torch.randn(3, 7, D), context=Context(samples={"severity": torch.tensor([0.4, -2.0, 0.1])}))
    assert tape[0].routing.indices.reshape(3, 7).tolist() == [[0] * 7, [1] * 7, [0] * 7]


def test_trained_saved_and_in_low_precision(tmp_path):
    layer = MoE(
        Router(ContextScorer(D, E, width=P, token=True, hidden=5), Balanced(2)), FeedForward(E, D, 5)
    ).bfloat16()
    layer.router.scorer.bias.data[0] = 20  # all tokens want the first expert
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    attach(optimizer, layer)
    x, context = torch.randn(2, N, D).bfloat16(), Context(samples={"severity": torch.randn(2, P).bfloat16()})
    with record(layer) as tape:
        layer(x, context=context).square().sum().backward()
    assert tape[0].routing.logits.dtype == torch.float32
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.router.parameters())
    optimizer.step()
    assert layer.router.selector.bias.any()
    save(layer, tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(loaded(x, context=context), layer.eval()(x, context=context))
