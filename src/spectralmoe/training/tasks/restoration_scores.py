"""PSNR and SSIM of restored images, for each degradation."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmoe.data.degradations import KINDS, Pairs
from spectralmoe.errors import UserError
from spectralmoe.training.tasks.base import Metric

__all__ = ["PSNR", "RESTORATION", "SSIM", "psnr", "restoration_scores", "ssim"]

PSNR = Metric("psnr", "PSNR", "peak signal-to-noise ratio, mean over patches, then over degradations", "higher", "dB")
SSIM = Metric("ssim", "SSIM", "structural similarity, mean over patches, then over degradations", "higher", digits=3)


def _of_kind(metric: Metric, kind: str) -> Metric:
    meaning = f"{metric.meaning.partition(',')[0]}, mean over patches with {kind}"
    return Metric(f"{metric.key}_{kind}", f"{metric.title} {kind}", meaning, metric.better, metric.unit, metric.digits)


RESTORATION = tuple(each for metric in (PSNR, SSIM) for each in (metric, *(_of_kind(metric, kind) for kind in KINDS)))
"""PSNR and SSIM, each in all and for every kind."""


def psnr(images: Tensor, truths: Tensor) -> Tensor:
    r"""Peak signal-to-noise ratio :math:`-10 \log_{10} \mathrm{mean}(x - \hat x)^2` of images (N, C, H, W) in [0, 1]:
    (N,) in decibels; equal images have 100.

    >>> round(float(psnr(torch.full((1, 1, 4, 4), 0.1), torch.zeros(1, 1, 4, 4))), 4)
    20.0
    """
    error = (images.double() - truths.double()).square().flatten(1).mean(1)
    return -10 * error.clamp_min(1e-10).log10()


def ssim(images: Tensor, truths: Tensor) -> Tensor:
    """Structural similarity of grey images (N, 1, H, W) in [0, 1]: (N,), 1 for equal images.

    That of scikit-image with the window of Wang et al., "Image Quality Assessment: From Error Visibility to Structural
    Similarity", IEEE TIP 2004: Gaussian, of width 1.5.

    Raises:
        UserError: scikit-image is not installed.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise UserError("SSIM needs scikit-image: install it with 'pip install spectralmoe[restore]'") from error
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    pairs = zip(images[:, 0].double().numpy(), truths[:, 0].double().numpy(), strict=True)
    return torch.tensor([structural_similarity(image, truth, **window) for image, truth in pairs])


def restoration_scores(images: Tensor, pairs: Pairs) -> dict[str, float]:
    """All metrics of ``RESTORATION`` for restored images (N, 1, H, W) of ``pairs``, which have every kind."""
    scores = {}
    for metric, values in ((PSNR, psnr(images, pairs.truths)), (SSIM, ssim(images, pairs.truths))):
        of_kinds = [float(values[pairs.kinds == place].mean()) for place in range(len(KINDS))]
        scores[metric.key] = sum(of_kinds) / len(of_kinds)
        scores |= {f"{metric.key}_{kind}": value for kind, value in zip(KINDS, of_kinds, strict=True)}
    return scores
