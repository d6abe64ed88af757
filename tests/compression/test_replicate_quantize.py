"""Replicate-and-Quantize: who gets copies, whose weights become integers, what that leaves and what it takes."""

from __future__ import annotations

import copy

import pytest
import torch
from seeds import generator, shifted

from spectralmoe import FeedForward, LinearScorer, MoE, Placement, Router, Soft, TopK, load, record, save
from spectralmoe.compression import fake_quantize, prune, replicate_and_quantize, stored_bytes, wanda
from spectralmoe.diagnostics import load_imbalance
from spectralmoe.experts import EXPERTS

D, E = 12, 5
COUNTS = (40, 21, 9, 15, 2)


def layer_of(*, k=1, experts=E, bank=None, **options):
    """A layer whose router reads the expert of a token off its first E features."""
    router = Router(LinearScorer(D, experts), Soft() if k is None else TopK(k))
    with torch.no_grad():
        router.scorer.weight.copy_(9 * torch.eye(experts, D))
    return MoE(router, bank or FeedForward(E, D, 8, bias=True), **options).eval()


def tokens_of(counts=COUNTS):
    """Tokens (N, D) of which ``counts[e]`` choose expert e, in an order that is drawn."""
    chosen = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    x = torch.randn(len(chosen), D, generator=generator(1)) / 4
    x[:, : len(counts)] = 0.1 * x[:, : len(counts)] + torch.eye(len(counts))[chosen]
    return x[torch.randperm(len(x), generator=generator(2))]


def matrices(layer, place):
    return {name: tensor for name, tensor in layer.experts.expert_parameters(place).items() if tensor.dim() > 1}


@pytest.mark.parametrize("bits", [2, 3, 8, 17, 32])
def test_a_row_is_whole_multiples_of_its_scale_and_the_nearest_ones(bits):
    weight = torch.randn(6, 4, 3, generator=generator(bits))
    weight[2] = 0
    got, most = fake_quantize(weight, bits), 2 ** (bits - 1) - 1
    assert torch.equal(got[2], weight[2])
    for row, made in zip(weight.flatten(1).double(), got.flatten(1).double(), strict=True):
        scale, peak = float(row.abs().max()) / most, float(row.abs().max())
        assert float((row - made).abs().max()) <= scale / 2 + 1e-6 * peak
        if bits <= 8:
            numbers = made / (scale or 1)
            assert torch.allclose(numbers, numbers.round(), atol=1e-3)
            assert float(numbers.abs().max()) <= most + 1e-3


def test_bytes_by_hand():
    matrix, bias = torch.zeros(3, 5, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16)
    assert stored_bytes([matrix, bias]) == 36
    assert stored_bytes([matrix, bias], 3) == 6 + 12 + 6


@pytest.mark.grid(keep=[True, False], copies=[0, 1, 3], quantize=[0, 1], dispatch=["auto", "loop"])
def test_with_32_bits_or_none_at_all_the_function_stays(keep, copies, quantize, dispatch, close):
    layer, x = layer_of(dispatch=dispatch), tokens_of()
    before = layer.state_dict()
    options = {"copies": copies, "quantize": quantize, "keep_original": keep, "bits": 32}
    report = replicate_and_quantize(layer, [x], importance="frequency", **options)
    close(report.model(x), layer(x))
    assert report.model.experts.num_experts == E + copies
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    if not copies and not quantize:
        assert report.model.placement is None
        assert report.bytes_after == report.bytes_before


@pytest.mark.grid(keep=[True, False], importance=["removal", "wanda", "reap", "random"], bits=[2, 8])
def test_the_busiest_and_the_least_are_quantised_and_nothing_else(keep, importance, bits):
    layer, x = layer_of(shared=torch.nn.Linear(D, D)), tokens_of()
    report = replicate_and_quantize(layer, [x[:30], x[30:]], importance=importance, bits=bits, keep_original=keep)
    done, made = report.layers[""], report.model
    assert done.counts.tolist() == list(COUNTS)
    assert done.replicated == (0,)
    assert done.places == (2, 1, 1, 1, 1)
    (least,) = done.quantised
    assert least == min(range(1, E), key=lambda e: float(done.importance[e]))
    low = {least, E} | (set() if keep else {0})
    for place in range(E + 1):
        old = layer.experts.expert_parameters(place % E)
        for name, tensor in made.experts.expert_parameters(place).items():
            wanted = fake_quantize(old[name], bits) if place in low and tensor.dim() > 1 else old[name]
            assert torch.equal(tensor, wanted), (place, name)
    assert all(map(torch.equal, made.router.state_dict().values(), layer.router.state_dict().values()))
    assert torch.equal(made.shared.weight, layer.shared.weight)


