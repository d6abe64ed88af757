"""A method of any kind is one file, one table line (with its import) and one test; nothing else has to know of it.

Each example is added to a copy of the package. The file of the scorer and its test are those of CONTRIBUTING.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import spectralmoe

ROOT = Path(__file__).parent.parent
PACKAGE = Path(spectralmoe.__file__).parent
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.S)
HELPERS = ("browser_tools", "seeds", "grids", "small_parts")
QUICK = "--data dark:digits --depths 1 --seeds 1 --epochs 1 --tune 0 --trials 1 --train-size 200 --experts 4"
ROW = '{scorer="sign", selector="halves", experts="scales", terms={logit_spread=0.01}}'
VERBS = {
    "list": ["list", "--json"],
    "compare": [
        *("compare", *QUICK.split(), "--columns", "accuracy", "--routers", ROW),
        *("--set", "optimization.optimizer=bare_adam", "--out", "runs"),
    ],
    "inspect": ["inspect", "model.safetensors", "--router-only", "--json", "--out", "look"],
}
ONE_INTERPRETER = """
import contextlib, io, json, sys
from spectralmoe.cli.app import run
said = {}
for name, words in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run(words) == 0, words
    said[name] = out.getvalue()
print(json.dumps(said))
"""


@dataclass(frozen=True)
class Example:
    """A method of one kind.

    Attributes:
        file, source: where it is written, and what.
        table: the file of the table.
        names: what is imported from the file.
        before: the line of the table that the new one follows.
        line: the new line.
        contracts: the tests of the repository that take it up by themselves.
    """

    file: str
    source: str
    table: str
    names: str
    before: str
    line: str
    contracts: str = ""


SELECTOR = '''"""The best expert of each half of the experts."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmoe.context import Rows
from spectralmoe.routing import EMPTY
from spectralmoe.selectors.base import Selector

__all__ = ["Halves"]


class Halves(Selector):
    """One expert of the first half and one of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.normalize = "softmax", False

    def choose(self, logits: Tensor, *, mask: Tensor | None = None, context: Rows | None = None) -> Tensor:
        """The largest logit of either half."""
        half = logits.shape[1] // 2
        best = torch.stack([logits[:, :half].argmax(-1), half + logits[:, half:].argmax(-1)], 1)
        return best if mask is None else best.masked_fill(~mask[:, None], EMPTY)
'''

BANK = '''"""Experts that scale each feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectralmoe.experts.base import Experts

__all__ = ["Scales"]


class Scales(Experts):
    """Expert e is x times a vector of its own (D,)."""

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__(num_experts)
        self.dim, self.scale = dim, nn.Parameter(1 + torch.randn(num_experts, dim) / 4)

    def expert(self, x: Tensor, e: int) -> Tensor:
        """See ``Experts``."""
        return x * self.scale[e].to(x.dtype)

    def expert_parameters(self, e: int) -> dict[str, Tensor]:
        """See ``Experts``."""
        return {"scale": self.scale[e]}
'''

TERM = '''"""The spread of the logits of a token."""

from __future__ import annotations

from torch import Tensor

from spectralmoe.tape import Record

__all__ = ["logit_spread"]


def logit_spread(record: Record) -> Tensor:
    """Mean over real tokens of the variance of a token's logits."""
    logits = record.routing.logits
    return record.routing.real((logits - logits.mean(-1, keepdim=True)).square().mean(-1))
'''

OPTIMIZER = '''"""Adam without decay."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from spectralmoe.optim.plain import Rates

__all__ = ["bare_adam"]


def bare_adam(model: nn.Module, settings: Rates) -> Optimizer:
    """Adam of all parameters."""
    return torch.optim.Adam(model.parameters(), lr=settings.lr)
'''

VALUE = '''"""The size of a routing matrix."""

from __future__ import annotations

from spectralmoe.diagnostics.evidence import Evidence
from spectralmoe.diagnostics.measure import Measure

__all__ = ["matrix_norm"]


def matrix_norm(seen: Evidence) -> Measure:
    """Frobenius norm of the routing matrix."""
    return Measure.of(seen.matrix.norm(), seen.matrix.numel(), "weights")
'''

TASK = '''"""Images with half of their light."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from torch import Tensor, nn

from spectralmoe.training.tasks.images import Images, ImageTask
from spectralmoe.training.settings.run import TrainSettings

__all__ = ["DarkTask"]


