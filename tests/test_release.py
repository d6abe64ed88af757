"""What a release says of itself agrees: versions, the page of the index, the floors, the promises of SECURITY.md."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import spectralmoe

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_version():
    """It stands in version.py alone; the citation and the newest heading of the changelog follow."""
    version = re.escape(spectralmoe.__version__)
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "src/spectralmoe/version.py"
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(), re.M)
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert re.fullmatch(rf"{version} \((unreleased|\d{{4}}-\d\d-\d\d)\)", headings[0])


def test_page_of_a_package_index_has_no_broken_picture_or_link():
    hook = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    text = "".join((ROOT / fragment["path"]).read_text() for fragment in hook["fragments"])
    before = len(text)
    for change in hook["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    assert "*Made by" not in text  # the caption goes with its picture
    assert "docs/compare.md" in text  # pages stay named
    assert len(text) > before / 2


RUNS_WITH = ("data", "datasets", "plots", "vision", "restore", "text", "hf", "lora", "cluster", "slurm")
"""The extras that ``make test-min`` installs."""


def _release(version: str) -> tuple[int, ...]:
    """2.0 and 2.0.0 are one release."""
    numbers = [int(number) for number in version.split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def test_bounds_are_the_oldest_versions_that_are_tested():
    lines = (ROOT / "constraints-min.txt").read_text().splitlines()
    tested = dict(re.findall(r"^([\w.-]+)={2,3}([\d.]+)", "\n".join(lines), re.M))
    extras = PROJECT["project"]["optional-dependencies"]
    named = [*PROJECT["project"]["dependencies"], *(line for extra in RUNS_WITH for line in extras[extra])]
    bounds = dict(line.split(">=") for line in named)
    assert {name: _release(tested[name]) for name in bounds} == {name: _release(low) for name, low in bounds.items()}
    assert {line.split("==")[0] for line in lines[: lines.index("")] if "==" in line} == set(bounds)  # the upper part
    for extra in extras:  # the same bound wherever a package is named
        for line in extras[extra]:
            name, _, low = line.partition(">=")
            assert low == bounds.get(name, low), (extra, line)


def test_the_lowest_environment_has_these_extras():
    recipe = re.search(r"MIN_INSTALL\) -e \"\.\[(.*?)\]\"", (ROOT / "Makefile").read_text()).group(1)
    assert sorted(recipe.split(",")) == sorted(RUNS_WITH)


def test_typed_and_licensed():
    assert (Path(spectralmoe.__file__).parent / "py.typed").is_file()
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert not [line for line in PROJECT["project"]["classifiers"] if line.startswith("License")]  # as PEP 639 wants it


@pytest.mark.parametrize("word", ["trust_remote_code=True", "allow_pickle=True", "weights_only=False"])
def test_no_file_is_trusted(word):
    assert not [path for path in (ROOT / "src").rglob("*.py") if word in path.read_text()]


def test_issue_forms_are_whole():
    yaml = pytest.importorskip("yaml")
    forms = list((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 3
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert form["name"]
        assert form["description"]
        assert all(item["attributes"]["label"] for item in form["body"])
