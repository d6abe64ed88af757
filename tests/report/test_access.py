"""The page for everyone: by keyboard, by screen reader, on a narrow screen, on paper."""

from __future__ import annotations

import base64
import time

import pytest
from browser_tools import all_of, errors, one, press

OUTLINE = """
const all = (selector) => [...document.querySelectorAll(selector)];
const levels = all("h1,h2,h3,h4").map((h) => Number(h.tagName[1]));
const named = (node) => (node.getAttribute("aria-label") || node.textContent || "").trim() !== "";
const ids = all("[id]").map((node) => node.id);
return {
  skips: levels.filter((level, i) => i && level > levels[i - 1] + 1).length + (levels[0] === 1 ? 0 : 1),
  ones: levels.filter((level) => level === 1).length,
  landmarks: ["header", "nav", "main", "footer"].filter((tag) => all("body > " + tag).length !== 1),
  unlabelled: all("select, input").filter((node) => !node.labels.length).length,
  nameless: all("button, summary, a, [role]").filter((node) => !named(node)).length,
  images: all("img:not([alt])").length,
  heads: all("th:not([scope])").length,
  twice: ids.filter((id, i) => ids.indexOf(id) !== i),
  broken: all("a[href^='#']").filter((a) => !document.getElementById(a.hash.slice(1))).length,
}"""


def test_everything_is_reached_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    page.execute_script("document.addEventListener('focusin', (e) => { e.target.dataset.reached = 1; })")
    press(page, Keys.TAB * 400)
    names = "return [...document.querySelectorAll('[data-reached]')].map((n) => `${n.tagName}.${n.className}`)"
    reached = set(page.execute_script(names))
    controls = "a, select, input:not([type=radio]), main button, summary, .heat, .lines[tabindex], .bands, .running"
    missed = f"""return [...document.querySelectorAll("{controls}")]
      .filter((n) => n.checkVisibility() && !n.dataset.reached).map((n) => n.outerHTML.slice(0, 120))"""
    assert page.execute_script(missed) == []
    assert {"DIV.heat", "DIV.bands", "A.skip"} <= reached
    page.execute_script("document.querySelector('.heat').focus({ focusVisible: true })")
    press(page, Keys.ARROW_RIGHT)
    press(page, Keys.ARROW_DOWN)
    assert one(page, "[data-chart=load] .readout").text.startswith("layer 1, expert 1: ")
    width = page.execute_script("return getComputedStyle(document.activeElement).outlineWidth")
    assert width == "2px"
    page.execute_script("document.querySelector('.bands').focus({ focusVisible: true })")
    press(page, Keys.ARROW_RIGHT)
    assert "tokens" in one(page, ".bands + .readout").text
    slider = one(page, "#training input[type=range]")
    slider.send_keys(Keys.HOME)
    assert "step 50" in one(page, "#training .control.wide").text


def test_outline_labels_and_landmarks(page):
    found = page.execute_script(OUTLINE)
    assert found == dict.fromkeys(("skips", "unlabelled", "nameless", "images", "heads", "broken"), 0) | {
        "ones": 1,
        "landmarks": [],
        "twice": [],
    }


@pytest.mark.parametrize("width", [360, 800])
def test_no_page_wider_than_the_window(page, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    time.sleep(0.2)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_printing_opens_everything_and_drops_the_controls(page):
    page.execute_script("document.querySelector('input[value=dark]').click()")
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert not all_of(page, "details:not([open]):not(.values)")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not [node for node in all_of(page, "nav, .controls, .theme, .readout") if node.is_displayed()]
    assert page.execute_script("return getComputedStyle(document.body).color") == "rgb(27, 30, 35)"
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    page.execute_script("dispatchEvent(new Event('afterprint'))")
    assert base64.b64decode(page.execute_cdp_cmd("Page.printToPDF", {})["data"]).startswith(b"%PDF")
    assert errors(page) == []
