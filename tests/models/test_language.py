"""The language model: against the equations of one block, causal, with and without a cache, saved, compiled."""

import copy
import math
import pickle

import pytest
import torch
from seeds import generator, shifted
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spectralmoe import (
    BasisScorer,
    EigenExperts,
    LinearScorer,
    Router,
    Soft,
    TopK,
    attach,
    load,
    penalty,
    record,
    retract,
    save,
)
from spectralmoe.experiments.compare.look import active_parameters
from spectralmoe.models import LanguageMoE, language_moe
from spectralmoe.models.language import Cache, _draw, rotated
from spectralmoe.regularizers import load_balance
from spectralmoe.selectors import Threshold
from spectralmoe.spec import describe
from spectralmoe.terms import Term

SIZES = {"width": 16, "depth": 2, "heads": 2, "num_experts": 4, "hidden": 8}
V = 30


def top2(dim, experts):
    return Router(LinearScorer(dim, experts), TopK(2))


def all_experts(dim, experts):
    return Router(LinearScorer(dim, experts), Soft())


def made(**changes):
    torch.manual_seed(shifted(0))
    model = language_moe(V, **{"router": top2, **SIZES, **changes}).eval()
    for parameter in model.parameters():  # embeddings and norms away from their first values, weights that matter
        nn.init.normal_(parameter, std=0.5)
    return model


def tokens_of(batch=2, length=7):
    return torch.randint(V, (batch, length), generator=generator(1))


def normed(x, weight):
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def turned(vector, position):
    """Pairs (i, i + d/2) as complex numbers, turned by position * 10000^(-2i/d)."""
    half = len(vector) // 2
    angles = [position * 10_000 ** (-2 * i / len(vector)) for i in range(half)]
    cos, sin = (torch.tensor([f(angle) for angle in angles], dtype=vector.dtype) for f in (math.cos, math.sin))
    a, b = vector[:half], vector[half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin])


def slow_block(block, x):
    """One block on x (S, D), one token, one head, one expert at a time."""
    (s, dim), heads, size = x.shape, block.heads, x.shape[1] // block.heads
    attention = block.attention
    rows = [attention.qkv.weight @ normed(x[t], block.attention_norm.weight) for t in range(s)]
    after = []
    for t in range(s):
        mixed = []
        for h in range(heads):
            q, keys, values = (
                [row[part * dim + h * size : part * dim + (h + 1) * size] for row in rows] for part in range(3)
            )
            seen = [turned(q[t], t) @ turned(keys[u], u) / size**0.5 for u in range(t + 1)]
            weights = torch.stack(seen).softmax(0)
            mixed.append(sum(w * value for w, value in zip(weights, values, strict=False)))
        after.append(x[t] + attention.out.weight @ torch.cat(mixed))
    out = []
    for row in after:
        token, bank = normed(row, block.moe_norm.weight), block.moe.experts
        scores = (block.moe.router.scorer.weight @ token).softmax(0)
        y = torch.zeros_like(row)
        for e in scores.topk(2).indices.tolist():
            gate, up = (bank.up[e] @ token).chunk(2)
            y = y + scores[e] * (bank.down[e] @ (F.silu(gate) * up))
        out.append(row + y)
    return torch.stack(out)


def test_a_block_is_its_equations_in_value_and_gradient(same):
    block = made(depth=1).blocks[0].double()
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    same(block(x[None])[0], slow_block(block, x), [x, *block.parameters()])


def attentive(**changes):
    """A model whose routers read what the attention gave."""

    def router(dim, experts):
        return Router(BasisScorer(dim, experts), Threshold(2))

    model = made(router=router, experts=lambda experts, dim, _: EigenExperts(experts, dim, 4), **changes).double()
    retract(model)
    return model


def test_a_layer_that_reads_it_gets_what_the_attention_gave(same):
    """Logits are cosines of token and attention output in the bases; a layer that does not read it gets no context."""
    block, x = attentive(depth=1).blocks[0], torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    with record(block) as tape:
        block(x)
    attended = block.attention(block.attention_norm(x))
    tokens, bases = block.moe_norm(x + attended), block.moe.experts.right
    logits = [F.cosine_similarity(tokens @ basis, attended @ basis, dim=-1) for basis in bases]
    same(tape[0].routing.logits, torch.stack(logits, -1).flatten(0, 1), [x, bases])
    plain = made(depth=1)
    with record(plain) as tape:
        plain(tokens_of())
    assert tape[0].context is None


def test_layers_that_read_attention_work_with_a_cache_and_saved(tmp_path, close):
    model, tokens, cache = attentive(), tokens_of(), Cache()
    close(torch.cat([model(part, cache) for part in tokens.split([3, 1, 3], 1)], 1), model(tokens))
    save(model, tmp_path)
    assert torch.equal(load(tmp_path)(tokens), model(tokens))


@pytest.mark.full
def test_layers_that_read_attention_compile_whole(close):
    torch.compiler.reset()
    model, tokens = attentive(depth=1), tokens_of()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(compiled(tokens), model(tokens))
    torch.compiler.reset()


