"""What the tests share: tolerances, small routers made from the tables, the check of a user's error."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from grids import pairings, pairwise
from seeds import shifted
from torch import Tensor

from spectralmoe import Router, TopK, UserError
from spectralmoe.scorers import SCORERS
from spectralmoe.selectors import SELECTORS

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2}
"""The only tolerances, relative and absolute: of the arithmetic that produced a result."""

# What a table entry needs besides the sizes (scorers) or at all (selectors). An entry that is not named needs nothing.
SCORER_ARGUMENTS: dict[str, dict[str, Any]] = {
    "linear": {"bias": True},
    "cosine": {"proj_dim": 5, "temperature": 0.3},
    "eigenbasis": {"rank": 5, "temperature": 0.1},
    "basis": {"score": "energy"},
}
NOT_ALONE = {"basis", "context"}
"""Scorers that need more than tokens, a bank or a context: they have tests of their own instead."""
SELECTOR_ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "topk": lambda: {"k": 2},
    "noisy_topk": lambda: {"k": 2},
    "expert_choice": lambda: {"capacity": 2.0},
    "topp": lambda: {"p": 0.5},
    "balanced": lambda: {"k": 2},
    "capacity": lambda: {"selector": TopK(2), "factor": 1.0},
    "cluster_dropout": lambda: {"selector": TopK(2), "groups": 1},
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests over the tables that they ask for, and over the factors of their marker ``grid``.

    ``scorer_name`` and ``selector_name`` stand for the tables (the scorers ``NOT_ALONE`` are left out). With more than
    one factor the default run takes a cover (tests/grids.py), and ``--full`` the product.
    """
    full, seed, factors = metafunc.config.getoption("--full"), shifted(0), {}
    tables = {"scorer_name": [name for name in SCORERS if name not in NOT_ALONE], "selector_name": list(SELECTORS)}
    asked = tuple(name for name in tables if name in metafunc.fixturenames)
    if len(asked) == 2:
        pairs = itertools.product(*tables.values()) if full else pairings(*tables.values(), seed=seed)
        factors[asked] = list(pairs)
    elif asked:
        factors[asked] = [(value,) for value in tables[asked[0]]]
    for marker in metafunc.definition.iter_markers("grid"):
        factors |= {(name,): [(value,) for value in values] for name, values in marker.kwargs.items()}
    if not factors:
        return
    names = [name for group in factors for name in group]
    rows = list(itertools.product(*factors.values())) if full else pairwise(*factors.values(), seed=seed)
    grid = [pytest.mark.grid] if len(names) > 1 else []
    flat = [list(itertools.chain(*row)) for row in rows]
    metafunc.parametrize(names, [pytest.param(*row, id="-".join(map(str, row)), marks=grid) for row in flat])


@pytest.fixture(scope="session")
def make_scorer() -> Callable[..., Any]:
    """``make_scorer(name, dim=12, num_experts=6)``: a small scorer from the table."""

    def make(name: str, dim: int = 12, num_experts: int = 6) -> Any:
        return SCORERS[name](dim, num_experts, **SCORER_ARGUMENTS.get(name, {}))

    return make


@pytest.fixture(scope="session")
def make_selector() -> Callable[..., Any]:
    """``make_selector(name)``: a selector from the table."""

    def make(name: str) -> Any:
        return SELECTORS[name](**SELECTOR_ARGUMENTS.get(name, dict)())

    return make


@pytest.fixture(scope="session")
def make_router(make_scorer: Any, make_selector: Any) -> Callable[..., Router]:
    """``make_router(scorer_name, selector_name, dim=12, num_experts=6)``."""

    def make(scorer_name: str, selector_name: str, dim: int = 12, num_experts: int = 6) -> Router:
        return Router(make_scorer(scorer_name, dim, num_experts), make_selector(selector_name))

    return make


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """``close(actual, expected, dtype=actual's)``: equal up to the tolerance of the arithmetic in ``dtype``."""

    def check(actual: Tensor, expected: Any, dtype: torch.dtype | None = None) -> None:
        tolerance = TOLERANCE[dtype or actual.dtype]
        expected = torch.as_tensor(expected).to(actual.dtype)
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)

    return check


@pytest.fixture(scope="session")
def gradients() -> Callable[..., list[Tensor]]:
    """``gradients(loss, tensors)``: the gradient of a scalar in each tensor, zeros where it takes no part."""

    def of(loss: Tensor, tensors: Any) -> list[Tensor]:
        tensors = list(tensors)
        if not loss.requires_grad:
            return [torch.zeros_like(t) for t in tensors]
        found = torch.autograd.grad(loss, tensors, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]

    return of


@pytest.fixture(scope="session")
def same(close: Any, gradients: Any) -> Callable[..., None]:
    """``same(actual, expected, inputs)``: equal in value and in the gradient of every input, up to ``close``."""

    def check(actual: Tensor, expected: Tensor, inputs: Any) -> None:
        inputs = list(inputs)
        close(actual, expected)
        direction = (torch.randn(actual.shape) / 4).to(actual.dtype)
        losses = [(values * direction.to(values.dtype)).sum() for values in (actual, expected)]
        for one, two in zip(*(gradients(loss, inputs) for loss in losses), strict=True):
            close(one, two, actual.dtype)

    return check


@pytest.fixture(scope="session")
def user_error() -> Callable[..., Any]:
    """``with user_error("word", ...)``: the block raises a UserError of one line that holds all words."""

    @contextmanager
    def expect(*words: str) -> Iterator[None]:
        with pytest.raises(UserError) as caught:
            yield
        line = str(caught.value)
        assert line
        assert len(line.splitlines()) == 1, line
        for word in words:
            assert word in line, line

    return expect


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone, for sharded parameters."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
