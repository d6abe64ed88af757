"""Placement: it says which places of a bank hold each expert of a router, for merged experts and replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError
from spectralmoe.routing import EMPTY, Routing, count_slots

__all__ = ["Placement", "arrival", "check_places"]


class Placement(nn.Module):
    """Maps each expert that a router knows to the places of the bank that hold it.

    A place is an index of a network in the bank. Row e of the table (E, R) lists the places of expert e:

    - none makes it a zero expert, which is chosen and counted, and adds nothing to the output;
    - a place that is in other rows, too, makes these experts one network, as merging does;
    - several places make replicas. They take the expert's tokens in turn, in the order of the batch, so that in each
      forward their loads differ by one at most. Their parameters are separate, so training would let them drift apart.

    Router, losses, loads and records count experts; dispatch and bank count places. The table is saved with the
    description of the layer (its spec), not with its weights.

    Args:
        table: (E, R) whole numbers, R the most places of an expert, filled up with -1; or rows of different lengths.

    Raises:
        UserError: the table has another form; a place is below -1, behind a -1 or twice in a row; or no expert has one.

    >>> placement = Placement([[0], [1, 2], [], [0]])
    >>> placement.table.tolist(), placement.places(1)
    ([[0, -1], [1, 2], [-1, -1], [0, -1]], [1, 2])
    >>> routing = Routing(torch.zeros(4, 4), torch.ones(4, 1), torch.tensor([[1], [3], [1], [2]]))
    >>> placement(routing).indices.flatten().tolist()
    [1, 0, 2, -1]
    """

    table: Tensor

    def __init__(self, table: Tensor | Sequence[Sequence[int]]) -> None:
        super().__init__()
        rows = _checked(table.tolist() if isinstance(table, Tensor) else table)
        width = max(map(len, rows))
        padded = [[*row, *[EMPTY] * (width - len(row))] for row in rows]
        self.num_experts, self.num_places = len(rows), 1 + max(max(row) for row in padded)
        self.complete = all(rows)  # no zero experts
        self.register_buffer("table", torch.tensor(padded, dtype=torch.int64), persistent=False)

    def spec_arguments(self) -> dict[str, object]:
        """Return the table as lists."""
        return {"table": self.table.tolist()}

    def places(self, e: int) -> list[int]:
        """Return the places of expert ``e``; an empty list if there is no such expert."""
        return [place for place in self.table[e].tolist() if place >= 0] if 0 <= e < self.num_experts else []

    def forward(self, routing: Routing) -> Routing:
        """Return the routing with places of the bank as indices, -1 where there is none.

        Count its slots with ``count_slots(indices, num_places)``; ``counts()`` would still count E experts.
        """
        chosen, table = routing.indices.clamp_min(0), self.table
        if table.shape[1] == 1:
            places = table[:, 0][chosen]
        else:
            replicas = (table >= 0).sum(1).clamp_min(1)
            places = table[chosen, arrival(routing.indices, len(table)) % replicas[chosen]]
        placed = places.masked_fill(routing.indices < 0, EMPTY)
        return replace(routing, indices=placed, full=routing.full and self.complete)


def arrival(indices: Tensor, num_experts: int) -> Tensor:
    """Count for each slot how many earlier slots hold the same expert, token by token: (N, K) int64.

    >>> arrival(torch.tensor([[0, 1], [1, 0], [1, 2]]), 3).tolist()
    [[0, 0], [1, 1], [2, 0]]
    """
    key = indices.flatten()
    key = torch.where(key < 0, num_experts, key)
    counts = count_slots(key, num_experts + 1)
    order = key.argsort(stable=True)
    places = torch.arange(len(key), device=key.device)
    turns = places - (counts.cumsum(0) - counts)[key[order]]
    return torch.zeros_like(key).scatter(0, order, turns).view_as(indices)


def check_places(placement: Placement | None, num_experts: int, num_places: int) -> None:
    """Check that a placement fits a router with ``num_experts`` experts and a bank with ``num_places`` places.

    Raises:
        UserError: its sizes or its type are wrong; or it is None and the router has fewer experts than the bank.
    """
    if placement is None:
        if num_experts < num_places:
            raise UserError(
                f"MoE: the router knows E={num_experts} experts, but the bank holds {num_places}; make the "
                "scorer for as many"
            )
    elif not isinstance(placement, Placement):
        raise UserError(f"MoE: placement takes a Placement, got {type(placement).__name__}; write Placement(table)")
    elif placement.num_experts != num_experts:
        raise UserError(f"Placement: the table has {placement.num_experts} rows, but the router knows E={num_experts}")
    elif placement.num_places > num_places:
        raise UserError(f"Placement: place {placement.num_places - 1} is not in the bank, which holds {num_places}")


def _checked(table: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows of ``table`` without the -1 that fill them up."""
    if not isinstance(table, Sequence) or not table or not all(isinstance(row, Sequence) for row in table):
        raise UserError("Placement: the table must have one row an expert, which lists its places")
    rows = []
    for e, row in enumerate(table):
        filled = [place for place in row if place != EMPTY]
        if any(not isinstance(place, int) or isinstance(place, bool) or place < 0 for place in filled):
            raise UserError(f"Placement: places are whole numbers from 0 on, -1 for none; expert {e} has {list(row)}")
        if filled != list(row[: len(filled)]) or len(set(filled)) < len(filled):
            raise UserError(f"Placement: places stand once each, before any -1; expert {e} has {list(row)}")
        rows.append(filled)
    if not any(rows):
        raise UserError("Placement: no expert has a place")
    return rows
