"""Random layers against an independent loop in float64, written from the equations."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectralmoe import FeedForward, LinearScorer, MoE, PrototypeScorer, Router, TopK, TopP
from spectralmoe.dispatch import DISPATCHES


def by_hand(layer, x, mask, indices, act):
    """sum_j w_j E_j(x) + S(x), token by token, with the choice as given: (N, D) float64."""
    scorer, bank, shared = layer.router.scorer, layer.experts, layer.shared
    y = torch.zeros(len(x), x.shape[1], dtype=torch.float64)
    for t, token in enumerate(x.double()):
        if not mask[t]:
            continue
        if isinstance(scorer, LinearScorer):
            logits = torch.stack([(row.double() * token).sum() for row in scorer.weight])
        else:
            logits = torch.stack([-(token - row.double()).square().sum() for row in scorer.prototypes])
        shares = (logits - logits.max()).exp()
        shares = shares / shares.sum()
        chosen = [e for e in indices[t].tolist() if e >= 0]
        assert chosen, "a real token has an expert"
        assert shares[chosen].min() >= max([p for e, p in enumerate(shares) if e not in chosen], default=0) - 1e-4
        for e in chosen:
            hidden = bank.up[e].double() @ token
            if act == "swiglu":
                gate, value = hidden.chunk(2)
                hidden = gate / (1 + (-gate).exp()) * value
            elif act == "relu":
                hidden = hidden.clamp_min(0)
            else:
                hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            y[t] += shares[e] * (bank.down[e].double() @ hidden)
        if shared is not None:
            y[t] += shared.weight.double() @ token + shared.bias.double()
    return y


def check(data):
    draw, act = data.draw, data.draw(st.sampled_from(["gelu", "relu", "swiglu"]))
    n, dim, experts = draw(st.integers(0, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 6))
    k, dtype = draw(st.integers(1, experts)), draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    scorer = draw(st.sampled_from([LinearScorer, PrototypeScorer]))(dim, experts)
    selector = TopK(k) if draw(st.booleans()) else TopP(draw(st.floats(0.1, 1)), max_k=k if k > 1 else None)
    bank = FeedForward(experts, dim, draw(st.integers(1, 9)), activation=act)
    shared = torch.nn.Linear(dim, dim) if draw(st.booleans()) else None
    layer = MoE(Router(scorer, selector), bank, dispatch=draw(st.sampled_from(["auto", *DISPATCHES])), shared=shared)
    layer = layer.to(dtype)
    x = (torch.randn(n, dim) * draw(st.sampled_from([1e-3, 1.0, 3.0]))).to(dtype)
    mask = torch.rand(n) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    x[~mask] = torch.nan
    indices = layer.router(x, mask=mask).indices
    with torch.no_grad():
        y, expected = layer(x, mask=mask).double(), by_hand(layer, x, mask, indices, act)
    size = 1 + float(expected.abs().amax()) if n else 1
    tolerance = size * {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)


def test_layers_are_the_loop(request):
    examples = 3000 if request.config.getoption("--full", default=False) else 150
    settings(max_examples=examples, deadline=None)(given(st.data())(check))()
