"""What experts cost, as terms on their cost read it: a share of the dearest."""

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
    """Costs (E,) over the largest of them, in the precision of ``like`` (E,).

    Args:
        term: whose costs they are, for errors.
        costs: None: what the bank of the recorded layer says of one position, ``experts.costs()``.
        free: zero experts cost 0; else they are refused.

    Raises:
        UserError: costs that are not one positive number an expert; none given with a ``Routing`` alone.
    """
    beyond = 0
    if costs is None:
        experts = None if isinstance(record, Routing) else getattr(record.layer, "experts", None)
        if experts is None:
            raise UserError(f"{term}: costs are missing, and there is no bank here that could say them")
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
