"""The gate that reads the bank's bases: its equations as float64 loops; layer and gate share one set of bases."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from spectralmoe import (
    Balanced,
    BasisScorer,
    Context,
    EigenExperts,
    FeedForward,
    MoE,
    Placement,
    Router,
    TopK,
    attach,
    load,
    record,
    save,
    shard_routers,
)
from spectralmoe.compression import prune, replicate
from spectralmoe.linalg import qr_retraction
from spectralmoe.sharding import full

N, D, E, R = 20, 12, 4, 3


def scorer_of(score, rank=R):
    bank = EigenExperts(E, D, rank)
    bank.right.data = qr_retraction(torch.randn(E, D, rank))  # not orthogonal to each other
    return BasisScorer(D, E, bank=bank, score=score)


def layer_of(score="energy", selector=None):
    scorer = scorer_of(score)
    return MoE(Router(scorer, selector or TopK(2)), scorer.bank)


def energy(bases, x):
    """||V_e' x||^2 / ||x||^2, one token and expert at a time."""
    return torch.stack([torch.stack([(v.T @ row).square().sum() / row.square().sum() for v in bases]) for row in x])


def cosine(bases, x, attended):
    def of(v, row, other):
        one, two = v.T @ row, v.T @ other
        return (one * two).sum() / (one.square().sum().sqrt() * two.square().sum().sqrt())

    return torch.stack([torch.stack([of(v, *pair) for v in bases]) for pair in zip(x, attended, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_value_and_gradient_are_those_of_the_equations(dtype, same):
    x, attended = (torch.randn(N, D, dtype=dtype, requires_grad=True) for _ in range(2))
    scorer = scorer_of("energy")
    bases = scorer.bank.to(dtype).right
    same(scorer(x), energy(bases.double(), x.double()), [x, bases])
    scorer = scorer_of("context")
    bases = scorer.bank.to(dtype).right
    got = scorer(x, context={"attended": attended})
    same(got, cosine(bases.double(), x.double(), attended.double()), [x, attended, bases])


def test_by_hand():
    bank = EigenExperts(2, 2, 1)
    bank.right.data = torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]])
    x, attended = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, -1.0]])
    assert BasisScorer(2, 2, bank=bank, score="energy")(x)[0].tolist() == pytest.approx([9 / 25, 16 / 25])
    assert BasisScorer(2, 2, bank=bank)(x, context={"attended": attended})[0].tolist() == pytest.approx([1, -1])


def test_experts_of_full_rank_score_alike(close):
    x, attended = (torch.randn(N, D, dtype=torch.float64) for _ in range(2))
    bank = EigenExperts(E, D, D).double()
    bank.right.data = qr_retraction(torch.randn(E, D, D, dtype=torch.float64))
    close(BasisScorer(D, E, bank=bank, score="energy")(x), torch.ones(N, E))
    cosines = BasisScorer(D, E, bank=bank)(x, context={"attended": attended})
    close(cosines, torch.nn.functional.cosine_similarity(x, attended)[:, None].expand(N, E))


def test_a_multiple_of_the_token_as_context_scores_one(close):
    scorer, x = scorer_of("context"), torch.randn(N, D, dtype=torch.float64)
    close(scorer(x, context={"attended": 3.5 * x}), torch.ones(N, E))


def test_a_token_of_zeros_gives_finite_numbers(gradients):
    x = torch.zeros(2, D, requires_grad=True)
    for score in ("energy", "context"):
        scorer = scorer_of(score)
        logits = scorer(x, context={"attended": torch.randn(2, D)})
        assert not logits.any()
        assert all(g.isfinite().all() for g in gradients(logits.sum(), [x, scorer.bank.right]))


def test_the_whole_layer_with_attended_context(close):
    layer = layer_of("context")
    x, attended = torch.randn(2, 5, D), torch.randn(2, 5, D)
    mask = torch.rand(2, 5) < 0.7
    context = Context(tokens={"attended": attended.masked_fill(~mask[..., None], torch.nan)})
    with record(layer) as tape:
        y = layer(x, mask=mask, context=context)
    logits = cosine(layer.experts.right, x.flatten(0, 1), attended.flatten(0, 1))
    close(tape[0].routing.logits[mask.flatten()], logits[mask.flatten()])
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    with torch.autocast("cpu", torch.bfloat16), record(layer) as tape:
        layer(x, context=Context(tokens={"attended": attended.bfloat16()}))
    assert tape[0].routing.logits.dtype == torch.float32


