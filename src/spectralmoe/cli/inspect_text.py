"""``spectralmoe inspect`` on a Hugging Face language model: the routing of a text, file by file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spectralmoe.attribution import holders
from spectralmoe.cli.texts import read_domains
from spectralmoe.diagnostics.watch import Watch, Watched
from spectralmoe.errors import UserError
from spectralmoe.hf.language import TransformersModel, encode, run, token_ids, training_facts
from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.load import load_transformers
from spectralmoe.hf.watch import watch_transformers
from spectralmoe.instruments import Inspector, inspection_document
from spectralmoe.instruments.running_text import PASSAGES, TOKENS, passage, split_text
from spectralmoe.instruments.samples import Place
from spectralmoe.recording import Recordable

__all__ = ["DTYPES", "inspect_text"]

_AROUND = 24
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions to load a model in, by name."""


def inspect_text(
    source: str,
    device: torch.device,
    *,
    texts: Sequence[str],
    tokens: int,
    dtype: str,
    seed: int,
    attribute: Sequence[str] = (),
) -> dict[str, Any]:
    """The inspection document of a language model, from up to ``tokens`` tokens of the ``texts``, in equal numbers of
    each domain.

    Raises:
        UserError: no text; as ``read_domains``; a model that cannot be loaded or read.
    """
    if not texts:
        raise UserError(
            f"{source}: give text to run with --text FILE (or - for standard input), or look at the weights "
            "alone with --router-only"
        )
    domains, notes = read_domains(texts)
    read = {name: _as_one(documents) for name, documents in domains.items()}
    loaded = load_transformers(source, dtype=DTYPES[dtype], device=device)
    batches = {name: encode(loaded, text, -(-tokens // len(read))) for name, text in read.items()}
    labels = list(read) if len(read) > 1 else []
    sequences: list[Tensor] = []
    with watch_transformers(loaded.model) as seen:
        inspector = Inspector(seen.layers, labels=labels, seed=seed)
        for topic, name in enumerate(read):
            for batch in batches[name]:
                run(loaded, [batch])
                ids = batch["input_ids"]
                inspector.add(seen.drain(), torch.full((len(ids),), topic, device=device) if labels else None)
                sequences += list(ids.cpu())
        words = _Words(loaded, sequences)
        layers, passages = inspector.layers(words), _passages(loaded, seen, batches, words)
    held = [_holders(loaded, text, words, [layer.name for layer in seen.layers]) for text in attribute]
    for layer in layers:
        layer["name"] = loaded.stored_names.get(layer["name"], layer["name"])
    found = find_layers(loaded.model)
    model = {
        "name": loaded.name,
        "source": source,
        "library": "transformers",
        "class": type(loaded.model).__name__,
        "mode": "run",
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "parameters": loaded.model.num_parameters(),
        "training": training_facts(loaded.model),
        "groups": found[0].groups[0],
        "swapped": any(isinstance(layer.router, Recordable) for layer in found),
    }
    names = ", ".join("standard input" if name == "-" else name for name in texts)
    facts = {
        "source": f"{inspector.tokens} tokens of {names}",
        "tokens": inspector.tokens,
        "sequences": len(sequences),
        "tokenizer": "bytes (UTF-8)" if loaded.tokenizer is None else type(loaded.tokenizer).__name__,
        "notes": [*notes, *loaded.notes],
    }
    return inspection_document(loaded.name, model, facts, layers, inspector.paths(), text=passages, holders=held)


def _passages(
    loaded: TransformersModel, seen: Watch, batches: Mapping[str, Sequence[dict[str, Tensor]]], words: _Words
) -> list[dict[str, Any]]:
    """The beginning of each domain, with the experts of its tokens."""
    names = list(batches)[:PASSAGES]
    passages = []
    for name in names:
        first = {key: value[:1, : TOKENS // len(names)] for key, value in batches[name][0].items()}
        run(loaded, [first])
        pieces = split_text(first["input_ids"][0], words.text)
        passages.append(passage(pieces, seen.layers, seen.drain(), name if len(batches) > 1 else ""))
    return passages


def _holders(loaded: TransformersModel, text: str, words: _Words, layers: Sequence[str]) -> dict[str, Any]:
    """What each expert adds to the last token of ``text``, without the end token that a tokenizer may append."""
    ids = token_ids(loaded, text)
    if ids and ids[-1] == getattr(loaded.tokenizer, "eos_token_id", None):
        ids = ids[:-1]
    return holders(loaded.model, ids, split_text(torch.tensor(ids), words.text), layers)


def _as_one(documents: Sequence[str]) -> str:
    """Documents one after the other, each from the beginning of a line, whose ends are "\n"."""
    text = "".join(each if each.endswith("\n") else f"{each}\n" for each in documents)
    return text.replace("\r\n", "\n").replace("\r", "\n")


class _Words:
    """A token with what stands before and after it."""

    def __init__(self, loaded: TransformersModel, sequences: Sequence[Tensor]) -> None:
        self.loaded, self.sequences = loaded, sequences

    def __call__(self, layer: Watched, place: Place) -> dict[str, Any]:
        ids = self.sequences[place.sequence].tolist()
        at = place.position - (layer.stack == "decoder")  # a decoder reads the start token, then the text
        if at < 0:
            return {"text": "(start)", "before": "", "after": self.text(ids[:_AROUND])}
        before, after = ids[max(0, at - _AROUND) : at], ids[at + 1 : at + 1 + _AROUND]
        return {"text": self.text(ids[at : at + 1]), "before": self.text(before), "after": self.text(after)}

    def text(self, ids: Sequence[int]) -> str:
        if self.loaded.tokenizer is None:
            return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
        return str(self.loaded.tokenizer.decode(ids))
