"""The cost of each expert as a share of the most expensive one, for the terms that read costs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.errors import UserError
from spectralmoe.routing import Routing
from spectralmoe.tape import Record

__all__ = ["cost_shares"]


def cost_shares(
    term: str,
    record: Record | Routing,
    costs: Sequence[float] | Tensor | None,
    like: Tensor,
    *,
    free: bool = False,
) -> Tensor:
    """Return the costs (E,) divided by their largest, in the dtype of ``like`` (E,).

    Args:
        term: the name of the regularizer, for error messages.
        costs: None takes ``experts.costs()`` of the recorded layer, operations a position.
        free: whether zero experts are allowed, at a cost of 0.

    Raises:
        UserError: costs are not one positive number for each expert, or are missing for a ``Routing`` without a layer.
    """
    beyond = 0
    if costs is None:
        experts = None if isinstance(record, Routing) else getattr(record.layer, "experts", None)
        if experts is None:
            raise UserError(
                f"{term}: costs are missing, and a Routing does not know them; pass costs=, or the record of a layer"
            )
        costs = experts.costs()
        beyond = max(0, len(like) - len(costs)) if free else 0
    values = torch.as_tensor(costs, dtype=like.dtype)  # checked where they are: for costs on the host nobody waits
    if values.shape != (len(like) - beyond,) or not (values.isfinite() & (values > 0)).all():
        raise UserError(
            f"{term}: costs must be one positive number for each of E={len(like)} experts"
            f"{'' if free else ' (zero experts have none)'}, got {values.tolist()}"
        )
    values = F.pad(values.to(like.device, non_blocking=True), (0, beyond))
    return values / values.max()
