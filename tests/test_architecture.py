"""Imports go one way, and heavy packages are imported when they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import spectralmoe

SOURCE = Path(spectralmoe.__file__).parent

# Low to high. A module imports from lower levels, from its own folder, and from what is named beside its level.
LEVELS = [
    {"errors", "sharding", "transforms"},
    {"files", "machine", "linalg", "routing", "stacks", "context", "units"},
    {"parts", "draw"},
    {"selectors", "experts"},
    {"scorers"},
    {"dispatch"},
    {"router", "placement"},
    {"recording"},
    {"moe", "tape"},
    {"movement"},
    {"steps", "terms", "regularizers", "diagnostics", "manifold", "compression"},
    {"spec", "instruments", "model_folder"},
    {"checkpoints", "models", "optim"},
    {"hf"},
    {"vision"},
    {"saving"},
    {""},  # ``import spectralmoe``: whatever the package's own __init__ does not need
    {"adaptation", "data"},
    {"training", "report"},
    {"experiments", "bench"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
HEAVY = {"timm", "transformers", "huggingface_hub", "sklearn", "mlxtend", "PIL", "torchvision", "matplotlib"}
ONLY_IN = {
    "timm": {"vision/model.py"},
    "transformers": {"hf/load.py", "bench/peers/transformers.py"},
    "huggingface_hub": {"saving/hub.py"},
    "matplotlib": {"draw/figure.py"},
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


def upward(file: str, name: str) -> str | None:
    """What is wrong with this import of ours, if anything."""
    own, (package, _, rest) = file.split("/", maxsplit=1)[0].removesuffix(".py"), name.partition(".")
    other = rest.split(".")[0]
    if package != "spectralmoe" or file == "__init__.py" or other == "__version__":
        return None
    if other not in LEVEL:
        return f"{file} imports {name}: import the module that defines it, or give it a level"
    if own not in LEVEL:
        return f"{file} has no level yet"
    return None if other == own or LEVEL[other] < LEVEL[own] else f"{file} imports {name}, which is not below it"


def test_imports_go_one_way():
    wrong = [upward(file, name) for file in FILES for name in modules(at_import(tree_of(file)))]
    assert not [line for line in wrong if line]


def test_heavy_packages_are_imported_where_they_are_used():
    early = {file: HEAVY & {name.split(".")[0] for name in modules(at_import(tree_of(file)))} for file in FILES}
    assert not {file: names for file, names in early.items() if names}


def test_some_packages_are_imported_by_one_module_alone():
    wrong = []
    for file in FILES:
        everywhere = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {name.split(".")[0] for name in modules(everywhere)}
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
