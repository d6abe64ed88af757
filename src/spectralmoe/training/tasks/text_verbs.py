"""What the verbs do with a saved language model: it goes on with a text; held-out windows for ``inspect``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from spectralmoe.data.text_sources import read_text
from spectralmoe.data.vocabulary import SEPARATOR, Vocabulary
from spectralmoe.errors import UserError
from spectralmoe.instruments.running_text import PASSAGES, TOKENS, split_text
from spectralmoe.instruments.samples import Place
from spectralmoe.models import LanguageMoE
from spectralmoe.training.settings import Settings, Several, parse
from spectralmoe.training.tasks.shown import HeldOut, Running, Shown

__all__ = [
    "TextMeta",
    "continue_text",
    "continue_texts",
    "held_out_windows",
    "read_prompt",
    "read_text_meta",
    "split_prompt",
]

_AROUND, _TOGETHER, _SHOWN = 24, 2048, 200
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class TextMeta(Settings):
    """What a saved language model needs to be used on text.

    Attributes:
        length: S of the windows that it was trained on.
        vocabulary: for ``Vocabulary.of_json``.
        results: measured after training.
        settings: of the run that trained it.
    """

    data: str
    domains: Several[str]
    length: int
    vocabulary: dict[str, Any]
    router: str
    results: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)


def read_text_meta(network: nn.Module, values: Any, folder: Path) -> TextMeta:
    """What was saved beside a language model.

    Raises:
        UserError: another network; values that are missing, or do not fit it.
    """
    where = f"{folder / 'config.json'}: meta"
    if not isinstance(network, LanguageMoE):
        raise UserError(f"{folder} holds a {type(network).__name__}, and its meta is that of a language model")
    meta = parse(TextMeta, values, where)
    if Vocabulary.of_json(meta.vocabulary).size != network.vocab:
        raise UserError(f"{where} does not fit the network")
    return meta


def read_prompt(given: str) -> str:
    """The text of an argument: of standard input for "-", of a file where it names one, else the argument itself.

    Raises:
        UserError: no text in it; a file that is no text; a word that looks like a file that is not there.
    """
    if given == "-":
        content = sys.stdin.buffer.read() if sys.stdin else b""
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 text: byte {error.start}") from error
        if not text.strip():
            raise UserError("standard input is empty; give the beginning of a text")
        return text
    if not given.strip():
        raise UserError("the text is empty; give its beginning, a file, or - for standard input")
    if os.path.isfile(given):
        return read_text(Path(given))
    if len(given.split()) == 1 and Path(given).suffix[1:].isalnum():
        raise UserError(f"there is no file {given!r}; to go on with these letters as a text, put a space before them")
    return given


def continue_texts(
    network: nn.Module,
    meta: TextMeta,
    inputs: Sequence[str],
    *,
    tokens: int = 100,
    temperature: float = 0.8,
    seed: int = 0,
) -> list[Shown]:
    """How each text goes on (``read_prompt``): ``tokens`` more, each drawn under ``seed`` at a ``temperature``.

    Raises:
        UserError: as ``read_prompt``.
    """
    assert isinstance(network, LanguageMoE)
    vocabulary, device = Vocabulary.of_json(meta.vocabulary), next(network.parameters()).device
    how: dict[str, Any] = {"length": meta.length, "tokens": tokens, "temperature": temperature}
    results = []
    for given, prompt in [(given, read_prompt(given)) for given in inputs]:
        draws = torch.Generator(device).manual_seed(seed)
        results.append(_shown(given, prompt, continue_text(network, vocabulary, prompt, draws=draws, **how)))
    return results


def continue_text(
    network: LanguageMoE,
    vocabulary: Vocabulary,
    prompt: str,
    *,
    length: int,
    tokens: int,
    temperature: float,
    draws: torch.Generator,
) -> str:
    """The ``tokens`` that the network writes after ``prompt``, the beginning of a document.

    It never reads more than ``length`` tokens, those of the windows that it was trained on: where a text is longer, it
    reads the last half of a window and goes on from there.
    """
    device = next(network.parameters()).device
    start = [SEPARATOR, *vocabulary.encode(prompt)][-length:]
    text = torch.tensor([start], device=device)
    while (left := tokens + len(start) - text.shape[1]) > 0:
        seen = text if text.shape[1] < length else text[:, -max(1, length // 2) :]
        more = network.generate(
            seen, min(left, max(1, length - seen.shape[1])), temperature=temperature, generator=draws
        )
        text = torch.cat([text, more[:, seen.shape[1] :]], 1)
    return vocabulary.decode(text[0, len(start) :].tolist())


def held_out_windows(windows: Tensor, domains: Tensor, names: Sequence[str], vocabulary: Vocabulary) -> HeldOut:
    """Windows (N, S) of text with the domain of each token (N, S)."""
    length, several = windows.shape[1], len(names) > 1

    def describe(index: int, place: Place) -> dict[str, Any]:
        ids, at = windows[index].tolist(), place.position
        parts = {"text": ids[at : at + 1], "before": ids[max(0, at - _AROUND) : at], "after": ids[at + 1 :][:_AROUND]}
        return {key: vocabulary.decode(part) for key, part in parts.items()}

    def running(index: int) -> Running:
        sample = windows[index, : TOKENS // PASSAGES]
        return Running(names[int(domains[index, 0])], sample[None], split_text(sample, vocabulary.decode))

    return HeldOut(
        "windows",
        windows,
        domains,
        names if several else (),
        describe,
        batch=max(1, _TOGETHER // length),
        tokenizer=f"byte pairs ({vocabulary.size})" if vocabulary.merges else "bytes (UTF-8)",
        running=[running(index) for index in _from_each(domains)],
    )


def split_prompt(network: nn.Module, meta: Any, text: str) -> tuple[list[int], list[str]]:
    """The tokens of the beginning of a document, at most a window of its end, and the text of each.

    Raises:
        UserError: a network of another kind.
    """
    if not isinstance(meta, TextMeta):
        raise UserError(f"--attribute is for language models, and this is a {type(network).__name__}; leave it out")
    vocabulary = Vocabulary.of_json(meta.vocabulary)
    ids = [SEPARATOR, *vocabulary.encode(text)][-meta.length :]
    return ids, split_text(torch.tensor(ids), vocabulary.decode)


def _from_each(domains: Tensor) -> list[int]:
    """Windows to show: the first of each domain, then the second, and so on."""
    first = domains[:, 0]
    queues = [(first == domain).nonzero().flatten().tolist()[:PASSAGES] for domain in first.unique()]
    return [index for index in chain(*zip_longest(*queues)) if index is not None][:PASSAGES]


def _shown(given: str, prompt: str, continuation: str) -> Shown:
    """A text and how it goes on; a long beginning is cut to its end, and terminal control characters are removed."""
    source = {"file": given} if prompt != given else {}
    beginning = prompt if len(prompt) <= _SHOWN else "…" + prompt[-_SHOWN:]
    values = {**source, "prompt": prompt, "continuation": continuation}
    return Shown(values, _CONTROL.sub("\ufffd", beginning + continuation))
