"""MPOExperts: the product of cores written again, dense networks taken apart exactly, and who shares what."""

import copy
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from spectralmoe import LinearScorer, MoE, Router, TopK, load, save
from spectralmoe.experts import FeedForward, MPOExperts
from spectralmoe.experts.matrix_products import MatrixProducts
from spectralmoe.spec import build, describe

COUNTS = torch.tensor([3, 0, 4])
THREE, FIVE = ((2, 3, 2), (3, 2, 3)), ((2, 1, 3, 1, 2), (1, 3, 2, 1, 3))
FACTORS = pytest.mark.parametrize("factors", [THREE, FIVE], ids=["three", "five"])


def bank_of(factors=THREE, **options):
    return MPOExperts(3, 12, 18, factors=factors, **options)


def slow_matrix(products, e):
    """W[i_1 .. i_n, j_1 .. j_n] = T_1[i_1, j_1] ... T_n[i_n, j_n], one entry at a time."""
    own = [[core[e] for core in cores] for cores in (products.left, products.right)]
    cores = [*own[0], products.central, *own[1]]
    return torch.stack(
        [
            torch.stack(
                [
                    torch.linalg.multi_dot([core[:, a, b] for core, a, b in zip(cores, i, j, strict=True)])[0, 0]
                    for j in product(*map(range, products.columns))
                ]
            )
            for i in product(*map(range, products.rows))
        ]
    )


def slow_rows(bank, x):
    """Row by row, in the order of ``COUNTS``."""
    experts = torch.arange(3).repeat_interleave(COUNTS).tolist()
    matrices = {e: (slow_matrix(bank.up, e), slow_matrix(bank.down, e)) for e in set(experts)}
    return torch.stack([matrices[e][1] @ F.gelu(matrices[e][0] @ row) for e, row in zip(experts, x, strict=True)])


@FACTORS
@pytest.mark.parametrize("bond", [None, 3])
def test_value_and_gradients_are_those_of_the_equation(factors, bond, same):
    bank = bank_of(factors, bond=bond).double()
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    same(bank(x, COUNTS), slow_rows(bank, x), [x, *bank.parameters()])


def test_by_hand():
    """Cores of one number each but for the central one: the matrix is C times both."""
    products = MatrixProducts(2, (1, 2, 1), (1, 2, 1))
    with torch.no_grad():
        products.left[0].copy_(torch.tensor([2.0, 3.0]).reshape(2, 1, 1, 1, 1))
        products.right[0].copy_(torch.tensor([5.0, 7.0]).reshape(2, 1, 1, 1, 1))
        products.central.copy_(torch.tensor([[1.0, 0.0], [-1.0, 2.0]]).reshape(1, 2, 2, 1))
    assert products.matrices().tolist() == [[[10.0, 0.0], [-10.0, 20.0]], [[21.0, 0.0], [-21.0, 42.0]]]


@FACTORS
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=["fp32", "fp64"])
def test_with_full_bonds_every_expert_is_the_dense_network(factors, dtype, most):
    up, down, x = (torch.randn(*shape, dtype=dtype) for shape in ((18, 12), (12, 18), (6, 12)))
    bank = bank_of(factors).to(dtype)
    assert bank.from_dense(up, down) is bank
    wanted = F.gelu(x @ up.T) @ down.T
    for e in range(3):
        assert float((bank.expert(x, e) - wanted).detach().abs().max()) <= most * float(wanted.abs().max())
        assert torch.equal(bank.expert(x, e), bank.expert(x, 0))


