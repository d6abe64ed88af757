"""What the page says: sizes, numbers, what has no data, which panels."""

from __future__ import annotations

import base64
import json
import math
import re
from html import unescape

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic_documents import inspection, monitor

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
from spectralmoe.adaptation import receipt_lines
from spectralmoe.diagnostics.watch import watch
from spectralmoe.instruments import Inspector, inspection_document
from spectralmoe.instruments.monitor import Monitor
from spectralmoe.json_files import write_json
from spectralmoe.report import as_document, read_documents, render_report
from spectralmoe.report.charts import inspection_data, monitor_data
from spectralmoe.report.encode import pack
from spectralmoe.report.measures import amount, figure


def panels(page):
    return re.findall(r'<section id="(\w+)"', page)


def text_of(page, panel):
    inside = page.split(f'<section id="{panel}"')[1].split("</section>")[0]
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", inside)).split())


def unpacked(text, count, bits, low, high):
    """``pack`` undone bit by bit."""
    digits = "".join(f"{byte:08b}" for byte in base64.b64decode(text))
    codes = [int(digits[i * bits : (i + 1) * bits], 2) for i in range(count)]
    return [math.nan if code == 0 else low + (code - 1) / (2**bits - 2) * (high - low) for code in codes]


@given(st.lists(st.floats(-2, 3) | st.just(math.nan), min_size=1, max_size=40), st.sampled_from([4, 6, 8]))
def test_packed_values_are_right_to_half_a_step(values, bits):
    found = unpacked(pack(np.array(values), bits, -2.0, 3.0), len(values), bits, -2.0, 3.0)
    for value, held in zip(values, found, strict=True):
        assert math.isnan(value) == math.isnan(held)
        assert math.isnan(value) or abs(value - held) <= 2.5 / (2**bits - 2) + 1e-9


def test_similarity_matrices_keep_their_values():
    document = inspection(2, 6)
    rows = document["layers"][0]["similarity"]["matrices"]["rows"]
    rows[0][1] = rows[1][0] = None
    rows[2][4] = rows[4][2] = 0.97
    weights = document["layers"][0]["similarity"]["matrices"]["weights"]
    weights[1][0] = 0.5  # not symmetric
    data = inspection_data(as_document(document, "x").body)
    held = data["layers"][0]["similarity"]
    assert data["bits"] == 8
    triangle = unpacked(held["rows"]["values"], 21, 8, 0.0, 1.0)
    expected = [math.nan if rows[a][b] is None else rows[a][b] for a in range(6) for b in range(a, 6)]
    np.testing.assert_allclose(triangle, expected, atol=0.5 / 254)
    assert held["rows"]["pairs"][0] == [2, 4, 0.97]
    assert len(held["rows"]["pairs"]) == 10
    assert (held["rows"]["symmetric"], held["weights"]["symmetric"]) == (True, False)
    np.testing.assert_allclose(unpacked(held["weights"]["values"], 36, 8, 0, 1), np.ravel(weights), atol=0.5 / 254)


def test_load_through_training_is_thinned_and_a_silent_layer_has_no_data(tmp_path):
    lines = monitor(2, 4, 5)
    first = next(line for line in lines if line["kind"] == "load")
    first["shares"]["model.layers.1.mlp"] = [0.0] * 4
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "st')
    (document,) = read_documents([path])
    load = monitor_data(document.body)["load"]
    for place, name in enumerate(("model.layers.0.mlp", "model.layers.1.mlp")):
        held = load["layers"][place]
        root = np.reshape(unpacked(held["values"], 20, 8, 0.0, held["high"]), (5, 4))
        shares = np.array([line["shares"][name] for line in lines if line["kind"] == "load"]) * 4
        assert np.isnan(root[0]).all() == (place == 1)
        np.testing.assert_allclose(root[1:], np.sqrt(shares[1:]), atol=held["high"] / 500)


