"""Imputation of missing views: a placeholder that is the mean of other samples.

Zheng, Zhang, Guo, Xu, Maennel & Chen, "Rethinking Gating Mechanism in Sparse MoE: Handling Arbitrary Modality Inputs
with Confidence-Guided Gate" (ConfSMoE), arXiv 2505.19525, the first stage.
Written from the equations.
Differs: the mean is of raw samples, before any network reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmoe.errors import UserError

__all__ = ["PoolImputer"]


class PoolImputer:
    r"""Fills missing samples with the mean of some others: :math:`x_b \leftarrow \frac{1}{n} \sum_{i \in S_b} p_i`.

    S_b are n samples of the pool, drawn anew for each missing one, without replacement. Samples that are not missing
    stay as they are, bit by bit; if none is missing, nothing is drawn. The pool holds one view (a modality) of the
    training samples.

    Args:
        pool: p (P, *S).
        samples: n.

    Raises:
        UserError: fewer samples in the pool than n, or n below 1; in a call, samples of another shape.

    >>> imputer = PoolImputer(torch.tensor([[1.0], [3.0]]), samples=2)
    >>> imputer(torch.tensor([[7.0], [9.0]]), torch.tensor([True, False])).tolist()
    [[7.0], [2.0]]
    """

    def __init__(self, pool: Tensor, samples: int = 10) -> None:
        if not 1 <= samples <= len(pool):
            raise UserError(f"PoolImputer: samples={samples} is no number from 1 to the {len(pool)} of the pool")
        self.pool, self.samples = pool, samples

    def __call__(self, x: Tensor, present: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Samples x (B, *S), with those filled that ``present`` (B,) says are missing.

        Args:
            generator: of the draws, on the device of the pool; None: torch's own.
        """
        if x.shape[1:] != self.pool.shape[1:] or present.shape != x.shape[:1]:
            raise UserError(
                f"PoolImputer: x {tuple(x.shape)} and present {tuple(present.shape)} do not fit a pool of samples "
                f"{tuple(self.pool.shape[1:])}"
            )
        missing = (~present).nonzero().flatten()
        if not len(missing):
            return x
        numbers = torch.rand(len(missing), len(self.pool), generator=generator, device=self.pool.device)
        drawn = numbers.topk(self.samples, dim=1).indices
        return x.index_copy(0, missing, self.pool[drawn].mean(1).to(x))
