"""The document of an inspection, and the values in it that need no run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from spectralmoe.diagnostics import geometry
from spectralmoe.diagnostics.measure import Measure
from spectralmoe.diagnostics.similarity import mean_offdiagonal
from spectralmoe.instruments.findings import find_problems

__all__ = ["geometry_values", "inspection_document", "layer_names", "mean_likeness", "rounded"]

FORMAT = 1


def inspection_document(
    title: str,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    paths: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The document that ``spectralmoe inspect`` writes and ``spectralmoe report`` reads, with its findings.

    Args:
        model: name, class, mode ("run" or "router-only"), dtype, parameters.
        data: source, tokens, sequences, tokenizer, notes.
        layers: of an ``Inspector``, or of a checkpoint.
        paths: of an ``Inspector``.
    """
    from spectralmoe import __version__

    document = {
        "kind": "inspection",
        "format": FORMAT,
        "spectralmoe": __version__,
        "title": title,
        "model": dict(model),
        "data": dict(data),
        "layers": list(layers),
        "paths": list(paths),
    }
    return {**document, "findings": find_problems(document)}


class Named(Protocol):
    """A MoE layer that runs, or one of a checkpoint."""

    @property
    def name(self) -> str: ...
    @property
    def number(self) -> int: ...
    @property
    def stack(self) -> str: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int | None: ...


def layer_names(layer: Named) -> dict[str, Any]:
    """Which layer: name, number, stack, E and K."""
    return {
        "name": layer.name,
        "layer": layer.number,
        "stack": layer.stack,
        "experts": layer.num_experts,
        "top_k": layer.top_k,
    }


def geometry_values(matrix: Tensor | None) -> dict[str, Any]:
    """Geometry of a routing matrix; without one, no data."""
    m = torch.empty(0, 0) if matrix is None else matrix
    names = ("sigma_1", "stable_rank", "effective_rank", "row_cosine", "row_spread")
    found: dict[str, Any] = {name: getattr(geometry, name)(m).as_json() for name in names}
    return {**found, "spectrum": geometry.spectrum(m).tolist() if m.isfinite().all() else []}


def mean_likeness(table: Tensor | None, data: int, unit: str, needs: int = 1) -> dict[str, Any]:
    """The mean of a table of experts by experts over its pairs, which rests on ``data`` things."""
    value = None if table is None else mean_offdiagonal(table).value
    return Measure.of(math.nan if value is None else value, data, unit, needs).as_json()


def rounded(table: Tensor | None) -> list[list[float | None]] | None:
    """For a file that people read; nan as None; no table without data."""
    if table is None or not table.isfinite().any():
        return None
    return [[round(value, 4) if math.isfinite(value) else None for value in row] for row in table.tolist()]