@pytest.mark.full
def test_48_layers_of_128_experts_stay_under_two_megabytes(tmp_path):
    path = tmp_path / "monitor.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in monitor(48, 128, 100)))
    documents = [as_document(inspection(48, 128, labels=50, sick=tuple(range(24))), "big"), *read_documents([path])]
    page = render_report(documents, "big")
    assert len(page.encode()) < 2_000_000
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(data["monitors"][0]["load"]["steps"]) >= 30
    assert data["monitors"][0]["load"]["steps"][-1] == 5000
    layers = data["inspections"][0]["layers"]
    assert sum(map(len, (layer["similarity"] for layer in layers))) == 3 * 48
    kept = [bool(layer["examples"][int(np.argmax(layer["counts"]))]) for layer in layers]
    assert all(kept)  # the busiest expert of every layer


def test_panels_stand_in_order_and_only_with_data(folder):
    document = inspection(2, 4, labels=0)
    for layer in document["layers"]:
        layer["similarity"]["matrices"] = {"output": None, "weights": None, "rows": None}
        layer["examples"] = [[], [], [], []]
    document["text"] = document["holders"] = []
    assert panels(render_report([document], "t")) == ["summary", "load", "devices", "layers", "spectra", "paths"]
    assert panels(render_report(read_documents([folder / "results.json"]), "t")) == ["comparisons"]
    assert panels(render_report(read_documents([folder / "receipt.json"]), "t")) == ["receipts"]
    assert panels(render_report(read_documents([folder / "monitor.jsonl"]), "t")) == ["summary", "training"]


def test_a_checkpoint_that_was_not_run_is_not_called_healthy():
    document = inspection(2, 4, labels=0)
    document["model"]["mode"] = "router-only"
    document |= {
        "paths": [],
        "text": [],
        "holders": [],
        "data": {"source": "x.safetensors", "tokens": 0, "sequences": 0, "tokenizer": None, "notes": []},
    }
    for layer in document["layers"]:
        layer |= {
            "load": None,
            "entropy": None,
            "stability": None,
            "association": None,
            "examples": [],
            "weights": None,
        }
        layer["similarity"]["output_cos2"] = {"value": None, "data": 0, "unit": "tokens", "needs": 1}
    page = render_report([document], "t")
    assert panels(page) == ["summary", "layers", "similarity", "spectra"]
    said = text_of(page, "summary")
    assert "weights only, not run" in page
    assert "No findings. Checked: sigma 1, stable rank" in said
    assert "nothing is known of: outputs cos² (0 of 1 tokens), load, entropy, stability." in said
    assert "MaxVio, mean no data 0 of 2 layers" in said
    assert "dead experts no data" in said
    assert "no data" in text_of(page, "layers")


def test_an_expert_is_called_dead_only_with_enough_slots():
    document = inspection(2, 4)
    document["layers"][1]["load"] |= {"counts": [3, 0, 0, 0], "share": [1.0, 0.0, 0.0, 0.0]}
    document["layers"][1]["load"]["dead"] = {"value": None, "data": 3, "unit": "slots", "needs": 40}
    layers = inspection_data(as_document(document, "x").body)["layers"]
    assert [layer["thin"] for layer in layers] == [None, "3 of 40 slots"]
    assert "dead experts 0 of 4 1 of 2 layers" in text_of(render_report([document], "t"), "summary")


def test_a_note_is_no_finding_to_worry_about():
    document = inspection(2, 4)
    document["findings"] = [
        {"kind": "no_data", "severity": "note", "message": "no data: margin", "cure": "more tokens"}
    ]
    said = text_of(render_report([document], "t"), "summary")
    assert "Nothing severe, and no warnings. Checked: MaxVio" in said
    document["findings"][0]["severity"] = "warning"
    assert "Checked:" not in text_of(render_report([document], "t"), "summary")


