"""The notebooks in examples/ are short, hold no outputs, and run from the first cell to the last."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
BOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))


@pytest.fixture(params=BOOKS, ids=lambda path: path.stem)
def book(request):
    return nbformat.read(request.param, as_version=4)


def test_they_are_three():
    assert [path.stem for path in BOOKS] == ["compare_routers", "correct_a_vit", "look_at_a_language_model"]


def test_outputs_are_cleared(book):
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert book.cells[0].cell_type == "markdown"  # it says first what it does and needs
    assert sum(len(cell.source.splitlines()) for cell in code) <= 80


@pytest.mark.full
def test_they_run(book, tmp_path, monkeypatch):
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    client.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {"stream", "display_data"} & {output.output_type for output in printed}
