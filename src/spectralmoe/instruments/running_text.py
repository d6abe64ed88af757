"""Running text: the expert with the largest combine weight for each token of a sequence, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from spectralmoe.diagnostics.watch import Seen, Watched
from spectralmoe.routing import Routing

__all__ = ["PASSAGES", "TOKENS", "passage", "split_text"]

PASSAGES, TOKENS = 4, 1024
"""Passages of a document, one a topic, and the tokens of all of them together, at most."""

_BROKEN = "\ufffd"


def passage(pieces: Sequence[str], layers: Sequence[Watched], calls: Sequence[Seen], title: str = "") -> dict[str, Any]:
    """One passage of "text" in an inspection document: its ``pieces``, one a token, and where each layer sent them.

    For every layer ``experts``, the expert with the largest combine weight of each token (None: no expert), and
    ``weights``, that weight; None for a layer that routed other things than these tokens.

    Args:
        layers: of a ``Watch``.
        calls: of one forward on this sequence alone.
    """
    first: dict[int, Routing] = {}
    for call in calls:
        first.setdefault(id(call.layer), call.routing)
    return {
        "title": title,
        "pieces": list(pieces),
        "layers": [_leaning(layer, first.get(id(layer)), len(pieces)) for layer in layers],
    }


def _leaning(layer: Watched, routing: Routing | None, tokens: int) -> dict[str, Any] | None:
    if routing is None or len(routing.logits) != tokens:
        return None
    experts = [e if 0 <= e < layer.num_experts else None for e in routing.top_expert().tolist()]
    largest = routing.gates().detach().float().amax(-1).tolist()
    weights = [None if e is None else round(weight, 3) for e, weight in zip(experts, largest, strict=True)]
    if layer.stack == "decoder":  # it reads the start token, then the text
        experts, weights = [*experts[1:], None], [*weights[1:], None]
    return {"experts": experts, "weights": weights}


def split_text(ids: Tensor, decode: Callable[[Sequence[int]], str]) -> list[str]:
    """What each token adds to the text of ``ids`` (S,); nothing where a letter ends in a later token.

    A tokenizer may write a single token differently: without its space, or as a part of a letter.

    >>> import torch
    >>> split_text(torch.tensor(list("né".encode())), lambda ids: bytes(ids).decode(errors="replace"))
    ['n', '', 'é']
    """
    tokens, pieces, before = ids.tolist(), list[str](), ""
    for end in range(1, len(tokens) + 1):
        text = decode(tokens[:end])
        text = text if end == len(tokens) else text.rstrip(_BROKEN)
        pieces.append(text[len(before) :])
        before = text
    return pieces
