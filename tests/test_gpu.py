"""On a CUDA device: every dispatch equals the float64 loop on the CPU, compiled and not; results do not vary."""

import copy

import pytest
import torch
from seeds import shifted

from spectralmoe import (
    Balanced,
    Capacity,
    EigenbasisScorer,
    ExpertChoice,
    FeedForward,
    LinearScorer,
    MoE,
    PrototypeScorer,
    Router,
    Soft,
    Term,
    TopK,
    TopP,
    after_step,
    penalty,
    record,
)
from spectralmoe.regularizers import load_balance, spectral_norm, stable_rank

pytestmark = pytest.mark.gpu

SELECTORS = {
    "top2": lambda: TopK(2),
    "soft": Soft,
    "expert_choice": lambda: ExpertChoice(2.0),
    "topp": lambda: TopP(0.5),
    "capacity": lambda: Capacity(TopK(2), 1.0),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}


def layer(selector, dispatch, hidden=32):
    torch.manual_seed(shifted(0))
    return MoE(
        Router(LinearScorer(16, 8), SELECTORS[selector]()), FeedForward(8, 16, hidden, bias=True), dispatch=dispatch
    )


def results(module, x):
    """Output and all gradients, float64 on the CPU."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view_as(y)).sum().backward()
    found = {"y": y, "x": x.grad} | {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {name: value.detach().double().cpu() for name, value in found.items()}


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp_min(1)
        assert (found[name] - value).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("hidden", [32, 30])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dispatch", ["auto", "dense", "grouped"])
@pytest.mark.parametrize("selector", SELECTORS)
def test_dispatch_equals_the_loop(selector, dispatch, dtype, hidden):
    x = torch.randn(100, 16).to(dtype)
    expected = results(layer(selector, "loop", hidden).double(), x.double())
    module = layer(selector, dispatch, hidden).to("cuda", dtype)
    routed = module.router(x.cuda()).indices.cpu()
    if not torch.equal(routed, layer(selector, "loop", hidden).double().router(x.double()).indices):
        pytest.skip("a tie was broken differently")
    assert_close(results(module, x.cuda()), expected, TOLERANCE[dtype] * (4 if dtype == torch.bfloat16 else 1))


@pytest.mark.parametrize("hidden", [32, 30])
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_compiled_equals_eager(selector, hidden, autocast):
    module = layer(selector, "auto", hidden).cuda()
    x = torch.randn(100, 16, device="cuda")
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        expected, found = results(module, x), results(compiled, x)
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    assert_close(found, expected, 2e-2 if autocast else 1e-4)


def test_two_runs_give_the_same_bits():
    module = layer("top2", "grouped").cuda()
    x = torch.randn(4096, 16, device="cuda")
    first, second = results(module, x), results(module, x)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "scorer", [PrototypeScorer, lambda d, e: EigenbasisScorer(d, e, rank=8)], ids=["proto", "eigen"]
)
def test_a_training_step_with_terms(scorer):
    module = MoE(Router(scorer(16, 8), Balanced(2, score="softmax")), FeedForward(8, 16, 32)).to("cuda", torch.bfloat16)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    terms = {"s": Term(spectral_norm, 1.0), "r": Term(stable_rank, 1.0), "b": Term(load_balance, 1.0)}
    for _ in range(3):
        with record(module) as tape:
            y = module(torch.randn(64, 16, device="cuda", dtype=torch.bfloat16))
        extra, _ = penalty(tape, terms)
        (y.square().mean() + extra).backward()
        optimizer.step()
        after_step(module, tape)
    assert y.dtype == torch.bfloat16
    assert {p.dtype for p in module.router.parameters()} == {torch.float32}
    assert module.router.selector.bias.abs().max() > 0
    basis = getattr(module.router.scorer, "basis", None)
    if basis is not None:
        assert (basis.T @ basis - torch.eye(8, device="cuda")).abs().max() < 1e-5
