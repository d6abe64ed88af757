"""What the cards' tests share: a card's modules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def card(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The plan in the test module's ``CARD`` folder, with the modules beside it, found as its command finds them."""
    folder = str(request.module.CARD)
    before, threads = set(sys.modules), torch.get_num_threads()
    sys.path.insert(0, folder)
    yield import_module("plan")
    sys.path.remove(folder)
    for name in set(sys.modules) - before:
        if folder in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    torch.set_num_threads(threads)
