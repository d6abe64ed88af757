"""torch.compile takes a layer whole (fullgraph) and changes neither its output nor its gradients."""

from __future__ import annotations

import pytest
import torch
from small_parts import NOT_ALONE

from spectralmoe import FeedForward, MoE, Router, record
from spectralmoe.experts import Answer, ConfidentExperts, MultilinearExperts, grouped_gemm
from spectralmoe.scorers import SCORERS
from spectralmoe.selectors import SELECTORS
from spectralmoe.units import Pixel

D, E = 12, 6
TRUSTED = {"cpp.vec_isa_ok": True}
"""Torch believes the processor: it would compile a trial for every instruction set, longer than these tests take."""
ALONE = [name for name in SCORERS if name not in NOT_ALONE]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def run(forward, layer, x, direction, mask=None):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = forward(x, mask)
    (y * direction).sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def options_of(backend):
    return TRUSTED if backend == "inductor" else None


def check(layer, backend, close, sizes=(20,), masked=False):
    """Equal to eager in output and in every gradient, for batches of all ``sizes``; what is masked holds nan."""
    layer.eval()  # the noise of one generator state differs between backends
    compiled = torch.compile(layer, backend=backend, fullgraph=True, options=options_of(backend))
    for n in sizes:
        x, direction = torch.randn(n, layer.router.scorer.dim), torch.randn(n, layer.router.scorer.dim)
        mask = torch.rand(n) < 0.7 if masked else None
        if mask is not None:
            mask[:1] = False
            x[~mask] = torch.nan
        eager = run(layer, layer, x, direction, mask)
        traced = run(compiled, layer, x, direction, mask)
        assert len(eager) == len(traced) > 2
        for one, two in zip(traced, eager, strict=True):
            close(one, two)


CASES = range(max(len(ALONE), len(SELECTORS)))


@pytest.mark.parametrize("case", CASES)
def test_aot_eager_takes_each_scorer_and_each_selector(make_router, close, case):
    scorer, selector = (list(table)[case % len(table)] for table in (ALONE, SELECTORS))
    check(MoE(make_router(scorer, selector, D, E), FeedForward(E, D, 8)), "aot_eager", close)


@pytest.mark.full
def test_aot_eager_takes_them_together(make_router, scorer_name, selector_name, close):
    check(MoE(make_router(scorer_name, selector_name, D, E), FeedForward(E, D, 8)), "aot_eager", close)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.full])]
)
def test_autocast(make_router, close, backend):
    layer = MoE(make_router("linear", "topk", D, E), FeedForward(E, D, 8)).eval()
    x = torch.randn(20, D)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, options=options_of(backend))
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
    assert y.dtype == torch.bfloat16
    close(y.float(), layer(x), torch.bfloat16)


@pytest.mark.full
@pytest.mark.inductor
@pytest.mark.parametrize("case", CASES)
def test_inductor_takes_each_scorer_and_each_selector(make_router, close, case):
    scorer, selector = (list(table)[case % len(table)] for table in (ALONE, SELECTORS))
    check(MoE(make_router(scorer, selector, D, E), FeedForward(E, D, 8)), "inductor", close)


@pytest.mark.inductor
@pytest.mark.parametrize(
    ("hidden", "native"),
    [pytest.param(8, True, marks=pytest.mark.full), (7, False)],
    ids=["grouped_mm", "own-operator"],
)
def test_inductor_takes_both_grouped_paths(make_router, close, hidden, native):
    bank = FeedForward(E, D, hidden, activation="swiglu", bias=True)
    assert grouped_gemm.supports_grouped_mm(torch.randn(3, D), bank.up) == native
    check(MoE(make_router("linear", "topp", D, E), bank), "inductor", close, masked=True)


@pytest.mark.parametrize("around", [lambda bank: bank, ConfidentExperts], ids=["alone", "confident"])
@pytest.mark.parametrize("form", ["cp", "tr"])
def test_padding_reaches_no_factor_that_experts_share(make_router, close, form, around):
    bank = around(MultilinearExperts(E, D, rank=5, form=form))
    check(MoE(make_router("linear", "topk", D, E), bank), "aot_eager", close, masked=True)


@pytest.mark.parametrize("hidden", [pytest.param(8, marks=pytest.mark.full), 7], ids=["grouped_mm", "own-operator"])
def test_sizes_may_change(make_router, close, hidden):
    layer = MoE(make_router("cosine", "capacity", D, E), FeedForward(E, D, hidden, bias=True))
    check(layer, "aot_eager", close, sizes=(20, 33, 1, 0), masked=True)


def test_noise_in_training_is_drawn_anew(make_router):
    router = make_router("linear", "noisy_topk", D, E)
    router.selector.noise_std = 10.0
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    x = torch.randn(50, D)
    assert not torch.equal(compiled(x).indices, compiled(x).indices)


class Scaled(FeedForward):
    """A bank with a gain for each row, whose rows behind the last block are not to be looked at."""

    def __init__(self) -> None:
        super().__init__(E, D, 8)
        self.scale = torch.nn.Parameter(torch.randn(D))

    def forward(self, x, counts):
        rows = super().forward(x, counts)
        tail = torch.arange(x.shape[0], device=x.device) >= counts.sum()
        return Answer(rows.masked_fill(tail[:, None], torch.nan), (x @ self.scale).sigmoid())


def test_undefined_rows_leave_no_trace(make_router, close):
    check(MoE(make_router("linear", "topp", D, E), Scaled()), "aot_eager", close)


def test_answers_and_pixels(make_router, close):
    """A bank that says something, on maps, with what it says kept: one graph."""
    bank = ConfidentExperts(FeedForward(E, D, 8))
    torch.nn.init.normal_(bank.direction)
    layer, x = MoE(make_router("linear", "topp", D, E), bank, unit=Pixel()), torch.randn(2, D, 3, 4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with record(layer, keep=("tokens", "confidence")) as tape:
        one, two = compiled(x), layer(x)
    close(one, two)
    close(tape[0].tokens, tape[1].tokens)
    close(tape[0].tensor("confidence"), tape[1].tensor("confidence"))


def test_a_compiled_router_equals_eager(make_router, close):
    router: Router = make_router("prototype", "topk", D, E)
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 9, D)
    one, two = compiled(x), router(x)
    assert torch.equal(one.indices, two.indices)
    assert one.shape == two.shape == (2, 9)
    close(one.weights, two.weights)
