"""Random layers against equations written out in float64 (``layer_oracle``): choice, value and every gradient."""

from __future__ import annotations

import hypothesis
import layer_oracle as oracle
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from seeds import shifted
from small_parts import NOT_ALONE
from torch import nn

from spectralmoe import Adapter, FeedForward, ModuleExperts, MoE, Router
from spectralmoe.dispatch import DISPATCHES
from spectralmoe.experts import ConfidentExperts, ModulatedExperts, MultilinearExperts
from spectralmoe.scorers import SCORERS
from spectralmoe.selectors import SELECTORS, Unweighted
from spectralmoe.units import Pixel, Token

EXAMPLES, EXAMPLES_IN_FULL = 120, 4_000
CHOICE = 1e-4  # fp32 scores that lie closer may come in either order
VALUE = {"fp32": 1e-4, "fp64": 1e-9, "bf16": 4e-2, "autocast": 4e-2}
GRADIENT = {"fp32": 1e-3, "fp64": 1e-8}
UNITS = {"token": Token, "pixel": Pixel}


def with_heads(bank):
    """A bank with directions of its own."""
    with torch.no_grad():
        bank.direction.normal_()
        bank.bias.normal_()
    return bank


BANKS = {
    "gelu": FeedForward,
    "relu": lambda e, d, h: FeedForward(e, d, h, activation="relu", bias=True),
    "swiglu": lambda e, d, h: FeedForward(e, d, h, activation="swiglu", bias=True),
    "adapter": Adapter,
    "confident": lambda e, d, h: with_heads(ConfidentExperts(FeedForward(e, d, h))),
    "multilinear": lambda e, d, h: MultilinearExperts(e, d, rank=h),
    "modulated": lambda e, d, h: ModulatedExperts(e, d, form="linear" if h % 2 else "vector"),
    "modules": lambda e, d, h: ModuleExperts([nn.Linear(d, d) for _ in range(e)]),
}


