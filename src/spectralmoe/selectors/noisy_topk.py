"""Top-k with Gaussian noise of a fixed size, which is added in training, for the choice only.

Riquelme et al., "Scaling Vision with Sparse Mixture of Experts" (V-MoE), arXiv 2106.05974, section 2: the standard
deviation is fixed to 1/E instead of learned. Differs: the combine weights come from the clean logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.selectors.base import Score, Selector, check_fits, check_k, largest

__all__ = ["NoisyTopK"]


class NoisyTopK(Selector):
    """Chooses the top k of ``logits + noise_std * N(0, 1)`` in training, and of the logits in evaluation.

    The combine weights come from the logits without noise. The noise comes from torch's random generator of the logits'
    device, so ``torch.manual_seed`` fixes it.

    Args:
        k: experts a token.
        noise_std: the standard deviation of the noise; None, the default, is 1/E, as in the paper.
        normalize, score: as in ``TopK``.

    Raises:
        UserError: as ``TopK``; a negative ``noise_std``.

    >>> NoisyTopK(1).eval().choose(torch.tensor([[0.1, 3.0, 2.0]]))
    tensor([[1]])
    """

    fills = True

    def __init__(
        self, k: int, *, noise_std: float | None = None, normalize: bool = False, score: Score = "softmax"
    ) -> None:
        super().__init__()
        check_k("NoisyTopK", k, normalize, score)
        if noise_std is not None and noise_std < 0:
            raise UserError(f"NoisyTopK: noise_std must not be negative, got {noise_std}")
        self.k, self.noise_std, self.normalize, self.score = k, noise_std, normalize, score

    def bind(self, num_experts: int) -> None:
        check_fits("NoisyTopK", self.k, num_experts)
        self.soft = self.k == num_experts

    def choose(self, logits: Tensor, *, mask: Tensor | None = None, context: dict[str, Any] | None = None) -> Tensor:
        if self.training:
            std = 1 / logits.shape[-1] if self.noise_std is None else self.noise_std
            logits = logits + std * torch.randn_like(logits)
        return largest(logits, self.k, mask)
