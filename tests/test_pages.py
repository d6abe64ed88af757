"""Every block and link of README and docs: code runs, commands and settings are read, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec

import pytest
import torch
import typer
from gloo_ranks import environment
from pages import CARDS, PAGES, ROOT, anchors, blocks, commands

from spectralmoe.cli.app import app, run

RUN_BY = {
    "README.md": "test_readme.py",
    "CONTRIBUTING.md": "test_adding.py",
    "docs/inspect.md": "test_readme.py",
    "docs/vision.md": "test_readme.py",
    "docs/llm.md": "test_llm_docs.py",
    "docs/restoration.md": "training/test_restoration.py",
}
"""Pages whose code other tests run, with what it needs."""
IMPORTS_ALONE = ("docs/parallel.md", "docs/machines.md", "docs/drop-ins.md")
"""Pages whose code wants several processes or other frameworks; tests/parallel and tests/integrations run the like."""
SHOWN = ("", "text")
"""Blocks that are no code."""


@pytest.mark.parametrize("page", [page for page in PAGES if page not in (*RUN_BY, *IMPORTS_ALONE)])
def test_code_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    if page == "docs/certificate.md":
        from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
        from spectralmoe.models import sr_moe

        stage = sr_moe(3, features=4, width=8, depth=1, num_experts=4, hidden=8).eval().stages[0]
        layer = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 8))
        names = {"layer": layer, "stage": stage, "tokens": torch.randn(5, 8), "z": torch.randn(5, 8)}
    for block in blocks(page):
        if block.kind == "python":
            exec(compile(block.text, page, "exec"), names)


def test_code_that_is_not_run_imports_what_is_there():
    """In a process of its own, which other frameworks may change as they like."""
    code = "\n".join(block.text for page in IMPORTS_ALONE for block in blocks(page) if block.kind == "python")
    lines = re.findall(r"^(?:from|import) \w.*$", code, re.M)
    there = [line for line in lines if find_spec(line.split()[1].partition(".")[0])]  # some frameworks are not
    guarded = [f"with suppress(UserError): {line}" for line in there]  # a module of ours says which one it needs
    script = ["from contextlib import suppress", "from spectralmoe.errors import UserError", *guarded]
    command = [sys.executable, "-c", "\n".join(script)]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_pages_whose_code_others_run_are_named_there():
    for page, test in RUN_BY.items():
        assert page.rpartition("/")[2] in (ROOT / "tests" / test).read_text(encoding="utf-8"), page


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_known_kinds(page):
    kinds = {block.kind for block in blocks(page)}
    directives = {"toctree", "field", "claims", "commands", "versions"}  # written {toctree}: these are no blocks
    assert kinds <= {"sh", "python", "toml", *SHOWN, *directives}


@pytest.mark.parametrize("page", [*PAGES, *CARDS, "benchmarks/README.md"])
def test_every_command_is_one(page):
    root = typer.main.get_command(app)
    for words in commands(page):
        verb, rest = root, list(words)
        while getattr(verb, "commands", None) and rest and rest[0] in verb.commands:
            verb = verb.commands[rest.pop(0)]
        assert verb is not root, words
        if "--help" not in rest:
            verb.make_context(words[0], rest)  # an unknown option, a missing argument or a wrong value is an error


@pytest.mark.parametrize("page", PAGES)
def test_settings_are_read(page, tmp_path, capsys):
    for block in blocks(page):
        if block.kind == "toml":
            tomllib.loads(block.text)
            (tmp_path / "run.toml").write_text(block.text, encoding="utf-8")
            assert run(["train", "--config", str(tmp_path / "run.toml"), "--print-config"]) == 0


@pytest.mark.parametrize("page", [*PAGES, *CARDS, "benchmarks/README.md", "CHANGELOG.md", "LOG.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", target):
            name, _, anchor = target.partition("#")
            file = path.parent / name if name else path
            assert file.is_file() or (page == "README.md" and file.is_dir()), target  # the site has no folders
            if anchor:
                assert anchor in anchors(file), target