def test_labels_with_most_tokens_are_kept():
    document = inspection(1, 4, labels=60)
    table = document["layers"][0]["association"]["table"]
    table[7], table[50] = [0, 0, 0, 0], [100, 900, 0, 3000]
    held = inspection_data(as_document(document, "x").body)["layers"][0]["association"]
    assert held["all"] == 60
    assert len(held["labels"]) == 40
    assert "class 7" not in held["labels"]
    place = held["labels"].index("class 50")
    root = unpacked(held["values"], 160, 8, 0.0, 1.0)[4 * place : 4 * place + 4]
    np.testing.assert_allclose(np.square(root), [0.025, 0.225, 0, 0.75], atol=5e-3)
    assert held["totals"][place] == 4000


def test_findings_come_first_the_worst_on_top():
    document = inspection(8, 8, sick=(1, 2, 3, 4, 5, 6))
    document["findings"].reverse()
    said = text_of(render_report([document], "t"), "summary")
    assert said.index("severe") < said.index("warning") < said.index("MoE layers")
    assert "6 findings" in said
    assert "2 more" in said
    assert said.count("What to do: balance the load") == 2
    page = render_report([document], "t")
    links = set(re.findall(r'href="#(run-0-layer-\d)"', page))
    assert links == {f"run-0-layer-{i}" for i in range(1, 7)}
    assert all(f'id="{link}"' in page for link in links)


def test_differences_between_runs_are_those_of_the_means():
    a, b = inspection(3, 8, seed=1, title="a"), inspection(3, 8, seed=2, title="b")
    means = [np.mean([layer["load"]["gini"]["value"] for layer in document["layers"]]) for document in (a, b)]
    row = text_of(render_report([a, b], "t"), "comparisons").split("load: Gini ")[1].split("load: least")[0]
    found = [float(x) for x in re.findall(r"[-+]?\d\.\d+(?= )", row) if "." in x]
    assert found[0] == pytest.approx(means[0], rel=5e-3)
    assert f"{means[1] - means[0]:+.3g}" in row
    assert row.count("3 of 3 layers") == 2


def test_receipts_say_what_the_terminal_says(folder):
    (document,) = read_documents([folder / "receipt.json"])
    page = render_report([document], "t")
    for line in receipt_lines(document.body.receipt):
        assert " ".join(line.split()) in text_of(page, "receipts")
    assert 'src="data:image/svg+xml;base64,' in page


def test_comparison_has_mean_interval_and_missing_values(folder):
    said = text_of(render_report(read_documents([folder / "results.json"]), "t"), "comparisons")
    assert "comparison on digits" in said
    assert "sr-moe 2 1 ± 2.48" in said
    assert said.count("no data") == 2  # interference of both rows


def test_what_the_library_writes_is_read(tmp_path):
    model = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16))
    with watch(model) as seen:
        inspector = Inspector(seen.layers)
        model(torch.randn(500, 8))
        inspector.add(seen.drain())
    about = {"name": "m", "class": "MoE", "mode": "run", "dtype": "float32", "parameters": 1}
    data = {"source": "noise", "tokens": 500, "sequences": 0, "tokenizer": None, "notes": []}
    document = inspection_document("own", about, data, inspector.layers(), inspector.paths())
    write_json(tmp_path / "inspection.json", document)
    with Monitor(model.train(), tmp_path / "monitor.jsonl", every=2, layers=True, title="own run") as held:
        for _ in range(6):
            model(torch.randn(100, 8))
            held.step()
    page = render_report(read_documents([tmp_path]), "t")
    assert panels(page) == ["summary", "load", "devices", "training", "layers", "similarity", "spectra"]
    assert json.loads(page.split('id="data">')[1].split("</script>")[0])["monitors"][0]["steps"] == [2, 4, 6]


def test_figures():
    assert [figure(x) for x in (0.0, -0.5, 999.6, 12345.0, math.inf)] == ["0", "-0.5", "1000", "12.3k", "no data"]
    assert [amount(x) for x in (0, 1000, 123_456, 2.5e9)] == ["0", "1k", "123k", "2.5G"]