def draw_scorer(draw, name, dim, num_experts):
    if name == "monte_carlo":
        return SCORERS[name](draw_scorer(draw, "linear", dim, num_experts))
    rank = {"eigenbasis": st.integers(1, dim), "principal": st.integers(-(-num_experts // 2), dim)}
    options = {"linear": {"bias": True}, "cosine": {"proj_dim": draw(st.integers(1, 5)), "temperature": 0.3}}
    if name == "saturated":
        saturation = draw(st.sampled_from(["tanh", "affine"]))
        options[name] = {"rank": draw(st.integers(1, 5)), "anchors": draw(st.integers(1, 3)), "saturation": saturation}
    chosen = {**options.get(name, {}), **({"rank": draw(rank[name])} if name in rank else {})}
    scorer = SCORERS[name](dim, num_experts, **chosen)
    with torch.no_grad():
        for state in ("bias", "gain", "mean"):
            if isinstance(getattr(scorer, state, None), torch.Tensor):
                getattr(scorer, state).add_(0.3 * torch.randn(getattr(scorer, state).shape))
    return scorer


def draw_selector(draw, name, scorer, num_experts):
    normalize, k = draw(st.booleans()), draw(st.integers(1, num_experts))
    scores = ["softmax"] if scorer == "prototype" else ["softmax", "sigmoid"]  # sigmoids of distances underflow
    usual = {"normalize": normalize and k > 1, "score": draw(st.sampled_from(scores))}
    if name in ("capacity", "cluster_dropout", "group_limited", "unweighted"):
        inner = SELECTORS["topk"](max(k - 1, 1), **{**usual, "normalize": False})
        if name == "unweighted":
            return SELECTORS[name](inner, router_grad=draw(st.sampled_from(["none", "confidence"])))
        if name == "group_limited":  # with one group it is what it wraps
            return SELECTORS[name](inner, 1, 1)
        return SELECTORS[name](inner, draw(st.floats(0.2, 2)) if name == "capacity" else 1)
    if name == "expert_choice":
        return SELECTORS[name](draw(st.floats(0.1, num_experts)))
    if name == "topp":
        most = draw(st.none() | st.integers(2, num_experts)) if num_experts > 1 else None
        return SELECTORS[name](draw(st.floats(0.05, 1)), max_k=most, **{**usual, "normalize": normalize})
    if name in ("soft", "soft_balanced", "entmax"):
        return SELECTORS[name](**usual | {"normalize": normalize}) if name == "soft" else SELECTORS[name]()
    if name == "threshold":
        return SELECTORS[name](k, draw(st.floats(0.05, 0.6)), **usual)
    if name == "balanced":
        k = min(k, num_experts - 1)
        return SELECTORS[name](k, **{**usual, "normalize": normalize and k > 1})
    return SELECTORS[name](k, **usual)


def draw_layer(draw):
    """A layer and the names of its parts."""
    scorer = draw(st.sampled_from(sorted(SCORERS.keys() - NOT_ALONE)))
    bank = draw(st.sampled_from(sorted(BANKS)))
    selector = draw(st.sampled_from(sorted(SELECTORS)))
    least = 2 if selector in ("balanced", "capacity", "cluster_dropout", "group_limited", "unweighted") else 1
    dim, num_experts = draw(st.integers(3, 9)), draw(st.integers(least, 6))
    torch.manual_seed(shifted(draw(st.integers(0, 2**16))))
    router = Router(draw_scorer(draw, scorer, dim, num_experts), draw_selector(draw, selector, scorer, num_experts))
    if isinstance(bias := getattr(router.selector, "bias", None), torch.Tensor):
        bias.add_(0.2 * torch.randn(num_experts))
    experts = BANKS[bank](num_experts, dim, draw(st.integers(1, 7)))
    shared = nn.Linear(dim, dim) if draw(st.booleans()) else None
    layer = MoE(
        router,
        experts,
        dispatch=draw(st.sampled_from(["auto", *DISPATCHES])),
        shared=shared,
        unit=UNITS[draw(st.sampled_from(sorted(UNITS)))](),
    )
    return layer.eval(), scorer, selector, bank


def expected(layer, scorer, selector, bank, x, mask, routing):
    """The output (N, D) by the equations, for a choice that is checked first; and how near a ReLU came to its kink."""
    part, tokens, kinks = layer.router.selector, x.double()[mask], []
    logits = oracle.logits_of(scorer, layer.router.scorer, tokens)
    chosen = routing.indices[mask].tolist()
    if selector == "capacity":
        wanted = part.choose(routing.logits.detach(), mask=mask)[mask].tolist()
        oracle.check_choice("topk", part.selector, oracle.scores_of(part.selector, logits).detach(), wanted, CHOICE)
        assert chosen == oracle.bounded(wanted, part.factor, layer.router.num_experts)
        part = part.selector
    else:
        if selector in (
            "cluster_dropout",
            "group_limited",
            "unweighted",
        ):  # in evaluation they choose as what they wrap
            selector, part = "topk", part.selector
        oracle.check_choice(selector, part, oracle.scores_of(part, logits).detach(), chosen, CHOICE)
    if isinstance(layer.router.selector, Unweighted):
        weights = oracle.ones(layer.router.selector, logits, chosen)
    else:
        weights = oracle.weights_of(part, oracle.scores_of(part, logits), chosen)
    rows = []
    for token, experts, slots in zip(tokens, chosen, weights, strict=True):
        y = torch.zeros_like(token)
        for e, weight in zip(experts, slots, strict=True):
            if e >= 0:
                y = y + weight * oracle.expert_of(bank, layer.experts, token, e, kinks)
        rows.append(
            y if layer.shared is None else y + layer.shared.weight.double() @ token + layer.shared.bias.double()
        )
    real = iter(rows)
    return torch.stack([next(real) if m else 0 * x.double()[0].nan_to_num() for m in mask.tolist()]), min(
        kinks, default=1
    )


def gradients(y, probe, tensors):
    found = torch.autograd.grad((y * probe.to(y.dtype)).sum(), tensors, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def near(actual, wanted, tolerance):
    size = 1 + (float(wanted.detach().abs().amax()) if wanted.numel() else 0)
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=0, atol=tolerance * size)


def check(data):
    draw, precision = data.draw, data.draw(st.sampled_from(list(VALUE)))
    layer, *names = draw_layer(draw)
    layer.to({"fp64": torch.float64, "bf16": torch.bfloat16}.get(precision, torch.float32))
    dtype = next(layer.experts.parameters()).dtype
    n, dim = draw(st.integers(0, 8)), layer.router.scorer.dim
    mask = torch.rand(n) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    x = (torch.randn(n, dim) * draw(st.sampled_from([0.01, 1.0, 4.0]))).to(dtype)
    x = torch.where(mask[:, None], x, torch.nan).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        if isinstance(layer.unit, Pixel):
            routing, y = layer.router(x, mask=mask), layer(x.T[None], mask=mask[None])[0].T
        else:
            routing, y = layer.router(x, mask=mask), layer(x, mask=mask)
    assert (routing.indices[~mask] == -1).all()
    assert y.shape == x.shape
    if not n:
        return
    wanted, kink = expected(layer, *names, x, mask, routing)
    near(y, wanted, VALUE[precision])
    if precision in GRADIENT:
        assume(kink > CHOICE)
        probe, tensors = torch.randn(n, dim, dtype=torch.float64), [x, *layer.parameters()]
        for one, two in zip(gradients(y, probe, tensors), gradients(wanted, probe, tensors), strict=True):
            near(one, two, GRADIENT[precision])


def test_layers_are_their_equations(request):
    examples = EXAMPLES_IN_FULL if request.config.getoption("--full") else EXAMPLES
    health = [hypothesis.HealthCheck.filter_too_much, hypothesis.HealthCheck.too_slow]
    hypothesis.settings(max_examples=examples, suppress_health_check=health)(given(st.data())(check))()