def test_a_product_of_one_number_a_bond_is_kept_by_any_bond_and_a_cut_keeps_the_largest_values(close):
    left, middle, right = (torch.randn(i, j, dtype=torch.float64) for i, j in ((3, 2), (2, 3), (3, 2)))
    products = MatrixProducts(2, THREE[1], THREE[0], bond=1).double()
    whole = torch.kron(left, torch.kron(middle, right))
    products.fill(whole)
    close(products.matrices().detach(), whole.expand(2, -1, -1))
    u, _, v = torch.linalg.svd(torch.randn(4, 4, dtype=torch.float64))
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    cut = MatrixProducts(1, (2, 1, 2), (2, 1, 2), bond=2).double()
    legs = (u * values) @ v  # (i1 j1, i3 j3)
    cut.fill(legs.reshape(2, 2, 2, 2).transpose(1, 2).reshape(4, 4))
    found = cut.matrices().detach().reshape(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    close(torch.linalg.svdvals(found), values * torch.tensor([1, 1, 0, 0]))


def test_numbers_are_those_of_the_formula_and_most_stand_in_the_central_core():
    bank = MPOExperts(8, 64, 128, factors=((4, 4, 4), (4, 8, 4)))
    count = sum(p.numel() for p in bank.parameters())
    assert count == 2 * (8192 + 8 * (256 + 256))
    assert count / sum(p.numel() for p in FeedForward(8, 64, 128).parameters()) == 0.1875
    assert [core.numel() for core in bank.central] == [8192, 8192]
    assert sum(value.numel() for value in bank.expert_parameters(3).values()) == 2 * 2 * 256
    narrow = MPOExperts(8, 64, 128, factors=((4, 4, 4), (4, 8, 4)), bond=8)
    assert sum(p.numel() for p in narrow.parameters()) == 2 * (8 * 32 * 8 + 8 * 2 * 128)
    large = MatrixProducts(1, (4, 4, 8, 6, 4), (3, 4, 4, 4, 4))
    assert [core.numel() for core in (*large.left, large.central, *large.right)] == [144, 36864, 2359296, 147456, 256]


def test_the_central_core_gets_the_sum_of_the_experts_gradients(same):
    """dL/dC is the sum over experts of dL/dW_e, contracted with their own cores."""
    bank, x = bank_of().double(), torch.randn(7, 12, dtype=torch.float64)
    matrices = [part.matrices().detach().requires_grad_() for part in (bank.up, bank.down)]
    blocks = x.split(COUNTS.tolist())
    y = torch.cat([F.gelu(block @ up.T) @ down.T for block, up, down in zip(blocks, *matrices, strict=True)])
    probe = torch.randn_like(y)
    dense = torch.autograd.grad((y * probe).sum(), matrices)
    central = torch.autograd.grad((bank(x, COUNTS) * probe).sum(), bank.central)
    for part, gradient, found in zip((bank.up, bank.down), dense, central, strict=True):
        legs = [each for pair in zip(part.rows, part.columns, strict=True) for each in pair]
        split = gradient.reshape(3, *part.rows, *part.columns).permute(0, 1, 4, 2, 5, 3, 6).reshape(3, *legs)
        left, right = part.left[0].squeeze(1), part.right[0].squeeze(-1)
        torch.testing.assert_close(torch.einsum("eabcdfg,eabx,eyfg->xcdy", split, left, right), found)


def test_experts_start_apart_and_as_large_as_linear_layers():
    bank = MPOExperts(4, 32, 64, bond=8)
    for part, fan_in in ((bank.up, 32), (bank.down, 64)):
        matrices = part.matrices().detach()
        sizes = matrices.square().mean((1, 2)) * 3 * fan_in
        assert torch.all((sizes > 0.8) & (sizes < 1.25)), sizes
        assert all(
            float(F.cosine_similarity(matrices[0].flatten(), w.flatten(), dim=0).abs()) < 0.3 for w in matrices[1:]
        )
    assert bank.factors == ((2, 4, 4), (4, 4, 4))


def test_taken_apart_the_central_cores_stay(close):
    bank = bank_of()
    chosen = bank.select([2, 0])
    for bits, place in ((2, 0), (0, 1)):
        assert torch.equal(chosen.up.matrices()[place], bank.up.matrices()[bits])
    assert torch.equal(chosen.up.central, bank.up.central)
    assert chosen.up.central.data_ptr() != bank.up.central.data_ptr()
    mean = bank.averaged([[0, 1], [2]], [[1, 3], [1]])
    close(mean.down.left[0][0], 0.25 * bank.down.left[0][0] + 0.75 * bank.down.left[0][1])
    assert (mean.num_experts, len(mean.up.matrices())) == (2, 2)


def test_costs_are_those_of_two_plain_matrices():
    assert bank_of().costs().tolist() == FeedForward(3, 12, 18).costs().tolist()


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        (((2, 6), (3, 6)), ("odd number",)),
        (((2, 3, 2), (3, 3, 3)), ("H=18", "(2, 3, 3)")),
        (((2, 3, 2), (3, 2, 3, 1, 1)), ("as many of each",)),
        ((), ("D=12",)),
        (((2.0, 3, 2), (3, 2, 3)), ("D=12",)),
    ],
)
def test_factors_that_do_not_fit_are_refused(factors, words, user_error):
    with user_error("MPOExperts: factors", *words):
        bank_of(factors)


def test_other_mistakes_are_refused(user_error):
    with user_error("unknown activation", "swiglu", "gelu"):
        bank_of(activation="swiglu")
    with user_error("MPOExperts", "bond", "0"):
        bank_of(bond=0)
    with user_error("from_dense", "(H, D)", "(18, 12)", "(12, 18)"):
        bank_of().from_dense(torch.ones(12, 18), torch.ones(18, 12))


def test_saved_copied_and_described(tmp_path):
    layer = MoE(Router(LinearScorer(12, 3), TopK(2)), bank_of(bond=4)).eval()
    save(layer, tmp_path)
    x = torch.randn(10, 12)
    assert torch.equal(load(tmp_path)(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    spec = describe(layer.experts)
    assert spec["factors"] == [[2, 3, 2], [3, 2, 3]]
    assert build(spec).factors == THREE
