"""Watches: a common view of the MoE layers of any model and of their calls, which all diagnostics of a run read.

``watch`` opens one on a model with layers of this library, ``spectralmoe.hf.watch_transformers`` one on a Hugging Face
model. Both give layers (``Watched``) and their calls (``Seen``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError
from spectralmoe.layers import moe_layers, unwrapped
from spectralmoe.moe import MoE
from spectralmoe.ranks import RankExperts
from spectralmoe.recording import Recordable
from spectralmoe.router import Router
from spectralmoe.routing import Routing
from spectralmoe.sharding import full
from spectralmoe.tape import Record, Tape

__all__ = ["Seen", "Watch", "Watched", "WithOwnRouter", "layer_number", "seen_of", "watch", "watched_layers"]


class Watched(ABC):
    """One MoE layer of any model: it can route given tokens and run single experts.

    Attributes:
        name: the path of the layer's module.
        number: the layer number of the model.
        stack: "encoder" or "decoder" in a model with both, else "".
        num_experts: E.
        top_k: K; None if the number of experts a token varies.
    """

    name: str
    number: int
    stack: str = ""
    num_experts: int
    top_k: int | None

    @property
    def reroutes(self) -> bool:
        """Whether ``route`` routes single tokens as the model would."""
        return True

    @property
    @abstractmethod
    def matrix(self) -> Tensor | None:
        """The routing matrix (E, D), one row for each expert; None if the scorer has none."""

    @abstractmethod
    def route(self, x: Tensor, dtype: torch.dtype | None = None) -> Routing:
        """Route tokens x (N, D) as in evaluation mode; with ``dtype``, in that precision."""

    def raw_logits(self, x: Tensor) -> Tensor:
        """Return the logits (N, E) that the router itself returns for tokens x (N, D)."""
        return self.route(x).logits

    @abstractmethod
    def expert(self, x: Tensor, e: int) -> Tensor:
        """Apply expert ``e`` to tokens x (N, D) -> (N, D), without combine weights."""

    @abstractmethod
    def expert_weights(self, e: int) -> Tensor:
        """Return all weights of expert ``e`` as one vector, in the same order for all experts; empty if it has none."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One call of one layer.

    Attributes:
        layer: the layer.
        routing: the router's own decision, also if another choice was replayed. Its scores are those that it chose by,
            selection bias included; its shape is (B, S) if the tokens came in sequences; its mask is False for padding.
        tokens: what the router read (N, D); (0, D) if the watch was opened with ``tokens=False``.
    """

    layer: Watched
    routing: Routing
    tokens: Tensor


class Watch(ABC):
    """What ``watch`` gives: the MoE layers of a model, and their calls since the last ``drain``.

    Attributes:
        layers: the layers, in the order of the forward.
    """

    layers: Sequence[Watched]

    @abstractmethod
    def drain(self) -> list[Seen]:
        """Return the calls since the last ``drain``, by layer and then by call, without recomputations."""


class WithOwnRouter(Watched):
    """The view of a layer whose router is of this library, whatever its experts are."""

    @property
    @abstractmethod
    def own_router(self) -> Router:
        """The router."""

    @property
    def reroutes(self) -> bool:
        """False where the router reads side information, or tokens compete for experts."""
        return self.own_router.per_token

    @property
    def matrix(self) -> Tensor | None:
        """The scorer's routing matrix."""
        rows = self.own_router.scorer.matrix
        return None if rows is None else full(rows).detach()

    def route(self, x: Tensor, dtype: torch.dtype | None = None) -> Routing:
        """Route x with gradient; ``dtype`` rounds the tokens alone, because routers of this library compute in fp32."""
        router = self.own_router
        training, _ = router.training, router.eval()
        try:
            return router(x if dtype is None else x.to(dtype))  # type: ignore[no-any-return]
        finally:
            router.train(training)


class OwnLayer(WithOwnRouter):
    """The view of an ``MoE`` of this library."""

    def __init__(self, name: str, number: int, layer: MoE) -> None:
        self.name, self.number, self.layer = name, number, layer
        self.num_experts = (layer.experts if layer.placement is None else layer.router).num_experts
        self.top_k = layer.router.k

    @property
    def own_router(self) -> Router:
        """The layer's router."""
        return self.layer.router

    @torch.no_grad()
    def expert(self, x: Tensor, e: int) -> Tensor:
        """Apply expert ``e`` to x; 0 for a zero expert."""
        places = self.layer.places(e)
        return self.layer.experts.expert(x, places[0]) if places else torch.zeros_like(x)

    def expert_weights(self, e: int) -> Tensor:
        """Return the parameters of expert ``e``, in the order of their names."""
        places = self.layer.places(e)
        parameters = self.layer.experts.expert_parameters(places[0]) if places else {}
        return torch.cat(
            [full(parameters[name]).detach().flatten().float() for name in sorted(parameters)] or [torch.empty(0)]
        )


