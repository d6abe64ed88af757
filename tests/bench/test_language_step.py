"""benchmarks/language_step.py compares what is equal: with transformers' block the decoder gives the same logits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from spectralmoe import LinearScorer, Router, TopK

pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "language_step.py"


def test_transformers_block_gives_what_ours_gives():
    spec = importlib.util.spec_from_file_location("language_step", SCRIPT)
    step = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(step)
    ours = step.built({**step.SIZES, "depth": 2}, lambda d, e: Router(LinearScorer(d, e), TopK(2, normalize=True)))
    theirs = step.with_mixtral(ours, "eager")
    assert step.unlike(ours, theirs, 16) is None
    with torch.no_grad():
        theirs.blocks[0].moe.layer.experts.down_proj.mul_(2)
    assert step.unlike(ours, theirs, 16) is not None
