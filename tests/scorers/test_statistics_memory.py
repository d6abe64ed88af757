"""Statistics memory: the equation, what a shift does to routing, what follows the tokens, and padding."""

from __future__ import annotations

import copy

import pytest
import torch
from seeds import generator

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, after_step, attach, load, record, save
from spectralmoe.adaptation.targets import choose_layers
from spectralmoe.diagnostics import watch
from spectralmoe.scorers import StatisticsMemory
from spectralmoe.units import Pixel, Sample

D, E = 6, 5


def correlated(*shape, seed=0):
    mixing = torch.randn(D, D, generator=generator(99), dtype=torch.float64)
    return torch.randn(*shape, D, generator=generator(seed), dtype=torch.float64) @ mixing + 2.0


def moe(**options):
    return MoE(Router(LinearScorer(D, E), TopK(1)), FeedForward(E, D, 8), memory=StatisticsMemory(D, **options))


def taught(x, **options):
    """A memory in evaluation mode whose only step saw the tokens x (..., D)."""
    memory = StatisticsMemory(D, **options).double()
    memory.update(memory.statistics(x.reshape(-1, D), torch.zeros(0)))
    return memory.eval()


def follow(layer, *batches, **arguments):
    for x in batches:
        with record(layer) as tape:
            layer(x, **arguments)
        after_step(layer, tape)


def shift(seed=7):
    """Factors above 0 and offsets of every feature."""
    draw = generator(seed)
    return torch.rand(D, generator=draw, dtype=torch.float64) + 0.2, 9 * torch.randn(D, generator=draw).double()


def slow(memory, x, least):
    """The docstring's equation for one group x (n, D), one number at a time."""
    n, slots = len(x), memory.slots
    overall = sum(p * m for p, m in zip(memory.share, memory.mean, strict=True))
    total = sum(memory.share[p] * (memory.variance[p] + (memory.mean[p] - overall) ** 2) for p in range(slots))
    shares = [0.0] * slots
    for token in x:
        weights = [(-((token - memory.mean[p]) ** 2 / total).sum() / 2).exp() for p in range(slots)]
        shares = [shares[p] + weights[p] / sum(weights) / n for p in range(slots)]
    rows = []
    for d in range(D):
        goal = sum(shares[p] * memory.mean[p, d] for p in range(slots))
        spread = sum(shares[p] * (memory.variance[p, d] + (memory.mean[p, d] - goal) ** 2) for p in range(slots))
        m = sum(x[:, d]) / n
        s2 = sum((value - m) ** 2 for value in x[:, d]) / n
        own = min(1.0, (n - 1) / (least - 1))
        m, s2 = own * m + (1 - own) * goal, own * s2 + (1 - own) * spread
        rows.append(torch.stack([(value - m) / s2**0.5 * spread**0.5 + goal for value in x[:, d]]))
    return torch.stack(rows, 1)


@pytest.mark.parametrize(("slots", "n"), [(1, 5), (3, 5), (3, 20)])
def test_equation(same, slots, n):
    memory = taught(correlated(40), slots=slots, least=12)
    memory.update(memory.statistics(correlated(40, seed=1), torch.zeros(0)))
    x = correlated(2, n, seed=2).requires_grad_()
    same(memory(x), torch.stack([slow(memory, group, 12) for group in x]), [x])


def test_by_hand(close):
    memory = StatisticsMemory(1, least=2).eval()
    memory.mean, memory.variance, memory.updates = torch.tensor([[10.0]]), torch.tensor([[4.0]]), torch.tensor(1)
    close(memory(torch.tensor([[0.0], [6.0]])), torch.tensor([[8.0], [12.0]]))  # mean 3, spread 3


@pytest.mark.parametrize("over", ["sample", "stream"])
def test_a_shift_of_every_feature_is_undone(over, close):
    x, (factor, offset) = correlated(3, 200), shift()
    memory = taught(x, over=over)
    if over == "stream":
        assert torch.equal(memory(x), x)  # nothing is observed yet
        for part in (factor * x + offset).flatten(0, 1).split([100, 7, 493]):
            memory.observe(part)
        close(memory(factor * x[:, :2] + offset), x[:, :2])  # small groups, too: the statistics are those of all
        memory.forget()
        assert torch.equal(memory(x), x)
    else:
        close(memory(factor * x + offset), memory(x))
        close(memory((factor * x + offset).flatten(0, 1)), x.flatten(0, 1))  # all rows are one group


def test_features_far_from_zero_keep_their_spread():
    x = (correlated(200) + 1e4).float()
    memory = StatisticsMemory(D)
    memory.update(memory.statistics(x, torch.zeros(0)))
    torch.testing.assert_close(memory.variance[0], x.double().var(0, correction=0).float(), rtol=1e-3, atol=0)
    torch.testing.assert_close(memory.eval()(3 * x - 7), x, rtol=1e-6, atol=1e-2)