class OwnRanks(OwnLayer):
    """The view of a ``RankExperts`` layer, whose experts are ranks: expert ``e`` returns (N, O)."""

    layer: RankExperts  # type: ignore[assignment]

    def __init__(self, name: str, number: int, layer: RankExperts) -> None:
        self.name, self.number, self.layer = name, number, layer
        self.num_experts, self.top_k = layer.ranks, layer.k

    @torch.no_grad()
    def expert(self, x: Tensor, e: int) -> Tensor:
        """Return what rank ``e`` adds with the gate 1."""
        return self.layer.rank(x, e)

    def expert_weights(self, e: int) -> Tensor:
        """Return the row and the column of rank ``e``."""
        return torch.cat([full(value).detach().float() for value in self.layer.rank_parameters(e).values()])


class _OwnWatch(Watch):
    def __init__(self, model: nn.Module, tokens: bool, training_only: bool) -> None:
        inside = unwrapped(model)
        recorded, paths = moe_layers(inside), {module: path for path, module in inside.named_modules()}
        layers = {
            name: _watched(name, number, layer) or layer.watched(inside, paths[layer])
            for (name, layer), number in zip(recorded.items(), _numbers(list(recorded)), strict=True)
        }
        self.layers = [layer for layer in layers.values() if layer is not None]
        self.keeps_tokens = tokens
        self.tape = Tape(recorded, keep=("tokens",) if tokens else (), training_only=training_only)

    def drain(self) -> list[Seen]:
        """Return the calls since the last ``drain``."""
        layers = {layer.name: layer for layer in self.layers}
        records = [item for item in self.tape.drain() if item.name in layers]
        return [seen_of(item, layers[item.name], self.keeps_tokens) for item in records]


def _watched(name: str, number: int, layer: Recordable) -> Watched | None:
    """A layer whose experts are this library's; None for another."""
    if isinstance(layer, MoE):
        return OwnLayer(name, number, layer)
    return OwnRanks(name, number, layer) if isinstance(layer, RankExperts) else None


def seen_of(item: Record, layer: Watched, tokens: bool) -> Seen:
    """Make a ``Seen`` of one record of a tape, whose routing has the scores that the router chose by.

    Args:
        tokens: whether the tokens were kept and shall be in it.
    """
    router = cast(Router, item.router)
    routing = replace(item.routing.unforced, score=router.selector.ranked(item.routing.logits.detach()))
    return Seen(layer, routing, _tokens(item, tokens))


def _tokens(item: Record, asked: bool) -> Tensor:
    """The tokens that the router read, with zeros for padding; none where the experts read something else."""
    layer = item.layer
    if not asked or (isinstance(layer, MoE) and not layer.reads_alike):
        return item.routing.logits.new_empty(0, cast(Router, item.router).scorer.dim)
    tokens, mask = item.tensor("tokens").detach(), item.routing.mask
    return tokens if mask is None else tokens.masked_fill(~mask[:, None], 0)


@contextmanager
def watch(model: nn.Module, *, tokens: bool = True, training_only: bool = False) -> Iterator[Watch]:
    """Record the calls of the MoE layers of a model inside a ``with`` block, in the form that diagnostics read.

    Args:
        model: a model with layers of this library.
        tokens: whether the tokens that the routers read are kept, which takes memory.
        training_only: whether calls in evaluation mode are left out.

    Raises:
        UserError: the model holds no MoE layer.

    >>> from spectralmoe import FeedForward, LinearScorer, Router, TopK
    >>> model = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16))
    >>> x = torch.randn(10, 8)
    >>> with watch(model) as seen:
    ...     y = model(x)
    >>> call = seen.drain()[0]
    >>> bool((call.tokens == x).all()), call.layer.number
    (True, 0)
    """
    seen = _OwnWatch(model, tokens, training_only)
    seen.tape.open()
    try:
        yield seen
    finally:
        seen.tape.seal()


def watched_layers(owner: str, model: nn.Module, seen: Watch) -> Sequence[Watched]:
    """The layers that ``seen`` watches in ``model``.

    Raises:
        UserError: there is none, because no layer has experts that can be looked at one by one; ``owner`` asks.
    """
    if not seen.layers:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in moe_layers(model).values()}))
        raise UserError(
            f"{owner}: {type(unwrapped(model)).__name__} has no layer to watch: experts of {kinds} do not stand by "
            "themselves; record(model) shows how it routes"
        )
    return seen.layers


def layer_number(name: str) -> int | None:
    """Return the first number in the path of a module, which is the model's layer number; None if there is none.

    >>> layer_number("encoder.block.3.layer.1.mlp"), layer_number("mlp")
    (3, None)
    """
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _numbers(names: Sequence[str]) -> list[int]:
    """Numbers from the module paths if they are all different, else 0, 1, 2, ..."""
    numbers = [layer_number(name) for name in names]
    return [n for n in numbers if n is not None] if len({*numbers} - {None}) == len(names) else list(range(len(names)))
