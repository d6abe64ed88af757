"""What experts cost, as terms on their cost read it: a share of the dearest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.routing import Routing
from spectralmoe.tape import Record

__all__ = ["cost_shares"]


def cost_shares(term: str, record: Record | Routing, costs: Sequence[float] | Tensor | None, like: Tensor) -> Tensor:
    """Costs (E,) over the largest of them, in the precision of ``like`` (E,).

    Args:
        term: whose costs they are, for errors.
        costs: None: what the bank of the recorded layer says of one position, ``experts.costs()``.

    Raises:
        UserError: costs that are not one positive number an expert; none given with a ``Routing`` alone.
    """
    if costs is None:
        experts = None if isinstance(record, Routing) else getattr(record.layer, "experts", None)
        if experts is None:
            raise UserError(f"{term}: costs are missing, and there is no bank here that could say them")
        costs = experts.costs()
    values = torch.as_tensor(costs, dtype=like.dtype, device=like.device)
    if values.shape != like.shape or not (values.isfinite().all() and (values > 0).all()):
        raise UserError(
            f"{term}: costs must be one positive number for each of E={len(like)} experts, got {values.tolist()}"
        )
    return values / values.max()