def test_a_stream_takes_what_counts_alone_and_lasts():
    memory, x = StatisticsMemory(D, over="stream").double(), correlated(2, 12)
    memory.update(memory.statistics(correlated(50), torch.zeros(0)))
    mask = torch.arange(24).view(2, 12) % 3 > 0
    broken = torch.where(mask[..., None], x, torch.nan)
    with torch.inference_mode():
        memory.observe(broken, mask.long())  # as tokenizers give it
        memory.observe(broken)
    assert int(memory.stream_count) == 2 * int(mask.sum())
    torch.testing.assert_close(memory.stream_mean, x[mask].mean(0))
    memory.eval()(y := x.clone().requires_grad_()).sum().backward()
    assert y.grad.any()
    memory.forget()
    assert torch.equal(memory(x), x)


def test_clean_tokens_stay(close):
    x = correlated(100)
    close(taught(x)(x), x)
    assert torch.equal(taught(x)(x[:1]), x[:1])  # one token has no statistics


def test_small_groups_move_less():
    x, memory = correlated(1000), taught(correlated(1000))
    moved = [(memory(x[None, :n] + 3) - x[:n]).abs().mean() for n in (1, 2, 8, 16)]
    assert moved[0] == pytest.approx(3)
    assert moved == sorted(moved, reverse=True)


def test_several_slots_keep_what_tells_groups_apart():
    kinds = torch.stack([correlated(500, seed=1) / 4, correlated(500, seed=2) / 4 + 40])
    memories = []
    for slots in (1, 2):
        memory = StatisticsMemory(D, slots=slots, momentum=0.5).double()
        memory.mean.copy_(torch.linspace(-0.5, 0.5, slots)[:, None] if slots > 1 else memory.mean)
        for _ in range(40):
            memory.update(memory.statistics(kinds.flatten(0, 1), torch.zeros(0)))
        memories.append(memory.eval())
    one, two = ((memory(kinds) - kinds).abs().mean() for memory in memories)
    assert one > 5  # both kinds get the mean of all
    assert two < 0.1


def test_means_follow_the_tokens(close):
    layer = moe(momentum=0.7).double()
    batches = [correlated(40, seed=seed) for seed in range(6)]
    mean, square = torch.zeros(D).double(), torch.zeros(D).double()
    for step, x in enumerate(batches, 1):
        weight = max(1 / step, 0.3)
        mean, square = (1 - weight) * mean + weight * x.mean(0), (1 - weight) * square + weight * x.square().mean(0)
        follow(layer, x)
        close(layer.memory.mean[0], mean)
        close(layer.memory.variance[0], square - mean.square())


@pytest.mark.parametrize("slots", [1, 3])
def test_micro_batches_count_as_one(slots, close):
    whole = moe(slots=slots).double()
    parts = copy.deepcopy(whole)
    for seed in range(3):
        x = correlated(60, seed=seed)
        follow(whole, x)
        tapes = []
        for part in x.split([10, 50, 0]):
            with record(parts) as tape:
                parts(part)
            tapes.append(tape)
        after_step(parts, *tapes)
        for name, value in whole.memory.state_dict().items():
            close(parts.memory.state_dict()[name].double(), value.double())


def test_what_does_not_count():
    layer, x = moe().double(), correlated(2, 30)
    mask = torch.arange(60).view(2, 30) < 45
    follow(layer, torch.where(mask[..., None], x, torch.nan), mask=mask)
    torch.testing.assert_close(layer.memory.mean[0], x[mask].mean(0))
    before = copy.deepcopy(layer.memory.state_dict())
    follow(layer, torch.full_like(x, torch.nan), x[:, :0])
    follow(layer.eval(), x)
    assert all(torch.equal(value, before[name]) for name, value in layer.memory.state_dict().items())


