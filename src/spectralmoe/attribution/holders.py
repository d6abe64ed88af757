"""Who holds a token: the attribution of a text's last token as a part of an inspection document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from spectralmoe.attribution.attribute import attribute_experts
from spectralmoe.errors import UserError

__all__ = ["holders"]


def holders(model: nn.Module, ids: Sequence[int], pieces: Sequence[str], layers: Sequence[str]) -> dict[str, Any]:
    """One entry of "holders" in an inspection document: what holds the last of ``ids``.

    ``pieces``, ``log_prob``, ``experts``, each with the place of its layer in the document, its number (None: what the
    layer adds beside its routed experts), weight and gain, the largest gain first, and ``layers``, the gain of all that
    each layer adds.

    Args:
        ids: tokens of a text (S,), two or more.
        pieces: the text of each token.
        layers: the names of the document's layers in their order, as the model has them.

    Raises:
        UserError: a text of one token; as ``attribute_experts``.
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
