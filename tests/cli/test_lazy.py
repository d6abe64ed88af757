"""Help, completion and ``import spectralmoe`` are quick: torch is imported where it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spectralmoe
from spectralmoe.bench import SUITES
from spectralmoe.cli import completion
from spectralmoe.cli.options import ANY_DATA
from spectralmoe.data.image_data import DATASETS
from spectralmoe.data.text_sources import TEXTS
from spectralmoe.errors import UserError
from spectralmoe.experiments.few_shot.grid import FewShotSettings, recipe
from spectralmoe.experiments.few_shot.learning import FEW_SHOT
from spectralmoe.parts import Part
from spectralmoe.presets import PRESETS, find_preset
from spectralmoe.training.finetuning.routers import terms_of
from spectralmoe.training.logs import LOGS
from spectralmoe.training.names import (
    DATA_NAMES,
    DEFAULT_ROUTERS,
    FRESH_ROWS,
    OWN_EXPERTS,
    OWN_ROWS,
    ROUTER_NAMES,
    TEXT_NAMES,
)
from spectralmoe.training.settings.finetuning import FinetuneSettings
from spectralmoe.training.tasks import TASKS

VERBS = (
    "compare",
    "train",
    "evaluate",
    "predict",
    "prune",
    "replicate",
    "adapt",
    "adapt correct",
    "adapt apply",
    "fewshot",
    "upcycle",
    "finetune",
    "report",
    "inspect",
    "plan",
    "bench",
    "card",
    "list",
)
SLOW = ("torch", "numpy", "pydantic", "jinja2", "safetensors", "timm", "transformers")


def loaded_after(code: str) -> set[str]:
    """The slow packages that ``code`` imports in a process of its own."""
    code = f"import sys, io, contextlib\nwith contextlib.redirect_stdout(io.StringIO()):\n {code}\nprint(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(SLOW) & set(ran.stdout.split())


def test_help_of_every_verb_imports_nothing_slow():
    calls = "; ".join(f"run([*{verb!r}.split(), '--help'])" for verb in ("", *VERBS))
    found = loaded_after(f"from spectralmoe.cli.app import run; {calls}; run(['--version'])")
    assert found <= {"pydantic"}  # typer's own, where an option has a range


def test_importing_the_package_imports_nothing_slow_until_a_name_is_asked_for():
    assert loaded_after("import spectralmoe") == set()
    assert "torch" in loaded_after("import spectralmoe; spectralmoe.MoE")


def test_every_public_name_is_there_and_typed():
    assert set(spectralmoe.__all__) <= set(dir(spectralmoe))
    for name in spectralmoe.__all__:
        assert getattr(spectralmoe, name) is not None
    tree = ast.parse(Path(spectralmoe.__file__).read_text(encoding="utf-8"))
    (typed,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    declared = {
        item.module.removeprefix("spectralmoe."): tuple(alias.name for alias in item.names) for item in typed.body
    }
    assert declared == spectralmoe._NAMES
    assert {name for names in declared.values() for name in names} == set(spectralmoe.__all__) - {"__version__"}


def test_modules_are_attributes_and_a_wrong_name_is_an_attribute_error():
    assert spectralmoe.diagnostics.__name__ == "spectralmoe.diagnostics"
    with pytest.raises(AttributeError, match="no attribute 'Mixture'"):
        spectralmoe.Mixture  # noqa: B018


def test_the_names_of_help_and_completion_are_those_of_the_tables():
    assert tuple(PRESETS) == ROUTER_NAMES
    assert tuple(name for name, row in PRESETS.items() if "experts" in row) == OWN_EXPERTS
    assert set(DEFAULT_ROUTERS) <= set(PRESETS)
    assert tuple(DATASETS) == DATA_NAMES
    assert tuple(TEXTS) == TEXT_NAMES
    assert tuple(SUITES) == completion.SUITES
    assert tuple(LOGS) == completion.LOG_NAMES
    for row in {*FRESH_ROWS, *OWN_ROWS, *completion.complete_few_shot_rows("")}:
        recipe(row, FewShotSettings(data="digits"))
    kinds = {name.partition(":")[0] for name in completion.complete_data("") if not name.startswith(("folder:", "hf:"))}
    assert {kind for kind in kinds if kind not in DATASETS} == set(TASKS) - {"images"}
    assert all(f"{kind}:NAME" in ANY_DATA for kind in set(TASKS) - {"images"})


def test_only_routers_are_offered_that_work():
    """In branches of a frozen model, and in the place of transformers' own."""
    branches, finetuned = set(ROUTER_NAMES), set(ROUTER_NAMES)
    for name in ROUTER_NAMES:
        preset = find_preset(name)
        reads = any(part.reads for part in preset.make_router(8, 4, k=2).modules() if isinstance(part, Part))
        kept = any(set(term.keeps) - {"tokens"} for term in preset.terms.values())
        if reads or preset.experts:
            branches.remove(name)
        if reads or preset.experts or preset.optimizer or preset.dense or kept:
            finetuned.remove(name)
        if kept or preset.optimizer or preset.dense:
            with pytest.raises(UserError):
                terms_of(FinetuneSettings(router=name))
        elif name in finetuned:
            terms_of(FinetuneSettings(router=name))
    assert set(completion.complete_few_shot_rows("")) == {*branches, *OWN_ROWS, "adapter"}
    assert set(completion.complete_finetune_router("")) == finetuned


def test_the_defaults_that_help_shows_are_those_of_the_library(call):
    shown = " ".join(call("fewshot", "--help")[1].split())
    assert f"[default: {FEW_SHOT.epochs}; x>=1]" in shown
    assert f"[default: {FEW_SHOT.lr}]" in shown


def test_lists_are_completed_name_by_name():
    assert completion.complete_routers("li") == ["linear", "linear+load_balance", "linear+balanced"]
    assert completion.complete_routers("linear,sr") == ["linear,sr-moe"]
    assert completion.complete_routers("sr-moe,sr") == []
    assert completion.complete_data("f") == ["fashion-mnist", "folder:"]
    assert completion.one_among(*completion.SUITES)("s") == ["step", "scaling"]


def test_a_shell_gets_completions():
    env = {
        "_SPECTRALMOE_COMPLETE": "complete_bash",
        "COMP_WORDS": "spectralmoe compare --routers lin",
        "COMP_CWORD": "3",
    }
    code = "from spectralmoe.cli import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**env, "PYTHONPATH": ":".join(sys.path)},
    )
    assert ran.stdout.split() == ["linear", "linear+load_balance", "linear+balanced"], ran.stderr
