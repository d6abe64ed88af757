"""What the tests of the page share: documents in files, and a page in Chromium."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from seeds import shifted
from synthetic_documents import inspection, monitor

from spectralmoe.adaptation import adapt_one, make_receipt
from spectralmoe.experiments.compare.columns import COLUMNS, summarise, summary_json
from spectralmoe.json_files import write_json
from spectralmoe.models import sr_moe
from spectralmoe.report import read_documents, render_report

SVG = '<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def comparison() -> dict[str, Any]:
    """As ``spectralmoe compare`` writes it: three seeds of two rows; one measure was never made."""
    cells = []
    for i, router in enumerate(("sr-moe", "linear")):
        for seed in range(3):
            values = {column.key: 10.0 * i + seed for column in COLUMNS} | {"interference": None}
            cells.append({"router": router, "depth": 2, "seed": seed, **values})
    meanings = {column.key: column.meaning for column in COLUMNS}
    summary = summary_json(summarise(cells))
    return {"settings": {"data": "digits"}, "columns": meanings, "summary": summary, "cells": cells}


def receipt() -> dict[str, Any]:
    """A correction of a tiny network, by the library."""
    torch.manual_seed(shifted(0))
    model = sr_moe(10, width=16, depth=1, num_experts=4, hidden=8).eval()
    x = torch.rand(1, 1, 8, 8)
    wrong = int(model(x).argmin())
    update = adapt_one(model, x, wrong)
    found = make_receipt(model, x, wrong, update, test=(torch.rand(20, 1, 8, 8), torch.zeros(20).long()))
    return {"model": "runs/tiny", "image": "seven.png", **found.to_json()}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One document of each kind, and a second inspection and training run."""
    where = tmp_path_factory.mktemp("documents")
    write_json(where / "inspection.json", inspection(4, 8, sick=(2,), title="tiny"))
    write_json(where / "other.json", inspection(4, 8, seed=1, title="other"))
    write_lines(where / "monitor.jsonl", monitor(4, 8, 30, title="run a"))
    write_lines(where / "second.jsonl", monitor(4, 8, 30, seed=1, title="run b"))
    write_json(where / "results.json", comparison())
    write_json(where / "receipt.json", receipt())
    (where / "receipt.svg").write_text(SVG)
    return where


@pytest.fixture(scope="session")
def show(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``show(documents)``: the browser on the page of documents, paths or JSON values; light theme, 1280 wide."""

    def open_page(documents: list[Any], title: str = "A page") -> Any:
        if documents and isinstance(documents[0], Path):
            documents = list(read_documents(documents))
        path = tmp_path_factory.mktemp("page") / "report.html"
        path.write_text(render_report(documents, title), encoding="utf-8", errors="backslashreplace")
        features = [{"name": "prefers-color-scheme", "value": "light"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(path.as_uri())
        return browser

    return open_page


@pytest.fixture
def page(show: Callable[..., Any], folder: Path) -> Any:
    """The browser on a page with every panel."""
    return show([folder, folder / "other.json"])
