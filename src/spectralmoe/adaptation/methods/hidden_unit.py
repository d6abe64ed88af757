r"""A new hidden unit for one expert: it fires on the sample and its copies, and on little else.

A spare unit of the expert (``FeedForward(spare=...)``) gets an input direction, a threshold and an output. The start
is a linear discriminant: :math:`q = (C + S)^{-1}(\bar u - \mu)`, mu and C the gate-weighted mean and covariance of what
the expert sees on reference data, :math:`\bar u` and S those of the sample and its copies, scaled so that
:math:`q^\top(\bar u - \mu) = 1`; the threshold theta is the third highest :math:`q^\top(u - \mu)` among the reference
tokens. Then the unit's numbers alone are trained by Adam on

.. math::
    \sum_c v_c (\epsilon - m_c)_+ + \lambda \sum_r \big[(\min(m_r, \epsilon) - m_r')_+ + \beta \|z_r' - z_r\|^2\big]

with margins m of the samples and copies c, and the margins m, m' and logits z, z' before and after of those reference
samples r that use the expert and are nearest to firing, chosen anew every few steps; the first part only of those that
were right. Ours; no paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectralmoe.adaptation.correction import Correction, margins
from spectralmoe.adaptation.methods.activations import LEAST_GATE, bank_of, input_moments, tokens_of
from spectralmoe.adaptation.methods.small_steps import margin
from spectralmoe.adaptation.reference import Reference, Tokens
from spectralmoe.adaptation.targets import Target, Weights, logits_of
from spectralmoe.errors import UserError
from spectralmoe.experts import FeedForward

__all__ = ["NoFreeUnit", "unit"]

EPSILON = 0.3
STRENGTH = 2500.0
SPREAD = 0.1
RIDGE = 0.05
FALSE_FIRES = 3
NEAR, REFRESH = 1000, 15
INF = float("inf")
STEPS, RATE = 60, 0.08
SAMPLE_WEIGHT, COPIES_WEIGHT = 8.0, 2.0
SHARPNESS = {"relu": 1.0, "gelu": 4.0, "swiglu": 4.0}


class NoFreeUnit(UserError):
    """Earlier updates have used up the spare units of an expert that had some."""


def unit(correction: Correction) -> int:
    """Write one spare hidden unit of the expert in the last chosen layer; returns the training steps.

    Raises:
        UserError: no free unit, or no bias for its threshold; a bank without hidden units; no guard, or one whose
            data the expert cannot tell apart from each other or from the samples.
    """
    target = correction.experts[-1]
    bank = bank_of(target)
    free = bank.free_units(target.place)
    if not free or bank.up_bias is None:
        cause = "has no free hidden unit" if not free else "has no bias"
        kind = NoFreeUnit if bank.spare and bank.up_bias is not None else UserError
        raise kind(
            f"expert {target.expert} of layer {target.layer!r} {cause}; method='unit' needs "
            "FeedForward(bias=True, spare=...), other methods do not"
        )
    spare = _Unit(bank, target.place, free[0])
    spare.start(_discriminant(correction, target), SHARPNESS[bank.activation])
    margin(replace(correction, weights=Weights({"down": spare.down}), copies=correction.samples[:0], max_steps=20))
    return _train(correction, spare, target)


class _Unit(Weights):
    """The numbers of one hidden unit, as views."""

    def __init__(self, bank: FeedForward, expert: int, index: int) -> None:
        assert bank.up_bias is not None
        halves = bank.up.shape[1] // bank.down.shape[2]
        with torch.no_grad():
            rows = bank.up[expert].unflatten(0, (halves, -1))[:, index]
            biases = bank.up_bias[expert].unflatten(0, (halves, -1))[:, index]
            self.down = bank.down[expert][:, index]
        self.rows, self.biases = rows, biases
        super().__init__({"up": rows, "up_bias": biases, "down": self.down})

    @torch.no_grad()
    def start(self, start: _Start, sharpness: float) -> None:
        """Fire like ReLU((q (u - mu) - theta) / (1 - theta)); SwiGLU's value is the constant 1."""
        scale = sharpness / (1 - start.threshold)
        self.rows[0] = scale * start.direction
        self.biases[0] = -scale * (start.direction @ start.mean + start.threshold)
        self.biases[1:] = 1.0
        self.down.fill_(torch.finfo(self.down.dtype).eps)


@dataclass(frozen=True, slots=True)
class _Start:
    """A direction q (D,) with q (u* - mu) = 1, mu (D,), and the threshold."""

    direction: Tensor
    mean: Tensor
    threshold: float


