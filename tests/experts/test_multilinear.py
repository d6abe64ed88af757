"""The multilinear bank against its materialised tensor, as a float64 loop over all indices."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch

from spectralmoe import LinearScorer, MoE, Router, Soft, TopK, load, save
from spectralmoe.experiments.compare.look import active_flops, active_parameters
from spectralmoe.experts import FeedForward, MultilinearExperts
from spectralmoe.selectors import Entmax
from spectralmoe.spec import build, describe

E, D, O = 4, 5, 3  # noqa: E741
COUNTS = torch.tensor([3, 0, 2, 4])


@pytest.fixture(params=["cp", "tr"])
def form(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["bias", "plain"])
def bank(request, form):
    return MultilinearExperts(E, D, rank=3, form=form, bond=2, out=O, bias=request.param)


def entry(bank, n, i, o):
    """W[n, o, i], one product at a time: i = D is the bias."""
    u2 = bank.input_factor[:, i] if i < D else bank.input_bias
    if bank.form == "cp":
        return sum(bank.output_factor[o, r] * bank.expert_factor[n, r] * u2[r] for r in range(bank.rank))
    two, three = u2.view(bank.bond, bank.rank), bank.output_factor[o].view(bank.bond, bank.rank)
    return sum(
        bank.expert_factor[n, a, b] * two[b, c] * three[a, c]
        for a, b, c in product(range(bank.bond), range(bank.bond), range(bank.rank))
    )


def materialised(bank):
    """(E, O, D) or, with a bias, (E, O, D + 1)."""
    width = D if bank.input_bias is None else D + 1
    return torch.stack(
        [torch.stack([torch.stack([entry(bank, n, i, o) for i in range(width)]) for o in range(O)]) for n in range(E)]
    )


def extended(x, width):
    return torch.cat([x, x.new_ones(len(x), 1)], 1) if width > D else x


def test_mix_is_the_sum_of_the_materialised_experts(bank, same, close):
    bank = bank.double()
    x = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    gates = torch.randn(7, E, dtype=torch.float64, requires_grad=True)
    tensor = materialised(bank)
    expected = torch.einsum("ne,eoi,ni->no", gates, tensor, extended(x, tensor.shape[2]))
    found = bank.mix(x, gates)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    same(found, expected, [x, gates, *bank.parameters()])
    close(copy.deepcopy(bank).float().mix(x.detach().float(), gates.detach().float()), expected.detach())


def test_rows_and_single_experts_are_slices(bank, same):
    bank = bank.double()
    x = torch.randn(9, D, dtype=torch.float64, requires_grad=True)
    tensor = materialised(bank)
    chosen = torch.arange(E).repeat_interleave(COUNTS)
    z = extended(x, tensor.shape[2])
    same(bank(x, COUNTS), torch.einsum("noi,ni->no", tensor[chosen], z), [x, *bank.parameters()])
    same(bank.expert(x, 2), z @ tensor[2].T, [x, *bank.parameters()])


def test_by_hand():
    bank = MultilinearExperts(2, 2, rank=1, out=1)
    for name, value in {
        "expert_factor": [[2.0], [-1.0]],
        "input_factor": [[1.0, 3.0]],
        "input_bias": [4.0],
        "output_factor": [[10.0]],
    }.items():
        getattr(bank, name).data = torch.tensor(value)
    x = torch.tensor([[1.0, 1.0]])  # [1 + 3 + 4] = 8, times 10, times the expert's factor
    assert [bank.expert(x, e).item() for e in range(2)] == [160.0, -80.0]
    assert bank.mix(x, torch.tensor([[0.5, 0.25]])).item() == 60.0


def test_parameters_are_the_formulas():
    sizes = {"num_experts": 16, "dim": 12, "rank": 5, "out": 7}
    cp, tr = MultilinearExperts(**sizes), MultilinearExperts(**sizes, form="tr", bond=3)
    assert sum(p.numel() for p in cp.parameters()) == 5 * (16 + 12 + 1 + 7)
    assert sum(p.numel() for p in tr.parameters()) == 3 * 16 * 3 + 3 * 13 * 5 + 5 * 7 * 3
    assert MultilinearExperts(4, 8, rank=3).output_factor.shape == (8, 3)


def test_a_hierarchy_of_two_is_one_bank_under_the_kronecker_gate(close):
    one, two = torch.rand(7, 3).softmax(-1), torch.rand(7, 4).softmax(-1)
    upper, lower = torch.randn(3, 5), torch.randn(4, 5)
    bank = MultilinearExperts(12, D, rank=5, out=O)
    bank.expert_factor.data = (upper[:, None] * lower).flatten(0, 1)
    x = torch.randn(7, D)
    coordinates = x @ bank.input_factor.T + bank.input_bias
    nested = ((one @ upper) * (two @ lower) * coordinates) @ bank.output_factor.T
    close(bank.mix(x, (one[:, :, None] * two[:, None]).flatten(1)), nested)


def test_experts_start_near_one_linear_map(form):
    bank = MultilinearExperts(400, D, rank=4, form=form, bond=2)
    mean = bank.expert_factor.mean(0).detach()
    expected = torch.ones(4) if form == "cp" else torch.eye(2)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.3)
    if form == "tr":
        assert not bank.expert_factor[:, [0, 1], [1, 0]].any()


def test_means_of_experts_are_means_of_their_matrices(bank, close):
    bank = bank.double()
    tensor = materialised(bank).detach()
    merged = bank.averaged([[0, 2], [3]], [[1, 3], [1]])
    x = torch.randn(4, D, dtype=torch.float64)
    z = extended(x, tensor.shape[2])
    close(merged.expert(x, 0), z @ (0.25 * tensor[0] + 0.75 * tensor[2]).T)
    kept = bank.select([3, 0])
    assert kept.num_experts == 2
    assert torch.equal(kept.expert(x, 0), bank.expert(x, 3))


@pytest.mark.parametrize("selector", [Entmax, Soft, lambda: TopK(2)], ids=["entmax", "soft", "topk"])
@pytest.mark.parametrize("dispatch", ["auto", "dense", "grouped", "loop"])
def test_a_layer_may_be_of_another_width(form, selector, dispatch, close, gradients):
    layer = MoE(Router(LinearScorer(D, E), selector()), MultilinearExperts(E, D, rank=4, form=form, out=O))
    layer.dispatch = dispatch
    x, mask = torch.randn(3, 4, D), torch.rand(3, 4) < 0.6
    mask[0, 0], mask[0, 1] = True, False
    broken = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    y = layer(broken, mask=mask)
    assert y.shape == (3, 4, O)
    assert not y[~mask].any()
    routing = layer.router(x.flatten(0, 1))
    outputs = torch.stack([layer.experts.expert(x.flatten(0, 1), e) for e in range(E)], 1)
    expected = (routing.gates()[:, :, None] * outputs).sum(1).view(3, 4, O)
    close(y[mask], expected[mask])
    found = gradients(y.square().sum(), [broken, *layer.parameters()])
    assert all(g.isfinite().all() for g in found)
    assert not found[0][~mask].any()
    for n in (0, 1):
        assert layer(x[0, :n]).shape == (n, O)
    assert layer(x[:0]).shape == (0, 4, O)


def test_no_tokens_leave_gradients_of_zero(form):
    for selector in (Entmax(), TopK(2)):
        layer = MoE(Router(LinearScorer(D, E), selector), MultilinearExperts(E, D, rank=4, form=form, out=O))
        layer(torch.randn(0, D)).sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_the_dense_sum_costs_little_more_than_one_expert(form):
    bank = MultilinearExperts(64, 8, rank=4, form=form, bond=2)
    own = 64 * 4
    shared = 8 * bank.output_factor.shape[1] + 8 * bank.output_factor.shape[1] + (2 * 2 * 4 if form == "tr" else 0)
    assert bank.costs().tolist() == [2 * shared] * 64
    assert bank.mix_cost() == 2 * (shared + own)
    layer = MoE(Router(LinearScorer(8, 64), Entmax()), bank)
    assert active_flops(layer, torch.randn(1, 3, 8)) == 3 * (bank.mix_cost() + 2 * 8 * 64)
    plain = FeedForward(4, 8, 5)
    assert plain.mix_cost() == plain.costs().sum()
    pair = MoE(Router(LinearScorer(8, 64), TopK(2)), bank)
    rest = sum(p.numel() for p in pair.parameters()) - own
    assert active_parameters(pair, torch.randn(1, 3, 8)) == rest + own * 2 // 64


def test_saved_copied_and_described(tmp_path):
    layer = MoE(Router(LinearScorer(D, E), Entmax(1.25)), MultilinearExperts(E, D, rank=4, out=O, bias=False)).eval()
    save(layer, tmp_path)
    x = torch.randn(10, D)
    for twin in (load(tmp_path), copy.deepcopy(layer)):
        assert torch.equal(twin(x), layer(x))
    spec = describe(layer.experts)
    assert spec == {"type": "multilinear", "num_experts": E, "dim": D, "rank": 4, "form": "cp"} | {
        "bond": 4,
        "out": O,
        "bias": False,
    }
    assert build(spec).input_bias is None


def test_mistakes_are_named(user_error):
    with user_error("form of MultilinearExperts", "'pc'", "cp"):
        MultilinearExperts(2, 8, rank=3, form="pc")
    for name in ("rank", "bond", "out"):
        with user_error("MultilinearExperts", name, "at least 1", "got 0"):
            MultilinearExperts(2, 8, **{"rank": 3, name: 0})
