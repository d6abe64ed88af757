"""Text from models and data does nothing in the page but stand there."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_documents import inspection, monitor

from spectralmoe import UserError
from spectralmoe.report import Document, as_document, render_report
from spectralmoe.report.encode import script_json
from spectralmoe.report.schema_runs import Monitor

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    "<img src=x onerror='window.hacked = 3'>",
    '" onmouseover="window.hacked = 4" x=\'',
    "<!--<script>",
    "{{ 7 * 7 }}{% raw %}",
    "\u202eright to left \u05d0\u05d1\u2028\u2029 \ud800",
    "&lt;b&gt;&#60;i&#62;",
]
DRAWN_AS_NUMBERS = {"kind", "severity", "unit", "image", "format"}


def spoiled(value: Any, texts: Any) -> Any:
    """``value`` with every text in it made hostile."""
    if isinstance(value, dict):
        return {key: item if key in DRAWN_AS_NUMBERS else spoiled(item, texts) for key, item in value.items()}
    if isinstance(value, list):
        return [spoiled(item, texts) for item in value]
    return next(texts) if isinstance(value, str) else value


def documents() -> list[Any]:
    """Every text of every kind of document is hostile; the names of the layers stay apart."""
    turn = (f"{HOSTILE[i % len(HOSTILE)]} {i}" for i in range(10**6))
    found = [as_document(spoiled(inspection(3, 4, sick=(1,)), turn), HOSTILE[0])]
    found[0].body.findings[0].model_extra["x"] = 1
    start, *lines = monitor(2, 4, 3)
    held = {kind: [line for line in lines if line["kind"] == kind] for kind in ("step", "load", "finding")}
    body = {"title": HOSTILE[1], "layers": spoiled(start["layers"], turn), "steps": held["step"], "loads": []}
    body["findings"] = [spoiled(line["finding"], turn) for line in held["finding"]]
    names = [layer["name"] for layer in body["layers"]]
    body["loads"] = [
        {"step": row["step"], "shares": dict(zip(names, row["shares"].values(), strict=True))} for row in held["load"]
    ]
    found.append(Document("monitor", HOSTILE[0], Monitor.model_validate(body)))
    value = {"mean": 1.0, "half": 0.1, "values": [0.9, 1.1]}
    row = {"router": HOSTILE[1], "depth": 2, HOSTILE[2]: value}
    comparison = {"title": HOSTILE[3], "columns": {HOSTILE[2]: HOSTILE[0]}, "summary": [row], "cells": []}
    return [*found, as_document(comparison, "results.json"), as_document(inspection(2, 4, title=HOSTILE[1]), "second")]


class Elements(HTMLParser):
    """All elements of a page, and what its scripts hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[dict[str, str | None]] = []
        self.handlers: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        self.images += tag == "img"
        if tag == "script":
            self.scripts.append(dict(attrs))


def test_hostile_text_adds_no_element_to_the_page():
    found = Elements()
    page = render_report(documents(), HOSTILE[1])
    found.feed(page)
    assert found.scripts == [{"type": "application/json", "id": "data"}, {}]
    assert found.handlers == []
    assert found.images == 0
    assert "49" not in page.split("<title>")[1].split("</title>")[0]
    assert "Content-Security-Policy" in page


def test_hostile_names_in_a_receipt_are_text(folder):
    value = json.loads((folder / "receipt.json").read_text())
    value |= {"image": HOSTILE[0], "model": HOSTILE[2], "classes": [f"{HOSTILE[1]}{i}" for i in range(10)]}
    found = Elements()
    page = render_report([as_document(value, HOSTILE[0])], "t")
    found.feed(page)
    assert len(found.scripts) == 2
    assert (found.handlers, found.images) == ([], 0)
    assert "&lt;/script&gt;&lt;script&gt;window.hacked = 2" in page


def test_hostile_text_stands_in_the_browser_and_does_nothing(show):
    browser = show(documents(), HOSTILE[0])
    assert browser.execute_script("return typeof window.hacked") == "undefined"
    for details in browser.find_elements("css selector", "details"):
        browser.execute_script("arguments[0].open = true", details)
    for select in browser.find_elements("css selector", "select"):
        browser.execute_script("arguments[0].dispatchEvent(new Event('change'))", select)
    text = browser.execute_script("return document.body.textContent.toWellFormed()")
    for hostile in HOSTILE[:6]:
        assert hostile in text
    assert browser.title == HOSTILE[0]
    assert browser.execute_script("return document.querySelectorAll('script').length") == 2
    assert browser.execute_script("return document.querySelectorAll('main img, main [onerror]').length") == 0
    assert browser.execute_script("return typeof window.hacked") == "undefined"
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


@pytest.mark.parametrize(
    "address", ["http://x.test/a.png", "data:image/svg+xml;base64,PHN2Zz4=", "data:text/html,x", "a.png"]
)
def test_only_pixels_are_shown_as_examples(address):
    document = inspection(1, 2)
    document["layers"][0]["examples"] = [[{"image": address, "text": "", "weight": 1.0}], []]
    with pytest.raises(UserError, match="not an image inside a data: address"):
        as_document(document, "x")


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_json_in_the_page_cannot_leave_its_element(value):
    text = script_json(value)
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == value
