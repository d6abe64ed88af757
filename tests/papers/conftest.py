"""What the cards' tests share: a card's modules, and an executor that works here and now."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from types import ModuleType
from typing import Any

import pytest
import torch


class Here(Executor):
    """Runs a job at once, in this process, and counts them."""

    def __init__(self) -> None:
        self.jobs = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.jobs += 1
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.fixture(scope="session")
def here() -> type[Here]:
    """``here()``: an executor for a card."""
    return Here


@pytest.fixture(scope="module")
def card(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The card in the test module's ``CARD`` folder, with its own modules, found as its command finds them."""
    folder = str(request.module.CARD)
    before, threads = set(sys.modules), torch.get_num_threads()
    sys.path.insert(0, folder)
    import card as module

    yield module
    sys.path.remove(folder)
    for name in set(sys.modules) - before:
        if folder in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    torch.set_num_threads(threads)
