"""How files are read: broken ones are one line, and the verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic_documents import inspection

from spectralmoe.cli.app import run
from spectralmoe.report import as_document, read_documents, render_report


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", None, ["no such file"]),
        ("a.jsonl", None, ["no such file"]),
        ("a.json", "{", ["not a readable JSON file"]),
        ("a.json", "[1]", ["no document of this library's", "inspection.json"]),
        ("a.json", '{"kind": "inspection", "format": 2}', ["format 2", "inspect the model again"]),
        (
            "a.json",
            '{"kind": "inspection", "format": 1, "title": "t", "model": {}, "layers": []}',
            ["broken", "layers"],
        ),
        ("a.json", '{"summary": [], "cells": []}', ["broken", "summary"]),
        ("a.json", '{"touched": {}, "carried_before": 1}', ["broken"]),
        ("a.jsonl", "", ["a.jsonl"]),
        ("a.jsonl", '{"kind": "step", "step": 1}\n', ["a.jsonl"]),
        ("a.jsonl", '{"kind": "start", "format": 1, "title": "t", "layers": [{}]}\n', ["broken", "layers.0"]),
    ],
)
def test_broken_files_are_one_line(tmp_path, user_error, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    with user_error(name, *words):
        read_documents([tmp_path / name])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d["layers"][0]["load"]["counts"].pop(),
        lambda d: d["layers"][0]["load"].update(share="x"),
        lambda d: d["layers"][0]["similarity"]["matrices"].update(output=[[1.0]]),
        lambda d: d["layers"][0]["similarity"]["matrices"].update(output=[1.0, 2.0]),
        lambda d: d["layers"][0]["similarity"]["matrices"].update(rows=[[1.0], [1.0, 2.0]]),
        lambda d: d["layers"][0].update(experts=0),
        lambda d: d["layers"][0]["association"]["table"].pop(),
        lambda d: d["layers"][0]["examples"].pop(),
        lambda d: d["layers"][0]["entropy"].update(tokens={"value": "high"}),
        lambda d: d["paths"][0].update(to=9),
        lambda d: d["paths"][0].update(flows=[[0, 99, 1]]),
        lambda d: d["paths"][0].update(out=[1.0]),
        lambda d: d["findings"].append({"kind": "x", "severity": "bad", "message": "m"}),
    ],
)
def test_documents_that_do_not_fit_are_one_line(user_error, spoil):
    document = inspection(2, 4)
    spoil(document)
    with user_error("here"):
        render_report([as_document(document, "here")], "t")


def test_the_verb(tmp_path, capsys, folder):
    out = tmp_path / "page.html"
    assert run(["report", str(folder), str(folder / "other.json"), "--out", str(out), "--title", "Ours", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] == out.stat().st_size
    kinds = ["inspection", "comparison", "receipt", "monitor", "monitor", "inspection"]
    assert [document["kind"] for document in said["documents"]] == kinds
    assert "<title>Ours</title>" in out.read_text()
    assert run(["report", str(folder / "receipt.json"), "--out", str(out)]) == 0
    assert "1 document" in capsys.readouterr().out
    empty = tmp_path / "empty"
    empty.mkdir()
    before = out.read_bytes()
    for wrong in ([str(empty), "--out", str(out)], [str(folder), "--out", str(tmp_path)], [str(tmp_path / "none")], []):
        assert run(["report", *wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert out.read_bytes() == before
    assert not Path("report.html").exists()
