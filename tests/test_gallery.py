"""The gallery: every picture is small, is on the page once, and comes from the page's own commands."""

from __future__ import annotations

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from pages import ROOT

IMAGES = ROOT / "docs" / "images"
PAGE = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")


@pytest.fixture
def script():
    spec = spec_from_file_location("gallery", IMAGES / "gallery.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pictures_of_the_page_are_those_of_the_script(script):
    shown = re.findall(r"^!\[[^\]]+\]\(images/(\S+)\)$", PAGE, re.M)
    assert sorted(shown) == sorted([*script.DRAWN, *script.PARTS])


def test_pictures_are_small():
    sizes = {path.name: path.stat().st_size for path in IMAGES.iterdir() if path.suffix in (".png", ".svg")}
    assert {name: size for name, size in sizes.items() if size > 300_000} == {}
    assert sum(sizes.values()) < 1_000_000


def test_sources_are_written_by_commands_of_the_page(script):
    commands = script.page_commands()
    for source in [*script.DRAWN.values(), *(page for page, *_ in script.PARTS.values())]:
        folder = source.rpartition("/")[0]
        assert any(command.endswith((f"--out {folder}", f"--out {source}")) for command in commands), source


def test_a_sample_that_is_right_here_gives_way(script, tmp_path):
    command = "spectralmoe adapt correct M --sample test:0 --out runs/corrected  # note"
    plain = [sys.executable, "-m", *command.partition("  #")[0].split()]
    assert script.words_of(command, tmp_path) == plain
    (tmp_path / "runs" / "wrong").mkdir(parents=True)
    for number in (104, 12):
        (tmp_path / "runs" / "wrong" / f"test-{number}_label-3_predicted-5.png").touch()
    assert script.words_of(command, tmp_path) == [word.replace("test:0", "test:12") for word in plain]
    wrong = command.replace("test:0", "test:104")
    assert "test:104" in script.words_of(wrong, tmp_path)
    assert script.words_of("python a.py b", tmp_path) == [sys.executable, "a.py", "b"]