def test_training_aligns_nothing_and_the_memory_gets_no_gradient(close):
    layer, (factor, offset) = moe(where="layer").double(), shift()
    follow(layer, correlated(50))
    x = (factor * correlated(50) + offset).requires_grad_()
    plain = copy.deepcopy(layer)
    plain.memory = None
    assert torch.equal(layer(x), plain(x))
    layer.eval()(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.any()
    assert not list(layer.memory.parameters())
    assert not any(buffer.requires_grad for buffer in layer.memory.buffers())


@pytest.mark.parametrize("where", ["router", "layer"])
def test_routing_survives_a_shift(where, close):
    layer, x, (factor, offset) = moe(where=where).double(), correlated(4, 100), shift()
    follow(layer, x)
    layer.eval()
    shifted = factor * x + offset
    with record(layer) as tape:
        outputs = layer(x), layer(shifted)
    clean, moved = (item.routing.indices for item in tape)
    bare = layer.router(shifted).indices
    assert torch.equal(clean, moved)
    assert (bare != clean).float().mean() > 0.1
    if where == "layer":
        close(outputs[1], outputs[0])
    else:
        assert not torch.allclose(*outputs)


@pytest.mark.parametrize("where", ["router", "layer"])
def test_padding_is_inert(where, close):
    layer, x = moe(where=where).double(), correlated(3, 20)
    follow(layer, x)
    layer.eval()
    mask = torch.arange(20) < torch.tensor([[20], [7], [0]])
    broken = torch.where(mask[..., None], x + 5, torch.nan)
    y = layer(broken, mask=mask)
    close(y[0], layer(x[:1] + 5)[0])
    close(y[1, :7], layer(x[1:2, :7] + 5)[0])
    assert not y[~mask].any()


def test_samples_are_groups_whatever_their_form(close):
    x = correlated(2, 12, seed=3)
    layer = MoE(Router(LinearScorer(D, E), TopK(1)), FeedForward(E, D, 8), unit=Pixel(), memory=StatisticsMemory(D))
    layer = layer.double()
    maps = x.view(2, 3, 4, D).movedim(-1, 1)
    follow(layer, maps)
    layer.eval()
    close(layer(maps + 3), torch.cat([layer(one[None] + 3) for one in maps]))
    assert layer(maps[:0]).shape == (0, D, 3, 4)


def test_saved_copied_and_in_low_precision(tmp_path):
    layer = moe(slots=2, where="layer", momentum=0.9, least=4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    attach(optimizer, layer)
    layer.bfloat16()
    x = correlated(4, 20).bfloat16()
    for _ in range(2):
        layer(x).float().square().mean().backward()
        optimizer.step()
    assert int(layer.memory.updates) == 2
    assert layer.memory.mean.dtype == torch.float32
    assert layer.eval()(x).dtype == torch.bfloat16
    save(layer, tmp_path)
    for twin in (load(tmp_path), copy.deepcopy(layer)):
        assert torch.equal(twin.to(torch.bfloat16)(x), layer(x))
        assert (twin.memory.where, twin.memory.least, twin.memory.momentum) == ("layer", 4, 0.9)


@pytest.mark.parametrize("slots", [1, 2])
def test_compiled_and_under_autocast(slots, close):
    layer, x = moe(where="layer", slots=slots), correlated(4, 20).float()
    follow(layer, x)
    for training in (True, False):
        layer.train(training)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        close(compiled(x + 2), layer(x + 2))
    with torch.autocast("cpu", torch.bfloat16):
        aligned = layer.memory(x + 2)
    assert aligned.dtype == torch.float32
    close(aligned, layer.memory(x + 2))


@pytest.mark.parametrize(("where", "seen"), [("router", 0), ("layer", 20)])
def test_instruments_see_tokens_that_experts_read(where, seen):
    layer, x = moe(where=where).eval(), correlated(20).float()
    with watch(layer) as watched:
        layer(x)
    assert len(watched.drain()[0].tokens) == seen


def test_mistakes_are_named(user_error):
    for words, options in (
        (("slots must be at least 1, got 0",), {"slots": 0}),
        (("momentum must lie in [0, 1), got 1.0",), {"momentum": 1.0}),
        (("least must be at least 2, got 1",), {"least": 1}),
        (("where", "'expert'", "layer, router"), {"where": "expert"}),
        (("over", "'batch'", "sample, stream"), {"over": "batch"}),
        (("over='stream'", "slots=2"), {"over": "stream", "slots": 2}),
    ):
        with user_error("StatisticsMemory", *words):
            StatisticsMemory(D, **options)
    for call in (StatisticsMemory(D), StatisticsMemory(D).observe):
        with user_error("StatisticsMemory", f"{2 * D} wide", "D=6"):
            call(torch.zeros(2, 2 * D))
        with user_error("StatisticsMemory", "mask has shape (3,)", "(2,)"):
            call(torch.zeros(2, D), torch.ones(3))
    with user_error("MoE", "D=6", "memory 4"):
        MoE(Router(LinearScorer(D, E), TopK(1)), FeedForward(E, D, 8), memory=StatisticsMemory(4))
    with user_error("MoE", "Sample", "where='router'"):
        memory = StatisticsMemory(D, where="layer")
        MoE(Router(LinearScorer(D, E), TopK(1)), FeedForward(E, D, 8), unit=Sample(), memory=memory)
    with user_error("layer ''", "memory = None"):
        choose_layers(moe(), "last")
