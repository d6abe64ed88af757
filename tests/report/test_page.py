"""The page in a browser: drawn, sorted, filtered, switched; it loads nothing."""

from __future__ import annotations

import json
import time

import pytest
from browser_tools import BLANK_CANVASES, all_of, choose, column, errors, one
from synthetic_documents import inspection, monitor

PANELS = ["summary", "load", "devices", "training", "layers", "similarity", "spectra", "paths"]
PANELS += ["association", "text", "holders", "examples", "comparisons", "receipts"]


def test_every_panel_is_drawn_without_errors(page):
    assert [panel.get_attribute("id") for panel in all_of(page, "main > section")] == PANELS
    assert page.execute_script(BLANK_CANVASES) == []
    for chart in all_of(page, "[data-chart]"):
        name = chart.get_attribute("data-chart")
        drawn = all_of(chart, "canvas, svg path, svg rect, table, ol li, .token")
        assert drawn, name
    assert len(all_of(page, "[data-chart=load] canvas[data-drawn='4 x 8']")) == 2
    assert len(all_of(page, "[data-chart=steps] .lines path.series")) == 2 * 5
    assert one(page, "#training .none").text == "no data"  # no slot was ever counted as dropped or kept
    assert len(all_of(page, "#paths path.band")) > 20
    assert page.execute_script("return document.querySelectorAll('#text .running .token').length") == 2 * 2 * 60
    assert len(all_of(page, "#holders tbody tr")) == 2 * 4 * 3
    assert one(page, "#holders mark").text == "Paris"
    assert len(all_of(page, "#comparisons svg rect.mean")) > 10
    assert "null" not in one(page, "main").text.split()
    assert not {"NaN", "undefined", "[object"} & set(one(page, "main").text.split())
    assert errors(page) == []


def test_nothing_is_loaded(page):
    sent = [json.loads(line["message"])["message"] for line in page.get_log("performance")]
    addresses = [line["params"]["request"]["url"] for line in sent if line["method"] == "Network.requestWillBeSent"]
    assert addresses
    assert all(address.startswith(("file:", "data:")) for address in addresses)
    script = """
    const done = arguments[0], seen = [];
    document.addEventListener("securitypolicyviolation", (event) => seen.push(event.effectiveDirective));
    const image = new Image(); image.src = "http://127.0.0.1:9/x.png";
    const script = document.createElement("script");
    script.textContent = "window.ran = true";
    document.body.append(script);
    setTimeout(() => done([seen, window.ran === undefined]), 300);
    """
    seen, harmless = page.execute_async_script(script)
    assert {"img-src", "script-src-elem"} <= set(seen)
    assert harmless


def test_headings_sort(page):
    table = "#layers table"
    head = one(page, f"{table} th[data-column='3']")  # MaxVio
    before = column(page, table, 3)
    head.find_element("css selector", "button").click()
    up = [float(x) for x in column(page, table, 3)]
    assert up == sorted(float(x) for x in before)
    assert head.get_attribute("aria-sort") == "ascending"
    head.find_element("css selector", "button").click()
    assert [float(x) for x in column(page, table, 3)] == up[::-1]
    assert head.get_attribute("aria-sort") == "descending"
    other = one(page, f"{table} th[data-column='0']")
    other.find_element("css selector", "button").click()
    assert (other.get_attribute("aria-sort"), head.get_attribute("aria-sort")) == ("ascending", "none")
    assert column(page, table, 0) == ["0", "1", "2", "3"]


def test_no_data_stays_last_when_sorted(show):
    document = inspection(4, 8)
    document["layers"][1]["load"]["max_vio"] = {"value": None, "data": 3, "unit": "slots", "needs": 64}
    page = show([document])
    button = one(page, "#layers th[data-column='3'] button")
    for _ in range(2):
        button.click()
        assert column(page, "#layers table", 3)[-1] == ""


def test_filter_and_groups_of_columns(page):
    box = one(page, "#layers input[type=search]")
    box.send_keys("layers.2")
    visible = [row.text for row in all_of(page, "#layers .run:first-of-type tbody tr") if row.is_displayed()]
    assert len(visible) == 1
    assert "model.layers.2.mlp" in visible[0]
    assert "1 of 4 layers" in one(page, "#layers .controls").text
    choose(page, "#layers .controls select", "stability")
    shown = {
        head.get_attribute("data-group")
        for head in all_of(page, "#layers .run:first-of-type th[data-group]")
        if head.is_displayed()
    }
    assert shown == {"stability"}


