"""Intervals, columns, tuning and the picture."""

import math
import statistics
import xml.etree.ElementTree as ET

import pytest
import torch

from spectralmoe import UserError
from spectralmoe.data.image_data import load_data
from spectralmoe.experiments.compare import CompareSettings, run
from spectralmoe.experiments.compare.columns import COLUMNS, Row, summarise
from spectralmoe.experiments.compare.picture import draw
from spectralmoe.experiments.compare.settings import Cell
from spectralmoe.experiments.compare.tuning import candidates
from spectralmoe.experiments.statistics import estimate, paired
from spectralmoe.files import read_json
from spectralmoe.training.tasks import ImageTask


def student_cdf(t: float, df: int, steps: int = 20000) -> float:
    """Student's distribution by the midpoint rule, from its density."""
    scale = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    width = t / steps
    area = sum((1 + ((i + 0.5) * width) ** 2 / df) ** (-(df + 1) / 2) for i in range(steps)) * width
    return 0.5 + scale * area


@pytest.mark.parametrize("n", [2, 3, 5, 11, 31, 32, 45, 200])
def test_interval_is_student_95(n):
    values = [float((7 * i) % 5) for i in range(n)]
    found = estimate(values)
    t = found.half / (statistics.stdev(values) / math.sqrt(n))
    assert student_cdf(t, n - 1) == pytest.approx(0.975, abs=2e-4)
    assert found.mean == pytest.approx(statistics.mean(values))


def test_missing_values_are_left_out():
    assert estimate([None, math.nan]) is None
    assert estimate([1.0, None]).half is None
    assert estimate([1.0, None, 3.0]).n == 2


def test_pairs_are_those_of_the_seeds_that_both_have():
    """The rows' own intervals overlap; their differences by seed do not hold 0."""
    a, b = {0: 10.0, 1: 20.0, 2: 31.0, 3: None, 5: 7.0}, {2: 30.0, 1: 19.1, 0: 9.0, 3: 1.0, 4: 2.0}
    found = paired(a, b)
    assert sorted(found.values) == pytest.approx([0.9, 1.0, 1.0])
    assert found == estimate(found.values)
    assert found.separated
    assert not paired(b, {0: 9.0, 1: 19.0, 2: 30.2}).separated
    assert not paired({0: 1.0}, {0: 0.0}).separated  # one seed tells nothing apart
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_an_interval_holds_what_lies_within_it():
    found = estimate([1.0, 2.0, 3.0])
    assert found.holds(1.999 + found.half)
    assert not found.holds(2.001 + found.half)
    assert not estimate([2.0]).holds(2.0)


def test_cells_take_turns_and_have_their_own_folders():
    settings = CompareSettings(routers=("linear", "sr-moe"), depths=(2, 4), seeds=2)
    cells = settings.cells()
    assert cells[:4] == [Cell("linear", 2, 0), Cell("sr-moe", 2, 0), Cell("linear", 4, 0), Cell("sr-moe", 4, 0)]
    assert len({cell.name for cell in cells}) == 8
    assert Cell("pkg:Class", 2, 0).name == "pkg_Class-depth2-seed0"


def test_candidates_are_the_same_for_every_row_and_start_with_the_preset():
    assert candidates(0) == []
    assert candidates(1)[0] == (1.0, 1.0)
    assert candidates(4) == candidates(6)[:4]
    assert all(10**-0.5 <= c.lr <= 10**0.5 and 0.1 <= c.strength <= 10 for c in candidates(50))


def test_tuning_picks_by_validation_and_gives_every_row_the_same_number(tmp_path):
    data = load_data("digits").subset(150)
    settings = CompareSettings(
        data="digits", routers=("linear", "sr-moe"), depths=(1,), seeds=1, trials=2, tune=3,
        network={"width": 16, "num_experts": 4, "hidden": 8}, optimization={"epochs": 2},
    )  # fmt: skip
    rows = run(settings, ImageTask(data), tmp_path, torch.device("cpu"), lambda text, done: None)
    tried = read_json(tmp_path / "tuning.json")
    for row in rows:
        own = [t for t in tried if t["router"] == row["router"]]
        assert len(own) == 3
        best = max(own, key=lambda t: t["validation"])
        assert row["tuned"] == {"lr": best["lr"], "strength": best["strength"]}
        assert row["validation_accuracy"] == pytest.approx(best["validation"])  # same seed, same setting


def test_picture_is_valid_svg_with_every_row_and_column():
    cells = [
        {"router": name, "depth": depth, **{c.key: base + i for i, c in enumerate(COLUMNS)}}
        for depth in (2, 4)
        for name, base in (("linear", 1.0), ("a<b&c", -2.0), ("linear", 2.0))
    ]
    rows = [*summarise(cells), Row("nothing", 2, {c.key: None for c in COLUMNS})]
    assert ET.fromstring(draw(summarise([{"router": "a", "depth": 1, **{c.key: 0 for c in COLUMNS}}]), "all zero")).tag
    assert ET.fromstring(draw([], "no rows")).tag
    root = ET.fromstring(draw(rows, 'title "quoted" <x>'))
    texts = [element.text for element in root.iter() if element.text]
    for word in ("a<b&c, depth 2", "linear, depth 4", "nothing, depth 2", *(c.title for c in COLUMNS)):
        assert word in texts
    width = float(root.get("width"))
    places = [float(e.get(k)) for e in root.iter() for k in ("x", "cx", "x1", "x2") if e.get(k)]
    assert all(0 <= x <= width for x in places)


def test_settings_refuse_what_cannot_work():
    for change, words in (
        ({"routers": ("linear", "linear")}, "twice"),
        ({"depths": (2, 2)}, "twice"),
        ({"network": {"k": 9}}, "only 8"),
    ):
        with pytest.raises(UserError, match=words):
            CompareSettings(**change).check()
