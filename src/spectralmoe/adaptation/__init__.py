"""Adaptation: change one expert, and show what else that moves."""

from spectralmoe.adaptation.one_shot import Correction, Rule, Trial, correct_sample, one_shot_trials

__all__ = ["Correction", "Rule", "Trial", "correct_sample", "one_shot_trials"]
