"""Adaptation: change one expert, and show what else that moves."""

from spectralmoe.adaptation.adapt import adapt_one
from spectralmoe.adaptation.copies import COPIES, Augment, contrasted, neighbours, noisy, rotated, shifted
from spectralmoe.adaptation.guard import Guard, Verdict
from spectralmoe.adaptation.methods import METHODS
from spectralmoe.adaptation.new_class import Shots, add_class
from spectralmoe.adaptation.one_shot import Carried, Rule, Trial, carried, one_shot_trials
from spectralmoe.adaptation.receipt import Receipt
from spectralmoe.adaptation.receipt.maker import make_receipt
from spectralmoe.adaptation.receipt.picture import draw_receipt
from spectralmoe.adaptation.receipt.text import receipt_lines
from spectralmoe.adaptation.stream import StreamStep, correction_stream
from spectralmoe.adaptation.update import Update, apply_update

__all__ = [
    "COPIES",
    "METHODS",
    "Augment",
    "Carried",
    "Guard",
    "Receipt",
    "Rule",
    "Shots",
    "StreamStep",
    "Trial",
    "Update",
    "Verdict",
    "adapt_one",
    "add_class",
    "apply_update",
    "carried",
    "contrasted",
    "correction_stream",
    "draw_receipt",
    "make_receipt",
    "neighbours",
    "noisy",
    "one_shot_trials",
    "receipt_lines",
    "rotated",
    "shifted",
]
