"""The document of an inspection, and the values in it that need no run."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from spectralmoe.diagnostics import geometry
from spectralmoe.diagnostics.evidence import Evidence
from spectralmoe.diagnostics.table import Need, measured
from spectralmoe.instruments.problems import find_problems
from spectralmoe.version import __version__

__all__ = ["inspection_document", "layer_names", "value_blocks"]

FORMAT = 1


def inspection_document(
    title: str,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    paths: Sequence[Mapping[str, Any]] = (),
    *,
    text: Sequence[Mapping[str, Any]] = (),
    holders: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The document that ``spectralmoe inspect`` writes and ``spectralmoe report`` reads, with its findings.

    Args:
        model: name, source (what it was loaded from), library ("transformers", "spectralmoe" or ""), class, mode ("run"
            or "router-only"), dtype, parameters, groups (that experts are chosen in), swapped (routers of this
            library in a model of transformers).
        data: source, tokens, sequences, tokenizer, notes.
        layers: of an ``Inspector``, or of a checkpoint.
        paths: of an ``Inspector``.
        text: passages, of a language model.
        holders: what each expert adds to the last token of texts (``spectralmoe.attribution.holders``).
    """
    document = {
        "kind": "inspection",
        "format": FORMAT,
        "spectralmoe": __version__,
        "title": title,
        "model": dict(model),
        "data": dict(data),
        "layers": list(layers),
        "paths": list(paths),
        **({"text": list(text)} if text else {}),
        **({"holders": list(holders)} if holders else {}),
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


def value_blocks(evidence: Evidence, given: Collection[Need], labels: Sequence[str] = ()) -> dict[str, Any]:
    """The values of one layer by group, each group with the tables and lists that belong to it."""
    counts, matrix, e = evidence.counts, evidence.matrix, evidence.counts.num_experts
    known, outputs = matrix.numel() > 0, "outputs" in given
    lists: dict[str, dict[str, Any]] = {
        "load": {"counts": counts.counts().tolist(), "share": counts.share().tolist()},
        "geometry": {"spectrum": geometry.spectrum(matrix).tolist() if matrix.isfinite().all() else []},
        "similarity": {
            "matrices": {
                "output": rounded(evidence.output_cosines) if outputs else None,
                "weights": rounded(evidence.weight_cosines),
                "rows": rounded(geometry.row_cosines(matrix)[:e, :e]) if known else None,
            }
        },
        "association": {"labels": list(labels), "table": evidence.labels.tolist()},
    }
    blocks = measured(evidence, given)
    return {group: block and {**lists.get(group, {}), **block} for group, block in blocks.items()}


def rounded(table: Tensor | None) -> list[list[float | None]] | None:
    """Round values for a file that people read; nan becomes None, and tables without data are left out."""
    if table is None or not table.isfinite().any():
        return None
    return [[round(value, 4) if math.isfinite(value) else None for value in row] for row in table.tolist()]
