"""Tokens of text: bytes, or pairs of them merged by byte-pair encoding."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spectralmoe.errors import UserError

__all__ = ["BYTES", "SEPARATOR", "Vocabulary"]

BYTES, SEPARATOR = 256, 0
"""How many bytes there are; the token between two documents, which no text holds."""

Merges = Sequence[tuple[int, int]]


class Vocabulary:
    """Tokens 0 to 255 are bytes; each later one is two earlier tokens side by side.

    Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", arXiv 1508.07909, section 3.2, on
    bytes, inside words as GPT-2 splits them. Merging and learning merges need the package ``tokenizers``; reading
    tokens does not. No text is changed on the way: ``decode(encode(text)) == text``.

    Args:
        merges: the two tokens of each token from 256 on; none: bytes.

    Raises:
        UserError: a merge of tokens that are not there yet; in ``encode``, ``tokenizers`` is missing.

    >>> vocabulary = Vocabulary([(116, 104)])
    >>> vocabulary.size, vocabulary.decode([256, 101]), Vocabulary().encode("the")
    (257, 'the', [116, 104, 101])
    """

    def __init__(self, merges: Merges = ()) -> None:
        self.merges = [(int(left), int(right)) for left, right in merges]
        self.tokens = [bytes([byte]) for byte in range(BYTES)]
        for pair in self.merges:
            if not all(0 <= part < len(self.tokens) for part in pair):
                raise UserError(f"vocabulary: token {len(self.tokens)} merges {pair}, which are not there yet")
            self.tokens.append(b"".join(self.tokens[part] for part in pair))
        self._encoder: Any = None

    @classmethod
    def learn(cls, texts: Iterable[str], size: int) -> Vocabulary:
        """The vocabulary of ``size`` tokens whose merges are the most frequent in ``texts``; fewer in a small text.

        Raises:
            UserError: ``tokenizers`` is missing.
        """
        from_scratch = _encoder([])
        trainers = _tokenizers().trainers
        alphabet = list(_LETTERS)
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
        from_scratch.train_from_iterator(texts, trainer)
        pairs = json.loads(from_scratch.to_str())["model"]["merges"]
        places = {letter: byte for byte, letter in enumerate(_LETTERS)}
        merges = []
        for pair in pairs:
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            merges.append((places[left], places[right]))
            places.setdefault(left + right, BYTES + len(merges) - 1)
        return cls(merges)

    @property
    def size(self) -> int:
        """V."""
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """How many bytes each token is: (V,) int64. The separator counts as one."""
        return torch.tensor([len(token) for token in self.tokens])

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        tokens: list[int] = self.encode_all([text])[0].tolist()
        return tokens

    def encode_all(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """The tokens of each text, int32."""
        if not self.merges:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
        if self._encoder is None:
            self._encoder = _encoder(self.merges)
        return [np.array(encoding.ids, np.int32) for encoding in self._encoder.encode_batch(list(texts))]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; a character that is cut off becomes U+FFFD, a separator an empty line."""
        return self._bytes(tokens).decode(errors="replace")

    def as_json(self) -> dict[str, Any]:
        """JSON values that ``of_json`` reads back."""
        return {"merges": [list(pair) for pair in self.merges]}

    @classmethod
    def of_json(cls, values: Any) -> Vocabulary:
        """The vocabulary that ``as_json`` wrote.

        Raises:
            UserError: other values.
        """
        try:
            return cls([(left, right) for left, right in values["merges"]])
        except (TypeError, KeyError, ValueError) as error:
            raise UserError("vocabulary: no list of merges [token, token]") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None}

    def _bytes(self, tokens: Iterable[int]) -> bytes:
        return b"".join(b"\n\n" if token == SEPARATOR else self.tokens[token] for token in tokens)


def _letters() -> str:
    """The character that stands for each byte in byte-level BPE: itself where it is printable, else one from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(BYTES))


_LETTERS = _letters()


def _encoder(merges: Merges) -> Any:
    """The tokenizer of ``tokenizers`` with our numbers."""
    tokenizers = _tokenizers()
    names = list(_LETTERS)
    for left, right in merges:
        names.append(names[left] + names[right])
    pairs = [(names[left], names[right]) for left, right in merges]
    model = tokenizers.models.BPE(vocab={name: token for token, name in enumerate(names)}, merges=pairs)
    encoder = tokenizers.Tokenizer(model)
    encoder.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return encoder


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        cure = "install it with 'pip install spectralmoe[text]'"
        raise UserError(f"a vocabulary of more than {BYTES} bytes needs tokenizers; {cure}, or use bytes") from error
    return tokenizers
