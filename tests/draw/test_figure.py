"""Figures: three formats from one call, text that stays text, whole intervals, no title, colours that stay."""

import re
import warnings
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from spectralmoe.draw.figure import _colours, _drawn, write_figure, write_figures
from spectralmoe.draw.panels import Intervals, Lines, Mark, Point
from spectralmoe.errors import UserError

ROWS = [Mark("a<b", "a", 2.0, -900.0, 904.0, (1.0, 3.0)), Mark("not measured", "b"), Mark("one seed", "c", 5.0)]
BARS = Intervals("accuracy %", ROWS, better="higher")
RATIOS = Intervals("time, ratio", [Mark("x", "x", 3.0, 2.5, 40.0, (), 1.5)], better="lower", guides=(1.0,), ratio=True)
SERIES = {"first": [Point(16, 1.0, 0.5), Point(2, 0.0, 30.0)], "second": [Point(2, 1.0)], "none": []}
DEPTHS = Lines("interference (points)", SERIES, "depth", "higher", log_x=True, guides=(0.0,))
LONG = Lines("loss", {"run": [Point(step, 1 / (1 + step)) for step in range(50)]}, "step", "lower")


def texts(path):
    return [element.text for element in ET.parse(path).iter() if element.text and element.text.strip()]


@pytest.mark.parametrize("panels", [[BARS] * 5, [RATIOS], [DEPTHS, LONG], [Intervals("nothing", [])]])
def test_three_files_from_one_call_without_a_warning(tmp_path, panels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = write_figure(tmp_path / "figure", panels)
    assert [path.suffix for path in paths] == [".svg", ".pdf", ".png"]
    assert paths[1].read_bytes().startswith(b"%PDF")
    assert min(Image.open(paths[2]).size) > 100
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["figure.pdf", "figure.png", "figure.svg"]


def test_text_stays_text_and_says_which_way_is_better(tmp_path):
    found = texts(write_figure(tmp_path / "a", [BARS])[0])
    for word in ("accuracy %", "a<b", "not measured", "higher is better"):
        assert word in found
    found = texts(write_figure(tmp_path / "b", [DEPTHS])[0])
    for word in ("interference (points)", "depth", "first", "second", "2", "16"):
        assert word in found


def test_the_same_panels_are_the_same_file(tmp_path):
    first, again = (write_figure(tmp_path / name, [BARS]) for name in "ab")
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_intervals_are_whole_and_no_title_is_burnt_in():
    bars = _drawn([BARS, RATIOS], 2, _colours((), [BARS, RATIOS]))
    assert bars.get_suptitle() == ""
    first, second = bars.axes
    low, high = first.get_xlim()
    assert low < -900 < 904 < high
    low, high = second.get_xlim()
    assert 0 < low < 1
    assert high > 40
    low, high = _drawn([DEPTHS], 1, _colours((), [DEPTHS])).axes[0].get_ylim()
    assert low < -30 < 30 < high


def test_ticks_are_few_and_round():
    (axes,) = _drawn([Intervals("x", [Mark("r", "r", 97.1234, 96.987, 97.4567)])], 1, {"r": 0}).axes
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert 2 <= len(ticks) <= 4
    assert all(re.fullmatch(r"97\.\d0*|9\d\.[05]0*", f"{tick:.2f}") for tick in ticks)


def test_names_keep_their_colours_over_figures():
    assert _colours(("b", "a"), [BARS]) == {"b": 0, "a": 1, "c": 2}
    assert _colours((), [DEPTHS]) == {"first": 0, "second": 1, "none": 2}


def test_a_figure_that_cannot_be_drawn_is_a_note(tmp_path, monkeypatch):
    assert write_figures(tmp_path, {"empty": []}) == ([], [])
    (tmp_path / "taken.svg").mkdir()
    written, notes = write_figures(tmp_path, {"good": [BARS], "taken": [BARS]})
    assert len(written) == 3
    assert "taken.svg" in notes[0]
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'spectralmoe\[plots\]'"):
        write_figure(tmp_path / "x", [BARS])
