"""``holders``: the attribution of a text's last token, in the form of an inspection document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from spectralmoe.attribution.attribute import attribute_experts
from spectralmoe.errors import UserError

__all__ = ["holders"]


def holders(model: nn.Module, ids: Sequence[int], pieces: Sequence[str], layers: Sequence[str]) -> dict[str, Any]:
    """Attribute the last of ``ids`` to the experts and layers of a model, for "holders" of an inspection document.

    Args:
        ids: the tokens of a text (S,), two or more.
        pieces: the text of each token.
        layers: the names of the document's layers, in their order.

    Returns:
        ``pieces``; ``log_prob`` of the last token; ``experts``, the largest gain first, each with the place of its
        layer in the document, its number (None is what the layer adds beside its routed experts), weight and gain; and
        ``layers``, with the gain of all that each layer adds.

    Raises:
        UserError: the text has one token; or as ``attribute_experts``.
    """
    if len(ids) < 2:
        raise UserError("--attribute needs a text of two tokens or more: what is to be predicted, and what it follows")
    tokens = torch.tensor(ids, device=next(model.parameters()).device)
    tables = [attribute_experts(model, tokens[:-1], int(ids[-1]), level=level) for level in ("expert", "layer")]
    experts, whole = ([{**row, "layer": layers.index(row["layer"])} for row in table.rows()] for table in tables)
    return {
        "pieces": list(pieces),
        "log_prob": float(tables[0].log_prob),
        "experts": experts,
        "layers": [{"layer": row["layer"], "gain": row["gain"]} for row in whole],
    }
