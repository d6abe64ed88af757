"""Finds bases that are no longer orthonormal, as after averaging weights, and makes them orthonormal again."""

from __future__ import annotations

import warnings

from torch import nn

from spectralmoe.errors import UserError
from spectralmoe.layers import plain_name, unwrapped
from spectralmoe.linalg import is_orthonormal, orthonormality_error
from spectralmoe.parts import Part

__all__ = ["off_manifold", "retract", "warn_off_manifold"]


def retract(model: nn.Module) -> None:
    r"""Make every basis U (D, R) of the routers and experts in ``model`` orthonormal again, :math:`U^\top U = 1`.

    ``attach`` and ``after_step`` do so after each step. A mean of orthonormal bases is not orthonormal, so call this on
    an average of weights (torch's ``AveragedModel``, timm's ``ModelEmaV3``, checkpoints averaged by hand) before it is
    evaluated or saved. A basis that is orthonormal up to rounding stays exactly as it is.

    Raises:
        UserError: ``model`` holds no router and no experts.

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
    r"""Return the bases U that are not orthonormal up to rounding: name -> :math:`\max |U^\top U - 1|`."""
    errors = {}
    for path, module in unwrapped(model).named_modules():
        if isinstance(module, Part):
            for name in module.manifold:
                basis = getattr(module, name)
                if not is_orthonormal(basis).all():
                    errors[plain_name(f"{path}.{name}")] = float(orthonormality_error(basis).amax())
    return errors


def warn_off_manifold(model: nn.Module) -> None:
    """Warn in one line if a basis that is about to be written is not orthonormal."""
    if errors := off_manifold(model):
        name, error = max(errors.items(), key=lambda item: item[1])
        cause = f"{name} is {error:.2g} off its manifold (not orthonormal; an average of weights?)"
        warnings.warn(f"{cause}; retract(model) puts it back", stacklevel=3)
