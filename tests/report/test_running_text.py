"""Running text on the page: each token in the colour of its expert, told to eyes, keys and readers alike."""

from __future__ import annotations

import itertools
import re
from importlib import resources

import numpy as np
import pytest
from browser_tools import all_of, choose, errors, one, press
from synthetic_documents import inspection

from spectralmoe import UserError
from spectralmoe.report import as_document, render_report
from spectralmoe.report.charts import TEXT_LETTERS, inspection_data
from spectralmoe.report.encode import script_json

# Machado, Oliveira, Fernandes, "A physiologically-based model for simulation of color vision deficiency", 2009, table 1
VISION = {
    "usual": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour):
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(light):
    ratio = XYZ @ np.clip(light, 0, 1) / [0.9505, 1, 1.089]
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def colours():
    script = resources.files("spectralmoe.report").joinpath("templates", "text.js").read_text(encoding="utf-8")
    return re.findall(r'"(#[0-9a-f]{6})"', script)


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_apart_for_every_kind_of_eyes_and_words_stand_out(vision):
    assert len(colours()) == 9
    seen = [np.array(VISION[vision]) @ linear(colour) for colour in colours()]
    assert min(np.linalg.norm(lab(a) - lab(b)) for a, b in itertools.combinations(seen, 2)) > 15
    ink, brightness = XYZ[1] @ linear("#14171c"), [XYZ[1] @ linear(colour) for colour in colours()]
    assert (min(brightness) + 0.05) / (ink + 0.05) > 4.5  # WCAG 2, AA


def test_a_broken_passage_is_refused():
    def broken(change):
        document = inspection(2, 4)
        change(document["text"][0])
        with pytest.raises(UserError) as caught:
            as_document(document, "x")
        return str(caught.value)

    assert "one entry a layer" in broken(lambda text: text["layers"].pop())
    assert "one expert and one weight a token" in broken(lambda text: text["pieces"].pop())
    assert "not there" in broken(lambda text: text["layers"][1]["experts"].__setitem__(3, 4))
    assert "greater than or equal to 0" in broken(lambda text: text["layers"][1]["experts"].__setitem__(3, -2))
    assert as_document({**inspection(2, 4), "text": []}, "x").body.text == []


def test_the_page_takes_as_many_tokens_as_fit():
    document = inspection(48, 2, labels=0)
    for passage in document["text"]:
        passage["pieces"] = ["a long piece of text that is cut" * 9] * 1200
        passage["layers"] = [{"experts": [1] * 1200, "weights": [0.5] * 1200} for _ in range(48)]
    held = inspection_data(as_document(document, "x").body)["text"]
    assert len(script_json(held)) < 1.1 * TEXT_LETTERS
    assert 100 < len(held[0]["pieces"]) < held[0]["all"] == 1200
    few = inspection_data(as_document(inspection(2, 4), "x").body)["text"]
    assert [len(passage["pieces"]) for passage in few] == [60, 60]


def test_no_text_no_panel():
    document = inspection(2, 4)
    del document["text"]
    assert 'id="text"' not in render_report([document], "t")
    document["text"] = [{"title": "", "pieces": ["a"], "layers": [None, None]}]
    assert 'id="text"' not in render_report([document], "t")


def token(page, i):
    script = "const s = document.querySelectorAll('#text .token')[arguments[0]]; return [s.textContent, s.title, "
    return page.execute_script(script + "s.style.getPropertyValue('--expert'), s.classList.contains('faint')]", i)


def test_tokens_have_the_colour_of_their_expert_in_the_chosen_layer(show):
    document = inspection(3, 4)
    page, passage = show([document]), document["text"][0]
    for layer in (0, 2):
        choose(page, "#text select", str(layer))
        for i in (1, 7, 16):
            expert, weight = (passage["layers"][layer][key][i] for key in ("experts", "weights"))
            text, title, colour, faint = token(page, i)
            assert text == passage["pieces"][i].replace("\n", "⏎\n")
            assert re.fullmatch(rf"layer {layer}, token {i} “.*”: expert {expert}, weight [\d.]+", title)
            assert float(title.rsplit(" ", 1)[1]) == pytest.approx(weight, abs=0.003)
            assert (colour, faint) == (colours()[expert], False)
        assert token(page, 0)[1].endswith("no expert")
    assert errors(page) == []


def test_one_expert_alone_by_its_key_in_the_legend(show):
    document = inspection(2, 4)
    page, passage = show([document]), document["text"][0]
    key = all_of(page, "#text .keys button")[0]
    expert = int(key.text.split("expert ")[1].split(",")[0])
    key.click()
    experts = passage["layers"][0]["experts"]
    assert [token(page, i)[3] for i in range(40)] == [e != expert for e in experts[:40]]
    pressed = [button.get_attribute("aria-pressed") for button in all_of(page, "#text .keys button")]
    assert pressed.count("true") == 1
    all_of(page, "#text .keys button")[0].click()
    assert [token(page, i)[3] for i in range(40)] == [e is None for e in experts[:40]]


def test_more_experts_than_colours_are_grey_and_can_be_chosen(show):
    page = show([inspection(1, 64)])
    assert len(all_of(page, "#text .keys > button")) == 8
    grey = all_of(page, "#text .keys .sign button")
    assert len(grey) > 8
    expert = grey[0].text
    grey[0].click()
    tokens = "[...document.querySelectorAll('#text .token:not(.faint)')]"
    shown = page.execute_script(f"return {tokens}.map((span) => [span.title, span.style.cssText])")
    assert shown
    assert all(f"expert {expert}," in title and "#dddddd" in style for title, style in shown)


def test_arrow_keys_and_the_table_read_the_tokens(show):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    page = show([inspection(2, 4)])
    page.execute_script("document.querySelector('.running').focus({ focusVisible: true })")
    said = one(page, "#text .readout")
    assert said.text.startswith("layer 0, token 0 ")
    press(page, Keys.ARROW_RIGHT)
    assert said.text.startswith("layer 0, token 1 ")
    press(page, Keys.ARROW_DOWN)
    lower = int(said.text.split("token ")[1].split()[0])
    assert lower > 5
    press(page, Keys.ARROW_UP)
    assert int(said.text.split("token ")[1].split()[0]) < lower
    press(page, Keys.END)
    assert said.text.startswith("layer 0, token 59 ")
    page.execute_script("document.querySelector('#text details').open = true")
    WebDriverWait(page, 10).until(lambda page: len(all_of(page, "#text tbody tr")) == 120)
    assert errors(page) == []


def test_html_in_the_text_is_text(show):
    document = inspection(1, 4)
    document["text"][0]["pieces"][:2] = ["</script><script>hacked = 1</script>", "<img src=x onerror=alert(1)>"]
    page = show([document])
    assert token(page, 0)[0] == "</script><script>hacked = 1</script>"
    assert page.execute_script("return typeof window.hacked") == "undefined"
    assert not all_of(page, "#text img, #text script")
