r"""How the router of an upcycled layer starts: its rows, one a copy of the MLP.

``random``: normal numbers, as in Komatsuzaki et al., arXiv 2212.05055, section 3.

``prompts``: the mean of what the layer's MLP reads in each set of prompts, after the "hidden" mode of mergekit-moe
(Goddard et al., "Arcee's MergeKit", arXiv 2403.13257; github.com/arcee-ai/mergekit, LGPL-3.0). Differs: written anew;
the mean of all sets is taken off first, which all experts share, and rows are of one length.

``principal``: the two sides of the principal directions of what the MLP reads, after EMoE (Cheng et al.,
"Eigenbasis-Guided Routing for Mixture-of-Experts", arXiv 2601.12137). Differs: a linear gate, whose logits are the
signed coordinates in units of their standard deviation; directions are orthogonal to the mean, as a stock gate has no
bias to take it off.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.errors import UserError
from spectralmoe.hf.upcycling.calibration import Reads

__all__ = ["STARTS", "principal", "prompts", "random"]

_LEAST_VARIANCE = 1e-6  # of the largest


def random(groups: int, dim: int, reads: Reads | None, draw: torch.Generator) -> Tensor:
    """Rows of standard normal numbers."""
    return torch.randn(groups, dim, generator=draw)


def prompts(groups: int, dim: int, reads: Reads | None, draw: torch.Generator) -> Tensor:
    """Rows towards the means of the prompt sets.

    Raises:
        UserError: no calibration, or not a set for each row.
    """
    if reads is None or len(reads.counts) != groups:
        given = "none" if reads is None else str(len(reads.counts))
        raise UserError(f"router 'prompts' needs calibration with one set of prompts a row: {groups}, got {given}")
    means = reads.sums / reads.counts[:, None]
    rows: Tensor = F.normalize(means - means.mean(0), dim=1) * dim**0.5
    return rows.float()


def principal(groups: int, dim: int, reads: Reads | None, draw: torch.Generator) -> Tensor:
    """Rows along both sides of the leading directions, two by two.

    Raises:
        UserError: no calibration, or text that varies along fewer directions.
    """
    if reads is None or reads.products is None:
        raise UserError("router 'principal' needs calibration: batches of text that the dense model is run on")
    count, needed = reads.counts.sum(), (groups + 1) // 2
    mean = reads.sums.sum(0) / count
    covariance = reads.products / count - torch.outer(mean, mean)
    unit = F.normalize(mean, dim=0)
    across = torch.eye(dim, dtype=mean.dtype) - torch.outer(unit, unit)
    variances, directions = torch.linalg.eigh(across @ covariance @ across)
    variances, directions = variances.flip(0)[:needed], directions.flip(1)[:, :needed]
    if len(variances) < needed or variances[-1] <= _LEAST_VARIANCE * variances[0]:
        raise UserError(f"router 'principal': calibration varies along fewer than {needed} directions; give more text")
    rows = directions.T / variances.sqrt()[:, None] * dim**0.5
    return torch.stack([rows, -rows], 1).flatten(0, 1)[:groups].float()


STARTS: dict[str, Callable[[int, int, Reads | None, torch.Generator], Tensor]] = {
    "random": random,
    "prompts": prompts,
    "principal": principal,
}
