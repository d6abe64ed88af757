"""Replicate-and-Quantize for Hugging Face models: copies of busy experts behind the stacks, integers of few bits.

After Liu et al., "A Replicate-and-Quantize Strategy for Plug-and-Play Load Balancing of Sparse Mixture-of-Experts LLMs"
(R&Q), arXiv 2602.19938; see ``spectralmoe.compression.replicate_and_quantize``. Differs: what an expert is worth
follows from its layer alone, because a family's router cannot be told to leave one out.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from spectralmoe.compression.quantize import quantise_, stored_bytes
from spectralmoe.compression.scheme import Held, Report, Scheme
from spectralmoe.errors import UserError
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.routers.copies import add_copies, refuse_copies, refuse_plain_saving
from spectralmoe.hf.routers.rules import read_rule
from spectralmoe.hf.routers.swap import swap_routers
from spectralmoe.hf.shrinking.calibration import Batches, Calibration
from spectralmoe.hf.shrinking.shrink import unswapped_layers
from spectralmoe.hf.structure import experts_of
from spectralmoe.layers import unwrapped
from spectralmoe.placement import Placement

__all__ = ["replicate_and_quantize_experts"]

Model = TypeVar("Model", bound=nn.Module)

_OWNER = "replicate_and_quantize_experts"


def replicate_and_quantize_experts(
    model: Model,
    calibration: Batches,
    *,
    importance: str = "removal",
    bits: int = 8,
    copies: int = 1,
    quantize: int = 1,
    keep_original: bool = False,
    tokens: int = 2048,
    seed: int = 0,
) -> Report[Model]:
    """A copy of a Hugging Face ``model`` whose busy experts have copies and whose unimportant ones are quantised.

    It does what ``compression.replicate_and_quantize`` does. Copies stand behind the stacked experts. Routers of this
    library take the place of the stock ones (``swap_routers``), choose the same experts and share an expert's tokens
    among its places. ``save_swapped`` saves the model and ``load_swapped`` loads it; plain transformers loads that
    folder as a model without copies and with the same quantised experts. ``save_pretrained`` is refused, since
    its folder would not load. With ``copies=0`` no router is replaced, and ``save_pretrained`` saves the model.

    Args:
        model: of transformers, with its stock routers, in evaluation mode.
        calibration: batches of tables of the model's arguments, as ``encode`` makes them of text, or of token ids
            (B, S).
        importance: what an expert is worth: "removal", how much the layer's output changes without it; "frequency";
            "reap"; "random".
        bits, copies, quantize, keep_original: as there.
        tokens: how many of each layer's tokens "removal" and "reap" look at, drawn evenly.
        seed: of the draw and of "random".

    Raises:
        UserError: as ``prune_experts``; training mode; a family whose experts are not called by their index, unless
            ``copies`` is 0; "wanda", since these experts do not show their hidden activations; numbers out of range.

    >>> import pytest, torch
    >>> transformers = pytest.importorskip("transformers")
    >>> sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}
    >>> sizes |= {"num_hidden_layers": 1, "vocab_size": 64, "num_experts": 4, "num_experts_per_tok": 1}
    >>> model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes)).eval()
    >>> _ = torch.nn.init.zeros_(model.model.layers[0].mlp.gate.weight)  # every token takes the same expert
    >>> report = replicate_and_quantize_experts(model, [torch.randint(64, (2, 16))])
    >>> layer = report.layers["model.layers.0.mlp"]
    >>> layer.imbalance_before, layer.imbalance_after
    (4.0, 2.5)
    """
    scheme = Scheme(_OWNER, importance, bits, copies, quantize, keep_original)
    if importance == "wanda":
        raise UserError(
            f"{_OWNER}: importance='wanda' reads hidden activations, which these experts do not show; take 'removal'"
        )
    stock: Model = unwrapped(model)  # type: ignore[assignment]
    layers = unswapped_layers(_OWNER, stock)
    if stock.training:
        raise UserError(f"{_OWNER}: the model is in training mode, and copies would drift apart; call model.eval()")
    for layer in layers if copies else ():
        refuse_copies(_OWNER, layer, read_rule(layer)[0])
    looks = importance in ("removal", "reap") and quantize > 0
    known, done = Calibration(_OWNER, stock, calibration, tokens if looks else 0, seed), {}
    held = {layer.name: _held(layer, bits) for layer in layers}
    for name, before in held.items():
        counts = known.load("the busiest expert", name)
        done[name] = scheme.applied(name, before, counts, partial(known.saliency, importance, name))
    made = copy.deepcopy(stock)
    if copies:
        swap_routers(made)
        refuse_plain_saving(made)
    for layer in find_layers(made):
        table = _table(done[layer.name].places)
        if copies:
            behind = [e for e, row in enumerate(table) for _ in row[1:]]
            add_copies(
                layer, Placement(table), {name: stack.detach()[behind] for name, stack in layer.stacks().items()}
            )
        for place in scheme.low(done[layer.name], held[layer.name], table):
            quantise_(_owned(layer, place), bits)
    return Report(made, done)


def _table(places: tuple[int, ...]) -> list[list[int]]:
    """The places of each expert: itself, then its copies behind all experts."""
    table, last = [[e] for e in range(len(places))], len(places)
    for row, number in zip(table, places, strict=True):
        row += range(last, last + number - 1)
        last += number - 1
    return table


def _held(layer: HFLayer, bits: int) -> Held:
    owned = [_owned(layer, e) for e in range(layer.num_experts)]
    return Held([1] * len(owned), [stored_bytes(own) for own in owned], [stored_bytes(own, bits) for own in owned])


def _owned(layer: HFLayer, place: int) -> list[Tensor]:
    """Views of the tensors in one place."""
    if isinstance(layer.experts, nn.ModuleList | nn.ModuleDict):
        return [value.detach() for value in experts_of(layer.experts)[place].parameters()]
    return [stack.detach()[place] for stack in layer.stacks().values()]