class DarkTask(ImageTask):
    """Trains on dark images, "dark:NAME"; is measured on the others."""

    @classmethod
    def open(cls, settings: TrainSettings, data_dir: Path | None = None, download: bool = False) -> Self:
        """See ``Task``."""
        return super().open(settings.model_copy(update={"data": settings.data.partition(":")[2]}), data_dir, download)

    def loss(self, model: nn.Module, batch: Images) -> Tensor:
        """See ``Task``."""
        return super().loss(model, Images(batch.images / 2, batch.labels, batch.others, batch.share))
'''

CARD = """from spectralmoe.experiments.cards import Card, Cells, Section
from spectralmoe.experiments.compare.columns import Column

CELLS = [{"row": row, "seed": seed} for seed in range(3) for row in ("old", "new")]


def measure(cell, desk, progress):
    return {"error": {"old": 2.0, "new": 1.0}[cell["row"]] + cell["seed"]}


def sections(stored):
    columns = (Column("error", "error", 1, "smaller is better"),)
    return [Section("## Errors", stored["results"], columns, pairs=[("new", "old")])]


FULL = QUICK = Card("A paper", "What is compared.", {}, [Cells("results", CELLS, measure)], sections, lambda stored: {})
"""

EXAMPLES = {
    "scorer": Example(
        "scorers/sign.py", BLOCKS[0], "scorers/__init__.py", "SignScorer",
        '    "linear": LinearScorer,', '    "sign": SignScorer,', "tests/test_contract.py",
    ),
    "selector": Example(
        "selectors/halves.py", SELECTOR, "selectors/__init__.py", "Halves",
        '    "topk": TopK,', '    "halves": Halves,', "tests/test_contract.py",
    ),
    "bank": Example(
        "experts/scales.py", BANK, "experts/__init__.py", "Scales",
        '    "adapter": Adapter,', '    "scales": Scales,', "tests/test_contract_banks.py",
    ),
    "term": Example(
        "regularizers/logit_spread.py", TERM, "regularizers/__init__.py", "logit_spread",
        '    "router_z": router_z,', '    "logit_spread": logit_spread,', "tests/test_contract_regularizers.py",
    ),
    "optimizer": Example(
        "optim/bare_adam.py", OPTIMIZER, "optim/table.py", "bare_adam",
        '    "adamw": adamw,', '    "bare_adam": bare_adam,',
    ),
    "task": Example(
        "training/tasks/dark.py", TASK, "training/tasks/__init__.py", "DarkTask",
        '    "images": ImageTask,', '    "dark": DarkTask,',
    ),
    "value": Example(
        "diagnostics/matrix_norm.py", VALUE, "diagnostics/table.py", "matrix_norm",
        "_LINES = (", '    Value("geometry", "norm", "norm", "Frobenius norm", "weights", matrix_norm),',
    ),
}  # fmt: skip


class Copy:
    """The package in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.root, self.source = folder, folder / "src" / "spectralmoe"
        shutil.copytree(PACKAGE, self.source, ignore=shutil.ignore_patterns("__pycache__"))

    def add(self, example: Example) -> None:
        """Write the file, the import and the line of the table."""
        (self.source / example.file).write_text(example.source, encoding="utf-8")
        table = self.source / example.table
        text = table.read_text(encoding="utf-8")
        module = example.file.removesuffix(".py").replace("/", ".")
        first = text.index("from spectralmoe.")
        text = f"{text[:first]}from spectralmoe.{module} import {example.names}\n{text[first:]}"
        assert text.count(example.before) == 1, example.before
        table.write_text(text.replace(example.before, f"{example.before}\n{example.line}"), encoding="utf-8")

    def python(self, *arguments: object) -> str:
        """What a new interpreter says, with this copy as the package."""
        env = {**os.environ, "PYTHONPATH": str(self.root / "src")}
        line = [sys.executable, *map(str, arguments)]
        ran = subprocess.run(line, cwd=self.root, env=env, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
        return ran.stdout

    def command(self, *arguments: str) -> str:
        """What ``spectralmoe`` says."""
        return self.python("-m", "spectralmoe", *arguments)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A copy with one new method of every kind."""
    copy = Copy(tmp_path_factory.mktemp("grown"))
    for example in EXAMPLES.values():
        copy.add(example)
    return copy


@pytest.fixture(scope="module")
def gate():
    return torch.randn(4, 8)


@pytest.fixture(scope="module")
def said(grown, gate):
    """What the verbs say of the copy, one after the other in one interpreter."""
    weights = {"model.layers.0.mlp.gate.weight": gate}
    for e, (name, shape) in itertools.product(range(4), [("gate", (6, 8)), ("up", (6, 8)), ("down", (8, 6))]):
        weights[f"model.layers.0.mlp.experts.{e}.{name}_proj.weight"] = torch.randn(shape)
    save_file(weights, grown.root / "model.safetensors")
    return json.loads(grown.python("-c", ONE_INTERPRETER, json.dumps(VERBS)))


def test_each_is_one_file_and_one_line_with_its_import(grown):
    new, added = [], []
    for path in sorted(grown.source.rglob("*.py")):
        name = path.relative_to(grown.source)
        if not (PACKAGE / name).is_file():
            new.append(name.as_posix())
            continue
        before, after = (part.read_text(encoding="utf-8").splitlines() for part in (PACKAGE / name, path))
        changed = [line for line in difflib.ndiff(before, after) if line[0] in "+-"] if before != after else []
        assert not [line for line in changed if line[0] == "-"]
        added += [line[2:] for line in changed]
    assert new == sorted(example.file for example in EXAMPLES.values())
    assert sorted(line for line in added if not line.startswith("from ")) == sorted(
        example.line for example in EXAMPLES.values()
    )
    assert len(added) == 2 * len(EXAMPLES)


def test_all_are_listed(said):
    tables = json.loads(said["list"])
    listed = {name for table in tables.values() for name in table}
    assert {"sign", "halves", "scales", "logit_spread", "bare_adam", "geometry.norm"} <= listed


@pytest.mark.full
def test_the_contracts_take_them_up_and_the_test_of_contributing_passes(grown):
    test = grown.root / "tests" / "scorers" / "test_sign.py"
    test.parent.mkdir(parents=True, exist_ok=True)
    test.write_text(BLOCKS[2], encoding="utf-8")
    contracts = sorted({example.contracts for example in EXAMPLES.values()} - {""})
    helpers = ["pyproject.toml", "conftest.py", *(f"tests/{name}.py" for name in ("conftest", *HELPERS))]
    for name in (*helpers, *contracts):
        shutil.copy(ROOT / name, grown.root / name)
    only = "(sign or halves or scales or logit_spread) and not compiled and not permuted"
    said = grown.python("-m", "pytest", *contracts, test, "-p", "no:cacheprovider", "-q", "-rA", "-k", only)
    for word in ("test_sign.py", "sign-topk", "linear-halves", "[scales", "[logit_spread"):
        assert [line for line in said.splitlines() if line.startswith("PASSED") and word in line], word


def test_the_table_line_of_contributing_is_the_one_that_is_added():
    example = EXAMPLES["scorer"]
    assert BLOCKS[1] == f"SCORERS: dict[str, type[Scorer]] = {{\n    ...\n{example.line}\n}}\n"
    assert f"`src/spectralmoe/{example.file}`" in CONTRIBUTING
    assert f"`src/spectralmoe/{example.table}`" in CONTRIBUTING


def test_all_parts_are_compared_by_name(grown, said):
    results = json.loads((grown.root / "runs" / "results.json").read_text(encoding="utf-8"))
    assert len(results["summary"]) == 1
    assert results["settings"]["optimization"]["optimizer"] == "bare_adam"
    assert results["settings"]["data"] == "dark:digits"
    (saved,) = (grown.root / "runs").rglob("config.json")
    config = saved.read_text(encoding="utf-8")
    assert all(f'"{name}"' in config for name in ("sign", "halves", "scales"))


def test_a_new_value_is_inspected_and_on_the_page(grown, gate, said):
    (layer,) = json.loads(said["inspect"])["layers"]
    assert layer["geometry"]["norm"]["value"] == pytest.approx(float(gate.norm()))
    assert "Frobenius norm" in (grown.root / "look" / "report.html").read_text(encoding="utf-8")


@pytest.mark.full
def test_a_card_is_a_plan_that_needs_no_line_anywhere(grown):
    folder = grown.root / "papers" / "toy"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# A claim\n", encoding="utf-8")
    (folder / "plan.py").write_text(CARD, encoding="utf-8")
    grown.command("card", "papers/toy")
    assert "| new | old | 3 | -1.0 separated |" in (folder / "RESULTS.md").read_text(encoding="utf-8")
