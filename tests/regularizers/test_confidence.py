"""Confidence loss: the mean square by its equation, its target row by row, and what a detached target keeps out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
from spectralmoe.experts import ConfidentExperts
from spectralmoe.regularizers import class_target, confidence_loss
from spectralmoe.selectors import Unweighted

D, E, N, C = 6, 4, 9, 3


def make_layer(**options):
    bank = ConfidentExperts(FeedForward(E, D, 8), **options)
    nn.init.normal_(bank.direction)
    return MoE(Router(LinearScorer(D, E), Unweighted(TopK(2))), bank).double()


def recorded(layer, x, mask=None):
    with record(layer, keep=("confidence", "unweighed")) as tape:
        layer(x, mask=mask)
    return tape[0]


@pytest.mark.parametrize("detach_target", [True, False])
def test_equation(detach_target, close):
    layer, head = make_layer(detach_target=detach_target), nn.Linear(D, C).double()
    x, labels, mask = torch.randn(N, D, dtype=torch.float64), torch.randint(C, (N,)), torch.arange(N) != 4
    item = recorded(layer, x, mask)
    loss = confidence_loss(item, class_target(item, head, labels))
    rows = []
    for t in range(N):
        for e in layer.router(x, mask=mask).indices[t].tolist():
            if e < 0:
                continue
            y = layer.experts.experts.expert(x[t : t + 1], e)[0]
            normal = (y - y.mean()) / ((y - y.mean()).square().mean() + 1e-5).sqrt()
            c = 1 / (1 + (-(normal @ layer.experts.direction[e]) - layer.experts.bias[e]).exp())
            q = head(y).exp()[labels[t]] / head(y).exp().sum()
            rows.append((c - (q.detach() if detach_target else q)) ** 2)
    assert len(rows) == 2 * (N - 1)
    parts = [*layer.experts.parameters(), *([] if detach_target else head.parameters())]
    want = sum(rows) / len(rows)
    close(loss, want)
    for got, slow in zip(torch.autograd.grad(loss, parts), torch.autograd.grad(want, parts), strict=True):
        close(got, slow)


def test_a_detached_target_gets_no_gradient():
    item = recorded(make_layer(), torch.randn(N, D, dtype=torch.float64))
    target = torch.rand(2 * N, dtype=torch.float64, requires_grad=True)
    confidence_loss(item, target).backward()
    assert target.grad is None
    item = recorded(make_layer(detach_target=False), torch.randn(N, D, dtype=torch.float64))
    confidence_loss(item, target).backward()
    assert target.grad.any()


def test_no_token_has_no_loss():
    item = recorded(make_layer(), torch.randn(0, D, dtype=torch.float64))
    assert confidence_loss(item, torch.ones(0)).item() == 0.0


def test_what_it_refuses(user_error):
    layer, x = make_layer(), torch.randn(N, D, dtype=torch.float64)
    item = recorded(layer, x)
    with user_error("confidence_loss", "(3,)", f"M={2 * N}"):
        confidence_loss(item, torch.ones(3))
    with user_error("class_target", "(3,)", f"N={N}"):
        class_target(item, nn.Linear(D, C).double(), torch.zeros(3, dtype=torch.int64))
    with record(layer) as tape:
        layer(x)
    with user_error("'confidence'", "keep"):
        confidence_loss(tape[0], torch.ones(2 * N))
    plain = MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 8))
    with record(plain) as tape:
        plain(torch.randn(N, D))
    with user_error("FeedForward", "ConfidentExperts"):
        confidence_loss(tape[0], torch.ones(2 * N))