def test_metric_and_order_change_what_is_shown(page):
    heat = one(page, "[data-chart=load] .heat")
    said = "[data-chart=load] .readout"
    page.execute_script("arguments[0].querySelector('details').open = true", one(page, "[data-chart=load]"))
    waited = "return document.querySelector('[data-chart=load] .values td')?.textContent"
    deadline = time.monotonic() + 60
    while page.execute_script(waited) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    counts = json.loads(one(page, "#data").get_attribute("textContent"))["inspections"][0]["layers"]
    even = [float(cell.text) for cell in all_of(page, "[data-chart=load] tbody tr:first-child td")][:8]
    total = sum(counts[0]["counts"])
    assert even == pytest.approx([8 * n / total for n in counts[0]["counts"]], rel=6e-3)
    picture = page.execute_script("return arguments[0].querySelector('canvas').toDataURL()", heat)
    choose(page, "#load select", "count")
    assert [int(cell.text) for cell in all_of(page, "[data-chart=load] tbody tr:first-child td")][:8] == counts[0][
        "counts"
    ]
    assert page.execute_script("return arguments[0].querySelector('canvas').toDataURL()", heat) != picture
    one(page, "#load input[type=checkbox]").click()
    sizes = [int(cell.text.split(": ")[1]) for cell in all_of(page, "[data-chart=load] tbody tr:first-child td")][:8]
    assert sizes == sorted(counts[0]["counts"], reverse=True)
    assert one(page, said).text


def test_the_pointer_reads_values(page):
    from selenium.webdriver.common.action_chains import ActionChains

    expected = {"load": "layer ", "similarity": "layer 0, experts ", "steps": "step ", "spectra": "layer "}
    for chart, begins in expected.items():
        picture, said = (
            one(page, f"[data-chart={chart}] {part}") for part in (":is(.heat canvas, .lines svg)", ".readout")
        )
        hint = said.text
        page.execute_script("arguments[0].scrollIntoView({ block: 'center' })", picture)
        ActionChains(page).move_to_element_with_offset(picture, -60, 0).perform()
        assert said.text.startswith(begins), chart
        ActionChains(page).move_to_element(one(page, f"#{chart.replace('steps', 'training')} h2")).perform()
        assert said.text == hint


def test_themes(page):
    def colours():
        background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        return background, page.execute_script("return document.querySelector('.heat canvas').toDataURL()")

    light = colours()
    page.execute_script("document.querySelector('input[value=dark]').click()")
    dark = colours()
    assert light[0] == "rgb(255, 255, 255)"
    assert dark[0] != light[0]
    assert dark[1] != light[1]
    page.execute_script("document.querySelector('input[value=auto]').click()")
    assert colours() == light
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    assert colours() == dark


@pytest.mark.parametrize(("layers", "experts"), [(12, 64), pytest.param(48, 128, marks=pytest.mark.full)])
def test_many_layers_of_many_experts(layers, experts, show, tmp_path):
    path = tmp_path / "monitor.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in monitor(layers, experts, 20)))
    document = inspection(layers, experts, labels=0)
    (tmp_path / "inspection.json").write_text(json.dumps(document))
    page = show([tmp_path])
    assert len(all_of(page, f"#similarity .gallery canvas[data-drawn='{experts} x {experts}']")) == layers
    assert page.execute_script(BLANK_CANVASES.replace("main canvas", ".heat canvas")) == []
    assert errors(page) == []


def test_kinds_and_measures_of_later_versions_stand_in_the_page(show):
    from selenium.webdriver.support.ui import WebDriverWait

    document = inspection(3, 4)
    for layer in document["layers"]:
        layer["stability"]["a_later_measure"] = {"value": 0.031, "data": 256, "unit": "tokens"}
        layer["entropy"]["a.b"] = {"value": None, "data": 0, "unit": "x", "needs": 9}
        layer["a_later_group"] = {"x": {"value": 1.0, "data": 1, "unit": "x"}}
        layer["load"]["share"] = layer["weights"]["share"] = [None] * 4
    plain = {"severity": "warning", "message": "none of it", "layer": None, "cure": "look", "measure": None}
    document["findings"] = [
        {"kind": "no_router", "layer": 1, "name": None, "severity": "severe", "message": "layer 1: a gate of zeros"},
        {"kind": "empty_expert", **plain},
        {
            "kind": "later",
            "severity": "note",
            "message": "later",
            "measure": {"value": None},
            "threshold": None,
            "x": 1,
        },
    ]
    page = show([document])
    text = one(page, "main").text
    for words in ("no router", "empty expert", "layer 1: a gate of zeros", "a later measure", "0.031"):
        assert words in text
    choose(page, "#load select", "weight")
    page.execute_script("document.querySelector('#load details').open = true")
    WebDriverWait(page, 10).until(lambda page: all_of(page, "#load td"))
    assert {cell.text for cell in all_of(page, "#load td")} == {"no data"}
    assert errors(page) == []
