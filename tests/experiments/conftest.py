"""What tests of cards share."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture
def no_plan(monkeypatch):
    """No module called plan is loaded, before and after."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("plan", None)
    yield
    sys.modules.pop("plan", None)
