"""``spectralmoe plan``: a recorded load on several devices, and one clear line for every mistake."""

from __future__ import annotations

import json
import re

import pytest
from synthetic_documents import inspection

from spectralmoe.cli.app import run
from spectralmoe.json_files import write_json
from spectralmoe.parallel import plan_least_loaded, plan_native, plan_replicas, scaled_load
from spectralmoe.report import render_report


@pytest.fixture
def folder(tmp_path):
    """An inspection of three layers of 32 experts: two as drawn, one with 95% of its slots in one expert."""
    document = inspection(3, 32, title="tiny")
    document["layers"][1]["load"]["counts"] = [30_400 + 50, *[50] * 31]
    write_json(tmp_path / "inspection.json", document)
    return tmp_path


def test_each_layer_is_planned_as_the_library_does(folder, call):
    code, out, _ = call("plan", folder, "--devices", 8, "--capacity", 1.1, "--chunk", 64, "--threshold", 0, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["inspection"] == str(folder / "inspection.json")
    assert [found[key] for key in ("devices", "tokens", "capacity", "chunk", "threshold")] == [8, 8192, 1.1, 64, 0]
    for row, layer in zip(found["layers"], inspection(3, 32)["layers"], strict=True):
        assert (row["name"], row["experts"], row["slots"]) == (layer["name"], 32, 2 * 8 * 8192)
        if row["layer"] == 1:
            continue
        load = scaled_load(layer["load"]["counts"], row["slots"])
        planned = plan_least_loaded(load, 8, capacity=1.1, chunk=64, threshold=0)
        assert row["plans"]["native"]["imbalance"] == plan_native(load, 8).imbalance()
        assert row["plans"]["replicas"]["imbalance"] == plan_replicas(load, 8).imbalance()
        assert row["plans"]["least_loaded"]["busiest"] == max(planned.device_load())
        assert row["plans"]["least_loaded"]["copies"] == len(planned.copies)


def test_the_table_says_what_becomes_of_the_busiest_device(folder, call):
    code, out, _ = call("plan", folder / "inspection.json", "--devices", 8)
    assert code == 0
    assert "tiny: 8 devices, 8192 tokens on each in a step" in out
    (line,) = [line for line in out.splitlines() if "model.layers.1.mlp" in line]
    native, _, least, _, copies, over = re.findall(r"[\d.]+", line.partition("mlp")[2])[1:]
    assert (native, least, copies, over) == ("7.65", "1.00", "7", "0")


def test_one_device_has_everything(folder, call):
    layer = json.loads(call("plan", folder, "--devices", 1, "--json")[1])["layers"][1]
    assert all(plan["imbalance"] == 1 and not plan["copies"] for plan in layer["plans"].values())


def test_a_layer_without_a_load_has_no_data(folder, call):
    document = inspection(2, 8, title="half")
    document["layers"][0]["load"] = None
    write_json(folder / "inspection.json", document)
    assert json.loads(call("plan", folder, "--json")[1])["layers"][0]["plans"] is None
    assert call("plan", folder)[1].count("no data") == 6


def test_mistakes_are_one_line(folder, refused, tmp_path):
    assert "layer 0: 5 devices cannot share 32 experts evenly; take one of 1, 2, 4, 8" in refused(
        "plan", folder, "--devices", 5
    )
    for option, value in (("--devices", 0), ("--tokens", 0), ("--capacity", 0.5), ("--chunk", 0), ("--threshold", -1)):
        assert option in refused("plan", folder, option, value)
    assert "capacity must be a number from 1 on, got inf" in refused("plan", folder, "--capacity", "inf")
    assert "no such file" in refused("plan", tmp_path / "gone.json")
    (tmp_path / "empty").mkdir()
    assert "holds no inspection.json; 'spectralmoe inspect MODEL --out DIR' writes one" in refused(
        "plan", tmp_path / "empty"
    )
    write_json(tmp_path / "history.json", {"epochs": [{"loss": 1.0}], "test_accuracy": 1.0})
    assert "is a history, not an inspection" in refused("plan", tmp_path / "history.json")
    document = inspection(2, 8)
    for layer in document["layers"]:
        layer["load"] = None
    write_json(tmp_path / "still.json", document)
    assert "no load: its model was not run" in refused("plan", tmp_path / "still.json")


def test_errors_are_json_too(folder, capsys):
    assert run(["plan", str(folder), "--devices", "5", "--json"]) == 2
    assert "cannot share" in json.loads(capsys.readouterr().out)["error"]


def test_the_page_has_a_panel_on_as_many_devices_as_fit():
    page = render_report([inspection(2, 12, title="twelve"), inspection(2, 7, title="seven")], "t")
    panel = page.partition('<section id="devices"')[2].partition("</section>")[0]
    assert "6 devices, 8,192 tokens on each" in panel
    assert "7 devices" in panel
    assert panel.count("<tr>") == 2 * (1 + 2)
    for experts in (1, 11):  # nothing to share out, at up to eight devices
        assert 'id="devices"' not in render_report([inspection(1, experts)], "t")
