"""Soft-routed units: the student and the teacher networks of a theory of jointly trained routers and experts.

"Guided by the Experts: Provable Feature Learning Dynamic of Soft-Routed Mixture-of-Experts", arXiv 2510.07205, AISTATS
2026. Written from its abstract, which does not give the constants, the start, the pruning threshold or the condition on
the width.
Differs: units have an amplitude; without it, two units that cancel look like two that work. Units that have become
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
    r"""A network that sums K gated units into one number for each sample: x (N, D) -> (N,).

    .. math:: f(x) = \sum_k a_k\, \pi(w_k^\top x)\, s(v_k^\top x)

    :math:`\pi` is the sigmoid; s is a Hermite polynomial, which has mean 0 and variance 1 for Gaussian inputs, or the
    ReLU. The directions w_k of the routers and v_k of the experts have length 1 (``spectralmoe.optim.SphereStep`` keeps
    it) and start at random. The amplitudes a start at 1/K, so that the sum starts as an average.

    Args:
        dim: D.
        units: K.
        activation: "hermite3" (the paper's), "hermite2" or "relu".

    Attributes:
        experts, routers: v and w, each (K, D).
        amplitudes: a (K,).

    Raises:
        UserError: a size is below 1, or the activation is unknown.

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
        """Make a frozen teacher, whose 2K directions are orthonormal and whose amplitudes are 1.

        Raises:
            UserError: there are more than D/2 units; or as the class.

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
        """Return what each unit adds: x (N, D) -> (N, K)."""
        gates = (x @ self.routers.T).sigmoid()
        return self.amplitudes * gates * ACTIVATIONS[self.activation](x @ self.experts.T)

    def forward(self, x: Tensor) -> Tensor:
        """Return f(x) for x (N, D): (N,)."""
        return self.contributions(x).sum(1)


class Overlaps(NamedTuple):
    """The cosines between the directions of a student's K units and a teacher's T units.

    Attributes:
        experts: those of the expert directions (K, T).
        routers: those of the router directions (K, T).
    """

    experts: Tensor
    routers: Tensor


@torch.no_grad()
def overlaps(student: SoftRouted, teacher: SoftRouted) -> Overlaps:
    """Compute the cosines between each unit of a student and each of a teacher.

    If s is odd ("hermite3"), (a, v) and (-a, -v) are the same unit, so the cosine of the experts is multiplied by the
    signs of both amplitudes.

    Raises:
        UserError: the networks differ in width or activation.

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
    r"""Return a smaller network: units that are alike are merged, and then idle units are left out.

    Two units are alike if the cosines of their experts (with the sign of ``overlaps``) and of their routers are above
    ``merge``. The unit of smaller amplitude joins the other; directions become means that are weighed by the
    amplitudes. The share of a unit is :math:`\mathrm{E}[(a_k \pi s)^2]` over the samples.

    Args:
        x: samples (N, D) on which the shares are measured.
        keep: how many units stay; None keeps those with at least ``threshold`` times the largest share.
        threshold: see ``keep``.
        merge: a cosine; above 1 nothing is merged.

    Raises:
        UserError: ``keep`` is below 1, or there are no samples.
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
