"""How files are read: broken ones are one line, and the verb."""

from __future__ import annotations

import json
import math
import os
import shutil
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
        lambda d: d["layers"][0]["load"].update(counts=[-1, 1, 1, 1]),
        lambda d: d["layers"][0]["load"]["dead"].update(data=10**400),
        lambda d: d["layers"][0]["similarity"]["matrices"].update(rows=[[{}] * 4] * 4),
        lambda d: d["layers"][0]["similarity"]["matrices"].update(rows=[[10**400] * 4] * 4),
        lambda d: d["layers"][0]["similarity"]["matrices"].update(rows=[[1e308, -1e308, 0, 0]] * 4),
        lambda d: d["layers"][0]["association"]["table"][0].__setitem__(0, 10**400),
        lambda d: d["paths"][0].update(flows=[[0, 1, 1e308], [0, 1, 1e308]]),
        lambda d: d["data"].update(tokens=10**400),
        lambda d: d["holders"][0]["experts"][0].update(expert=4),
        lambda d: d["holders"][0]["layers"][0].update(layer=2),
        lambda d: d["holders"][0].update(pieces=["one"]),
    ],
)
def test_documents_that_do_not_fit_are_one_line(user_error, spoil):
    document = inspection(2, 4)
    spoil(document)
    with user_error("here"):
        render_report([as_document(document, "here")], "t")


def estimate(**values):
    return {"summary": [{"router": "r", "accuracy": values}], "cells": []}


@pytest.mark.parametrize(
    "document",
    [
        estimate(mean="high"),
        estimate(mean=10**400),
        estimate(mean=1.0, half="wide"),
        estimate(mean=1.0, values=None),
        estimate(mean=1.0, values=["</script>"]),
        {"touched": 1, "carried_before": 2, "reference": "x"},
        {"touched": 1, "carried_before": 2, "reference": [1]},
    ],
)
def test_comparisons_and_receipts_that_do_not_fit_are_one_line(user_error, document):
    with user_error("here is broken"):
        render_report([as_document(document, "here")], "t")


def test_an_estimate_that_is_not_finite_is_no_data():
    page = render_report([as_document(estimate(mean=math.nan, values=[1.0, math.inf, None]), "here")], "t")
    assert "no data" in page.split('id="comparisons"')[1]
    assert drawn(page)["comparisons"][0]["columns"] == {"accuracy": [None]}
    page = render_report([as_document(estimate(mean=1.5, values=[1.0, math.inf, None]), "here")], "t")
    assert drawn(page)["comparisons"][0]["columns"] == {"accuracy": [[1.5, None, [1]]]}


def test_a_receipt_about_a_class_that_it_does_not_name_is_one_line(folder, user_error):
    held = {**json.loads((folder / "receipt.json").read_text()), "classes": ["only"]}
    with user_error("here is broken", "class"):
        render_report([as_document(held, "here")], "t")


@pytest.mark.parametrize(
    "line",
    [
        {"kind": "finding", "step": 1, "finding": "text"},
        {"kind": "step", "step": 10**400, "max_vio": 1},
        {"kind": "step", "step": 1, "max_vio": 10**400},
        {"kind": "load", "step": 1, "shares": {"a": [1e308, 1e308]}},
    ],
)
def test_monitors_that_do_not_fit_are_one_line(tmp_path, user_error, line):
    start = {"kind": "start", "format": 1, "title": "t", "layers": [], "every": 1}
    (tmp_path / "m.jsonl").write_text(json.dumps(start) + "\n" + json.dumps(line) + "\n")
    with user_error("m.jsonl is broken"):
        render_report(read_documents([tmp_path / "m.jsonl"]), "t")


def test_a_number_of_experts_costs_nothing_without_data(user_error):
    bare = {"kind": "inspection", "format": 1, "model": {}}
    layers = [{"name": f"a{i}", "layer": i, "experts": 2**16} for i in range(40)]
    flows = {"from": 0, "to": 1, "flows": [[2**16 - 1, 3, 5], [0, 3, 2]]}
    page = render_report([{**bare, "layers": layers, "paths": [flows]}], "t")
    assert len(page) < 1_500_000  # 40 * 2^16 numbers would need more than twice as many characters
    assert drawn(page)["inspections"][0]["paths"][0]["into"][3] == 7
    with user_error("here is broken", "experts"):
        as_document({**bare, "layers": [{**layers[0], "experts": 10**8}]}, "here")


def test_shares_that_are_not_finite_are_no_data():
    for share in ([None] * 4, [], [math.nan] * 4):
        document = inspection(2, 4)
        document["layers"][0]["load"]["share"] = share
        document["layers"][0]["weights"] = {"share": share}
        render_report([as_document(document, "here")], "t")