def test_the_model_is_embedding_blocks_norm_and_the_tied_matrix(close):
    model, tokens = made().double(), tokens_of(1)
    x = model.embedding.weight[tokens[0]]
    for block in model.blocks:
        x = slow_block(block, x)
    logits = torch.stack([model.embedding.weight @ normed(row, model.norm.weight) for row in x])
    close(model(tokens)[0], logits)


def test_precision_changes_no_norm(close):
    """A norm whose epsilon follows its dtype would."""
    torch.manual_seed(shifted(0))
    model, tokens = language_moe(V, **SIZES, router=all_experts).eval(), tokens_of()
    close(copy.deepcopy(model).double()(tokens).float(), model(tokens))


def test_rotary_products_depend_on_the_distance_alone(close):
    q, k = torch.randn(2, 6, dtype=torch.float64)
    products = [[rotated(q[None], 3 + t) @ rotated(k[None], 3 + t + d).T for d in range(3)] for t in (0, 90)]
    for near, far in zip(*products, strict=True):
        close(near, far)
    assert abs(float(products[0][0] - products[0][1])) > 1e-3


def test_a_later_token_changes_no_earlier_logits(close):
    model, tokens = made(), tokens_of()
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % V
    before, after = model(tokens), model(changed)
    close(after[:, :4], before[:, :4])
    assert all(bool((after[:, t] - before[:, t]).abs().max() > 1e-3) for t in range(4, 7))


@pytest.mark.parametrize("pieces", [[7], [1] * 7, [3, 1, 3]], ids=str)
def test_logits_with_a_cache_are_those_without(close, pieces):
    model, tokens, cache = made().double(), tokens_of(), Cache()
    parts = [model(part, cache) for part in tokens.split(pieces, 1)]
    close(torch.cat(parts, 1), model(tokens))


def test_generation_with_a_cache_gives_the_same_tokens():
    model, tokens = made().double(), tokens_of()
    drawn = [
        model.generate(tokens, 9, temperature=0.7, top_k=5, generator=generator(2), cached=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*drawn)
    assert torch.equal(drawn[0][:, :7], tokens)
    greedy = [model.generate(tokens, 9, temperature=0, cached=cached) for cached in (True, False)]
    assert torch.equal(*greedy)
    assert torch.equal(greedy[0], model.generate(tokens, 9, top_k=1))
    one_by_one = tokens
    for _ in range(9):
        one_by_one = torch.cat([one_by_one, model(one_by_one)[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy[0], one_by_one)


def test_generation_draws_from_the_softmax_of_the_top_k():
    """Of a model whose logits are those of the embedding alone, by counts."""
    model = made()
    model.norm.weight.data.zero_()
    many = model.generate(torch.zeros(3000, 1, dtype=torch.int64), 1, generator=generator(3))[:, 1]
    assert len(many.unique()) == V
    assert int(many.bincount(minlength=V).max()) < 3000 / V * 2
    few = model.generate(torch.zeros(50, 1, dtype=torch.int64), 1, temperature=1e-4, generator=generator(3))
    assert few.shape == (50, 2)


def test_generation_leaves_modes_and_takes_only_what_makes_sense(user_error):
    model = made().train()
    model.blocks[0].eval()
    assert model.generate(tokens_of(), 0).shape == (2, 7)
    model.generate(tokens_of(), 1)
    assert model.training
    assert not model.blocks[0].training
    with user_error("a token to start from"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64), 1)
    with user_error("temperature", "-1"):
        model.generate(tokens_of(), 1, temperature=-1.0)
    with user_error("temperature", "nan"):
        model.generate(tokens_of(), 1, temperature=math.nan)
    with user_error("top_k", "0"):
        model.generate(tokens_of(), 1, top_k=0)


def test_what_no_model_is(user_error):
    with user_error("depth must be at least 1"):
        LanguageMoE([], V)
    with user_error("width D=16", "3 heads"):
        made(heads=3)
    with user_error("equally wide", "[8, 16]"):
        LanguageMoE([*made().blocks, *made(width=8).blocks], V)
    with user_error("tokens (B, S) of integers", "float32"):
        made()(torch.randn(2, 3))
    with user_error("tokens (B, S) of integers", "bool"):
        made()(torch.ones(2, 3, dtype=torch.bool))
    for wrong in (-1, V, 2**40):
        with user_error(f"token {wrong} is not in the vocabulary", f"0 to {V - 1}"):
            made()(torch.tensor([[0, wrong, 1]]))
    with user_error(f"token {V} is not in the vocabulary"):
        made().generate(torch.tensor([[V]]), 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_tokens_of_any_integer_type(dtype):
    model, tokens = made().eval(), tokens_of()
    assert torch.equal(model(tokens.to(dtype)), model(tokens))
    assert torch.equal(model.generate(tokens.to(dtype), 3, temperature=0), model.generate(tokens, 3, temperature=0))
    assert model(tokens[:0]).shape == (0, 7, V)


def test_temperatures_at_both_ends():
    logits = torch.tensor([[1e4, 0.0, 1e4 - 1.0, -1e4]]).expand(200, 4)
    for tiny in (1e-45, 5e-324, 1e-10):
        assert _draw(logits, tiny, None, generator(0)).unique().tolist() == [0]
    assert _draw(logits, math.inf, None, generator(0)).unique().tolist() == [0, 1, 2, 3]
    assert _draw(logits, math.inf, 2, generator(0)).unique().tolist() == [0, 2]


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_is_the_same(tied, tmp_path):
    model, tokens = made(tied=tied), tokens_of()
    save(model, tmp_path, meta={"length": 7})
    loaded = load(tmp_path)
    assert torch.equal(loaded(tokens), model(tokens))
    assert (loaded.head.weight is loaded.embedding.weight) == tied
    assert describe(loaded.blocks[0].moe) == describe(model.blocks[0].moe)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens), model(tokens))
        assert (other.head.weight is other.embedding.weight) == tied


def loss_of(model, tokens):
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())


