"""Likeness of experts: the definitions as loops and in numpy, and what must not matter."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seeds import generator

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
from spectralmoe.diagnostics import (
    cosine_matrix,
    duplicates,
    expert_outputs,
    linear_cka,
    mean_offdiagonal,
    similarity,
    subspace_overlap,
    watch,
    weight_cosine,
)

seeds = st.integers(0, 10**6)


def outputs_of(seed, experts=4, tokens=20, width=6):
    return torch.randn(experts, tokens, width, generator=generator(seed), dtype=torch.float64)


def rotation(width):
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]


def layer_of(bank, dim=6):
    with watch(MoE(Router(LinearScorer(dim, bank.num_experts), TopK(2)), bank)) as seen:
        return seen.layers[0]


def likeness(bank, x, among=None):
    """Mean squared cosine of the outputs of two experts, over pairs and tokens."""
    return mean_offdiagonal(cosine_matrix(expert_outputs(layer_of(bank, x.shape[1]), x, among))).value


# Outputs of a bank, as one number


def test_definition():
    bank, x = FeedForward(4, 6, 5, bias=True).double(), torch.randn(20, 6, dtype=torch.float64)
    for among in (None, [0, 2, 3]):
        chosen = range(4) if among is None else among
        squares = []
        for token in x:
            outputs = [bank.expert(token[None], e)[0].detach() for e in chosen]
            for i, a in enumerate(outputs):
                squares += [float((a @ b) ** 2 / (a @ a) / (b @ b)) for b in outputs[:i]]
        assert likeness(bank, x, among) == pytest.approx(sum(squares) / len(squares), rel=1e-6)


def test_independent_experts_come_to_one_over_the_width():
    bank = FeedForward(8, 64, 32)
    assert likeness(bank, torch.randn(200, 64)) == pytest.approx(1 / 64, rel=0.3)


def test_silent_experts_count_as_unlike():
    bank = FeedForward(2, 6, 5)
    bank.down.data[1] = 0
    assert likeness(bank, torch.randn(9, 6)) == 0.0


def test_too_few_to_compare_is_no_number():
    bank = FeedForward(3, 6, 5)
    assert likeness(bank, torch.randn(9, 6), [1]) is None
    assert likeness(bank, torch.randn(0, 6)) is None


def test_an_expert_that_is_not_there_is_refused(user_error):
    with user_error("expert_outputs", "-1", "3"):
        expert_outputs(layer_of(FeedForward(3, 6, 5)), torch.randn(9, 6), among=[-1])


# Outputs of a layer


def test_outputs_are_those_of_each_expert_for_all_tokens():
    bank, x = FeedForward(3, 6, 5), torch.randn(9, 6)
    layer = layer_of(bank)
    for among in (None, [2, 0], []):
        found = expert_outputs(layer, x, among)
        chosen = range(3) if among is None else among
        assert found.shape == (len(chosen), 9, 6)
        assert not found.requires_grad
        for row, e in zip(found, chosen, strict=True):
            assert torch.equal(row, bank.expert(x, e))
    layer.layer.experts.bfloat16()
    assert expert_outputs(layer, x.bfloat16()).dtype == torch.float32
    assert expert_outputs(layer, x[:0].bfloat16()).shape == (3, 0, 6)


# Squared cosines


@given(seed=seeds)
def test_cosines_by_loops(seed):
    outputs = outputs_of(seed)
    found = cosine_matrix(outputs)
    for i, j in np.ndindex(4, 4):
        pairs = zip(outputs[i], outputs[j], strict=True)
        squares = [float((a @ b) ** 2 / (a @ a) / (b @ b)) for a, b in pairs]
        assert float(found[i, j]) == pytest.approx(sum(squares) / 20, rel=1e-9)
    scale = torch.logspace(-3, 3, 80, dtype=torch.float64).reshape(4, 20, 1)
    torch.testing.assert_close(cosine_matrix(-scale * outputs @ rotation(6)), found)


# CKA


def cka_by_features(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    return norm(y.T @ x) ** 2 / norm(x.T @ x) / norm(y.T @ y)


def hsic(k, m):
    """Song et al., equation 5, as printed."""
    n, one = len(k), np.ones(len(k))
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    means = one @ k @ one * (one @ m @ one) / (n - 1) / (n - 2)
    return (np.trace(k @ m) + means - 2 / (n - 2) * one @ k @ m @ one) / n / (n - 3)


@given(seed=seeds, width=st.sampled_from([3, 40]))
def test_cka_by_definition(seed, width):
    outputs = outputs_of(seed, 3, 20, width) + 1
    biased, unbiased = linear_cka(outputs, unbiased=False), linear_cka(outputs)
    arrays = outputs.numpy()
    grams = [y @ y.T for y in arrays]
    for i, j in np.ndindex(3, 3):
        assert float(biased[i, j]) == pytest.approx(cka_by_features(arrays[i], arrays[j]), rel=1e-8)
        own = math.sqrt(hsic(grams[i], grams[i]) * hsic(grams[j], grams[j]))
        assert float(unbiased[i, j]) == pytest.approx(hsic(grams[i], grams[j]) / own, abs=1e-9)


@given(seed=seeds, unbiased=st.booleans())
def test_cka_does_not_see_shift_rotation_and_scale(seed, unbiased):
    outputs = outputs_of(seed)
    found = linear_cka(outputs, unbiased=unbiased)
    moved = torch.stack([(10 ** (e - 2)) * y @ rotation(6) + 5 * e for e, y in enumerate(outputs)])
    torch.testing.assert_close(linear_cka(moved, unbiased=unbiased), found, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found.diagonal(), torch.ones(4, dtype=torch.float64))
    assert (found.abs() <= 1 + 1e-9).all()


def test_only_the_unbiased_cka_tells_that_few_wide_outputs_are_unlike():
    outputs = torch.randn(20, 32, 512)
    assert mean_offdiagonal(linear_cka(outputs, unbiased=False)).value > 0.9
    found = linear_cka(outputs)
    assert abs(mean_offdiagonal(found).value) < 0.02
    assert float(found[0, 1:].std()) == pytest.approx(math.sqrt(2) / 32, rel=0.5)
    outputs[1] = 0.7 * outputs[0] + 0.1 * outputs[1]
    assert linear_cka(outputs)[0, 1] > 0.9


def test_no_cka():
    outputs = outputs_of(0)
    assert linear_cka(outputs[:, : similarity.CKA_TOKENS - 1]).isnan().all()
    assert linear_cka(outputs[:, : similarity.CKA_TOKENS]).isfinite().all()
    alike = torch.rand(100, 1, 6, dtype=torch.float64).expand(-1, 20, -1)  # every token the same
    outputs[2] = next(one for one in alike if (one - one.mean(0)).any())  # centred: 0 but for rounding
    for unbiased in (True, False):
        found = linear_cka(outputs, unbiased=unbiased)
        assert found[2].isnan().all()
        assert mean_offdiagonal(found).data == 3


# Subspaces


@given(seed=seeds, rank=st.integers(1, 5), sizes=st.sampled_from([(20, 6), (5, 12)]))
def test_subspaces_by_numpy(seed, rank, sizes):
    outputs = outputs_of(seed, 3, *sizes)
    found = subspace_overlap(outputs, rank)
    bases = [np.linalg.svd(y)[2][:rank] for y in outputs.numpy()]
    for i, j in np.ndindex(3, 3):
        assert float(found[i, j]) == pytest.approx(np.linalg.norm(bases[i] @ bases[j].T) ** 2 / rank, abs=1e-7)
    torch.testing.assert_close(subspace_overlap(1e-3 * outputs @ rotation(sizes[1]), rank), found, rtol=1e-6, atol=1e-6)


def test_subspaces_at_their_ends():
    x = torch.randn(30, 2)
    apart = torch.stack(
        [torch.cat([x, 0 * x], 1), torch.cat([0 * x, x], 1), torch.cat([x @ torch.randn(2, 2), 0 * x], 1)]
    )
    torch.testing.assert_close(
        subspace_overlap(apart, 2), torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.float64)
    )
    wide = torch.randn(20, 40, 256)
    assert mean_offdiagonal(subspace_overlap(wide, 8)).value == pytest.approx(8 / 256, rel=0.1)


def test_no_subspace(user_error):
    outputs = outputs_of(0)
    outputs[1, 2:] = 0
    outputs[3] = 0
    found = subspace_overlap(outputs, 3)
    assert found.isnan().sum() == 16 - 4
    assert found[0, 2].isfinite()
    assert subspace_overlap(outputs[:, :2], 3).isnan().all()
    assert subspace_overlap(outputs, 7).isnan().all()
    with user_error("subspace_overlap", "rank", "0"):
        subspace_overlap(outputs, 0)


# Weights


@pytest.mark.parametrize("block", [8, 2**22])
def test_weights_by_numpy(block, monkeypatch):
    monkeypatch.setattr(similarity, "_BLOCK", block)
    weights = torch.randn(4, 37)
    weights[3] = -2 * weights[0]
    rows = [w / np.linalg.norm(w) for w in weights.double().numpy()]
    found = weight_cosine(weights)
    assert found.numpy() == pytest.approx(np.array([[a @ b for b in rows] for a in rows]), abs=1e-12)
    assert float(found[0, 3]) == pytest.approx(-1)
    half = weights.bfloat16()
    assert torch.equal(weight_cosine(half), weight_cosine(half.double()))


def test_no_weights():
    weights = torch.randn(3, 5)
    weights[1] = 0
    assert weight_cosine(weights).isnan().sum() == 5
    assert weight_cosine(torch.empty(3, 0)).isnan().all()
    assert weight_cosine(torch.empty(0, 3)).shape == (0, 0)


# Pairs


@given(seed=seeds, experts=st.integers(1, 6))
def test_pairs(seed, experts):
    matrix = weight_cosine(outputs_of(seed, 1, experts, 4)[0])
    pairs = [(i, j) for i in range(experts) for j in range(i + 1, experts)]
    found = mean_offdiagonal(matrix)
    assert (found.data, found.unit) == (len(pairs), "pairs")
    if pairs:
        assert found.value == pytest.approx(sum(float(matrix[p]) for p in pairs) / len(pairs), abs=1e-12)
    else:
        assert found.value is None
    assert duplicates(matrix, 0.3) == [p for p in pairs if matrix[p] >= 0.3]


def test_unknown_pairs_are_neither_like_nor_unlike():
    matrix = torch.eye(3)
    matrix[0, 2] = matrix[2, 0] = math.nan
    assert mean_offdiagonal(matrix).data == 2
    assert duplicates(matrix, 0.0) == [(0, 1), (1, 2)]


def test_copies_are_found_and_no_data_is_no_likeness():
    bank, x = FeedForward(5, 6, 5), torch.randn(32, 6)
    for weight in (bank.up, bank.down):
        weight.data[4] = weight.data[1]
    layer = layer_of(bank)
    outputs = expert_outputs(layer, x)
    weights = torch.stack([layer.expert_weights(e) for e in range(5)])
    matrices = (cosine_matrix(outputs), linear_cka(outputs), subspace_overlap(outputs, 2), weight_cosine(weights))
    for matrix in matrices:
        assert duplicates(matrix, 0.999) == [(1, 4)]
    for matrix in (cosine_matrix(outputs[:, :0]), linear_cka(outputs[:, :0]), subspace_overlap(outputs[:, :0], 2)):
        assert matrix.shape == (5, 5)
        assert mean_offdiagonal(matrix).value is None


def test_outputs_that_are_not_finite_have_no_subspace(close):
    y = torch.randn(3, 20, 6)
    y[1, 4, 2] = math.nan
    found = subspace_overlap(y, 2)
    assert found[1].isnan().all()
    assert found[:, 1].isnan().all()
    close(found[0, 2], subspace_overlap(y[[0, 2]], 2)[0, 1])
