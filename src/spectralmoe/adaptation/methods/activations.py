"""The inputs of an expert's two matrices on the reference data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectralmoe.adaptation.correction import Correction
from spectralmoe.adaptation.reference import Tokens
from spectralmoe.adaptation.targets import Target
from spectralmoe.errors import UserError
from spectralmoe.experts import FeedForward

__all__ = ["Moments", "bank_of", "hidden_moments", "input_moments", "own_tokens", "tokens_of"]

LEAST_GATE = 0.02
"""Tokens that weigh the expert less than this do not count as tokens of the expert."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Gate-weighted mean (n,) and second moment (n, n) of what a matrix sees."""

    mean: Tensor
    second: Tensor

    @property
    def covariance(self) -> Tensor:
        """(n, n)."""
        return self.second - torch.outer(self.mean, self.mean)


def bank_of(target: Target) -> FeedForward:
    """The bank of an expert with ``up`` and ``down`` matrices.

    Raises:
        UserError: another kind of bank.
    """
    if not isinstance(target.bank, FeedForward):
        raise UserError(
            f"layer {target.layer!r}: this method reads the hidden units of FeedForward experts, not "
            f"{type(target.bank).__name__}; use method='sgd' or 'margin'"
        )
    return target.bank


def tokens_of(correction: Correction, target: Target) -> Tokens:
    """The reference tokens of the target's layer.

    Raises:
        UserError: there is no reference data.
    """
    if correction.reference is None:
        raise UserError("this method reads what the experts see of reference data; give guard=Guard(loader)")
    return correction.reference.tokens[target.layer]


def own_tokens(tokens: Tokens, expert: int) -> tuple[Tensor, Tensor]:
    """The tokens (n, D) that use the expert, and its weights for them (n,).

    Raises:
        UserError: there are fewer than two.
    """
    gate = tokens.gates[:, expert]
    used = gate > LEAST_GATE
    if int(used.sum()) < 2:
        raise UserError(f"expert {expert} sees fewer than two tokens of the guard's reference data; give it more")
    return tokens.x[used], gate[used]


def input_moments(correction: Correction, target: Target) -> Moments:
    """Of what ``up`` sees: the expert's tokens."""
    x, gate = own_tokens(tokens_of(correction, target), target.expert)
    return _moments(x, gate)


def hidden_moments(correction: Correction, target: Target) -> Moments:
    """Of what ``down`` sees: the hidden activations."""
    bank = bank_of(target)
    x, gate = own_tokens(tokens_of(correction, target), target.expert)
    counts = torch.zeros(bank.num_experts, dtype=torch.int64, device=x.device)
    counts[target.place] = len(x)
    return _moments(bank.hidden(x.to(bank.up.dtype), counts).float(), gate)


def _moments(x: Tensor, weight: Tensor) -> Moments:
    x, share = x.double(), (weight / weight.sum()).double()[:, None]
    return Moments((share * x).sum(0), (share * x).T @ x)
