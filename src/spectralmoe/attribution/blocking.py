"""``block``: it takes some experts out of a model for a while, without changing the model."""

from __future__ import annotations

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError, one_of
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.layers import find_layers, refuse_shared
from spectralmoe.hf.routers.rules import put_bias, read_rule
from spectralmoe.hf.scores import real_logits
from spectralmoe.layers import moe_layers, stock_experts, unwrapped
from spectralmoe.recording import Recordable
from spectralmoe.router import Router
from spectralmoe.routing import EMPTY, Routing
from spectralmoe.selectors import Selector
from spectralmoe.selectors.group_limited import GroupLimited
from spectralmoe.spec import build
from spectralmoe.torch_private import forward_hooks, is_compiled

__all__ = ["Mode", "block"]

Mode = Literal["mask", "zero"]
MODES: tuple[Mode, ...] = get_args(Mode)


@contextmanager
def block(model: nn.Module, experts: Mapping[str, Iterable[int]], *, mode: Mode = "mask") -> Iterator[None]:
    r"""Take experts out of the layers of a model inside a ``with`` block.

    With "mask", routers decide as if these experts had a logit of :math:`-\infty`, as a pruned router does
    (``Router.select``): the next best experts replace them, and normalised weights are normalised over those. With
    "zero", routers decide as usual, and the outputs of these experts count as 0. arXiv 2505.24593 does not say which of
    the two it means by blocking.

    The block holds for its thread alone: forwards in other threads, and copies of the model, use all experts. Blocks
    can be nested; then the experts of all are out. Records show the choice that was made, with the logits of the whole
    router. "mask" copies the routers when the block starts, so do not train inside it.

    Args:
        model: a model of this library, or a Hugging Face model with its own routers or swapped ones.
        experts: layer name, as in ``record`` -> numbers of the experts that are taken out.
        mode: "mask" or "zero".

    Raises:
        UserError: a layer, an expert or the mode is unknown; the model is compiled. With "mask": fewer experts are left
            than a token needs, the router's choice without some experts is not known, or, in forward, the choice is
            replayed.

    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
    >>> model = nn.Sequential(MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16)))
    >>> with block(model, {"0": [1, 2]}), record(model) as tape:
    ...     y = model(torch.randn(10, 8))
    >>> tape[0].routing.counts().tolist()
    [10, 0, 0, 10]
    """
    if mode not in MODES:
        raise one_of("mode", mode, MODES)
    if is_compiled(model):
        raise UserError("block: a compiled model does not look for blocked experts; pass it before torch.compile")
    routers = _routers(unwrapped(model))
    for name in experts:
        if name not in routers:
            raise one_of("MoE layer", name, routers)
    hooks = []
    for name, numbers in experts.items():
        layer, blocked = routers[name], frozenset(map(int, numbers))
        known = layer.num_experts
        if wrong := [e for e in sorted(blocked) if not 0 <= e < known]:
            raise UserError(f"block: layer {name!r} has no expert {wrong[0]}; it has 0 to {known - 1}")
        if blocked:
            make = _StockBlocked if isinstance(layer, HFLayer) else _Blocked
            hooks.append(make(name, layer, blocked, mode))  # type: ignore[arg-type]
    with ExitStack() as stack:
        if hooks:
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # a recomputation stays in the thread
        for hook in hooks:
            handle = hook.router.register_forward_hook(hook, with_kwargs=True, prepend=True)  # before those that record
            stack.callback(handle.remove)
        yield


def _routers(model: nn.Module) -> dict[str, Router | HFLayer]:
    """Layer's name -> its router, or the layer around a stock one."""
    if not stock_experts(model):
        recorded = moe_layers(model)
        return {name: layer.router for name, layer in recorded.items() if isinstance(layer.router, Router)}
    found = find_layers(model)
    refuse_shared(found)
    routers: dict[str, Router | HFLayer] = {}
    for layer in found:
        ours = next((part for part in (layer.layer, layer.router) if isinstance(part, Recordable)), None)
        routers[layer.name] = ours.router if ours is not None and ours.router is not None else layer
    return routers


