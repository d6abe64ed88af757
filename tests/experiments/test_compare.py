"""Intervals, columns, paired differences, tuning and what is written."""

import csv
import math
import re
import statistics
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

from spectralmoe import UserError
from spectralmoe.data.image_data import load_data
from spectralmoe.experiments.compare import CompareSettings, run
from spectralmoe.experiments.compare.columns import COLUMNS, chosen_columns, summarise, summary_json
from spectralmoe.experiments.compare.outputs import Shown, write_pictures, write_results
from spectralmoe.experiments.compare.settings import Cell
from spectralmoe.experiments.compare.tuning import candidates
from spectralmoe.experiments.statistics import estimate, paired
from spectralmoe.json_files import read_json
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
        data="digits", routers=("linear", "sr-moe"), depths=(1,), seeds=1, trials=1, tune=3,
        network={"width": 16, "num_experts": 4, "hidden": 8}, optimization={"epochs": 1},
    )  # fmt: skip
    rows = run(settings, ImageTask(data), tmp_path, torch.device("cpu"), lambda text, done: None).cells
    tried = read_json(tmp_path / "tuning.json")
    for row in rows:
        own = [t for t in tried if t["router"] == row["router"]]
        assert len(own) == 3
        best = max(own, key=lambda t: t["validation_accuracy"])
        assert row["tuned"] == {"lr": best["lr"], "strength": best["strength"]}
        assert row["validation_accuracy"] == pytest.approx(best["validation_accuracy"])  # same seed, same setting


def cells_of(*rows, depths=(2,), seeds=3, **changed):
    """Cells whose measures are the number of their row plus the seed; ``changed`` measures are the same in all."""
    return [
        {
            "router": row,
            "depth": depth,
            "seed": seed,
            "cpu": "a",
            **{c.key: 10.0 * i + seed for c in COLUMNS},
            **changed,
        }
        for seed in range(seeds)
        for depth in depths
        for i, row in enumerate(rows)
    ]


def test_differences_are_paired_by_seed_and_processor_with_the_baseline():
    cells = cells_of("a", "b", "c")
    cells[1] |= {"accuracy": 11.5}  # b under seed 0
    cells[4] |= {"cpu": "other"}  # b under seed 1: no pair
    first, b, c = summarise(cells)
    assert first.differences == {}
    assert sorted(b.differences["accuracy"].values) == [10.0, 11.5]
    assert b.values["accuracy"].n == 3
    assert c.differences["gini"].mean == 20
    assert c.differences["gini"].separated
    assert [row.differences == {} for row in summarise(cells, COLUMNS, "c")] == [False, False, True]
    with pytest.raises(UserError, match="unknown baseline 'd'"):
        summarise(cells, COLUMNS, "d")


def test_each_depth_has_its_own_baseline():
    cells = cells_of("a", "b", depths=(2, 4))
    for cell in cells:
        cell["accuracy"] += 100 * (cell["depth"] == 4 and cell["router"] == "b")
    found = {(row.router, row.depth): row.differences.get("accuracy") for row in summarise(cells)}
    assert (found["b", 2].mean, found["b", 4].mean) == (10, 110)


def test_a_diverged_cell_counts_as_one_and_has_no_values():
    cells = cells_of("a", "b")
    cells[1] = {"router": "b", "depth": 2, "seed": 0, "cpu": "a", "diverged": "the loss is nan in epoch 1"}
    _, b = summarise(cells)
    assert (b.seeds, b.diverged, b.values["accuracy"].n, b.differences["accuracy"].n) == ((1, 2), (0,), 2, 2)
    assert summary_json(summarise(cells))[1]["diverged"] == [0]


def written(out, cells, *columns, baseline=None):
    routers = tuple(dict.fromkeys(cell["router"] for cell in cells))
    shown = Shown.of(columns, baseline, routers)
    return write_results(out, CompareSettings(routers=routers), cells, shown), shown


def test_results_hold_differences_and_the_summary_is_rounded(tmp_path):
    cells = cells_of("a", "b", accuracy=97.123456)
    cells[0]["accuracy"] = 95.0
    written(tmp_path, cells, "accuracy", "success")
    results = read_json(tmp_path / "results.json")
    own = results["summary"][1]["differences"]
    assert own["baseline"] == results["baseline"] == "a"
    assert own["accuracy"]["mean"] == pytest.approx(2.123456 / 3)
    assert results["summary"][0].keys() >= {c.key for c in COLUMNS}  # whatever is shown
    first, second = csv.DictReader((tmp_path / "summary.csv").open())
    assert first["accuracy %"] == "96.42"
    assert (first["accuracy % minus a"], second["accuracy % minus a"]) == ("", "0.71")
    assert (second["accuracy % ±"], second["success %"]) == ("0.00", "1100.0")
    assert "Gini" not in first
    raw = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [float(row["accuracy"]) for row in raw] == [cell["accuracy"] for cell in cells]
    assert raw[0]["cpu"] == "a"


