"""A card that trains nothing, for tests/experiments/test_cards.py: two steps of cells, one of settings."""

from __future__ import annotations

import time
from pathlib import Path

from spectralmoe.draw.panels import Lines, Point
from spectralmoe.experiments.cards import Card, Cells, Check, Section, Tuning
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.training.loop import Diverged

ROWS = ("plain", "twice as much")
VALUE = Column("value", "value", 1, "what is measured")


def note(desk, text):
    """Notes that a cell has begun."""
    with (desk.work / "begun").open("a", encoding="utf-8") as file:
        file.write(f"{text}\n")


def tune(row, desk, progress):
    note(desk, f"tuning {row}")
    return {row: {"factor": 1 + ROWS.index(row)}}


def measure(cell, desk, progress):
    note(desk, f"{cell['row']} {cell['seed']}")
    progress(0.5)
    time.sleep(0.002)
    if cell["seed"] == 99:
        raise Diverged("the loss is nan")
    if cell["seed"] == 100:
        time.sleep(3600)
    return {"value": desk.tuned["tuning"][cell["row"]]["factor"] * (10 + cell["seed"] ** 2)}


def identities(seeds):
    return [{"row": row, "seed": seed} for seed in seeds for row in ROWS]


def sections(stored):
    pairs = ((ROWS[1], ROWS[0]),)
    return [Section("## Values", stored["results"], (VALUE,), pairs=pairs)]


def figures(stored):
    points = [Point(cell["seed"], cell["value"]) for cell in stored["results"] if "value" in cell]
    return {"values": [Lines("value", {"both": points}, "seed")]}


def card(seeds, **settings):
    """The card over these seeds; what follows from its settings are its cells."""
    results = Cells("results", identities(seeds), measure)
    steps = (Tuning("tuning", ROWS, tune), results, Cells("others", identities(seeds[:2]), measure))
    check = Check(Cells("results", identities(seeds[:1]), measure), ("row",), ("value",))
    return Card("Toy", "What stands above.", {"epochs": 1, **settings}, steps, sections, figures, check)


FULL = card(range(3))
QUICK = card((100, 0))  # one that works for an hour
HERE = Path(__file__).parent