def test_one_line_for_each_mistake(user_error):
    bank, x = EigenExperts(E, D, R), torch.randn(N, D)
    with user_error("score 'angle'", "context, energy"):
        BasisScorer(D, E, bank=bank, score="angle")
    with user_error("BasisScorer reads 'attended'", "holds severity"):
        BasisScorer(D, E, bank=bank)(x, context={"severity": x})
    with user_error("BasisScorer reads 'attended'", "7 wide, not 12"):
        BasisScorer(D, E, bank=bank)(x, context={"attended": x[:, :7]})
    with user_error("BasisScorer", "has no experts to read yet"):
        BasisScorer(D, E, score="energy")(x)
    with user_error("BasisScorer", "EigenExperts", "FeedForward"):
        MoE(Router(BasisScorer(D, E), TopK(1)), FeedForward(E, D, 4))
    with user_error("BasisScorer", "D=12, E=3", "D=12, E=4"):
        BasisScorer(D, 3, bank=bank)
    with user_error("BasisScorer: bank= is not the layer's experts"):
        MoE(Router(BasisScorer(D, E, bank=bank), TopK(1)), EigenExperts(E, D, R))


# One set of bases


def shares(layer):
    return layer.router.scorer.bank is layer.experts


def test_the_bank_belongs_to_the_layer_alone():
    layer = layer_of()
    assert [name for name, _ in layer.named_parameters()] == ["experts.left", "experts.right", "experts.scale"]
    assert not list(layer.router.parameters())
    met = MoE(Router(BasisScorer(D, E, score="energy"), TopK(2)), EigenExperts(E, D, R))
    assert shares(met)


def test_saved_and_copied_layers_share_their_own_bases(tmp_path):
    layer = layer_of("energy", Balanced(2)).eval()
    save(layer, tmp_path)
    x = torch.randn(N, D)
    for twin in (load(tmp_path), copy.deepcopy(layer), nn.Sequential(copy.deepcopy(layer))[0]):
        assert shares(twin)
        assert twin.experts is not layer.experts
        assert torch.equal(twin(x), layer(x))
        before = layer.router(x).logits
        twin.experts.right.data.copy_(qr_retraction(torch.randn(E, D, R)))
        assert not torch.allclose(twin.router(x).logits, before)
        assert torch.equal(layer.router(x).logits, before)


def test_sharded_layers_share_their_bases(one_process, close):
    layer, x = layer_of(), torch.randn(N, D)
    twin = copy.deepcopy(layer)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    shard_routers(layer, mesh=mesh)
    fully_shard(layer, mesh=mesh)
    assert shares(layer)
    for one in (layer, twin):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        attach(optimizer, one)
        for _ in range(3):
            one(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, two in zip(layer.parameters(), twin.parameters(), strict=True):
        close(full(one).detach(), two.detach())


def test_a_bank_that_is_sharded_by_itself_is_refused(one_process, user_error):
    layer = layer_of()
    fully_shard(layer.experts, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with user_error("BasisScorer", "a sharded group of their own", "their layer or block"):
        layer(torch.randn(N, D))


@pytest.mark.parametrize("score", ["energy", "context"])
def test_compiled(score, close):
    torch.compiler.reset()
    layer, x = layer_of(score), torch.randn(N, D, requires_grad=True)
    context = Context(tokens={"attended": torch.randn(N, D)}) if score == "context" else None
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for one, two in zip(*(outcome(forward, layer, x, context) for forward in (compiled, layer)), strict=True):
        close(one, two)
    torch.compiler.reset()


def outcome(forward, layer, x, context):
    """Output and gradients."""
    y = forward(x, None, context)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def test_a_pruned_layer_reads_the_bases_that_are_left(close):
    layer, x = layer_of(), torch.randn(N, D)
    small = prune(layer, [0, 2, 3])
    assert shares(small)
    close(small.router(x).logits, layer.router(x).logits[:, [0, 2, 3]])


def test_a_bank_with_other_places_is_refused(user_error):
    with user_error("BasisScorer", "D=12, E=4", "E=5"):
        replicate(layer_of(), [1, 2, 1, 1])
    layer = layer_of()
    with user_error("BasisScorer", "takes no placement"):
        MoE(layer.router, layer.experts, placement=Placement([[1], [0], [2], [3]]))


def test_a_router_rests_where_its_bases_are_frozen():
    layer = layer_of("energy", Balanced(1, normalize=False))
    layer.experts.right.requires_grad_(False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach(optimizer, layer)
    layer(torch.randn(N, D)).sum().backward()
    optimizer.step()
    assert not layer.router.selector.bias.any()


def test_saliency_by_removal_asks_the_scorer_nothing():
    """The recorded logits say where the tokens go without an expert: no bank, no context."""
    layer = layer_of("context")
    context = Context(tokens={"attended": torch.randn(N, D)})
    with record(layer, keep=("input",)) as tape:
        layer(torch.randn(N, D), context=context)
    assert prune(layer, 3, by="removal", evidence=tape).router.num_experts == 3
