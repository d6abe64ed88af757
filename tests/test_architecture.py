"""Imports go one way, and heavy packages are imported when they are used."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import spectralmoe

SOURCE = Path(spectralmoe.__file__).parent
ROOT = Path(__file__).parent.parent

# Low to high. A module imports from lower levels, from its own folder, and from what is named beside its level.
LEVELS = [
    {"errors", "sharding", "torch_private", "version"},
    {"files", "digests", "machine", "linalg", "routing", "stacks", "context", "formula", "units", "scrambling"},
    {"json_files"},
    {"parts", "draw"},
    {"selectors", "experts"},
    {"scorers"},
    {"dispatch"},
    {"router", "placement"},
    {"recording"},
    {"layers"},
    {"moe", "ranks", "tape"},
    {"feeding", "movement"},
    {"steps", "terms", "regularizers", "diagnostics", "manifold", "compression"},
    {"spec", "instruments", "model_folder", "parallel"},
    {"checkpoints", "models", "optim", "naming"},
    {"hf", "rows"},
    {"presets", "recorder"},
    {"vision", "integrations", "attribution"},
    {"saving"},
    {""},  # ``import spectralmoe``: whatever the package's own __init__ does not need
    {"adaptation", "data"},
    {"training", "report"},
    {"experiments", "bench"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
HEAVY = {
    "timm",
    "transformers",
    "tokenizers",
    "peft",
    "huggingface_hub",
    "skimage",
    "sklearn",
    "mlxtend",
    "PIL",
    "torchvision",
    "matplotlib",
    "dask",
    "distributed",
    "submitit",
    "datasets",
}
ONLY_IN = {
    "timm": {"vision/model.py"},
    "transformers": {"hf/load.py", "bench/peers/transformers.py"},
    "tokenizers": {"data/vocabulary.py"},
    "datasets": {"data/hub_data.py"},
    "peft": {"hf/training/lora.py"},
    "huggingface_hub": {"saving/hub.py"},
    "matplotlib": {"draw/figure.py", "draw/images.py"},
    "skimage": {"training/tasks/restoration_scores.py"},
    "dask": {"experiments/remote.py"},
    "distributed": {"experiments/remote.py"},
    "submitit": {"experiments/remote.py"},
}
NOT_AT_START = HEAVY | {"typer", "rich", "pydantic"}

FILES = sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


def at_import(node: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """The imports that run when the module is imported: not in functions, not for type checkers alone."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            found.append(child)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            found += [item for branch in child.orelse for item in at_import(ast.Module([branch], []))]
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found += at_import(child)
    return found


def modules(imports: list[ast.Import | ast.ImportFrom]) -> list[str]:
    """Full names of what is imported, ``from a import b`` as a.b."""
    names = []
    for item in imports:
        if isinstance(item, ast.Import):
            names += [alias.name for alias in item.names]
        else:
            assert item.level == 0, "imports are absolute"
            names += [f"{item.module}.{alias.name}" for alias in item.names]
    return names


def tree_of(file: str) -> ast.Module:
    return ast.parse((SOURCE / file).read_text(encoding="utf-8"))


def everywhere(file: str) -> list[str]:
    """The names of all imports of a file: those in functions and those for type checkers alone, too."""
    return modules([node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Import | ast.ImportFrom)])


def upward(file: str, name: str) -> str | None:
    """What is wrong with this import of ours, if anything. The package's own __init__ is a door to all of it."""
    folder, (package, _, rest) = file.split("/", maxsplit=1)[0].removesuffix(".py"), name.partition(".")
    other = rest.split(".")[0]
    if package != "spectralmoe" or file == "__init__.py":
        return None
    if other not in LEVEL:
        return f"{file} imports {name}: import the module that defines it, or give it a level"
    if folder not in LEVEL:
        return f"{file} has no level yet"
    return None if other == folder or LEVEL[other] < LEVEL[folder] else f"{file} imports {name}, which is not below it"


def file_of(name: str) -> str | None:
    """The file of ours that an import reads: of a module, of the module that holds a name, or of a folder."""
    parts = name.split(".")[1:] if name.startswith("spectralmoe.") else []
    paths = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((file for path in paths for file in (f"{path}.py", f"{path}/__init__.py") if file in FILES), None)


def test_imports_go_one_way_in_functions_and_for_types_too():
    wrong = [upward(file, name) for file in FILES for name in everywhere(file)]
    assert not [line for line in wrong if line]


def test_no_circle_of_files():
    needs = {file: {file_of(name) for name in everywhere(file)} - {None} for file in FILES if file != "__init__.py"}
    TopologicalSorter(needs).prepare()  # raises CycleError with the files of a circle


def test_a_circle_would_be_seen():
    assert file_of("spectralmoe.scorers.base.Scorer") == "scorers/base.py"
    assert file_of("spectralmoe.scorers.Scorer") == "scorers/__init__.py"
    assert upward("scorers/base.py", "spectralmoe.tape.Record")
    with pytest.raises(CycleError):
        TopologicalSorter({"tape.py": {"moe.py"}, "moe.py": {"tape.py"}}).prepare()


def test_heavy_packages_are_imported_where_they_are_used():
    early = {file: HEAVY & {name.split(".")[0] for name in modules(at_import(tree_of(file)))} for file in FILES}
    assert not {file: names for file, names in early.items() if names}


def test_some_packages_are_imported_by_one_module_alone():
    wrong = []
    for file in FILES:
        names = {name.split(".")[0] for name in everywhere(file)}
        wrong += [f"{file} imports {name}" for name in names if file not in ONLY_IN.get(name, {file})]
    assert not wrong


def test_importing_the_library_imports_torch_and_nothing_heavier():
    code = "import sys, torch; before = set(sys.modules); import spectralmoe; print(*(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], cwd=SOURCE.parent, capture_output=True, text=True, check=True)
    new = {name.split(".")[0] for name in result.stdout.split()}
    assert "spectralmoe" in new
    assert not NOT_AT_START & new


def test_nothing_reads_outside_the_repository():
    assert not [file for file in FILES if "../shared" in (SOURCE / file).read_text(encoding="utf-8")]


def test_the_map_names_files_that_are_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("## Where is it chosen?")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 12
    for what, files, _ in rows:
        for name in re.findall(r"`([^`]+)`", files):
            assert name == "papers/<name>/" or (SOURCE / name).is_file(), (what, name)


def test_the_tables_of_the_map_are_in_their_files():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| `([\w/]+\.py)` \| the table `([A-Z]+)`", page, re.M)
    assert len(rows) >= 6
    for file, table in rows:
        module = importlib.import_module(
            "spectralmoe." + file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        )
        assert isinstance(getattr(module, table), dict), (file, table)


def test_the_map_is_in_the_order_of_imports():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^      (\w+)(?:\.py|/)", page, re.M)
    places = {"__init__", "__main__", "formula", *listed}  # formula.py stands beside spec.py
    assert places >= {file.partition("/")[0].removesuffix(".py") for file in FILES}
    order = {name: place for place, name in enumerate(listed)}
    order["formula"] = order["spec"]
    for file in FILES:
        mine = file.partition("/")[0].removesuffix(".py")
        for name in re.findall(r"^\s*from spectralmoe\.(\w+)", (SOURCE / file).read_text(encoding="utf-8"), re.M):
            assert mine not in order or name not in order or order[name] <= order[mine], (file, name)