def drawn(page):
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def test_documents_of_one_title_are_told_apart(tmp_path, folder):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inspection.json").write_text(json.dumps(inspection(1, 2, title="model")))
        shutil.copy(folder / "monitor.jsonl", tmp_path / name)
        shutil.copy(folder / "receipt.json", tmp_path / name)
    page = render_report(read_documents([tmp_path / "a", tmp_path / "b", folder / "other.json"]), "t")
    sources = [str(tmp_path / name / "inspection.json") for name in ("a", "b")]
    titles = [run["title"] for run in drawn(page)["inspections"]]
    assert titles == [f"model ({sources[0]})", f"model ({sources[1]})", "other"]
    assert [run["title"] for run in drawn(page)["monitors"]] == [
        f"run a ({tmp_path / name / 'monitor.jsonl'})" for name in ("a", "b")
    ]
    for name in ("a", "b"):
        assert f"seven.png ({tmp_path / name / 'receipt.json'})" in page
    page = render_report([inspection(1, 2, title="model"), inspection(1, 2, title="model")], "t")
    assert [run["title"] for run in drawn(page)["inspections"]] == ["model (1)", "model (2)"]


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


def test_a_pipe_is_not_replaced_by_the_page(tmp_path, capsys, folder):
    os.mkfifo(tmp_path / "pipe")
    assert run(["report", str(folder), "--out", str(tmp_path / "pipe")]) == 2
    assert "no regular file" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


def few_shot(*accuracies):
    summary = [
        {"row": row, "shots": shots, "accuracy": value}
        for row, shots, value in zip(("emoe", "emoe", "adapter", "adapter"), (1, 5, 1, 5), accuracies, strict=True)
    ]
    return {"settings": {"data": "digits"}, "machine": {}, "summary": summary, "cells": []}


def test_few_shot_results_are_a_comparison_over_shots(tmp_path):
    value = {"mean": 41.5, "half": 2.0, "values": [41.0, 42.0]}
    (tmp_path / "fewshot.json").write_text(json.dumps(few_shot(value, None, None, {**value, "mean": 80.0})))
    (found,) = read_documents([tmp_path])
    assert (found.kind, found.body.title) == ("comparison", "few-shot learning on digits")
    page = render_report([found], "t")
    (shown,) = drawn(page)["comparisons"]
    assert shown["rows"] == ["emoe", "adapter"]
    assert shown["columns"] == {
        "1 shot": [[41.5, 2.0, [41.0, 42.0]], None],
        "5 shots": [None, [80.0, 2.0, [41.0, 42.0]]],
    }
    table = page.split('id="comparisons"')[1].split("</table>")[0]
    assert "depth" not in table
    assert "41.5" in table


@pytest.mark.parametrize("spoil", [lambda d: d["summary"][0].pop("row"), lambda d: d.pop("settings")])
def test_few_shot_results_that_do_not_fit_are_one_line(user_error, spoil):
    document = few_shot(None, None, None, None)
    spoil(document)
    with user_error("here is broken: not the file of a few-shot run"):
        as_document(document, "here")


def history(**values):
    epochs = [
        {"loss": 2.0, "validation_accuracy": None, "seconds": 3.0},
        {"loss": 0.5, "validation_accuracy": 90.25, "seconds": 5.0},
    ]
    return {"epochs": epochs, "test_accuracy": 88.5, **values}


def test_a_history_is_drawn_by_epoch_and_summed_up(tmp_path):
    (tmp_path / "history.json").write_text(json.dumps(history(title="sr-moe on digits")))
    documents = read_documents([tmp_path])
    page = render_report(documents, "t")
    assert drawn(page)["histories"] == [
        {
            "title": "sr-moe on digits",
            "steps": [1, 2],
            "keys": {"loss": [2.0, 0.5], "validation_accuracy": [None, 90.25]},
        }
    ]
    summary = page.split('id="summary"')[1].split("</section>")[0]
    assert "88.5%" in summary
    assert "90.2%" in summary
    assert "2 epochs" in summary
    assert 'data-chart="epochs"' in page
    assert 'data-chart="steps"' not in page


@pytest.mark.parametrize("epochs", [[], 3, [{"loss": "low"}], {"a": 1}])
def test_histories_that_do_not_fit_are_one_line(user_error, epochs):
    with user_error("here is broken: epochs"):
        as_document(history(epochs=epochs), "here")


def test_two_histories_stand_side_by_side(show):
    from browser_tools import all_of, errors

    browser = show([history(title="a"), history(title="b")])
    assert errors(browser) == []
    assert len(all_of(browser, "[data-chart=epochs] .charts > div")) == 2  # loss and validation accuracy
