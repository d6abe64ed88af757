"""Sharded tensors are known by what they are, and nobody else pays for them."""

from __future__ import annotations

import subprocess
import sys

import torch

from spectralmoe.sharding import assign_, full, is_sharded, sharded_as


def test_a_plain_tensor_stays_what_it_is():
    x = torch.randn(3, requires_grad=True)
    assert not is_sharded(x)
    assert full(x) is x
    assert sharded_as(x, torch.zeros(3)) is x
    assign_(target := torch.zeros(3), x)
    assert torch.equal(target, x)
    assert not target.requires_grad


def test_the_library_does_not_import_what_only_sharded_models_need():
    code = (
        "import sys, spectralmoe.cli, spectralmoe.experiments.compare; print('torch.distributed.tensor' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
