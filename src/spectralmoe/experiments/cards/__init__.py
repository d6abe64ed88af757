"""Reproduction cards: a paper's claim, and a plan that measures it."""

from spectralmoe.experiments.cards.plan import Card, Cells, Check, Desk, Step, Tuning
from spectralmoe.experiments.cards.results import Section
from spectralmoe.experiments.cards.run import check_card, find_card, run_card

__all__ = ["Card", "Cells", "Check", "Desk", "Section", "Step", "Tuning", "check_card", "find_card", "run_card"]
