"""The spectrum gate: its features against sums written out, what leaves them as they are, and a layer routed by it."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch.autograd import gradcheck

from spectralmoe import Context, FeedForward, LinearScorer, MoE, Router, TopK, attach, load, record, save
from spectralmoe.scorers import SpectrumScorer
from spectralmoe.scorers.spectrum import spectrum_features

N, C, D, E = 3, 2, 5, 4
SHAPES = [(6,), (9,), (4, 6), (5, 3)]


def values(shape, *, kind=torch.float64, n=N):
    return torch.randn(n, C, *shape, dtype=kind)


def slow_lines(x):
    """[(|k| as a share of the highest, power)] of one map (C, *S), a Fourier sum for each frequency but 0."""
    shape = x.shape[1:]
    places = list(torch.cartesian_prod(*(torch.arange(size) for size in shape)).view(-1, len(shape)).tolist())
    lines = []
    for k in places[1:]:
        power = 0.0
        for channel in x:
            turns = [sum(a * b / size for a, b, size in zip(k, at, shape, strict=True)) for at in places]
            total = sum(
                complex(channel[tuple(at)]) * cmath.exp(-2j * math.pi * turn)
                for at, turn in zip(places, turns, strict=True)
            )
            power += abs(total) ** 2 / len(places) ** 2 / len(x)
        cycles = [min(a, size - a) / size for a, size in zip(k, shape, strict=True)]
        lines.append((math.hypot(*cycles) / (0.5 * math.sqrt(len(shape))), power))
    return lines


def slow_spectral(x, bands, floor=1e-6):
    """The features of the spectrum of one map, by the list of its lines."""
    lines = slow_lines(x)
    n = len(lines)
    powers = [power + floor / n for _, power in lines]
    shares = [power / sum(powers) for power in powers]
    logs = []
    for band in range(bands):
        inside = [power for k, power in lines if min(int(k * bands + 1e-4), bands - 1) == band]
        logs.append(math.log10(sum(inside) + floor))
    return [
        *logs,
        -sum(p * math.log(p) for p in shares) / math.log(n),
        sum(math.log10(p) for p in powers) / n - math.log10(sum(powers) / n),
        math.log10(n * max(shares)),
        -math.log10(n * sum(p * p for p in shares)),
    ]


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", SHAPES)
def test_features_are_those_of_the_sums_written_out(shape, kind):
    x = values(shape, kind=kind)
    expected = torch.tensor([slow_spectral(one, 3) for one in x], dtype=torch.float64)
    torch.testing.assert_close(spectrum_features(x, 3, statistics=False), expected)


def test_the_statistics_by_hand():
    x = torch.tensor([[[1.0, 3.0, 1.0, 3.0]]], dtype=torch.float64)  # power 1 everywhere about the mean 2
    assert spectrum_features(x)[0, -4:].tolist() == pytest.approx([2, 0, 0, 0], abs=1e-5)
    x = torch.tensor([[[2.0, 0, 0, 0, -2.0, 0, 0, 0]]], dtype=torch.float64)  # v = 1, power 4 twice: kurtosis 4
    steps = math.log10(1 + 4 * 16 / 8)
    assert spectrum_features(x)[0, -4:].tolist() == pytest.approx([0, 0, math.log10(4), steps], abs=1e-5)


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", SHAPES)
def test_band_powers_sum_to_the_variance(shape, kind):
    x = values(shape, kind=kind)
    flat = x.flatten(2)
    variance = (flat - flat.mean(2, keepdim=True)).abs().square().mean((1, 2))
    powers = 10 ** spectrum_features(x, 4)[:, :4] - 1e-6
    torch.testing.assert_close(powers.sum(1), variance)


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", SHAPES)
def test_circular_shifts_change_nothing_and_brightness_the_mean_alone(shape, kind):
    x = values(shape, kind=kind)
    features = spectrum_features(x)
    shifted = x.roll([2, 1][: len(shape)], tuple(range(2, x.dim())))
    torch.testing.assert_close(spectrum_features(shifted), features, rtol=0, atol=1e-12)
    brighter = spectrum_features(x + 0.7)
    mean = features.shape[1] - 4
    torch.testing.assert_close(brighter[:, :mean], features[:, :mean], rtol=0, atol=1e-10)
    torch.testing.assert_close(brighter[:, mean + 1 :], features[:, mean + 1 :], rtol=0, atol=1e-10)
    if not x.is_complex():
        torch.testing.assert_close(brighter[:, mean], features[:, mean] + 0.7)


def test_the_phase_of_a_complex_signal_changes_nothing():
    x = values((12,), kind=torch.complex128)
    turned = x * cmath.exp(0.8j)
    torch.testing.assert_close(spectrum_features(turned), spectrum_features(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"hidden": 0, "statistics": False}, {"token": True}])
def test_logits_are_those_of_the_equation_and_so_are_their_gradients(options):
    scorer = SpectrumScorer(D, E, bands=3, **{"hidden": 4, **options}).double()
    for parameter in scorer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    x, maps = torch.randn(N, D, dtype=torch.float64, requires_grad=True), values((4, 6)).requires_grad_()
    features = spectrum_features(maps, 3, statistics=options.get("statistics", True))
    middle = (features - features.mean(1, keepdim=True)) / (features.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    hidden = middle * scorer.norm.weight + scorer.norm.bias
    hidden = hidden if scorer.up is None else torch.nn.functional.gelu(scorer.up(hidden))
    expected = hidden @ scorer.weight.T + scorer.bias + (x @ scorer.token_weight.T if scorer.token else 0)
    torch.testing.assert_close(scorer(x, context={"map": maps}), expected)
    assert gradcheck(lambda x, maps, *_: scorer(x, context={"map": maps}), (x, maps, *scorer.parameters()))


def test_constant_maps_no_samples_and_every_kind_of_signal():
    for maps in (torch.ones(N, C, 4, 4), torch.zeros(N, 7), torch.zeros(0, C, 4, 4), torch.zeros(N, C, 2).cfloat()):
        maps = maps.requires_grad_()
        scorer = SpectrumScorer(D, E)
        logits = scorer(torch.randn(len(maps), D), context={"map": maps})
        assert logits.shape == (len(maps), E)
        assert logits.isfinite().all()
        logits.sum().backward()
        assert all(p.grad.isfinite().all() for p in (maps, *scorer.parameters()))


def test_mistakes_are_named(user_error):
    with user_error("bands must be at least 1, got 0"):
        SpectrumScorer(D, E, bands=0)
    with user_error("hidden must be at least 0, got -1"):
        SpectrumScorer(D, E, hidden=-1)
    with user_error("SpectrumScorer reads 'map'", "holds nothing"):
        SpectrumScorer(D, E)(torch.randn(N, D))
    for shape in ((N,), (N, 1), (N, C, 2, 2, 2)):
        with user_error("SpectrumScorer reads 'map' as signals", str(shape)):
            SpectrumScorer(D, E)(torch.randn(N, D), context={"map": torch.zeros(shape)})


def test_fewer_experts_keep_their_logits():
    scorer, x, maps = SpectrumScorer(D, E, token=True), torch.randn(N, D), values((4, 4), kind=torch.float32)
    chosen = scorer.select([3, 1])
    torch.testing.assert_close(chosen(x, context={"map": maps}), scorer(x, context={"map": maps})[:, [3, 1]])
    assert chosen.matrix.shape == (2, 32 + D)
    assert SpectrumScorer(D, E, hidden=0).matrix.shape == (E, 16)


@pytest.mark.parametrize("kind", [torch.float32, torch.complex64])
def test_a_layer_is_trained_saved_and_cast_down(kind, tmp_path):
    layer = MoE(Router(SpectrumScorer(D, E), TopK(2)), FeedForward(E, D, 6))
    context = Context(samples={"map": values((8,), kind=kind, n=2)})
    x, mask = torch.randn(2, N, D), torch.tensor([[True] * N, [True] * (N - 1) + [False]])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    attach(optimizer, layer)
    with record(layer) as tape:
        layer(x, mask=mask, context=context).square().sum().backward()
    assert len(tape[0].routing.indices[:N].unique(dim=0)) == 1  # one choice for all tokens of a sample
    assert all(p.grad.isfinite().all() for p in layer.router.parameters())
    assert layer.router.scorer.weight.grad.any()
    optimizer.step()
    save(layer, tmp_path)
    assert torch.equal(load(tmp_path)(x, context=context), layer.eval()(x, context=context))
    with torch.autocast("cpu", torch.bfloat16), record(layer) as tape:
        layer(x, context=context)
    assert tape[0].routing.logits.dtype == torch.float32
    low = MoE(Router(SpectrumScorer(D, E), TopK(2)), FeedForward(E, D, 6)).bfloat16()
    assert low(x.bfloat16(), context=context).isfinite().all()
    assert low.router.scorer.norm.weight.dtype == torch.float32


def test_it_tells_apart_what_a_gate_on_the_mean_cannot():
    time, phase = torch.arange(64) / 64, torch.rand(40, 1) * 2 * math.pi
    slow_or_fast = torch.where(torch.arange(40)[:, None] < 20, 3.0, 25.0)
    signals = torch.cos(2 * math.pi * slow_or_fast * time + phase)
    features = spectrum_features(signals[:, None])
    within = features[:20].std(0).max()
    assert (features[:20].mean(0) - features[20:].mean(0)).abs().max() > 100 * within
    means = signals.mean(1, keepdim=True)
    assert LinearScorer(1, 2)(means).std(0).max() < 1e-4


@pytest.mark.full
@pytest.mark.parametrize("kind", [torch.float32, torch.complex64])
def test_compiled_it_gives_the_same(kind, close):
    torch.compiler.reset()
    scorer, x, maps = SpectrumScorer(D, E), torch.randn(N, D), values((8,), kind=kind)
    compiled = torch.compile(scorer, backend="aot_eager", fullgraph=True)
    close(compiled(x, context={"map": maps}), scorer(x, context={"map": maps}))
