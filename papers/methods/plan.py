"""All methods side by side: two small tasks, one budget, equal tuning, the same measures of every row."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

from spectralmoe.draw.panels import Panel
from spectralmoe.experiments.cards import (
    ROUTING_COLUMNS,
    Card,
    Contest,
    Desk,
    Section,
    Step,
    Tuning,
    difference_panels,
    small_images,
    small_text,
    train_row,
)
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.compare.setup import Tuned
from spectralmoe.training.settings.run import TrainSettings

ROWS = (
    "linear",
    "linear+load_balance",
    "linear+balanced",
    "cosine",
    "prototype",
    "sr-moe",
    "eigenbasis",
    "emoe",
    "l2r",
    "ermoe",
    "ermoe-context",
    "moec",
    "synergy",
    "specialization",
    "omoe",
)
"""Presets by name; a later method joins by its name."""

TIMED_STEPS = 8
TASKS = ("images", "text")


def time_steps(
    task: str, desk: Desk, progress: Any, *, contests: Mapping[str, Contest], rounds: int
) -> dict[str, dict[str, float]]:
    """Median milliseconds of a training step of every row on a task, the rows taking turns in one process."""
    run = contests[task].run
    size = TIMED_STEPS * run.optimization.batch_size
    few = run.model_copy(update={"train_size": size, "optimization": run.optimization.model_copy(update={"epochs": 1})})
    times: dict[str, list[float]] = {row: [] for row in ROWS}
    for turn in range(rounds):
        progress(turn / rounds)
        for row in ROWS:
            history = train_row(few, row, Tuned(), 0).history
            times[row].append(1e3 * history.seconds_per_epoch / TIMED_STEPS)
    return {task: {row: round(statistics.median(values), 2) for row, values in times.items()}}


def card(contests: Mapping[str, Contest], seeds: int, rounds: int) -> Card:
    """One form of the card."""
    steps: list[Step] = [Tuning("times", TASKS, partial(time_steps, contests=contests, rounds=rounds))]
    for contest in contests.values():
        steps += [contest.tuning(), contest.cells(seeds)]
    settings = {task: contest.settings for task, contest in contests.items()}
    return Card("Methods side by side", ABOUT, settings, steps, sections, figures)


ABOUT = """
Written by `spectralmoe card papers/methods`: mean and 95% interval over seeds; the test part chose nothing. Differences
are paired: the same seed, so the same start and the same order of samples, on the same processor; "separated" where
their 95% interval leaves out 0. MaxVio: largest load over mean load minus 1, mean over layers. Centred cos²: of two
experts' outputs less their means over tokens. Flips: tokens whose choice changes under noise of 5% of their norm. Step:
of training, the rows taking turns in one process. Single cells are not stable across processors, means over seeds are.
"""

SCORES = {
    "images": Column("accuracy", "accuracy %", 2, "of the test part", better="higher"),
    "text": Column("bits_per_byte", "bits/byte", 4, "of held-out text", better="lower"),
}
STEP = Column("step_ms", "step, ms", 1, "a training step", better="lower")


def columns(task: str) -> tuple[Column, ...]:
    """What is compared on a task."""
    return (SCORES[task], *ROUTING_COLUMNS)


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """A table for each task, and every row less the linear gate."""
    made = []
    for task in TASKS:
        times = stored["times"].get(task, {})
        cells = [{**cell, "step_ms": times.get(cell["row"])} for cell in stored[task]]
        pairs = [(row, "linear") for row in ROWS[1:]]
        made.append(
            Section(f"## {task.title()}", cells, (*columns(task), STEP), pairs=pairs, differences=columns(task))
        )
    return made


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Every row less the linear gate: score, evenness, likeness and firmness."""
    drawn = ("max_vio", "output_centred", "noise_flips")
    return {
        task: difference_panels(
            stored[task], [c for c in columns(task) if c.key in (SCORES[task].key, *drawn)], "linear"
        )
        for task in TASKS
    }


def contests(images: TrainSettings, text: TrainSettings, **tuning: Any) -> dict[str, Contest]:
    """The two tasks with the same rows and tries."""
    rows = {row: row for row in ROWS}
    runs = {"images": images, "text": text}
    return {task: Contest(run, rows, file=task, **tuning) for task, run in runs.items()}


FULL = card(contests(small_images(), small_text(), tries=3), seeds=3, rounds=5)
QUICK = card(contests(small_images(128, 1), small_text(32), tries=1), seeds=1, rounds=1)