@pytest.mark.parametrize(("seeds", "word"), [(1, "one seed"), (2, "two seeds"), (3, "separated")])
def test_a_word_says_where_seeds_are_too_few(tmp_path, seeds, word):
    written(tmp_path, cells_of("a", "b", seeds=seeds), "gini")
    values, differences = (tmp_path / "table.md").read_text().split("Paired differences: minus a")
    assert differences.rstrip().endswith(f"{word} |")
    assert ("±" in values) == (seeds > 1)


def test_the_tables_for_latex_are_whole(tmp_path):
    """Balanced, as many columns in every line as the tabular has, and mathematics that matplotlib's parser reads."""
    from matplotlib.mathtext import MathTextParser

    written(tmp_path, cells_of("a_b&c", r"{x}\y~^%$#", interference=None))
    text = (tmp_path / "table.tex").read_text()
    blocks = re.findall(r"\\begin\{tabular\}\{(l[r]*)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    assert len(blocks) == 2
    parser, numbers = MathTextParser("agg"), 0
    for columns, body in blocks:
        lines = [line for line in body.splitlines() if not re.fullmatch(r"\\(top|mid|bottom)rule", line)]
        for line in lines:
            assert line.endswith(r" \\")
            fields = re.split(r"(?<!\\)&", line.removesuffix(r" \\"))
            assert len(fields) == len(columns) == 3 + len(COLUMNS)
            for field in fields:
                bare = re.sub(r"\\[&%$#_{}]", "", field)
                assert bare.count("$") in (0, 2)
                assert not re.search(r"[&%#_~^]", bare)
                assert bare.count("{") == bare.count("}")
                if "$" in bare:
                    parser.parse(field.strip().split("$ ")[0].removesuffix("$") + "$")
                    numbers += 1
    assert numbers == 45
    assert r"\{x\}\textbackslash{}y\textasciitilde{}\textasciicircum{}\%\$\#" in text


@pytest.mark.full
def test_pictures_leave_out_constant_columns_and_keep_intervals_whole(tmp_path):
    cells = [*cells_of("linear", depths=(2, 4), parameters=7), *cells_of("a<b&c", depths=(2, 4), parameters=7)]
    cells[0]["gini"] = 500.0
    rows, shown = written(tmp_path, cells)
    pictures, notes = write_pictures(tmp_path, rows, shown)
    assert notes == []
    assert [path.name for path in pictures] == [
        f"{name}.{kind}" for name in ("comparison", "differences") for kind in ("svg", "pdf", "png")
    ]
    texts = [element.text for element in ET.parse(tmp_path / "comparison.svg").iter() if element.text]
    for words in ("a<b&c, depth 2", "linear, depth 4", "interference (points)", "accuracy %", "higher is better"):
        assert words in texts
    assert "params k" not in texts
    assert "minus linear, lower is better" in (tmp_path / "differences.svg").read_text()
    one_row, shown = written(tmp_path, cells_of("alone", seeds=1), "accuracy")
    assert len(write_pictures(tmp_path, one_row, shown)[0]) == 3


def test_without_matplotlib_a_line_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_pictures(tmp_path, *written(tmp_path, cells_of("a", "b"))) == (
        [],
        ["figures need matplotlib: pip install 'spectralmoe[plots]', then the same command"],
    )
    assert not list(tmp_path.glob("*.svg"))


def test_columns_are_chosen_by_key():
    assert [column.key for column in chosen_columns(("gini", "accuracy"))] == ["gini", "accuracy"]
    with pytest.raises(UserError, match="unknown column 'ginni'; did you mean 'gini'"):
        chosen_columns(("ginni",))


def test_settings_refuse_what_cannot_work():
    for change, words in (
        ({"routers": ("linear", "linear")}, "twice"),
        ({"depths": (2, 2)}, "twice"),
        ({"network": {"k": 9}}, "from 1 to 8"),
    ):
        with pytest.raises(UserError, match=words):
            CompareSettings(**change).check()
