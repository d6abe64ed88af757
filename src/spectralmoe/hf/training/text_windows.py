"""Text for training a causal language model: documents held out, windows of tokens, bits per byte."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.hf.language import TransformersModel, token_ids

__all__ = ["IGNORED", "Passages", "Windows", "bits_per_byte", "cut_windows", "hold_out"]

IGNORED = -100
"""The label of a token that is not to be predicted, as transformers has it."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Stretches of text of one length: samples of a data set for the Trainer.

    Attributes:
        inputs: token ids (W, L), or in their place hidden states (W, L, D).
        labels: (W, L): the ids, ``IGNORED`` where a document begins. The model shifts them itself.
    """

    inputs: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return {self.name: self.inputs[place], "labels": self.labels[place]}

    @property
    def name(self) -> str:
        """The argument of the model's forward that ``inputs`` is."""
        return "input_ids" if self.inputs.dim() == 2 else "inputs_embeds"


@dataclass(frozen=True, slots=True)
class Passages:
    """Held-out text of one domain.

    Attributes:
        windows: of full length, and the shorter one that remains.
        size: how many bytes of UTF-8 they predict.
    """

    windows: tuple[Windows, ...]
    size: int


def hold_out(documents: Sequence[str], share: float, size: int | None = None) -> tuple[list[str], list[str]]:
    """The training and the held-out part of one domain, the same in every run.

    Documents are ordered by their SHA-256, so that a new document changes nothing for the others; the first ones are
    held out until they make up ``share`` of the text. Of a single document the end is held out, from the beginning of a
    line where there is one.

    Args:
        documents: texts that are not empty, at least one.
        size: take no more than this many bytes of UTF-8, the last document in part.

    >>> hold_out(["0\\n1\\n2\\n3\\n4\\n5\\n6\\n7\\n8\\n9\\n"], 0.25)
    (['0\\n1\\n2\\n3\\n4\\n5\\n6\\n'], ['7\\n8\\n9\\n'])
    >>> [sorted(part) for part in hold_out(["cat", "dog", "owl", "fox"], 0.25)]
    [['cat', 'dog', 'fox'], ['owl']]
    """
    ordered = _first(sorted(documents, key=lambda text: hashlib.sha256(text.encode()).hexdigest()), size)
    wanted = share * sum(map(len, ordered))
    if len(ordered) == 1:
        text = ordered[0]
        place = len(text) - max(1, round(wanted))
        place = text.rfind("\n", 0, place) + 1 or place
        return [text[:place]], [text[place:]]
    count, taken = 0, 0
    while count < len(ordered) - 1 and taken < wanted:
        taken += len(ordered[count])
        count += 1
    return ordered[count:], ordered[:count]


def _first(documents: Sequence[str], size: int | None) -> list[str]:
    """The first ``size`` bytes of the documents; None: all."""
    left, taken = size, []
    for text in documents:
        if left is not None:
            raw = text.encode()
            text, left = raw[:left].decode(errors="ignore"), left - min(len(raw), left)
        if text:
            taken.append(text)
    return taken


def cut_windows(loaded: TransformersModel, documents: Sequence[str], length: int) -> tuple[Windows, ...]:
    """The documents one after the other, cut into windows of ``length`` tokens; then the shorter one that remains.

    Each document begins with the model's start token. A window begins with the last token of the one before, so every
    token of the text is predicted once, from those before it in its window.

    Args:
        length: at least 2.

    Raises:
        UserError: as ``token_ids``.
    """
    start = _start_token(loaded)
    pieces = [[start, *token_ids(loaded, text, special=False)] for text in documents]
    ids = torch.tensor([*chain.from_iterable(pieces)], dtype=torch.int64)
    labels = ids.clone()
    labels[[0, *accumulate(map(len, pieces[:-1]))]] = IGNORED
    step = length - 1
    count = max(len(ids) - 1, 0) // step
    whole = [
        values[: count * step + 1].unfold(0, length, step) if count else values.new_empty(0, length)
        for values in (ids, labels)
    ]
    rest = [values[None, count * step :] for values in (ids, labels)]
    windows = Windows(*(values.contiguous() for values in whole))
    return (windows, Windows(*rest)) if rest[0].shape[1] > 1 else (windows,)


@torch.no_grad()
def bits_per_byte(model: Any, passages: Sequence[Passages], rows: int) -> list[float]:
    """The bits that a model needs for a byte of text, for each of the ``passages``.

    The model is run in evaluation mode and left in the mode that it was in.

    Args:
        rows: windows of a batch.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    scores = []
    for domain in passages:
        nats = torch.zeros((), dtype=torch.float64)
        for windows in domain.windows:
            for first in range(0, len(windows), rows):
                inputs, labels = (part[first : first + rows].to(device) for part in (windows.inputs, windows.labels))
                logits = model(**{windows.name: inputs}, use_cache=False).logits[:, :-1].float()
                losses = F.cross_entropy(
                    logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
                )
                nats += losses.double().cpu()
        scores.append(float(nats) / math.log(2) / domain.size)
    model.train(was_training)
    return scores


def _start_token(loaded: TransformersModel) -> int:
    """What a document begins with: the start token, where there is none the end token, else token 0."""
    config = loaded.model.config.get_text_config()
    for owner in (loaded.tokenizer, config):
        for name in ("bos_token_id", "eos_token_id"):
            value = getattr(owner, name, None)
            if isinstance(value, int) and 0 <= value < loaded.vocabulary:  # a config may name one that is not there
                return value
    return 0