class _Hook(ABC):
    """A forward hook of one router, for the thread that made it; it does what the blocks around it do as well."""

    masked: frozenset[int]
    zeroed: frozenset[int]

    def __init__(self, name: str, router: nn.Module, num_experts: int, blocked: frozenset[int], mode: Mode) -> None:
        self.name, self.router, self.thread = name, router, threading.get_ident()
        outer = self.innermost(router)
        masked, zeroed = (outer.masked, outer.zeroed) if outer else (frozenset[int](), frozenset[int]())
        self.masked = masked | blocked if mode == "mask" else masked
        self.zeroed = zeroed | blocked if mode == "zero" else zeroed
        kept = [e for e in range(num_experts) if e not in self.masked]
        if not kept:
            raise UserError(
                f'block: all experts of layer {name!r} are blocked, so no routing is left; use mode="zero" to take the '
                "layer's experts out"
            )
        self.kept = torch.tensor(kept)
        self.out = torch.tensor(sorted(self.zeroed), dtype=torch.int64)

    @staticmethod
    def innermost(router: nn.Module) -> _Hook | None:
        """Return the last block that the calling thread has open; None for a router that was copied inside one."""
        hooks = [hook for hook in forward_hooks(router) if isinstance(hook, _Hook)]
        here = threading.get_ident()
        return next((hook for hook in hooks if hook.router is router and hook.thread == here), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        """No copy: the hook of a copied router ends here, where it is not known."""
        return self

    def __call__(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Any:
        return self.changed(args, kwargs, returned) if self.innermost(router) is self else None

    @abstractmethod
    def changed(self, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Any:
        """Return what the router returns without the blocked experts."""

    def named(self, indices: Tensor) -> Tensor:
        """Translate indices among the kept experts to the router's own numbers."""
        return torch.where(indices >= 0, self.kept.to(indices.device)[indices.clamp_min(0)], EMPTY)

    def silent(self, routing: Routing) -> Routing:
        """Set the combine weights of the experts whose output shall be 0 to 0."""
        if not len(self.out):
            return routing
        out = torch.isin(routing.indices, self.out.to(routing.indices.device))
        return replace(routing, weights=routing.weights.masked_fill(out, 0))

    @contextmanager
    def refusing(self, selector: Selector) -> Iterator[None]:
        """Name the layer and the cure if ``selector`` cannot choose among the kept experts."""
        cure = 'use mode="zero"'
        if any(isinstance(part, GroupLimited) for part in selector.modules()):
            raise UserError(f"block: layer {self.name!r} chooses among equal groups of experts, so none can go; {cure}")
        try:
            yield
        except UserError as error:
            raise UserError(f"block: layer {self.name!r} without {sorted(self.masked)}: {error}, or {cure}") from error


class _Blocked(_Hook):
    """Of a router of this library."""

    def __init__(self, name: str, router: Router, blocked: frozenset[int], mode: Mode) -> None:
        super().__init__(name, router, router.num_experts, blocked, mode)
        self.smaller: Router | None = None
        if self.masked:
            with self.refusing(router.selector):
                self.smaller = router.select(self.kept)

    def changed(self, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Routing) -> Routing:
        if self.smaller is None:
            return self.silent(returned)
        if kwargs.get("replay") is not None:
            raise UserError("block: the choice is replayed, so no other expert can step in; use mode='zero'")
        made = self.smaller.train(self.router.training)(*args, **kwargs)
        chosen = self.named(made.indices)
        return self.silent(replace(returned, weights=made.weights, indices=chosen, asked=made.asked, full=made.full))


class _StockBlocked(_Hook):
    """Of a router of transformers', whose rule is read from its forward."""

    def __init__(self, name: str, layer: HFLayer, blocked: frozenset[int], mode: Mode) -> None:
        super().__init__(name, layer.router, layer.num_experts, blocked, mode)
        self.layer, self.names = layer, list(inspect.signature(layer.router.forward).parameters)
        self.rule, spec = read_rule(layer)
        self.selector: Selector | None = None
        if self.masked:
            if spec is None:
                raise UserError(
                    f"block: layer {name!r} chooses its experts by a rule that is not known here, so it cannot be "
                    'asked what it would choose without some; use mode="zero"'
                )
            selector: Selector = build(spec)
            selector.bind(layer.num_experts)
            put_bias(selector, layer.correction_bias)
            with self.refusing(selector):
                self.selector = selector.select(self.kept)

    def changed(self, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Any:
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tokens = next(value for value in inputs.values() if isinstance(value, Tensor))
        read, rule = self.layer.read(returned, tokens.reshape(-1, tokens.shape[-1])), self.rule
        logits = read.logits.to(torch.promote_types(read.logits.dtype, torch.float32))
        if self.selector is None:
            routing, rule = Routing(logits, read.weights, read.indices), replace(rule, scale=1.0)
        else:
            few = real_logits(logits, "probabilities" in rule.roles)[:, self.kept.to(logits.device)]
            chosen = self.selector.to(few.device).choose(few.detach())
            routing = Routing(logits, self.selector.weigh(few, chosen), self.named(chosen), shape=tokens.shape[:-1])
            routing = rule.limited(routing)
        arranged = rule.arrange(self.silent(routing), tokens)
        old = returned if isinstance(returned, tuple | list) else (returned,)
        return tuple(
            was if role in ("logits", "probabilities") else made.to(was.dtype)
            for role, was, made in zip(rule.roles, old, arranged, strict=True)
        )
