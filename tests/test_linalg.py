"""Spectra against the singular value decomposition; the algebra of core.md 9.3, items 2 and 3; retraction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.distributed import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from spectralmoe.linalg import EXACT_LIMIT, qr_retraction, sigma_max, spectrum, stable_rank, top_right
from spectralmoe.sharding import assign_, full

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 9), (9, 5), (8, 8)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def orthonormal_rows(rows: int, width: int) -> torch.Tensor:
    return torch.linalg.qr(double(width, rows)).Q.T.contiguous()


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sigma_max_is_the_largest_singular_value(shape, dtype, close):
    matrix = torch.randn(*shape, dtype=dtype)
    close(sigma_max(matrix), torch.linalg.svdvals(matrix.double())[0])


@shapes
def test_gradient_of_sigma_max_is_the_outer_product_of_the_singular_vectors(shape, close, gradients):
    matrix = double(*shape).requires_grad_()
    u, _, vh = torch.linalg.svd(matrix.detach())
    close(gradients(sigma_max(matrix), [matrix])[0], torch.outer(u[:, 0], vh[0]))


@shapes
def test_stable_rank_is_its_definition(shape, close, gradients):
    matrix = double(*shape).requires_grad_()
    u, s, vh = torch.linalg.svd(matrix.detach())
    squares = s.square().sum()
    close(stable_rank(matrix), squares / s[0] ** 2)
    slope = 2 * matrix / s[0] ** 2 - 2 * squares / s[0] ** 3 * torch.outer(u[:, 0], vh[0])
    close(gradients(stable_rank(matrix), [matrix])[0], slope)


@pytest.mark.parametrize("function", [sigma_max, stable_rank, spectrum])
def test_gradcheck(function):
    assert gradcheck(function, (double(4, 6).requires_grad_(),))


def test_by_hand():
    matrix = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    assert float(sigma_max(matrix)) == pytest.approx(4)
    assert float(stable_rank(matrix)) == pytest.approx(25 / 16)


def test_stable_rank_counts_orthonormal_rows_and_sees_through_equal_ones(close):
    close(stable_rank(orthonormal_rows(5, 9)), 5.0)
    close(stable_rank(double(1, 9).expand(5, 9)), 1.0)


@shapes
def test_the_gradient_of_the_stable_rank_is_orthogonal_to_the_matrix(shape, close, gradients):
    matrix = double(*shape).requires_grad_()
    (grad,) = gradients(stable_rank(matrix), [matrix])
    close((grad * matrix).sum(), 0.0)


@pytest.mark.parametrize("scale", [-1.0, 1e-18, 1e-6, 1e6, 1e15], ids=str)
def test_stable_rank_ignores_scale(scale, close):
    matrix = torch.randn(5, 9)
    close(stable_rank(scale * matrix), stable_rank(matrix))
    close(sigma_max(scale * matrix) / abs(scale), sigma_max(matrix))


@pytest.mark.parametrize("function", [sigma_max, stable_rank])
def test_a_zero_matrix_has_value_and_gradient_zero(function, gradients):
    matrix = torch.zeros(3, 5, requires_grad=True)
    value = function(matrix)
    assert value.item() == 0
    assert torch.equal(gradients(value, [matrix])[0], torch.zeros(3, 5))


@pytest.mark.parametrize("function", [sigma_max, stable_rank])
def test_a_matrix_without_rows_has_value_zero(function):
    assert function(torch.zeros(0, 5)).item() == 0


def spread_out(rows: int, columns: int, second: float) -> torch.Tensor:
    """A matrix with the singular values 2, 2 * second, and others from there down to 0.5."""
    size = min(rows, columns)
    s = torch.cat([torch.tensor([2.0]).double(), torch.linspace(2 * second, 0.5, size - 1, dtype=torch.float64)])
    return (torch.linalg.qr(double(rows, size)).Q * s) @ torch.linalg.qr(double(columns, size)).Q.T


LARGE = EXACT_LIMIT + 20


@pytest.mark.parametrize("shape", [(LARGE, LARGE + 10), (LARGE + 40, LARGE)], ids=["wide", "tall"])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_large_matrices(shape, scale, same):
    matrix = (scale * spread_out(*shape, second=0.99)).float().requires_grad_()
    v = top_right(matrix)
    assert not v.requires_grad
    assert float((matrix.detach().double() @ v.double()).norm()) / scale == pytest.approx(2, rel=1e-5)
    same(sigma_max(matrix), torch.linalg.svdvals(matrix.double())[0].float(), [matrix])


def test_large_matrices_with_equal_singular_values(close):
    hadamard = torch.ones(1, 1)
    while len(hadamard) <= LARGE:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    rows = hadamard[1 : LARGE + 1]  # each sums to 0
    close(sigma_max(rows), len(hadamard) ** 0.5)
    close(stable_rank(rows), LARGE)


def test_large_zero_and_broken_matrices():
    zero = torch.zeros(LARGE, LARGE)
    assert sigma_max(zero).item() == 0
    assert not top_right(zero).any()
    assert sigma_max(zero.index_fill(0, torch.tensor([3]), torch.nan)).isnan()


sizes = st.tuples(st.integers(1, 12), st.integers(1, 12)).map(lambda s: (max(s), min(s)))


@given(size=sizes, seed=st.integers(0, 1000))
def test_retraction_is_orthonormal_idempotent_and_keeps_signs(size, seed, close):
    torch.manual_seed(seed)
    basis = double(*size)
    q = qr_retraction(basis)
    close(q.T @ q, torch.eye(size[1]))
    close(qr_retraction(q), q)
    assert ((basis * q).sum(0) > 0).all()
    close(q @ (q.T @ basis), basis)  # the same space


def test_retraction_moves_little_for_a_small_step():
    q = qr_retraction(torch.randn(30, 8))
    step = 1e-3 * torch.randn(30, 8)
    assert float((qr_retraction(q + step) - q).norm()) < 3 * float(step.norm())


def test_unit_vectors_are_kept_by_hand(close):
    basis = torch.tensor([[-2.0, 1.0], [0.0, 3.0], [0.0, 0.0]])
    close(qr_retraction(basis), torch.tensor([[-1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))


def test_sharded_parameters_are_gathered_and_written_back(one_process, close):
    whole = torch.randn(6, 4)
    sharded = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)]).requires_grad_()
    stable_rank(sharded).backward()
    dense = whole.clone().requires_grad_()
    stable_rank(dense).backward()
    close(full(sharded.grad), dense.grad)
    assign_(sharded, qr_retraction(sharded))
    close(full(sharded).detach(), qr_retraction(whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-38, 1e-25, 1e25, 1e37])
def test_spectra_at_extreme_scale(size, dtype):
    base = torch.randn(6, 10)
    matrix = (base * size).to(dtype).requires_grad_()
    u, values, vh = torch.linalg.svd(matrix.detach().double())
    sigma, rank = spectrum(matrix)
    assert float(sigma.detach() / values[0]) == pytest.approx(1, rel=1e-5)
    assert float(rank.detach()) == pytest.approx(float((values / values[0]).square().sum()), rel=1e-4)
    (slope,) = torch.autograd.grad(sigma, matrix)
    torch.testing.assert_close(slope.double(), torch.outer(u[:, 0], vh[0]), rtol=0.02, atol=0.02)
    square = qr_retraction(matrix.mT).double()
    torch.testing.assert_close(square.mT @ square, torch.eye(6).double(), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_has_no_spectrum(bad):
    matrix = torch.randn(6, 10)
    matrix[1, 2] = bad
    for value in (*spectrum(matrix), qr_retraction(matrix.T)):
        assert value.isnan().all()