def _discriminant(correction: Correction, target: Target) -> _Start:
    tokens, moments = tokens_of(correction, target), input_moments(correction, target)
    mine = Reference(correction.model, correction.inputs, correction.targets, [target.layer]).tokens[target.layer]
    u = _per_sample(mine, target.expert, len(correction.targets))
    c = moments.covariance
    c = c + RIDGE * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
    centre = u.mean(0)
    spread = (u - centre).T @ (u - centre) / len(u)
    try:
        q = torch.linalg.solve(c + spread, centre - moments.mean)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise _alike(target) from error
    reach = q @ (centre - moments.mean)
    if not reach > 0:
        raise _alike(target)
    q = q / reach
    fires = (tokens.x.double() - moments.mean) @ q
    expert_fires = fires[tokens.gates[:, target.expert] > LEAST_GATE]
    threshold = float(expert_fires.topk(min(FALSE_FIRES, len(expert_fires))).values[-1].clamp(0.5, 0.7))
    return _Start(q.float(), moments.mean.float(), threshold)


def _alike(target: Target) -> UserError:
    return UserError(
        f"expert {target.expert} of layer {target.layer!r} sees all reference data alike, so method='unit' finds no "
        "direction; give the guard other samples, or use another method"
    )


def _per_sample(tokens: Tokens, expert: int, samples: int) -> Tensor:
    """The gate-weighted mean token (samples, D) of each sample."""
    gate = tokens.gates[:, expert].double().clamp_min(1e-12)
    total = gate.new_zeros(samples).index_add(0, tokens.owner, gate)
    sums = tokens.x.double().new_zeros(samples, tokens.x.shape[1])
    sums = sums.index_add(0, tokens.owner, gate[:, None] * tokens.x.double())
    return sums / total.clamp_min(1e-12)[:, None]


@dataclass(frozen=True, slots=True)
class _Held:
    """Reference samples (n,) that should stay: how they were, the margin to keep, and what each counts."""

    samples: Tensor
    labels: Tensor
    before: Tensor
    goal: Tensor
    weight: Tensor

    def damage(self, logits: Tensor) -> Tensor:
        """Of their new logits (n, C): lost margin of those that were right, and the squared change of all."""
        lost = (self.goal - margins(logits, self.labels)).clamp_min(0)
        return (self.weight * lost).sum() + SPREAD * (logits - self.before).square().sum()


def _nearest(correction: Correction, spare: _Unit, target: Target) -> _Held:
    """The reference samples nearest to firing the unit as it is now, among those that use its expert at all."""
    reference, tokens = correction.reference, tokens_of(correction, target)
    assert reference is not None
    with torch.no_grad():
        fires = (tokens.x @ spare.rows[0].float() + spare.biases[0]).masked_fill(
            tokens.gates[:, target.expert] == 0, -INF
        )
    highest = fires.new_full((len(reference),), -INF).scatter_reduce(0, tokens.owner, fires, "amax")
    chosen = highest.topk(min(NEAR, int((highest > -INF).sum()))).indices
    before, labels = reference.before.logits[chosen], reference.labels[chosen]
    margin = margins(before, labels)
    weight = torch.where(margin > 0, reference.importance[chosen], 0)
    return _Held(reference.samples[chosen], labels, before, margin.clamp_max(EPSILON), weight)


def _train(correction: Correction, spare: _Unit, target: Target) -> int:
    k, wanted = len(correction.labels), len(correction.targets)
    weight = torch.full((wanted,), COPIES_WEIGHT / max(wanted - k, 1), device=correction.labels.device)
    weight[:k] = SAMPLE_WEIGHT / k
    strength = correction.strength * STRENGTH / len(correction.reference or ())
    leaves = [view.detach().clone() for view in spare.views.values()]
    optimizer = torch.optim.Adam([{"params": [leaf], "lr": RATE * float(leaf.abs().mean())} for leaf in leaves])
    for step in range(STEPS):
        if step % REFRESH == 0:
            nearest = _nearest(correction, spare, target)
        logits = logits_of(correction.model, torch.cat([correction.inputs, nearest.samples]))
        loss = (weight * (EPSILON - margins(logits[:wanted], correction.targets)).clamp_min(0)).sum()
        loss = loss + strength * nearest.damage(logits[wanted:])
        for leaf, gradient in zip(leaves, spare.gradients(loss), strict=True):
            leaf.grad = gradient.contiguous()
        optimizer.step()
        spare.write(leaves)
    _reach(correction, spare)
    return STEPS


def _reach(correction: Correction, spare: _Unit) -> None:
    """Raise the unit's output until the samples are right, if they are nearly so."""
    for _ in range(20):
        if bool((margins(logits_of(correction.model, correction.samples), correction.labels) > 0.02).all()):
            return
        with torch.no_grad():
            spare.down.mul_(1.1)
