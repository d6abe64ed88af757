"""The figures in the cards' sentences are those of the stored cells: ``#`` is a number, in the order of the values."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from statistics import fmean

import pytest
from markdown_tables import NUMBER, agrees

from spectralmoe.experiments.evidence import difference, select

PAPERS = Path(__file__).parents[2] / "papers"
LINEAR, BIASED, BARE = "linear", "linear+balanced", "prototype+balanced"
DEPTHS = (2, 4, 8, 16)
CLOTHES, GUARDED = "fashion-mnist", "SR-MoE+guard"


def stored(card, name="results"):
    return json.loads((PAPERS / card / f"{name}.json").read_text(encoding="utf-8"))


def gain(key, row, baseline, depth, scale=1.0, dataset="mnist5k"):
    """(mean, half width) of a paired difference."""
    pairs = difference(select(stored("sr-moe"), dataset=dataset, depth=depth), key, row, baseline)
    return scale * pairs.mean, scale * pairs.half


def clothes(key, row, baseline, depth):
    return gain(key, row, baseline, depth, dataset=CLOTHES)


def at_all_depths(key, row, baseline):
    """Mean and half width at every depth of mnist5k."""
    return [value for depth in DEPTHS for value in gain(key, row, baseline, depth)]


def gains(key, row, baseline, scale=1.0):
    return [*gain(key, row, baseline, 2, scale), *gain(key, row, baseline, 8, scale)]


def carried(kind):
    """Guarded minus plain corrections on fashion-mnist at depth 2 and 8: percentage points of copies that are right."""
    return [x for depth in (2, 8) for x in gain(f"{kind}_after", GUARDED, "SR-MoE", depth, 100, CLOTHES)]


def shares(kind, row, dataset="mnist5k"):
    """Percent of the copies of a kind that are right at depth 2 and 8."""
    cells = select(stored("sr-moe"), dataset=dataset, row=row)
    return [100 * fmean(cell[f"{kind}_after"] for cell in select(cells, depth=depth)) for depth in (2, 8)]


def groups(row):
    """The cells of a row: mnist5k at every depth, then fashion-mnist."""
    cells = select(stored("sr-moe"), row=row)
    return [select(cells, dataset=data, depth=depth) for data in ("mnist5k", "fashion-mnist") for depth in DEPTHS]


def means(row, key):
    return [fmean(cell[key] for cell in group) for group in groups(row)]


def least(row, key):
    return [min(cell[key] for cell in group) for group in groups(row)]


def emoe(key, baseline, row="EMoE"):
    found = difference(stored("emoe"), key, row, baseline)
    return abs(found.mean), found.half


def shots(task, baseline):
    found = difference(select(stored("emoe", "fewshot"), task=task, shots=10), "accuracy", "EMoE", baseline)
    return abs(found.mean), found.half


WORST = least("SR-MoE", "interference_worst")
SHARES = least("SR-MoE", "min_load_share")

SENTENCES = [
    ("sr-moe", "the smallest share grows by # ±#, # ±#, # ±# and # ±#, separated",
     at_all_depths("min_load_share", BIASED, LINEAR)),
    ("sr-moe", "gentler: by # ±#, # ±# and # ±# points at depth #, # and #, separated (depth #: # ±#, not)",
     [*(x for depth in (2, 4, 16) for x in gain("interference_mean", BIASED, LINEAR, depth)), 2, 4, 16, 8,
      *gain("interference_mean", BIASED, LINEAR, 8)]),
    ("sr-moe", "on fashion-mnist by # ±# at depth #, separated (depth #: # ±#, not)",
     [*clothes("interference_mean", BIASED, LINEAR, 2), 2, 8, *clothes("interference_mean", BIASED, LINEAR, 8)]),
    ("sr-moe", "add # ±#, # ±#, # ±# and # ±# points of accuracy on mnist5k, # ±# and # ±# on fashion-mnist",
     [*at_all_depths("accuracy", BARE, BIASED), *clothes("accuracy", BARE, BIASED, 2),
      *clothes("accuracy", BARE, BIASED, 8)]),
    ("sr-moe", "at depth 16 alone (# ±#)", gain("interference_mean", BARE, BIASED, 16)),
    ("sr-moe",
     "in interference # ±#, # ±# and # ±# points at depth #, # and # of mnist5k, not separated; # ±# at depth #",
     [*(x for depth in (2, 4, 8) for x in gain("interference_mean", "SR-MoE", BARE, depth)), 2, 4, 8,
      *gain("interference_mean", "SR-MoE", BARE, 16), 16]),
    ("sr-moe", "separated; # ±# (not) and # ±# (separated) on fashion-mnist",
     [x for depth in (2, 8) for x in clothes("interference_mean", "SR-MoE", BARE, depth)]),
    ("sr-moe", "In accuracy # ±#, # ±#, # ±# and # ±# on mnist5k", at_all_depths("accuracy", "SR-MoE", BARE)),
    ("sr-moe", "by a hair, and # ±# and # ±# on fashion-mnist",
     [x for depth in (2, 8) for x in clothes("accuracy", "SR-MoE", BARE, depth)]),
    ("sr-moe", "the worst single one cost # points", [-min(least("linear", "interference_worst"))]),
    ("sr-moe", "the mean stays between # and # at every depth",
     [max(means("SR-MoE", "interference_mean")), min(means("SR-MoE", "interference_mean"))]),
    ("sr-moe", "the worst of SR-MoE's trials cost # to # points", [-max(WORST), -min(WORST)]),
    ("sr-moe", "an expert has only # and # of the load on mnist5k at depth # and #, and # and # on fashion-mnist",
     [SHARES[2], SHARES[3], 8, 16, SHARES[6], SHARES[7]]),
    ("sr-moe", "#% and #% of noisy copies, whose noise is drawn anew, and #% and #% of the shifts by one pixel",
     [*shares("noisy", "SR-MoE+guard"), *shares("shifted_one", "SR-MoE+guard")]),
    ("sr-moe", "other contrast #% and #%, turned by ten degrees #% and #%, shifted by two pixels #% and #%",
     [*shares("contrast", "SR-MoE+guard"), *shares("rotated", "SR-MoE+guard"), *shares("shifted_two", "SR-MoE+guard")]),
    ("sr-moe", "reach #% and #%, #% and #%, and #% and #%",
     [*shares("contrast", "SR-MoE"), *shares("rotated", "SR-MoE"), *shares("shifted_two", "SR-MoE")]),
    ("sr-moe", "ahead by # ±# and # ±# points in contrast", gains("contrast_after", "SR-MoE+guard", "SR-MoE", 100)),
    ("sr-moe", "and # ±# and # ±# in rotation, separated", gains("rotated_after", "SR-MoE+guard", "SR-MoE", 100)),
    ("sr-moe", "by two pixels (# ±# and # ±#) they are not", gains("shifted_two_after", "SR-MoE+guard", "SR-MoE", 100)),
    ("sr-moe", "other contrast #% and #%, ahead of plain steps by # ±# and # ±# points",
     [*shares("contrast", GUARDED, CLOTHES), *carried("contrast")]),
    ("sr-moe", "turned by ten degrees #% and #% and shifted by two pixels #% and #%, neither",
     [*shares("rotated", GUARDED, CLOTHES), *shares("shifted_two", GUARDED, CLOTHES)]),
    ("sr-moe", "from plain steps (# ±# and # ±#, # ±# and # ±#)", [*carried("rotated"), *carried("shifted_two")]),
    ("emoe", "behind the linear gate (by # ±#) and the one with a selection bias (by # ±#)",
     [*emoe("output_cos2", "linear"), *emoe("output_cos2", "linear+balanced")]),
    ("emoe", "less alike than a linear gate's (by # ±#)", emoe("output_cos2", "linear", "EMoE faithful")),
    ("emoe", "from the gate with a loss five seeds do not separate it (# ±#)",
     emoe("output_cos2", "linear+load_balance")),
    ("emoe", "ahead of the linear gates by # ±# and # ±# points and of the dense adapter by # ±#",
     [*shots("new classes", "linear"), *shots("new classes", "linear+load_balance"),
      *shots("new classes", "dense adapter")]),
    ("emoe", "behind the linear gates by # ±# and # ±# points",
     [*shots("mnist5k", "linear"), *shots("mnist5k", "linear+load_balance")]),
]  # fmt: skip


@pytest.mark.parametrize(("card", "sentence", "values"), SENTENCES, ids=[sentence for _, sentence, _ in SENTENCES])
def test_the_figures_of_a_sentence(card, sentence, values):
    text = " ".join((PAPERS / card / "README.md").read_text(encoding="utf-8").split())
    pattern = re.escape(sentence).replace(r"\#", f"({NUMBER.pattern})")
    (found,) = re.findall(pattern, text)
    written = [found] if isinstance(found, str) else list(chain(found))
    assert len(written) == len(values)
    for number, value in zip(written, values, strict=True):
        assert agrees(number, value), (sentence, number, value)