@pytest.mark.grid(bits=[2, 3, 4, 8], quantize=[0, 1, 3], keep=[True, False])
def test_memory_is_counted_and_does_not_grow(bits, quantize, keep):
    layer = layer_of(bank=FeedForward(E, D, 16, bias=True))
    options = {"importance": "frequency", "bits": bits, "quantize": quantize, "keep_original": keep}
    report = replicate_and_quantize(layer, [tokens_of()], **options)
    full, vectors, numbers, rows = 4 * (2 * 16 * D + 16 + D), 4 * (16 + D), 2 * 16 * D, 16 + D
    low = numbers * bits // 8 + 4 * rows + vectors
    assert report.bytes_before == E * full
    assert report.bytes_after == (E + 1) * full - (quantize + 1 + (not keep)) * (full - low)
    if quantize or not keep:
        assert report.bytes_after <= report.bytes_before


@pytest.mark.parametrize("counts", [COUNTS, (7, 7, 7, 7, 8), (90, 80, 1, 1, 1)])
def test_the_busiest_place_carries_the_second_load_or_half_of_the_first(counts):
    layer, x = layer_of(), tokens_of(counts)
    report = replicate_and_quantize(layer, [x], importance="frequency")
    with record(report.model) as tape:
        report.model(x)
    placed = report.model.placement(tape[0].routing).indices
    halves = [int((placed == place).sum()) for place in report.model.places(counts.index(max(counts)))]
    assert max(halves) - min(halves) <= 1
    first, second = sorted(counts)[-1], sorted(counts)[-2]
    assert load_imbalance(tape[0]) == pytest.approx(E * first / sum(counts))
    busiest = max(second, -(-first // 2))
    assert load_imbalance(tape[0], physical=True) == pytest.approx((E + 1) * busiest / sum(counts))
    done = report.layers[""]
    assert done.imbalance_before == pytest.approx(load_imbalance(tape[0]))
    assert done.imbalance_after == pytest.approx(load_imbalance(tape[0], physical=True))


def test_zero_experts_do_not_count():
    """The busiest computes nothing: it gets no copy, is not the least, and has no part in the imbalance."""
    layer, x = layer_of(experts=E + 1), tokens_of((4, 9, 5, 1, 2, 60))
    report = replicate_and_quantize(layer, [x], importance="frequency")
    done = report.layers[""]
    assert (done.replicated, done.quantised, done.places) == ((1,), (3,), (1, 2, 1, 1, 1, 0))
    with record(report.model) as tape:
        report.model(x)
    assert load_imbalance(tape[0]) == pytest.approx(done.imbalance_before) == pytest.approx(E * 9 / 21)
    assert load_imbalance(tape[0], physical=True) == pytest.approx(done.imbalance_after) == pytest.approx(6 * 5 / 21)


def test_wanda_is_the_size_of_weights_times_norms(close):
    layer, x = layer_of(), tokens_of((20, 5, 0, 7, 3))
    done = replicate_and_quantize(layer, [x[:11], x[11:]], importance="wanda").layers[""]
    bank, chosen = layer.experts, layer.router(x).indices[:, 0]
    for e in range(E):
        rows = x[chosen == e]
        hidden = torch.nn.functional.gelu(rows @ bank.up[e].T + bank.up_bias[e])
        pairs = ((bank.up[e], rows), (bank.down[e], hidden))
        want = sum(float((w.abs() * seen.norm(dim=0)).sum().detach()) for w, seen in pairs)
        assert float(done.importance[e]) == pytest.approx(want, rel=1e-4, abs=1e-9)
    close(wanda(bank.up.detach(), torch.ones(E, D)), bank.up.detach().abs().double().sum((1, 2)))


def test_with_a_score_removal_is_how_far_the_score_falls():
    layer, x = layer_of(), tokens_of()
    target = layer(x).detach() + 0.1

    def score(model):
        return -float((model(x).detach() - target).square().mean())

    done = replicate_and_quantize(layer, [x], score=score).layers[""]
    falls = [score(layer) - score(prune(layer, [e for e in range(E) if e != gone])) for gone in range(E)]
    assert done.importance.tolist() == pytest.approx(falls, abs=1e-7)
    assert done.quantised == (min(range(1, E), key=falls.__getitem__),)
    nothing = replicate_and_quantize(layer, [x], score=lambda model: 1 / 0, quantize=0)  # is not asked
    assert nothing.layers[""].importance is None


def test_the_result_is_an_ordinary_model(tmp_path, close):
    model = torch.nn.Sequential(layer_of(), torch.nn.Tanh(), layer_of(k=2)).eval()
    x = tokens_of()
    made = replicate_and_quantize(model, [x], bits=4, copies=2, quantize=2).model
    twin = copy.deepcopy(made)
    save(made[0], tmp_path / "layer")
    assert torch.equal(load(tmp_path / "layer")(x), made[0](x))
    assert torch.equal(twin(x), made(x))
    assert torch.equal(made(x), made(x))  # places take turns by the order of the batch, not by a draw
    again = replicate_and_quantize(made, [x], bits=32, quantize=0)
    assert all(sum(done.places) == E + 3 for done in again.layers.values())
    close(again.model(x), made(x))


def test_every_bank_with_matrices_of_its_own(bank_name, make_bank, user_error, close):
    bank = make_bank(bank_name, dim=D, num_experts=E)
    if bank.row_dims not in (None, 1) or bank.reshapes or not isinstance(bank, EXPERTS[bank_name]):
        pytest.skip("takes other rows")
    layer, x = layer_of(bank=bank), tokens_of()
    if bank.manifold:
        with user_error("replicate_and_quantize", "manifold"):
            replicate_and_quantize(layer, [x])
        return
    if not all(matrices(layer, place) for place in range(E)):
        with user_error("replicate_and_quantize", "no matrix"):
            replicate_and_quantize(layer, [x])
        return
    made = replicate_and_quantize(layer, [x], importance="frequency", bits=2, quantize=2).model
    assert made.experts.num_experts == E + 1
    assert not torch.allclose(made(x), layer(x))
    close(replicate_and_quantize(layer, [x], importance="frequency", bits=32).model(x), layer(x))


def test_mistakes_are_named(user_error):
    layer, x = layer_of(), tokens_of()
    for options, words in (
        ({"bits": 1}, ["bits", "from 2 to 32", "got 1"]),
        ({"bits": 8.0}, ["bits", "got 8.0"]),
        ({"copies": -1}, ["copies", "got -1"]),
        ({"quantize": E}, ["quantize", "4 experts", "from 0 to 4", "got 5"]),
        ({"importance": "wand"}, ["unknown importance 'wand'", "'wanda'"]),
        ({"importance": "wanda", "score": len}, ["score", "wanda"]),
        ({"score": lambda model: float("nan")}, ["score is nan"]),
    ):
        with user_error(*words):
            replicate_and_quantize(layer, [x], **options)
    with user_error("calibration holds no batch"):
        replicate_and_quantize(layer, [])
    with user_error("saw a token of the calibration"):
        replicate_and_quantize(layer, [x[:0]])
    with user_error("training mode", "eval()"):
        replicate_and_quantize(layer_of().train(), [x])
    with user_error("every expert"):
        replicate_and_quantize(layer_of(k=None), [x])
    with user_error("merged experts"):
        replicate_and_quantize(layer_of(placement=Placement([[0], [1], [0], [3], [4]])), [x])
    with user_error("fake_quantize", "takes a matrix"):
        fake_quantize(torch.ones(3), 8)
    with record(soft := layer_of(k=None)) as tape:
        soft(x)
    with user_error("load_imbalance", "every expert"):
        load_imbalance(tape[0])


def test_random_importance_is_drawn_by_its_seed():
    layer, x = layer_of(), tokens_of()
    drawn = {
        replicate_and_quantize(layer, [x], importance="random", seed=shifted(s)).layers[""].quantised for s in range(20)
    }
    assert len(drawn) > 1
    first, again = (replicate_and_quantize(layer, [x], importance="random", seed=3).layers[""] for _ in range(2))
    assert torch.equal(first.importance, again.importance)
