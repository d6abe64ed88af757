"""Megatron-core in a process of its own: to import it changes what torch loads, and its tests stand in for CUDA."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PLACES = ["tests/integrations/megatron", "src/spectralmoe/integrations/megatron.py"]


@pytest.mark.full
@pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron-core")
def test_routers_in_a_process_of_its_own(request):
    options = request.config.option
    chosen = ["--seed", str(options.seed), "--threads", str(torch.get_num_threads())]
    chosen += ["--full", "all"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--megatron", *chosen, *PLACES]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout
    assert "megatron" not in sys.modules
