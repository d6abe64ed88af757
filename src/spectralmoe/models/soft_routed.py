"""The student and the teacher of a theory of joint training: units of one expert direction and one router direction.

"Guided by the Experts: Provable Feature Learning Dynamic of Soft-Routed Mixture-of-Experts", arXiv 2510.07205, AISTATS
2026: its abstract; constants, start, pruning threshold and width condition could not be found. Written from the
equations that its words imply.
Differs: units have an amplitude, without which two that cancel cannot be told from two at work; units that have become
alike are merged before idle ones are pruned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.errors import UserError, one_of

__all__ = ["Overlaps", "SoftRouted", "overlaps", "prune_units"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "hermite2": lambda z: (z.square() - 1) / 2**0.5,
    "hermite3": lambda z: (z**3 - 3 * z) / 6**0.5,
    "relu": F.relu,
}


class SoftRouted(nn.Module):
    r"""A sum of gated units, one number a sample.

    .. math:: f(x) = \sum_k a_k\, \pi(w_k^\top x)\, s(v_k^\top x)

    :math:`\pi` is the sigmoid; s is a Hermite polynomial of mean 0 and variance 1 under Gaussian x, or the ReLU. Router
    directions w_k and expert directions v_k are of length 1 (``spectralmoe.optim.SphereStep`` keeps them so) and start
    at random; amplitudes start at 1/K, so that the sum starts as an average.

    Args:
        dim: D.
        units: K.
        activation: "hermite3" (the paper's), "hermite2" or "relu".

    Attributes:
        experts, routers: v and w (K, D).  amplitudes: a (K,).

    Raises:
        UserError: a size below 1, an unknown activation.

    >>> student = SoftRouted(16, 8)
    >>> student(torch.randn(5, 16)).shape
    torch.Size([5])
    """

    def __init__(
        self, dim: int, units: int, *, activation: Literal["hermite3", "hermite2", "relu"] = "hermite3"
    ) -> None:
        super().__init__()
        if dim < 1 or units < 1:
            raise UserError(f"SoftRouted: dim and units must be at least 1, got {dim} and {units}")
        if activation not in ACTIVATIONS:
            raise one_of("activation", activation, list(ACTIVATIONS))
        self.dim, self.units, self.activation = dim, units, activation
        self.experts = nn.Parameter(F.normalize(torch.randn(units, dim), dim=1))
        self.routers = nn.Parameter(F.normalize(torch.randn(units, dim), dim=1))
        self.amplitudes = nn.Parameter(torch.full((units,), 1 / units))

    @classmethod
    def teacher(
        cls, dim: int, units: int, *, activation: Literal["hermite3", "hermite2", "relu"] = "hermite3"
    ) -> SoftRouted:
        """Units whose 2K directions are orthonormal and whose amplitudes are 1.

        Raises:
            UserError: as the class; more than D/2 units.

        >>> teacher = SoftRouted.teacher(16, 2)
        >>> directions = torch.cat([teacher.experts, teacher.routers])
        >>> torch.allclose(directions @ directions.T, torch.eye(4), atol=1e-6)
        True
        """
        if 2 * units > dim:
            raise UserError(f"SoftRouted.teacher: {units} units need 2 x {units} orthonormal directions of D={dim}")
        made = cls(dim, units, activation=activation)
        directions = torch.linalg.qr(torch.randn(dim, 2 * units)).Q.T
        with torch.no_grad():
            made.experts.copy_(directions[:units])
            made.routers.copy_(directions[units:])
            made.amplitudes.fill_(1)
        return made.requires_grad_(False)

    def contributions(self, x: Tensor) -> Tensor:
        """What each unit adds: x (N, D) -> (N, K)."""
        gates = (x @ self.routers.T).sigmoid()
        return self.amplitudes * gates * ACTIVATIONS[self.activation](x @ self.experts.T)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, D) -> (N,)"""
        return self.contributions(x).sum(1)


class Overlaps(NamedTuple):
    """Cosines of a student's directions with a teacher's, (K, T) each."""

    experts: Tensor
    routers: Tensor


@torch.no_grad()
def overlaps(student: SoftRouted, teacher: SoftRouted) -> Overlaps:
    """How near each unit is to each of the teacher's.

    Where s is odd ("hermite3"), (a, v) and (-a, -v) are one unit, so an expert's cosine counts with the signs of both
    amplitudes.

    Raises:
        UserError: networks of other widths or activations.

    >>> teacher = SoftRouted.teacher(8, 2)
    >>> torch.allclose(overlaps(teacher, teacher).experts, torch.eye(2), atol=1e-6)
    True
    """
    if (student.dim, student.activation) != (teacher.dim, teacher.activation):
        raise UserError("overlaps: student and teacher must have one width and one activation")
    experts = F.normalize(student.experts, dim=1) @ F.normalize(teacher.experts, dim=1).T
    if student.activation == "hermite3":
        experts = experts * _sign(student.amplitudes)[:, None] * _sign(teacher.amplitudes)
    return Overlaps(experts, F.normalize(student.routers, dim=1) @ F.normalize(teacher.routers, dim=1).T)


@torch.no_grad()
def prune_units(
    model: SoftRouted, x: Tensor, *, keep: int | None = None, threshold: float = 0.01, merge: float = 0.9
) -> SoftRouted:
    r"""A network of the units that matter: alike ones merged, then idle ones left out.

    Two units are alike where the cosines of their experts (sign as in ``overlaps``) and of their routers are above
    ``merge``; the one of smaller amplitude joins the other, whose directions become the means weighed by amplitude. A
    unit's part is :math:`\mathrm{E}[(a_k \pi s)^2]` over x.

    Args:
        x: (N, D), samples to measure parts on.
        keep: how many units stay; None: those with at least ``threshold`` times the largest part.
        merge: above 1 nothing is merged.

    Raises:
        UserError: ``keep`` below 1; no samples.
    """
    if (keep is not None and keep < 1) or not len(x):
        raise UserError(f"prune_units: needs samples, and at least one unit to keep; got {len(x)} and keep={keep}")
    merged = _merged(model, merge)
    parts = merged.contributions(x.to(merged.experts)).square().mean(0)
    order = parts.argsort(descending=True, stable=True)
    kept = order[:keep] if keep is not None else order[parts[order] >= threshold * parts.max()]
    return _with_units(model, merged.experts[kept], merged.routers[kept], merged.amplitudes[kept])


def _merged(model: SoftRouted, merge: float) -> SoftRouted:
    odd = model.activation == "hermite3"
    signs = _sign(model.amplitudes) if odd else torch.ones_like(model.amplitudes)
    amplitudes, experts = model.amplitudes * signs, model.experts * signs[:, None]
    groups: list[list[int]] = []
    for k in amplitudes.abs().argsort(descending=True, stable=True).tolist():
        for group in groups:
            near = F.cosine_similarity(experts[k], experts[group[0]], 0) > merge
            if near and F.cosine_similarity(model.routers[k], model.routers[group[0]], 0) > merge:
                group.append(k)
                break
        else:
            groups.append([k])
    shares = [amplitudes[group].abs()[:, None] for group in groups]
    return _with_units(
        model,
        torch.stack([(share * experts[group]).sum(0) for share, group in zip(shares, groups, strict=True)]),
        torch.stack([(share * model.routers[group]).sum(0) for share, group in zip(shares, groups, strict=True)]),
        torch.stack([amplitudes[group].sum() for group in groups]),
    )


def _with_units(model: SoftRouted, experts: Tensor, routers: Tensor, amplitudes: Tensor) -> SoftRouted:
    made = SoftRouted(model.dim, len(amplitudes), activation=model.activation).to(model.experts)
    made.experts.copy_(F.normalize(experts, dim=1))
    made.routers.copy_(F.normalize(routers, dim=1))
    made.amplitudes.copy_(amplitudes)
    return made


def _sign(values: Tensor) -> Tensor:
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)