def test_terms_and_the_selection_bias_see_the_tokens_of_all_layers():
    torch.manual_seed(shifted(0))
    model, tokens = language_moe(V, **SIZES), tokens_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, model)
    with record(model) as tape:
        loss = loss_of(model, tokens)
    extra, parts = penalty(tape, {"balance": Term(load_balance, 0.1)})
    (loss + extra).backward()
    optimizer.step()
    assert [item.name for item in tape] == ["blocks.0.moe", "blocks.1.moe"]
    assert parts["balance"] > 0
    for block in model.blocks:
        assert block.moe.router.scorer.weight.grad.abs().sum() > 0
        assert block.moe.router.selector.bias.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


class Again(nn.Module):
    """A block that is computed again in the backward pass."""

    def __init__(self, block):
        super().__init__()
        self.attention, self.block = block.attention, block

    def forward(self, x, cache=None):
        return checkpoint(self.block, x, cache, use_reentrant=False)


def test_checkpointed_blocks_give_the_same_gradients_and_one_record_a_layer(close):
    model, tokens = made().double().train(), tokens_of()
    twin = LanguageMoE([Again(block) for block in copy.deepcopy(model).blocks], V).double()
    twin.embedding.weight.data.copy_(model.embedding.weight)
    twin.norm.weight.data.copy_(model.norm.weight)
    for one in (model, twin):
        with record(one) as tape:
            loss_of(one, tokens).backward()
        assert len(list(tape)) == 2
    for block, other in zip(model.blocks, twin.blocks, strict=True):
        for a, b in zip(block.parameters(), other.block.parameters(), strict=True):
            close(b.grad, a.grad)


def test_autocast_runs_attention_in_16_bits_and_routers_in_32():
    model, tokens = made(router=all_experts), tokens_of()
    with torch.autocast("cpu", torch.bfloat16), record(model) as tape:
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert all(item.routing.logits.dtype == torch.float32 for item in tape)
    assert float((logits.float() - model(tokens)).abs().max().detach()) < 0.1 * float(
        model(tokens).abs().max().detach()
    )


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.full])]
)
def test_the_model_compiles_whole(backend, close):
    torch.compiler.reset()
    model, tokens = made(depth=1).train(), tokens_of()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    close(compiled(tokens), model(tokens))
    loss_of(model, tokens).backward()
    plain = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss_of(compiled, tokens).backward()
    for parameter, grad in zip(model.parameters(), plain, strict=True):
        close(parameter.grad, grad)
    torch.compiler.reset()


def test_rows_start_alike_and_the_dense_twin_is_as_wide_as_the_chosen_experts():
    models = []
    for router in (top2, lambda d, e: Router(LinearScorer(d, e, bias=True), TopK(1))):
        torch.manual_seed(shifted(0))
        models.append(language_moe(V, **SIZES, router=router).state_dict())
    shared = [name for name in models[0] if ".router." not in name]
    assert len(shared) == 15
    assert all(torch.equal(models[0][name], models[1][name]) for name in shared)
    sparse = language_moe(V, **SIZES, router=top2)
    dense = language_moe(V, **{**SIZES, "num_experts": 1, "hidden": 16})
    rows = 2 * (4 - 1) * 16  # of two routing matrices
    assert active_parameters(sparse, tokens_of(1)) - active_parameters(dense, tokens_of(1)) == rows
    assert active_parameters(dense, tokens_of(1)) == sum(p.numel() for p in dense.parameters())


def test_embeddings_start_so_wide_that_a_tied_head_gives_logits_of_variance_one():
    torch.manual_seed(shifted(0))
    model = language_moe(500, width=64, depth=1, num_experts=2, hidden=4)
    assert float(model.embedding.weight.std()) == pytest.approx(64**-0.5, rel=0.05)
    assert model.head.weight is model.embedding.weight
    logits = model(torch.arange(500).view(20, 25))
    assert float(logits.std()) == pytest.approx(1, rel=0.2)


def test_a_model_learns_to_repeat():
    """A window of period 3 is predicted from its second period on."""
    torch.manual_seed(shifted(0))
    model = language_moe(V, **SIZES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    tokens = torch.tensor([3, 7, 11]).repeat(4)[None]
    first = float(loss_of(model, tokens).detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1 * first
    assert model.generate(tokens[:, :3], 6, temperature=0)[0].tolist() == [3, 7, 11] * 3
