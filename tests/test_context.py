"""Side information: flattened once beside the tokens, carried in the record, read by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spectralmoe import (
    Context,
    ContextScorer,
    FeedForward,
    LinearScorer,
    ModuleExperts,
    MoE,
    Monitor,
    Router,
    TopK,
    attach,
    feed,
    load,
    record,
    save,
)
from spectralmoe.diagnostics.watch import watch
from spectralmoe.units import Sample

B, S, D, E, P = 3, 4, 8, 5, 2
SHAPE = (B, S)


def test_values_of_tokens_and_of_samples_become_rows():
    place, severity = torch.randn(B, S, 2), torch.arange(B)
    rows = Context(tokens={"place": place}, samples={"severity": severity}).rows(SHAPE)
    assert torch.equal(rows["place"], place.reshape(B * S, 2))
    assert rows["severity"].tolist() == [0] * S + [1] * S + [2] * S


@pytest.mark.parametrize(("shape", "tokens"), [((7,), 7), ((0, 4), 0), ((2, 3, 4), 24), ((), 1)])
def test_any_number_of_leading_dimensions(shape, tokens):
    values, of_samples = torch.randn(*shape, P), torch.randn(*shape[:1], P)
    rows = Context(tokens={"a": values}, samples={"b": of_samples}).rows(shape)
    assert rows["a"].shape == rows["b"].shape == (tokens, P)
    assert torch.equal(rows["a"], values.flatten(0, -2) if shape else values[None])
    of_tokens = [of_samples[i // (tokens // shape[0])] if shape else of_samples for i in range(tokens)]
    assert all(torch.equal(row, value) for row, value in zip(rows["b"], of_tokens, strict=True))


def test_rows_of_padding_are_zero():
    mask = torch.rand(SHAPE) < 0.5
    values = torch.randn(*SHAPE, P).masked_fill(~mask[..., None], torch.nan)
    rows = Context(tokens={"a": values}, samples={"b": torch.ones(B, dtype=torch.int64)}).rows(SHAPE, mask)
    assert torch.equal(rows["a"], values.nan_to_num(0).flatten(0, 1))
    assert torch.equal(rows["b"], mask.flatten().long())


def test_mistakes_are_named(user_error):
    with user_error("'severity'", "tensor", "list"):
        Context(samples={"severity": [1, 2, 3]}).rows(SHAPE)
    with user_error("'severity'", "(5,)", "(3,) samples"):
        Context(samples={"severity": torch.ones(5)}).rows(SHAPE)
    with user_error("'place'", "(3, 5)", "(3, 4) tokens"):
        Context(tokens={"place": torch.ones(3, 5)}).rows(SHAPE)
    with user_error("'place'", "tokens and for samples"):
        Context(tokens={"place": torch.ones(SHAPE)}, samples={"place": torch.ones(B)}).rows(SHAPE)


class Reading(LinearScorer):
    """Notes the context that it gets."""

    reads = ("severity",)

    def forward(self, x, *, context=None):
        self.seen = context
        return super().forward(x)


class Choosing(TopK):
    """Leaves out the expert that the context names."""

    def choose(self, logits, *, mask=None, context=None):
        banned = self.read(context, "banned", len(logits), 1)
        return super().choose(logits.scatter(1, banned, -torch.inf), mask=mask)


def test_scorer_selector_and_record_get_the_same_rows():
    layer = MoE(Router(Reading(D, E), Choosing(2)), FeedForward(E, D, 6))
    banned, x = torch.tensor([0, 4, 2]), torch.randn(B, S, D)
    context = Context(tokens={"severity": torch.rand(SHAPE)}, samples={"banned": banned})
    with record(layer) as tape:
        layer(x, context=context)
    chosen = tape[0].routing.indices.reshape(B, -1)
    assert not (chosen == banned[:, None]).any()
    assert tape[0].context is layer.router.scorer.seen
    assert sorted(tape[0].context) == ["banned", "severity"]
    alone = layer.router(x, context=context)
    assert torch.equal(alone.indices, tape[0].routing.indices)
    with record(layer) as tape, feed(layer, context=context):
        layer(x)
    assert torch.equal(tape[0].routing.indices, alone.indices)


def test_nothing_is_carried_where_there_is_none():
    layer = MoE(Router(Reading(D, E), TopK(2)), FeedForward(E, D, 6))
    with record(layer) as tape:
        layer(torch.randn(B, S, D))
    assert tape[0].context is layer.router.scorer.seen is None


def test_tapes_of_training_do_not_hold_it():
    layer = MoE(Router(ContextScorer(D, E), TopK(2)), FeedForward(E, D, 6))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attachment = attach(optimizer, layer)
    layer(torch.randn(B, S, D), context=Context(samples={"severity": torch.rand(B)})).sum().backward()
    (item,) = attachment._tape.drain()
    assert item.context is None


class Modulated(nn.Module):
    """An expert whose output severity turns up or down."""

    def __init__(self):
        super().__init__()
        self.linear, self.strength = nn.Linear(D, D), nn.Linear(P, D)

    def forward(self, rows):
        x, severity = rows.split([D, P], -1)
        return self.linear(x) * (1 + self.strength(severity))


def modulated_layer(k=2):
    bank = ModuleExperts([Modulated() for _ in range(E)], reads=("severity",))
    return MoE(Router(LinearScorer(D, E + 1), TopK(k)), bank)  # the last one is a zero expert


@pytest.mark.parametrize("dispatch", ["loop", "dense", "grouped", "auto"])
def test_experts_read_it_in_every_dispatch(dispatch, same):
    layer = modulated_layer().double()
    layer.dispatch = dispatch
    x, severity = (torch.randn(B, *rest, dtype=torch.float64, requires_grad=True) for rest in ((S, D), (P,)))
    mask = torch.rand(SHAPE) < 0.8
    y = layer(x, mask=mask, context=Context(samples={"severity": severity}))
    routing, rows = layer.router(x, mask=mask), []
    for b in range(B):
        for s in range(S):
            total = torch.zeros(D, dtype=torch.float64)
            for weight, e in zip(routing.weights[b * S + s], routing.indices[b * S + s].tolist(), strict=True):
                if 0 <= e < E:
                    expert = layer.experts.experts[e]
                    total = total + weight * expert.linear(x[b, s]) * (1 + expert.strength(severity[b]))
            rows.append(total)
    same(y, torch.stack(rows).unflatten(0, SHAPE), [x, severity, *layer.parameters()])


def test_maps_get_it_as_constant_channels():
    bank = ModuleExperts([nn.Conv2d(3 + P, 3, 3, padding=1)], reads=("severity",))
    maps, severity = torch.randn(2, 3, 5, 4), torch.randn(2, P)
    wide = bank.beside(maps, {"severity": severity})
    assert torch.equal(wide[:, :3], maps)
    assert torch.equal(wide[:, 3:], severity[..., None, None].expand(2, P, 5, 4))
    assert bank.expert(wide, 0).shape == maps.shape


@pytest.mark.parametrize("dispatch", ["loop", "dense", "grouped"])
def test_whole_images_are_routed_and_changed_by_severity(dispatch, same):
    """One choice an image, by severity alone; its expert gets the severity as constant channels."""
    bank = ModuleExperts([nn.Conv2d(3 + P, 3, 3, padding=1) for _ in range(E)], reads=("severity",))
    layer = MoE(Router(ContextScorer(3, E, width=P), TopK(2)), bank, unit=Sample(), dispatch=dispatch).double()
    images, severity = torch.randn(4, 3, 5, 4, dtype=torch.float64), torch.randn(4, P, dtype=torch.float64)
    images.requires_grad_()
    severity.requires_grad_()
    with record(layer) as tape:
        y = layer(images, context=Context(samples={"severity": severity}))
    scores = (severity @ layer.router.scorer.weight.T).softmax(-1)
    want = []
    for image, value, score in zip(images, severity, scores, strict=True):
        wide = torch.cat([image, value[:, None, None].expand(P, 5, 4)])
        want.append(sum(score[e] * bank.experts[e](wide[None])[0] for e in score.topk(2).indices))
    same(y, torch.stack(want), [images, severity, layer.router.scorer.weight, *bank.parameters()])
    assert torch.equal(tape[0].context["severity"], severity)


def test_what_experts_read_is_kept_with_their_rows(user_error, tmp_path):
    layer, x, severity = modulated_layer(), torch.randn(B, S, D), torch.randn(B, P)
    context = Context(samples={"severity": severity})
    with record(layer, keep=("input",)) as tape:
        y = layer(x, context=context)
    tokens = tape[0].order // 2
    assert torch.equal(tape[0].input, torch.cat([x.flatten(0, 1), severity.repeat_interleave(S, 0)], 1)[tokens])
    with user_error("ModuleExperts reads 'severity'", "holds nothing"):
        layer(x)
    with watch(layer) as seen:
        layer(x, context=context)
        (call,) = seen.drain()
    assert call.tokens.shape == (0, D)
    save(layer.eval(), tmp_path)
    assert torch.equal(load(tmp_path, allow=[f"{__name__}:Modulated"])(x, context=context), y)


def layer_of(**options):
    return MoE(Router(ContextScorer(D, E, width=P, **options), TopK(2)), FeedForward(E, D, 6))


def test_a_missing_name_is_one_line_with_what_is_there(user_error):
    layer, x = layer_of(), torch.randn(B, S, D)
    with user_error("ContextScorer reads 'severity'", "holds nothing", "context=Context("):
        layer(x)
    with user_error("ContextScorer reads 'severity'", "holds place, weather"):
        layer(x, context=Context(tokens={"place": x}, samples={"weather": torch.ones(B)}))
    with user_error("ContextScorer reads 'severity'", "(3, 2)", "12 tokens", "Context(samples=...)"):
        layer(x, context={"severity": torch.ones(B, P)})


def test_padding_leaves_no_trace(gradients):
    layer, x, mask = layer_of(), torch.randn(B, S, D), torch.rand(SHAPE) < 0.6
    severity = torch.randn(*SHAPE, P)
    results = []
    for filled in (0.0, torch.nan):
        context = Context(tokens={"severity": severity.masked_fill(~mask[..., None], filled)})
        y = layer(x, mask=mask, context=context)
        results.append([y, *gradients(y.square().sum(), layer.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_checkpointed_layers_read_it_again(gradients, close):
    layer, x = layer_of(token=True), torch.randn(B, S, D)
    context = Context(samples={"severity": torch.randn(B, P)})
    with feed(layer, context=context):
        whole = gradients(layer(x).square().sum(), layer.parameters())
        again = gradients(checkpoint(layer, x, use_reentrant=False).square().sum(), layer.parameters())
    for one, two in zip(whole, again, strict=True):
        close(one, two)


def test_compiled(gradients, close):
    torch.compiler.reset()
    layer, x = layer_of(token=True), torch.randn(B, S, D)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    mask = torch.rand(SHAPE) < 0.6
    for context in (
        Context(samples={"severity": torch.randn(B, P)}),
        Context(tokens={"severity": torch.randn(*SHAPE, P)}, samples={"more": torch.ones(B)}),
    ):
        results = [forward(x, mask=mask, context=context) for forward in (compiled, layer)]
        for one, two in zip(*([y, *gradients(y.square().sum(), layer.parameters())] for y in results), strict=True):
            close(one, two)
    torch.compiler.reset()


def test_layers_that_read_it_are_not_routed_again():
    """Tokens alone do not say what a router that reads a context would do."""
    net = nn.Sequential(MoE(Router(LinearScorer(D, E), TopK(1)), FeedForward(E, D, 6)), layer_of())
    with watch(net) as seen, Monitor(net, every=1) as monitor:
        with feed(net, context=Context(samples={"severity": torch.ones(B, P)})):
            net(torch.randn(B, S, D))
        monitor.step()
    assert [layer.reroutes for layer in seen.layers] == [True, False]
    assert monitor.last["tokens"] == B * S
    assert copy.deepcopy(net)[1].router.scorer.reads == ("severity",)
