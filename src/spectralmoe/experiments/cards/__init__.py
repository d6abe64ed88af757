"""Reproduction cards: a paper's claim, and a plan that measures it.

A card is a folder: README.md (claim and verdict), plan.py with ``FULL`` and ``QUICK``, and the JSON files of its cells.
``spectralmoe card FOLDER`` runs the plan.

>>> from pathlib import Path
>>> from tempfile import TemporaryDirectory
>>> from spectralmoe.experiments.compare.columns import Column
>>> def measure(cell, desk, progress):  # desk.tuned["tuning"][cell["row"]]: its settings
...     return {"error": {"old": 2.0, "new": 1.0}[cell["row"]] + cell["seed"]}
>>> cells = [{"row": row, "seed": seed} for seed in range(3) for row in ("old", "new")]
>>> def sections(stored):
...     columns = (Column("error", "error", 1, "smaller is better"),)
...     return [Section("## Errors", stored["results"], columns, pairs=[("new", "old")])]
>>> card = Card("A paper", "What is compared.", {}, [Cells("results", cells, measure)], sections, lambda stored: {})
>>> with TemporaryDirectory() as folder:
...     count, notes = run_card(card, Path(folder), Path(folder) / "work", 1, lambda text, done, detail="": None)
...     print(count, Path(folder, "RESULTS.md").read_text().splitlines()[-1])
6 | new | old | 3 | -1.0 separated |
"""

from spectralmoe.experiments.cards.contest import ROUTING_COLUMNS, Contest, Trained, train_row
from spectralmoe.experiments.cards.kinds import experts_of_kinds, told_by_experts
from spectralmoe.experiments.cards.panels import difference_panels
from spectralmoe.experiments.cards.plan import Card, Cells, Check, Desk, Step, Tuning
from spectralmoe.experiments.cards.results import Section
from spectralmoe.experiments.cards.run import check_card, find_card, run_card, take_card, write_card
from spectralmoe.experiments.cards.small_runs import small_images, small_restoration, small_text
from spectralmoe.experiments.cards.tries import try_settings

__all__ = [
    "ROUTING_COLUMNS",
    "Card",
    "Cells",
    "Check",
    "Contest",
    "Desk",
    "Section",
    "Step",
    "Trained",
    "Tuning",
    "check_card",
    "difference_panels",
    "experts_of_kinds",
    "find_card",
    "run_card",
    "small_images",
    "small_restoration",
    "small_text",
    "take_card",
    "told_by_experts",
    "train_row",
    "try_settings",
    "write_card",
]
