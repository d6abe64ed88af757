"""Finds bases that averages of weights or edits by hand have moved off their manifold, and puts them back."""

from __future__ import annotations

import warnings

from torch import nn

from spectralmoe.errors import UserError
from spectralmoe.layers import plain_name, unwrapped
from spectralmoe.linalg import is_orthonormal, orthonormality_error
from spectralmoe.parts import Part

__all__ = ["off_manifold", "retract", "warn_off_manifold"]


def retract(model: nn.Module) -> None:
    r"""Put every basis U (D, R) of the routers and experts in ``model`` back on its manifold, :math:`U^\top U = 1`.

    ``attach`` and ``after_step`` do so after each step. An average of weights (torch's ``AveragedModel``, timm's
    ``ModelEmaV3``, checkpoints averaged by hand) is off the manifold, because a mean of orthonormal bases is not
    orthonormal: call this before the average is evaluated or saved. A basis that lies on its manifold up to rounding
    keeps its bits, frozen or not.

    Raises:
        UserError: no part of an MoE layer in ``model``.

    >>> import torch
    >>> from spectralmoe import EigenbasisScorer, Router, TopK
    >>> router = Router(EigenbasisScorer(8, 4, rank=3), TopK(2))
    >>> router.scorer.basis.data *= 0.9
    >>> {name: round(error, 2) for name, error in off_manifold(router).items()}
    {'scorer.basis': 0.19}
    >>> retract(router)
    >>> off_manifold(router)
    {}
    """
    parts = [module for module in model.modules() if isinstance(module, Part)]
    if not parts:
        name = type(unwrapped(model)).__name__
        raise UserError(f"retract: {name} holds no router and no experts; pass the model that holds them")
    for part in parts:
        part.retract()


def off_manifold(model: nn.Module) -> dict[str, float]:
    r"""Names of the bases that lie off their manifold by more than rounding, with :math:`\max |U^\top U - 1|`."""
    errors = {}
    for path, module in unwrapped(model).named_modules():
        if isinstance(module, Part):
            for name in module.manifold:
                basis = getattr(module, name)
                if not is_orthonormal(basis).all():
                    errors[plain_name(f"{path}.{name}")] = float(orthonormality_error(basis).amax())
    return errors


def warn_off_manifold(model: nn.Module) -> None:
    """One line of warning where a basis that is about to be written lies off its manifold."""
    if errors := off_manifold(model):
        name, error = max(errors.items(), key=lambda item: item[1])
        cause = f"{name} is {error:.2g} off its manifold (an average of weights?)"
        warnings.warn(f"{cause}; retract(model) puts it back", stacklevel=3)
