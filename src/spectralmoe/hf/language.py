"""A loaded Hugging Face language model: feed it with text, run it, read what its config says about balance."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectralmoe.diagnostics.watch import Watched, layer_number
from spectralmoe.errors import UserError, first_line
from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.structure import stack_of

__all__ = [
    "TransformersModel",
    "batch_arguments",
    "encode",
    "refuse_broken",
    "run",
    "stored_names",
    "token_ids",
    "training_facts",
]

_EXPERT = re.compile(r"(.*?)\.(?!shared)[^.]*expert")
LENGTH, ROWS = 512, 4
"""Tokens of a sequence and sequences of a batch, at most."""

BYTES = 256


@dataclass(frozen=True, slots=True)
class TransformersModel:
    """A loaded language model.

    Attributes:
        model: in evaluation mode.
        tokenizer: None where its folder holds none.
        name: the folder's name, or the name on the hub.
        notes: what a reader of the results should know, a sentence each.
        stored_names: layer's path -> what its tensors are called in the files, where that is another name.
    """

    model: Any
    tokenizer: Any = None
    name: str = ""
    notes: list[str] = field(default_factory=list)
    stored_names: dict[str, str] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        return int(self.model.config.get_text_config().vocab_size)


def encode(loaded: TransformersModel, text: str, tokens: int) -> list[dict[str, Tensor]]:
    """The first ``tokens`` tokens of ``text`` as batches of arguments of the model's forward: ``input_ids`` (B, S), ...

    Sequences have 512 tokens, or as many as the model has positions; the last one has what remains. The decoder of an
    encoder-decoder model gets the start token and then the text, so that it predicts each token from those before.

    Raises:
        UserError: no text; as ``token_ids``.
    """
    if not text.strip() or tokens < 1:
        raise UserError("there is no text to run: give at least one word, and at least one token of it")
    read = token_ids(loaded, text[: 16 * tokens])  # a short read of a long text ...
    if len(read) < tokens and len(text) > 16 * tokens:  # ... if that is enough
        read = token_ids(loaded, text)
    ids = torch.tensor(read[:tokens], dtype=torch.int64, device=next(loaded.model.parameters()).device)
    length = min(LENGTH, getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or LENGTH)
    whole = len(ids) // length * length
    batches = [*ids[:whole].view(-1, length).split(ROWS)] if whole else []
    batches += [ids[whole:][None]] if whole < len(ids) else []
    return [_arguments(loaded.model.config, batch) for batch in batches]


def token_ids(loaded: TransformersModel, text: str, *, special: bool = True) -> list[int]:
    """The tokens of ``text``; its bytes in UTF-8 where the model has no tokenizer.

    Args:
        special: with the tokens that the tokenizer puts around a text.

    Raises:
        UserError: no tokenizer and a vocabulary of less than 256; a tokenizer that fails or is of another model.
    """
    if loaded.tokenizer is None and loaded.vocabulary < BYTES:
        raise UserError(
            f"{loaded.name} has no tokenizer, and its vocabulary of {loaded.vocabulary} is too small to read text as "
            "bytes (256); save its tokenizer in its folder"
        )
    if loaded.tokenizer is None:
        return list(text.encode("utf-8"))
    try:
        ids = list(loaded.tokenizer(text, verbose=False, add_special_tokens=special)["input_ids"])
    except Exception as error:  # a tokenizer without an unknown token raises Exception itself
        raise UserError(f"{loaded.name}: its tokenizer cannot read this text ({first_line(error)})") from error
    if ids and max(ids) >= loaded.vocabulary:
        raise UserError(
            f"{loaded.name}: the tokenizer gives id {max(ids)}, the model knows {loaded.vocabulary}: it is of "
            "another model"
        )
    return ids


@torch.no_grad()
def run(loaded: TransformersModel, batches: Sequence[dict[str, Tensor]]) -> None:
    """Run the model on batches, for a watch that is open; logits of the vocabulary are not computed where possible.

    Raises:
        UserError: the model's forward fails, as with a config that asks for more experts than there are.
    """
    known = inspect.signature(loaded.model.forward).parameters
    options = {name: value for name, value in {"use_cache": False, "logits_to_keep": 1}.items() if name in known}
    for batch in batches:
        with refuse_broken(loaded.name):
            loaded.model(**batch, **options)


@contextmanager
def refuse_broken(name: str) -> Iterator[None]:
    """Say in one line what goes wrong in the forward of the model called ``name``.

    Raises:
        UserError: it fails, but for want of memory.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, UserError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        raise UserError(
            f"{name}: the model cannot be run ({first_line(error)}); does its config.json fit its weights?"
        ) from error


def training_facts(model: nn.Module) -> dict[str, Any]:
    """The settings that decide whether a model's own training balances its experts.

    Returns:
        ``top_k``; ``norm_topk_prob`` (None where the family has no such option); ``correction_bias``: scores carry a
        bias for the choice alone, which transformers never updates; ``router_aux_loss_coef`` of the config (None
        without); ``output_router_logits``: the loss is added only with it; ``computes_aux_loss``: the model's forward
        can compute one at all. A config may have a coefficient that nothing reads, an output class a field that stays
        None.
    """
    layers, config = find_layers(model), getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    used = inspect.unwrap(type(model).forward).__code__.co_names
    return {
        "top_k": layers[0].top_k,
        "norm_topk_prob": getattr(text, "norm_topk_prob", None),
        "correction_bias": any(layer.correction_bias is not None for layer in layers),
        "router_aux_loss_coef": getattr(text, "router_aux_loss_coef", None),
        "output_router_logits": bool(getattr(text, "output_router_logits", False)),
        "computes_aux_loss": any("load_balancing" in name for name in used),
    }


def stored_names(layers: Sequence[Watched], tensors: Iterable[str]) -> dict[str, str]:
    """Layer's name -> its name in the files, for layers whose tensors have another name there.

    Files keep the names of the model's authors, or those of a larger model that holds this one; ``--router-only``
    shows them too.

    Args:
        layers: of the model.
        tensors: names of the tensors in the files.
    """
    owners = {match[1] for name in tensors if (match := _EXPERT.match(name))}
    in_files = {}
    for layer in layers:
        alike = [name for name in owners if (layer_number(name), stack_of(name)) == (layer.number, layer.stack)]
        if layer.name not in owners and len(alike) == 1:
            in_files[layer.name] = alike[0]
    return in_files


def batch_arguments(owner: str, model: Any, batch: Any) -> dict[str, Any]:
    """A batch of calibration data as arguments of the model's forward, on its device.

    Args:
        owner: who asks, for errors.
        batch: a table of arguments, or token ids (B, S).

    Raises:
        UserError: it is neither.
    """
    device = next(model.parameters()).device
    if isinstance(batch, Tensor):
        return dict(_arguments(model.config, batch.to(device)))
    if isinstance(batch, Mapping):
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    raise UserError(
        f"{owner}: a batch must be token ids (B, S) or a table of the model's arguments, got {type(batch).__name__}"
    )


def _arguments(config: Any, ids: Tensor) -> dict[str, Tensor]:
    """The arguments of a model's forward for token ids (B, S): a decoder beside an encoder gets them shifted."""
    if not config.is_encoder_decoder:
        return {"input_ids": ids}
    start = next(
        (
            value
            for value in (config.decoder_start_token_id, config.bos_token_id, config.pad_token_id)
            if value is not None
        ),
        0,
    )
    shifted = torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], dim=1)
    return {"input_ids": ids, "decoder_input_ids": shifted}
