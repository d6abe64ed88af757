"""What one training step minimises: cross-entropy, label smoothing, mixup, and the precision of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.errors import UserError

__all__ = ["Batch", "Objective", "Precision"]

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Batch:
    """Images (B, C, H, W) with labels (B,); mixed ones are ``share`` of the first label and the rest of the second."""

    images: Tensor
    labels: Tensor
    others: Tensor | None = None
    share: float = 1.0

    def part(self, chosen: slice, device: torch.device) -> Batch:
        """Some of the images, on ``device``."""
        others = None if self.others is None else self.others[chosen].to(device)
        return Batch(self.images[chosen].to(device), self.labels[chosen].to(device), others, self.share)


@dataclass(frozen=True, slots=True)
class Objective:
    r"""The loss of a batch, and the precision of its forward.

    Attributes:
        label_smoothing: :math:`\epsilon` of the targets :math:`(1-\epsilon)\,\mathrm{onehot} + \epsilon / C`
            (Szegedy et al., arXiv 1512.00567, section 7).
        mixup: a of :math:`\lambda \sim \mathrm{Beta}(a, a)`; images and targets become
            :math:`\lambda x_i + (1-\lambda) x_j` (Zhang et al., arXiv 1710.09412). 0: none.
        precision: "fp32"; "bf16" or "fp16" (CUDA only, with a scaled loss) by autocast: weights, routers and the loss
            stay fp32.
    """

    label_smoothing: float = 0.0
    mixup: float = 0.0
    precision: Precision = "fp32"

    def mixed(self, batch: Batch, seed: tuple[int, ...]) -> Batch:
        """The batch with each image mixed with another one of it; the draw depends on ``seed`` alone."""
        if not self.mixup:
            return batch
        draw = np.random.default_rng(seed)
        share = float(draw.beta(self.mixup, self.mixup))
        order = torch.from_numpy(draw.permutation(len(batch.labels)))
        images = share * batch.images + (1 - share) * batch.images[order]
        return Batch(images, batch.labels, batch.labels[order], share)

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of logits (B, C) in fp32."""
        logits, smoothing = logits.float(), self.label_smoothing
        own = F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
        if batch.others is None:
            return own
        other = F.cross_entropy(logits, batch.others, label_smoothing=smoothing)
        return batch.share * own + (1 - batch.share) * other

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of the forward.

        Raises:
            UserError: fp16 without CUDA.
        """
        if self.precision == "fp32":
            return nullcontext()
        self.check(device)
        return torch.autocast(device.type, dtype=_DTYPES[self.precision])

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Scales the loss under fp16; does nothing otherwise.

        Raises:
            UserError: fp16 without CUDA.
        """
        self.check(device)
        return torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")

    def check(self, device: torch.device) -> None:
        """Refuse a precision that the device has not."""
        if self.precision == "fp16" and device.type != "cuda":
            raise UserError('precision = "fp16" needs a CUDA device; use "bf16" or "fp32"')
