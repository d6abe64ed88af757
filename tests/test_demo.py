"""Two comparisons that the documents show: the demo, and the one on 10,000 pictures of clothes."""

import re
import shlex
from pathlib import Path

import pytest

from spectralmoe.cli.app import run
from spectralmoe.data.image_data import FASHION_SYSTEM
from spectralmoe.json_files import read_json

ROOT = Path(__file__).parent.parent


def compare(out: Path, *arguments: str) -> list[dict]:
    assert run(["compare", *arguments, "--out", str(out)]) == 0
    return read_json(out / "results.json")["cells"]


@pytest.mark.full
def test_demo_as_the_makefile_runs_it(tmp_path, capsys):
    options = re.search(r"^DEMO \?= (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1)
    cells = compare(tmp_path / "out", "--data", "mnist5k", *shlex.split(options))
    assert len(cells) == 15
    assert all(cell["accuracy"] >= 90 for cell in cells), [(c["router"], c["accuracy"]) for c in cells]
    assert all(cell["trials"] == 50 and cell["success"] >= 0.95 for cell in cells)
    assert str(tmp_path / "out" / "results.json") in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.skipif(not FASHION_SYSTEM.is_dir(), reason="fashion-mnist is not installed")
def test_fashion_mnist(tmp_path):
    options = "--data fashion-mnist --train-size 10000 --depths 2 --seeds 2"
    cells = compare(tmp_path / "out", *options.split())
    assert len(cells) == 10
    assert all(cell["accuracy"] >= 80 for cell in cells), [(c["router"], c["accuracy"]) for c in cells]
