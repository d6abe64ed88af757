"""What the tests share: tolerances, small routers made from the tables, the check of a user's error, a browser."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import small_parts
import torch
from browser_tools import start_chromium
from grids import crosses, pairwise
from seeds import shifted
from small_parts import NOT_ALONE
from torch import Tensor

from spectralmoe import Router, UserError
from spectralmoe.experts import EXPERTS
from spectralmoe.regularizers import REGULARIZERS
from spectralmoe.scorers import SCORERS
from spectralmoe.selectors import SELECTORS

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2}
"""The only tolerances, relative and absolute: of the arithmetic that produced a result."""

CENTRES = ("linear", ("topk", "balanced"))
"""The scorer that meets every selector, and the selectors that meet every scorer."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests over the tables that they ask for, and over the factors of their marker ``grid``.

    ``scorer_name``, ``selector_name``, ``bank_name`` and ``regularizer_name`` stand for the tables (the scorers
    ``NOT_ALONE`` are left out). With more than one factor the default run takes a cover (tests/grids.py), and
    ``--full`` the product.
    """
    full, seed, factors = metafunc.config.getoption("--full"), shifted(0), {}
    scorers, selectors = [name for name in SCORERS if name not in NOT_ALONE], list(SELECTORS)
    tables = {"scorer_name": scorers, "selector_name": selectors}
    asked = tuple(name for name in tables if name in metafunc.fixturenames)
    if len(asked) == 2:
        pairs = itertools.product(scorers, selectors) if full else crosses(scorers, selectors, CENTRES, seed=seed)
        factors[asked] = list(pairs)
    elif asked:
        factors[asked] = [(value,) for value in tables[asked[0]]]
    for name, table in {"bank_name": EXPERTS, "regularizer_name": REGULARIZERS}.items():
        if name in metafunc.fixturenames:
            factors[name,] = [(value,) for value in table]
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
    return small_parts.make_scorer


@pytest.fixture(scope="session")
def make_selector() -> Callable[..., Any]:
    """``make_selector(name)``: a selector from the table."""
    return small_parts.make_selector


@pytest.fixture(scope="session")
def make_bank() -> Callable[..., Any]:
    """``make_bank(name, dim=8, num_experts=4)``: a small bank from the table."""
    return small_parts.make_bank


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


@pytest.fixture(scope="session")
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Headless Chromium."""
    chrome = start_chromium()
    if chrome is None:
        absent = pytest.fail if request.config.getoption("--require-chromium") else pytest.skip
        absent("needs Chromium: apt-get install chromium chromium-driver")
    yield chrome
    chrome.quit()
