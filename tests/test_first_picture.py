"""benchmarks/first_picture.py types what README says, and waits for what ``make demo`` leaves."""

from __future__ import annotations

import doctest
import re
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from pages import ROOT, blocks

from spectralmoe.json_files import read_json

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*-first-picture.json"))


@pytest.fixture
def script():
    spec = spec_from_file_location("first_picture", ROOT / "benchmarks" / "first_picture.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_commands_are_those_of_readme(script):
    first = next(block.text for block in blocks("README.md") if block.kind == "sh")
    typed = [line.partition("#")[0].strip() for line in first.splitlines()]
    assert tuple(typed[: len(script.README_COMMANDS)]) == script.README_COMMANDS
    picture = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("*Made by"))
    assert f"`{script.README_COMMANDS[-1]}`" in picture


def test_what_it_measures(script, tmp_path, monkeypatch):
    def typed(words, where):
        for name in script.STAGES.values() if words[0] == "make" else ():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_text("x" * 1000)
        return 2.0, "Downloading a.whl (3 MB)"

    (tmp_path / "clone").mkdir()
    monkeypatch.setattr(script, "type_command", typed)
    found = script.first_picture(tmp_path / "clone")
    assert found["commands"] == {"git clone": 2.0, "make demo": 2.0}
    assert (found["number_of_commands"], found["seconds"], found["picture_bytes"]) == (2, 4.0, 1000)
    assert found["downloaded_mb"] == 3.0
    assert found["installed_mb"] == pytest.approx(0.002)  # two of the files lie in .venv
    assert list(found["stages"]) == list(script.STAGES)
    with pytest.raises(SystemExit, match=r"has \.venv among its files"):
        script.first_picture(tmp_path / "clone")


def test_downloads_are_added_up(script):
    assert doctest.testmod(script).attempted > 0
    assert doctest.testmod(script).failed == 0


def test_stages_end_with_files_of_the_makefile(script):
    rule = re.search(r"^demo: (\S+)\n.* --out (\S+)", (ROOT / "Makefile").read_text(), re.M)
    assert list(script.STAGES.values()) == [".venv/pyvenv.cfg", rule[1], f"{rule[2]}/comparison.svg"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_what_is_stored_adds_up(path, script):
    found = read_json(path)
    assert list(found["commands"]) == ["git clone", *script.README_COMMANDS]
    assert found["number_of_commands"] == len(found["commands"])
    assert found["seconds"] == pytest.approx(sum(found["commands"].values()))
    assert sum(found["stages"].values()) <= found["seconds"]
    assert list(found["stages"]) == list(script.STAGES)
