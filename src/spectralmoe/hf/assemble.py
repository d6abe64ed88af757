"""A model of transformers made from its config and its tensors, each of which is in memory once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["assemble"]


def assemble(kind: Any, config: Any, tensors: Mapping[str, Tensor], *, attention: str | None = None) -> Any:
    """The decoder of ``config`` with ``tensors`` as its weights, not copies of them; in training mode.

    No weight is drawn: no time, memory or random number is spent on what would be overwritten. What no file holds, the
    angles of rotary embeddings, is computed from the config.

    Args:
        kind: ``transformers.AutoModelForCausalLM``.
        tensors: by name, all of the model's, in its precision. Of tied ones each name has the tensor.
        attention: how attention is computed, a name of transformers.

    Raises:
        RuntimeError: a tensor is missing, is of another shape, or has no place.
    """
    with torch.device("meta"):
        model = kind.from_config(config, dtype=next(iter(tensors.values())).dtype, attn_implementation=attention)
    model.load_state_dict(tensors, assign=True)
    rotary = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb = rotary.to(model.model.embed_tokens.weight.device)
    model.tie_weights()
    return model.train()
