"""The settings of an upcycling, checked against the dense model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from spectralmoe.errors import UserError, one_of
from spectralmoe.hf.upcycling.dense import Dense
from spectralmoe.hf.upcycling.methods import METHODS
from spectralmoe.hf.upcycling.starts import STARTS

__all__ = ["Plan", "make_plan", "router_notes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The form of the MoE layers.

    Attributes:
        experts, k: E, and experts a token.
        method, ratio: a name in ``METHODS`` and its ratio (0 where it takes none).
        granularity: shards of a copy; 1 where experts are whole.
        layers: the layers that get experts.
        router, scale, seed: a name in ``STARTS``, the size of the router's rows, where random draws start.
    """

    experts: int
    k: int
    method: str
    ratio: float
    granularity: int
    layers: tuple[int, ...]
    router: str
    scale: float
    seed: int

    @property
    def groups(self) -> int:
        """How many different rows the router has: one a copy of the MLP."""
        return self.experts // self.granularity


def router_notes(method: str, k: int) -> list[str]:
    """What the caller should know of the gradient that the router gets, a sentence each."""
    if k == 1:
        return ["with k=1 a token's only weight is 1, so the router never gets a gradient from the task; use k >= 2"]
    if method == "copy":
        return [
            "method 'copy' makes experts that are alike, so the router gets no gradient from the task until training "
            "has moved them apart; method 'drop' or 'noise' makes them differ"
        ]
    return []


def make_plan(
    dense: Dense,
    *,
    experts: int,
    k: int,
    method: str,
    ratio: float | None,
    granularity: int | None,
    layers: str | Sequence[int],
    router: str,
    scale: float | None,
    seed: int,
) -> Plan:
    """The plan of these arguments, those of ``upcycle``.

    Raises:
        UserError: an unknown name; a number out of range; experts that do not divide into groups.
    """
    if method not in METHODS:
        raise one_of("method of upcycle", method, METHODS)
    if router not in STARTS:
        raise one_of("router of upcycle", router, STARTS)
    if experts < 2 or not 1 <= k <= experts:
        raise UserError(f"upcycle: it takes at least 2 experts, and k from 1 to experts; got experts={experts}, k={k}")
    usual, splits = METHODS[method].ratio, METHODS[method].splits
    if ratio is not None and usual is None:
        raise UserError(f"upcycle: method {method!r} takes no ratio; 'drop' and 'noise' do")
    ratio = usual if ratio is None else ratio
    if ratio is not None and not 0 < ratio < float("inf"):
        raise UserError(f"upcycle: ratio must be above 0, got {ratio}")
    if method == "drop" and ratio is not None and ratio > 1:
        raise UserError(f"upcycle: the ratio of method 'drop' is a share of the hidden units, at most 1; got {ratio}")
    if granularity is not None and not splits:
        raise UserError(f"upcycle: method {method!r} splits no MLP and takes no granularity; 'virtual' does")
    shards = (k if granularity is None else granularity) if splits else 1
    if splits:
        _check_groups(dense, experts, k, shards)
    scale = dense.model.config.initializer_range if scale is None else scale
    if not 0 < scale < float("inf"):
        raise UserError(f"upcycle: scale must be above 0, got {scale}")
    return Plan(
        experts=experts,
        k=k,
        method=method,
        ratio=ratio or 0.0,
        granularity=shards,
        layers=_chosen(layers, dense.depth),
        router=router,
        scale=scale,
        seed=seed,
    )


def _check_groups(dense: Dense, experts: int, k: int, shards: int) -> None:
    """Experts and k are whole groups of shards, and shards have a whole number of hidden units."""
    if shards < 1:
        raise UserError(f"upcycle: granularity must be at least 1, got {shards}")
    for name, number in (("experts", experts), ("k", k), ("the MLP's hidden width", dense.hidden)):
        if number % shards:
            raise UserError(f"upcycle: {name} ({number}) does not divide into groups of granularity={shards}")


def _chosen(layers: str | Sequence[int], depth: int) -> tuple[int, ...]:
    """The numbers of the layers, in order."""
    if isinstance(layers, str):
        last = re.fullmatch(r"last(\d+)", layers)
        if last is None and layers != "all":
            raise UserError(f'upcycle: layers={layers!r} cannot be read; write "all", "last4" or a list of numbers')
        layers = range(-int(last[1]), 0) if last else range(depth)
    if not layers or not all(-depth <= layer < depth for layer in layers):
        raise UserError(f"upcycle: layers={list(layers)} is empty or out of range: there are {depth} layers, from 0")
    return tuple(sorted({layer % depth for layer in layers}))
