"""What is routed: tokens, pixels, samples. The layer equals the loop over units, whatever their shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectralmoe import (
    Context,
    ContextScorer,
    FeedForward,
    LinearScorer,
    ModuleExperts,
    MoE,
    Router,
    Soft,
    TopK,
    load,
    record,
    save,
)
from spectralmoe.dispatch import DISPATCHES
from spectralmoe.experts import ConvExperts
from spectralmoe.units import Pixel, Sample, Token

C, E, B = 4, 3, 5
dispatches = pytest.mark.parametrize("dispatch", ["auto", *DISPATCHES])


def images_layer(dispatch="auto", selector=None, shared=None):
    router = Router(LinearScorer(C, E + 1), selector or TopK(2))  # one zero expert
    return MoE(router, ConvExperts(E, C, 6), dispatch=dispatch, shared=shared, unit=Sample()).double()


def slow(layer, x, mask, scale=1.0):
    """Sample by sample and expert by expert."""
    rows = []
    for b in range(len(x)):
        y = torch.zeros_like(x[b : b + 1])
        if mask[b]:
            routing = layer.router(x[b : b + 1].mean((2, 3)))
            for weight, e in zip(routing.weights[0], routing.indices[0].tolist(), strict=True):
                y = y + (scale * weight * layer.experts.expert(x[b : b + 1], e) if 0 <= e < E else 0)
            y = y + (0 if layer.shared is None else scale * layer.shared(x[b : b + 1]))
        rows.append(y)
    return torch.cat(rows)


@dispatches
@pytest.mark.parametrize("selector", [TopK(1), TopK(2), Soft()], ids=["one", "two", "soft"])
def test_whole_images(dispatch, selector, same):
    layer = images_layer(dispatch, selector, nn.Conv2d(C, C, 1))
    x = torch.randn(B, C, 6, 5, dtype=torch.float64, requires_grad=True)
    mask, scale = torch.tensor([True, True, False, True, True]), torch.tensor(0.5, dtype=torch.float64)
    given = x.masked_fill(~mask[:, None, None, None], torch.nan)
    same(layer(given, mask=mask, scale=scale), slow(layer, x, mask, scale), [x, *layer.parameters()])


@dispatches
def test_no_image_and_an_image_without_experts(dispatch):
    layer = images_layer(dispatch)
    assert layer(torch.zeros(0, C, 6, 5, dtype=torch.float64)).shape == (0, C, 6, 5)
    x = torch.randn(2, C, 6, 5, dtype=torch.float64)
    assert not layer(x, mask=torch.tensor([False, False])).any()


def test_only_chosen_experts_run():
    layer, seen = images_layer(selector=TopK(1)), []
    layer.experts._convolve = lambda x, *rest: seen.append(len(x)) or ConvExperts._convolve(layer.experts, x, *rest)
    layer(torch.randn(B, C, 6, 5, dtype=torch.float64))
    assert sum(seen) <= 2 * B


@pytest.mark.parametrize("shape", [(2, C, 3, 4), (2, C, 7)], ids=["maps", "signals"])
def test_pixels_are_tokens_with_the_channels_first(shape):
    layer = MoE(Router(LinearScorer(C, E), TopK(2)), FeedForward(E, C, 8), shared=nn.Linear(C, C), unit=Pixel())
    tokens = MoE(layer.router, layer.experts, shared=layer.shared)
    x, mask = torch.randn(shape), torch.rand(shape[0], *shape[2:]) < 0.7
    with record(layer) as tape:
        y = layer(x, mask=mask)
    assert torch.equal(y, tokens(x.movedim(1, -1), mask=mask).movedim(-1, 1))
    assert tape[0].routing.shape == (shape[0], *shape[2:])


def test_a_pool_of_your_own_and_wider_rows(close):
    """Whole sequences (S, D) are routed by their first token, to modules."""

    class First(nn.Module):
        def forward(self, x):
            return x[:, 0]

    bank = ModuleExperts([nn.Linear(C, C) for _ in range(E)])
    layer = MoE(Router(LinearScorer(C, E), TopK(1)), bank, unit=Sample(First()))
    x = torch.randn(B, 7, C)
    weights, indices = layer.router(x[:, 0]).weights, layer.router(x[:, 0]).indices
    close(
        layer(x), torch.stack([w[0] * bank.expert(row, int(e)) for row, w, e in zip(x, weights, indices, strict=True)])
    )


def test_masked_samples_reach_no_pool_of_your_own(same):
    pool = nn.Sequential(nn.Conv2d(C, 2 * C, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1))
    layer = MoE(Router(LinearScorer(2 * C, E), TopK(2)), ConvExperts(E, C, 6), unit=Sample(pool)).double()
    mask, x = torch.tensor([True, False, True, True, False]), torch.randn(B, C, 6, 5, dtype=torch.float64)
    x[~mask] = torch.nan
    y = layer(x, mask=mask)
    assert not y[~mask].any()
    same(y[mask], layer(x[mask]), layer.parameters())


def test_a_mask_of_another_shape_is_refused(user_error):
    for unit in (Sample(), Sample(nn.AdaptiveAvgPool2d(1))):
        layer = MoE(Router(LinearScorer(C, E), TopK(2)), ConvExperts(E, C, 6), unit=unit)
        for shape in ((B + 1,), (B, 6), (B, C, 6, 5, 1)):
            with user_error("mask has shape", str(shape)):
                layer(torch.randn(B, C, 6, 5), mask=torch.ones(shape, dtype=torch.bool))


def test_side_information_routes_images_and_pixels(close):
    """One value a sample, or one a pixel."""
    severity, x = torch.tensor([[1.0], [-1.0]]), torch.randn(2, C, 3, 4)
    router = Router(ContextScorer(C, 2), TopK(1))
    router.scorer.weight.data = torch.tensor([[50.0], [-50.0]])  # weights of 1
    images = MoE(router, ConvExperts(2, C, 6), unit=Sample())
    y = images(x, context=Context(samples={"severity": severity}))
    close(y, torch.cat([images.experts.expert(x[e][None], e) for e in range(2)]))
    pixels = MoE(router, FeedForward(2, C, 6), unit=Pixel())
    sides = torch.randint(2, (2, 3, 4))
    y = pixels(x, context=Context(tokens={"severity": 1.0 - 2 * sides[..., None]})).movedim(1, -1)
    both = torch.stack([pixels.experts.expert(x.movedim(1, -1).reshape(-1, C), e) for e in range(2)])
    close(y.reshape(-1, C), both[sides.flatten(), torch.arange(24)])


def test_records_keep_whole_rows_and_the_queries(close):
    layer, x = images_layer(), torch.randn(B, C, 6, 5, dtype=torch.float64)
    with record(layer, keep=("tokens", "input", "hidden", "output")) as tape:
        layer(x)
    item = tape[0]
    close(item.tokens, x.mean((2, 3)))
    assert torch.equal(item.input, x[item.order // 2])
    assert item.hidden.shape == (len(item.order), 6, 6, 5)
    chosen = item.routing.indices.flatten()[item.order].tolist()
    rows = [layer.experts.expert(x[s // 2][None], e) for s, e in zip(item.order.tolist(), chosen, strict=True)]
    close(item.output, torch.cat(rows))


def test_units_are_saved(tmp_path):
    layer, x = images_layer(), torch.randn(B, C, 6, 5, dtype=torch.float64)
    save(layer, tmp_path / "one")
    again = load(tmp_path / "one")
    assert torch.equal(again(x), layer.eval()(x))
    assert isinstance(again.unit, Sample)
    pixels = MoE(layer.router, FeedForward(E, C, 8), unit=Pixel()).double()
    save(pixels, tmp_path / "two")
    assert torch.equal(load(tmp_path / "two")(x), pixels.eval()(x))
    assert isinstance(MoE(layer.router, layer.experts).unit, Token)


def test_what_does_not_fit(user_error):
    router = Router(LinearScorer(C, E), TopK(2))
    maps, tokens = torch.randn(2, C, 3, 3), torch.randn(2, C)
    for experts, unit, x, words in [
        (FeedForward(E, C, 8), Sample(), maps, ("FeedForward", "1 dimensions", "Sample")),
        (ConvExperts(E, C, 8), Token(), tokens, ("ConvExperts", "3 dimensions", "Token")),
        (FeedForward(E, C, 8), Pixel(), tokens, ("Pixel", "(2, 4)")),
        (ConvExperts(E, C, 8), Sample(), tokens[0], ("Sample", "(4,)")),
    ]:
        layer = MoE(router, experts, unit=unit)
        with user_error(*words):
            layer(x)
