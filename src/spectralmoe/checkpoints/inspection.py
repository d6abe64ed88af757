"""An inspection of weights alone: routers and experts of a checkpoint that is never run nor held in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralmoe.checkpoints.layers import Checkpoint, CheckpointLayer, read_checkpoint
from spectralmoe.diagnostics.evidence import Evidence
from spectralmoe.diagnostics.similarity import gram_cosine
from spectralmoe.diagnostics.statistics import LayerStatistics
from spectralmoe.instruments.document import inspection_document, layer_names, value_blocks

__all__ = ["expert_gram", "inspect_checkpoint"]

_LIBRARIES = {"spectralmoe": "spectralmoe", "model_type": "transformers"}  # by a key of config.json


def inspect_checkpoint(path: str | Path, *, experts: bool = True) -> dict[str, Any]:
    """The inspection document of a checkpoint, mode "router-only", in the memory of a few blocks of weights.

    What only a run tells (load, entropy, stability, outputs) is null or no data.

    Args:
        path: a model folder with safetensors files, or one such file.
        experts: read the experts too, which is nearly all of the file; False: the routers alone.

    Raises:
        UserError: see ``read_checkpoint``.
    """
    checkpoint = read_checkpoint(path)
    model = {
        "name": checkpoint.name,
        "source": str(path),
        "library": _library(checkpoint),
        "class": _model_class(checkpoint),
        "mode": "router-only",
        "dtype": checkpoint.dtype,
        "parameters": checkpoint.parameters,
        "groups": checkpoint.config.get("n_group"),
    }
    notes = _notes(checkpoint, experts)
    data = {"source": str(path), "tokens": 0, "sequences": 0, "tokenizer": None, "notes": notes}
    layers = [_layer(layer, experts) for layer in checkpoint.layers]
    return inspection_document(checkpoint.name, model, data, layers)


def expert_gram(layer: CheckpointLayer) -> tuple[Tensor, int]:
    """Inner products (E, E) of the experts' weights, float64, and how many weights an expert has.

    Products of a block are taken in fp32, of weights over the largest of their expert, and summed up in float64.
    """
    gram, size = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64), 0
    for block in layer.expert_vectors():
        largest = block.abs().amax(1)
        rows, scale = block / torch.where(largest == 0, 1, largest)[:, None], largest.double()
        gram += (rows @ rows.T).double() * scale[:, None] * scale
        size += block.shape[1]
    return gram, size


def _layer(layer: CheckpointLayer, experts: bool) -> dict[str, Any]:
    matrix, e = layer.matrix(), layer.num_experts
    known = torch.empty(0, 0) if matrix is None else matrix
    gram, size = expert_gram(layer) if experts else (torch.empty(0, 0), 0)
    nothing = LayerStatistics(e, layer.top_k)
    cosines = gram_cosine(gram) if size else None
    evidence = Evidence(nothing, nothing, known, weight_cosines=cosines, weights=(size * e, "weights"))
    return {
        **layer_names(layer),
        "width": layer.width,
        "finite": bool(known.isfinite().all() and gram.isfinite().all()),
        "empty_experts": (gram.diagonal() == 0).nonzero().flatten().tolist() if size else None,
        **value_blocks(evidence, {"weights"}),
        "examples": [],
    }


def _model_class(checkpoint: Checkpoint) -> str:
    named = checkpoint.config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _library(checkpoint: Checkpoint) -> str:
    """The library that loads the checkpoint: "spectralmoe", "transformers", or "" if unknown."""
    return next((name for key, name in _LIBRARIES.items() if key in checkpoint.config), "")


def _notes(checkpoint: Checkpoint, experts: bool) -> list[str]:
    notes = ["read from the weights alone: nothing was run", *checkpoint.notes]
    if not experts:
        return [*notes, "the experts were not read"]
    for note in sorted({layer.note for layer in checkpoint.layers if layer.note}):
        count = sum(layer.note == note for layer in checkpoint.layers)
        notes.append(f"{note} in {count} of {len(checkpoint.layers)} layers: their likeness is not known")
    return notes
