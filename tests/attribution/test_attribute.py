"""Attribution: the equation as a loop, what vectors add up to, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from seeds import shifted
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, UserError, feed, record
from spectralmoe.attribution import attribute_experts, block
from spectralmoe.attribution.frozen import frozen_norm
from spectralmoe.attribution.neurons import expert_part, neuron_parts
from spectralmoe.diagnostics import watch
from spectralmoe.hf import swap_routers
from spectralmoe.models import language_moe
from spectralmoe.models.language import RMS_EPS, DecoderBlock, LanguageMoE

WIDTH, VOCAB = 8, 20


def build(*, activation: str = "swiglu", bias: bool = False, shared: bool = False, k: int = 2) -> LanguageMoE:
    """A model in float64 whose experts write as much as what is there."""

    def layer() -> MoE:
        bank = FeedForward(5, WIDTH, 6, activation=activation, bias=bias)
        router = Router(LinearScorer(WIDTH, 5), TopK(k, normalize=True))
        return MoE(router, bank, shared=nn.Linear(WIDTH, WIDTH) if shared else None)

    model = LanguageMoE([DecoderBlock(layer(), 2) for _ in range(2)], VOCAB).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(VOCAB, (2, 4))


def slow(model, tokens, target):
    """(layer, expert) -> log p(t | u + g E(x)) - log p(t | u), and (layer, None) -> the same of all that it adds."""
    x, streams = model.embedding(tokens[None]), []
    for part in model.blocks:
        x = x + part.attention(part.attention_norm(x))
        read, before = part.moe_norm(x)[0, -1], x[0, -1]
        x = x + part.moe(part.moe_norm(x))
        streams.append((part.moe, before, read, x[0, -1] - before))
    size = (x[0, -1].square().mean() + RMS_EPS).sqrt()

    def log_p(stream):
        logits = [(stream / size * model.norm.weight * row).sum() for row in model.head.weight]
        return logits[target] - torch.stack(logits).exp().sum().log()

    gains = {}
    for place, (moe, before, read, added) in enumerate(streams):
        logits = moe.router.scorer.weight @ read
        chosen = logits.topk(2).indices
        for e, weight in zip(chosen.tolist(), logits[chosen].softmax(-1), strict=True):
            gains[place, e] = log_p(before + weight * moe.experts.expert(read[None], e)[0]) - log_p(before)
        gains[place, None] = log_p(before + added) - log_p(before)
    return gains, log_p(x[0, -1])


def test_gains_are_those_of_the_equation_as_a_loop(text):
    model, target = build(), torch.tensor([3, 7])
    table, layers = (attribute_experts(model, text, target, level=level) for level in ("expert", "layer"))
    assert len(table) == 8
    assert table.layers == ("blocks.0.moe", "blocks.1.moe")
    for sequence in range(2):
        with torch.no_grad():
            gains, log_prob = slow(model, text[sequence], int(target[sequence]))
        torch.testing.assert_close(table.log_prob[sequence], log_prob, atol=1e-9, rtol=1e-7)
        for level in (table, layers):
            for row in level.rows(sequence=sequence):
                want = gains[level.layers.index(row["layer"]), row["expert"]]
                assert row["gain"] == pytest.approx(float(want), abs=1e-9)
    assert torch.equal(table.of_experts(5).sum(-1), table.of_layers())


def test_weights_are_those_of_the_forward_and_one_sequence_needs_no_batch(text):
    model = build(shared=True)
    with record(model) as tape:
        model(text[:1])
    rows = attribute_experts(model, text[0], 3).rows()
    for item in tape:
        served = dict(zip(item.routing.indices[-1].tolist(), item.routing.weights[-1].tolist(), strict=True))
        mine = {row["expert"]: row["weight"] for row in rows if row["layer"] == item.name}
        assert mine == pytest.approx({**served, None: 1.0})


@pytest.mark.parametrize(("activation", "bias"), [("swiglu", False), ("gelu", True)])
def test_one_neuron_is_its_exact_difference_and_all_add_up_to_the_expert(text, activation, bias):
    model = build(activation=activation, bias=bias)
    table = attribute_experts(model, text[:1], 3, level="neuron")
    assert len(table) == 2 * 2 * 6
    with watch(model) as seen:
        model(text[:1])
        calls = seen.drain()
    call = calls[1]
    e, weight, x = int(call.routing.indices[-1, 0]), call.routing.weights[-1, :1], call.tokens[-1:]
    bank = model.blocks[1].moe.experts
    parts = neuron_parts(call.layer, x, weight, e)[0]
    whole = expert_part(call.layer, x, weight, e)[0]
    fixed = weight * bank.down_bias[e] if bias else 0
    torch.testing.assert_close(parts.sum(0) + fixed, whole)
    hidden = F.gelu(bank.up[e] @ x[0] + bank.up_bias[e]) if bias else bank.hidden(x, F.one_hot(torch.tensor(e), 5))[0]
    torch.testing.assert_close(parts[2], weight * hidden[2] * bank.down[e][:, 2])

    inner, final = [], []
    handles = [
        model.blocks[1].moe_norm.register_forward_pre_hook(lambda m, args: inner.append(args[0][0, -1])),
        model.norm.register_forward_pre_hook(lambda m, args: final.append(args[0][0, -1])),
    ]
    with torch.no_grad():
        model(text[:1])
        size = (final[0].square().mean() + RMS_EPS).sqrt()
        log_p = [model.head(u / size * model.norm.weight).log_softmax(-1)[3] for u in (inner[0] + parts[2], inner[0])]
    for handle in handles:
        handle.remove()
    at = (table.layer == 1) & (table.expert == e) & (table.neuron == 2)
    assert float(table.gain[at]) == pytest.approx(float(log_p[0] - log_p[1]), abs=1e-9)


@pytest.mark.parametrize("norm", [nn.RMSNorm(7), nn.LayerNorm(7), nn.LayerNorm(8), nn.Identity()])
def test_a_frozen_norm_is_the_norm_where_it_was_frozen_and_affine_elsewhere(norm):
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    states = torch.randn(3, getattr(norm, "normalized_shape", (7,))[0], dtype=torch.float64)
    frozen, every = frozen_norm(norm, states), torch.arange(3)
    wide = norm.double()
    torch.testing.assert_close(frozen(states, every), wide(states), atol=1e-6, rtol=1e-6)
    step = torch.randn_like(states)
    moved = [frozen(states + factor * step, every) for factor in (0, 1, 2)]
    torch.testing.assert_close(moved[2] - moved[1], moved[1] - moved[0])


def test_another_norm_is_refused():
    with pytest.raises(UserError, match="Softmax, which is no RMSNorm"):
        frozen_norm(nn.Softmax(-1), torch.randn(2, 6))


def test_mistakes_are_one_line(text):
    model = build()
    plain = nn.Sequential(nn.Embedding(VOCAB, 4), nn.Linear(4, VOCAB))
    for call, words in (
        (lambda: attribute_experts(plain, text, torch.tensor([1, 1])), "holds no MoE layer"),
        (lambda: attribute_experts(model, text[0], VOCAB), f"target {VOCAB} is no token of a vocabulary of 0 to 19"),
        (lambda: attribute_experts(model, text, 3), "a target for each sequence"),
        (lambda: attribute_experts(model, text[0].tolist(), 3), "whole numbers in a tensor, got list"),
        (lambda: attribute_experts(model, text > 3, torch.tensor([1, 1])), "got torch.bool"),
        (lambda: attribute_experts(model, text, torch.tensor([1.0, 1.0])), "got torch.float32"),
        (lambda: attribute_experts(model, text[0], 3, level="head"), "unknown level 'head'"),
        (lambda: attribute_experts(model, text[0], 3, unembed=lambda x: 2 * model.head(x)), "give unembed="),
        (lambda: attribute_experts(model, text[0], 3, norm=nn.RMSNorm(WIDTH)), "norm= did not run"),
    ):
        with pytest.raises(UserError, match=words) as error:
            call()
        assert "\n" not in str(error.value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_a_replayed_choice_and_a_sharded_model_are_refused(text, one_process, user_error):
    model = build()
    with record(model) as tape:
        model(text)
    with feed(model, replay=tape), user_error("blocks.0.moe replays choices", "outside of feed"):
        attribute_experts(model, text[0], 3)
    with feed(model, mask=torch.ones(1, text.shape[1], dtype=torch.bool)):
        attribute_experts(model, text[0], 3)
    fully_shard(model.blocks[1].moe)
    with user_error("blocks.1.moe", "sharded over several processes", "take the whole model"):
        attribute_experts(model, text[0], 3)


def test_a_block_that_scales_what_its_layer_adds_is_refused(text):
    class Halved(DecoderBlock):
        def forward(self, x, cache=None):
            x = x + self.attention(self.attention_norm(x), cache)
            return x + 0.5 * self.moe(self.moe_norm(x))

    model = build()
    model.blocks[1] = Halved(model.blocks[1].moe, 2).double()
    with pytest.raises(UserError, match=r"around blocks.1.moe \(Halved\) does not add"):
        attribute_experts(model, text[0], 3)


def test_an_attribution_inside_a_block_is_of_the_experts_that_are_left(text):
    model = build()
    first = attribute_experts(model, text[0], 3).rows(1)[0]
    with block(model, {first["layer"]: [first["expert"]]}):
        rows = attribute_experts(model, text[0], 3).rows()
    assert not [row for row in rows if (row["layer"], row["expert"]) == (first["layer"], first["expert"])]
    assert len(rows) == 4


def test_a_model_keeps_its_modes_and_starts_from_any_seed():
    torch.manual_seed(shifted(3))
    model = language_moe(32, width=16, depth=2, num_experts=4, hidden=8).train()
    model.blocks[0].eval()
    attribute_experts(model, torch.tensor([1, 2]), 3)
    assert model.training
    assert not model.blocks[0].training


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "llama4", "deepseek_v3"])
def test_hugging_face_models_stock_swapped_and_in_half_precision(family):
    pytest.importorskip("transformers")
    from families import batch, stock_of

    model = stock_of(family)
    ids, target = batch(model)["input_ids"][:, :9], torch.tensor([5, 6])
    tables = {level: attribute_experts(model, ids, target, level=level) for level in ("expert", "neuron", "layer")}
    with torch.no_grad():
        own = model(input_ids=ids).logits[:, -1].log_softmax(-1)[[0, 1], target]
    torch.testing.assert_close(tables["expert"].log_prob, own, atol=1e-4, rtol=1e-4)
    assert {(tables[level].expert >= 0).any().item() for level in ("expert", "neuron")} == {True}
    swapped = swap_routers(model)
    again = attribute_experts(model, ids, target)
    swapped.undo()
    torch.testing.assert_close(again.gain, tables["expert"].gain, atol=1e-4, rtol=1e-3)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert attribute_experts(half, ids, target, level="layer").layers == tables["layer"].layers
