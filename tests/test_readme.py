"""The README's example runs, and what it names exists."""

import re
from pathlib import Path

import pytest

from spectralmoe.cli.app import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_library_example_runs(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    assert len(code.splitlines()) <= 20
    exec(compile(code, "README.md", "exec"), {})
    assert "sigma" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["README.md", "docs/compare.md", "docs/architecture.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_verbs_in_the_readme_exist(capsys):
    for verb in re.findall(r"^\| `(\w+)", README, re.M):
        if verb != "verb":
            assert run([verb, "--help"]) == 0
