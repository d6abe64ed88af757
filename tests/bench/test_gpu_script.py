"""benchmarks/gpu.sh: refused in one line without a device; tiny on a CPU it goes through all of its steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a script for bash")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        capture_output=True, text=True, env=environment, check=False, timeout=600,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would run")
def test_without_a_device_it_says_so_in_one_line(tmp_path):
    result = run(tmp_path / "out")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [result.stderr.strip()]
    assert "no CUDA device" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_its_steps_fit_into_nine_minutes():
    limits = [int(line.split()[2]) for line in SCRIPT.read_text(encoding="utf-8").splitlines() if line[:5] == "step "]
    assert len(limits) == 5
    assert sum(limits) + 5 * len(limits) <= 540 - 30  # what starting, joining and reading take


@pytest.mark.full
def test_tiny_it_writes_all_suites_and_one_table(tmp_path):
    result = run("--smoke", tmp_path)
    assert result.returncode in (0, 1), result.stderr
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    ends = {step["name"]: step["end"] for step in found["steps"]}
    assert [*ends] == ["tests", "layer", "router", "decode", "step"]
    for name, suite in found["suites"].items():
        assert suite["settings"]["suites"] == [name]
        assert suite["complete"] == (ends[name] == "done")
    assert found["suites"].keys() >= {name for name, end in ends.items() if end == "done"} - {"tests"}
    table = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in table for name in ends)
