"""How experts are made of an MLP: each method by its equation."""

from __future__ import annotations

import pytest
import torch
from seeds import generator
from torch.nn import functional as F

from spectralmoe.hf.upcycling import METHODS
from spectralmoe.hf.upcycling.dense import Mlp


def mlp_of(hidden=40, width=12, dtype=torch.float64):
    draw = generator(1)
    shapes = [(hidden, width), (hidden, width), (width, hidden)]
    return Mlp(*(0.3 + torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes))


def output(mlp, x):
    """W_down(silu(W_gate x) * W_up x), one hidden unit at a time."""
    return sum(
        F.silu(x @ gate)[:, None] * (x @ up)[:, None] * down
        for gate, up, down in zip(*mlp[:2], mlp.down.T, strict=True)
    )


def experts_of(name, number, count=4, mlp=None):
    mlp, draw = mlp or mlp_of(), generator(2)
    return [METHODS[name].expert(mlp, e, number, draw) for e in range(count)]


def test_copies_are_the_mlp():
    mlp = mlp_of()
    assert all(
        torch.equal(one, whole) for expert in experts_of("copy", 0) for one, whole in zip(expert, mlp, strict=True)
    )


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_drop_redraws_the_same_units_of_all_matrices(ratio):
    mlp = mlp_of()
    redrawn = []
    for gate, up, down in experts_of("drop", ratio, mlp=mlp):
        changed = [(gate != mlp.gate), (up != mlp.up), (down.T != mlp.down.T)]
        units = [matrix.any(1).nonzero().flatten().tolist() for matrix in changed]
        assert units[0] == units[1] == units[2]
        assert len(units[0]) == int(ratio * 40)
        assert all(matrix[units[0]].all() for matrix in changed)
        redrawn.append(tuple(units[0]))
    assert ratio in (0.0, 1.0) or len(set(redrawn)) == 4


def test_drop_keeps_mean_and_spread_of_what_it_replaces():
    """Mean and standard deviation of 40000 draws, within six standard errors."""
    hidden, width = 400, 200
    mlp = mlp_of(hidden, width)
    gate, up, down = METHODS["drop"].expert(mlp, 0, 0.5, generator(3))
    units = (gate != mlp.gate).any(1)
    for new, old in ((gate[units], mlp.gate[units]), (up[units], mlp.up[units]), (down[:, units], mlp.down[:, units])):
        error = float(old.std()) / old.numel() ** 0.5
        assert abs(float(new.mean() - old.mean())) < 6 * error
        assert abs(float(new.std() - old.std())) < 6 * error


def test_noise_is_relative_to_each_matrix():
    mlp = mlp_of(400, 200)
    mlp = Mlp(mlp.gate, 10 * mlp.up, mlp.down)
    one, two = experts_of("noise", 0.1, 2, mlp)
    for value, other, whole in zip(one, two, mlp, strict=True):
        size = float((value - whole).std() / whole.std())
        assert abs(size - 0.1) < 0.005
        assert not torch.equal(value, other)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_of_a_copy_add_up_to_the_mlp(shards, close):
    mlp, x = mlp_of(), torch.randn(7, 12, dtype=torch.float64)
    experts = experts_of("virtual", shards, 2 * shards, mlp)
    assert all(expert.gate.shape == (40 // shards, 12) for expert in experts)
    whole = output(mlp, x)
    for copy in (experts[:shards], experts[shards:]):
        close(sum(output(expert, x) for expert in copy) / shards, whole)  # each has the weight 1/G


def test_shards_by_hand():
    mlp = Mlp(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]), torch.tensor([[5.0, 6.0]]))
    first, second = experts_of("virtual", 2, 2, mlp)
    assert [value.tolist() for value in first] == [[[1.0]], [[3.0]], [[10.0]]]
    assert [value.tolist() for value in second] == [[[2.0]], [[4.0]], [[12.0]]]


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_is_kept_and_the_mlp_stays(name):
    mlp = mlp_of(dtype=torch.bfloat16)
    before = [value.clone() for value in mlp]
    for expert in experts_of(name, 2 if METHODS[name].splits else 0.5, mlp=mlp):
        assert {value.dtype for value in expert} == {torch.bfloat16}
        assert all(value.isfinite().all() for value in expert)
    assert all(torch.equal(value, old) for value, old in zip(mlp, before, strict=True))
