"""Text of several domains as a language model reads it: for training, and held out for scores."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from spectralmoe.errors import UserError
from spectralmoe.hf.language import TransformersModel
from spectralmoe.hf.training.text_windows import Passages, Windows, bits_per_byte, cut_windows, hold_out

__all__ = ["Corpus", "read_corpus"]

LENGTH = 256
"""Tokens of a window, if the model reads as many."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Text as a model reads it.

    Attributes:
        train: windows of all domains.
        held_out: domain -> its held-out text.
    """

    train: Windows
    held_out: dict[str, Passages]

    def map(self, change: Callable[[Windows], Windows]) -> Corpus:
        """The same with every ``Windows`` changed."""
        held_out = {
            name: replace(passages, windows=tuple(map(change, passages.windows)))
            for name, passages in self.held_out.items()
        }
        return Corpus(change(self.train), held_out)

    def score(self, model: Any, rows: int) -> dict[str, float]:
        """Bits per byte of the held-out text: of all of it, "all", and by domain where there are several."""
        bits = dict(zip(self.held_out, bits_per_byte(model, list(self.held_out.values()), rows), strict=True))
        size = sum(passages.size for passages in self.held_out.values())
        whole = sum(bits[name] * passages.size for name, passages in self.held_out.items()) / size
        return {"all": whole, **(bits if len(bits) > 1 else {})}


def read_corpus(
    loaded: TransformersModel,
    texts: Mapping[str, Sequence[str]],
    length: int | None = None,
    *,
    share: float,
    size: int | None = None,
) -> Corpus:
    """The documents of each domain as windows of ``length`` tokens, a part held out: ``cut_windows``, ``hold_out``.

    Args:
        texts: domain -> documents that are not empty, at least one.
        length: None: ``LENGTH``, or as many as the model reads.
        share, size: as for ``hold_out``.

    Raises:
        UserError: less text for training than one window; windows that are longer than the model reads; a tokenizer
            that fails.
    """
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    length = length or min(LENGTH, longest)
    if length > longest:
        raise UserError(f"{loaded.name} reads at most {longest} tokens at a time: length = {length} is too long")
    parts, held_out = [], {}
    for name, documents in texts.items():
        train, held = hold_out(documents, share, size)
        if not any(train) or not any(held):
            raise UserError(f"text {name!r} is too short to hold a part of it out: give more of it")
        parts.append(cut_windows(loaded, train, length)[0])
        held_out[name] = Passages(cut_windows(loaded, held, length), sum(len(text.encode()) for text in held))
    windows = Windows(torch.cat([part.inputs for part in parts]), torch.cat([part.labels for part in parts]))
    if not len(windows):
        raise UserError(
            f"the text for training is shorter than one window of {length} tokens: give more text, or a smaller length"
        )
    return Corpus(windows, held_out)
