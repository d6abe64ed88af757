"""Preset: it says what one network of a comparison is made of, and makes its routers and experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from spectralmoe.context import Context
from spectralmoe.errors import UserError, first_line
from spectralmoe.experts import Experts
from spectralmoe.moe import MoE
from spectralmoe.naming import Table, part_class, shown
from spectralmoe.optim import WRAPPERS, make_optimizer
from spectralmoe.router import Router
from spectralmoe.spec import build, parameters_of
from spectralmoe.tape import Tape
from spectralmoe.terms import Term
from spectralmoe.units import Unit

__all__ = ["BRANCH", "RELU", "K", "Preset", "Trial", "check_reads", "experts_a_token"]

K = int | Literal["soft"]
"""The number of experts a token, or "soft" for all of them."""

RELU: Table = {"type": "feed_forward", "activation": "relu", "bias": True}
"""The experts of SR-MoE: ReLU networks with biases."""

BRANCH = {"tokens": "all", "norm": True, "start": "model"}
"""How a branch in a vision model reads the model's features, unless a preset says otherwise."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A small input, and what else a network gives its layers, on which a preset is tried.

    Attributes:
        x: an input of a layer.
        context: the side information that the network gives its layers; None is none.
        unit: what the layers route; None is tokens.
        experts: the spec of the network's own experts, for a preset without ``experts``.
    """

    x: Tensor
    context: Context | None = None
    unit: Unit | None = None
    experts: Table = field(default_factory=lambda: dict(RELU))


@dataclass(frozen=True, slots=True)
class Preset:
    """Says what one network of a comparison is made of, one row of its table.

    Attributes:
        summary: one line for ``spectralmoe list``.
        scorer, selector: their specs, without the arguments that follow from the network
            (``spectralmoe.naming.FILLED_IN``).
        soft: the spec of the selector that is used if a token uses all experts; None uses ``selector``.
        experts: the spec of the experts; None takes the network's own.
        k: experts a token; None takes what the network asks for.
        optimizer: what goes around the optimizer that all rows share, or replaces it (``make_optimizer``); None is
            nothing.
        dense: whether there is no choice, but one expert that is as wide as the k experts of a token together.
        terms: regularizers with their weights, by name.
        branch: how a branch in a vision model reads its features: tokens, norm and start (``BranchSpec``).
        allow: the classes of a user that the preset names, as ``pkg:Class``.
    """

    summary: str
    scorer: Table
    selector: Table = field(default_factory=lambda: {"type": "topk"})
    soft: Table | None = field(default_factory=lambda: {"type": "soft"})
    experts: Table | None = None
    k: K | None = None
    optimizer: Table | None = None
    dense: bool = False
    terms: Mapping[str, Term] = field(default_factory=dict)
    branch: Table = field(default_factory=lambda: dict(BRANCH))
    allow: tuple[str, ...] = ()

    def strengthened(self, factor: float) -> Preset:
        """Return the same preset with the weights of its terms multiplied by ``factor``."""
        return replace(self, terms={name: _scaled(term, factor) for name, term in self.terms.items()})

    def sizes(self, num_experts: int, hidden: int, k: K) -> tuple[int, int]:
        """Return E and H of this preset's experts in a network with the given E, H and ``k`` experts a token.

        >>> Preset("", {"type": "linear"}, dense=True).sizes(8, 32, 2)
        (1, 64)
        """
        if not self.dense:
            return num_experts, hidden
        return 1, hidden * (num_experts if k == "soft" else k)

    def make_router(self, dim: int, num_experts: int, *, k: K) -> Router:
        """Make a router for tokens of width D and E experts, ``k`` of them a token.

        Raises:
            UserError: k is "soft" and the preset's selector takes a number; or a part refuses its arguments.
        """
        k = self.k or k
        sizes: dict[str, Any] = {"dim": dim, "num_experts": num_experts} | ({} if k == "soft" else {"k": k})
        spec = self.soft if self.soft is not None and k in ("soft", num_experts) else self.selector
        if k == "soft" and "k" not in spec and "k" in parameters_of(part_class("selector", spec["type"])):
            raise UserError(
                f'selector {spec["type"]!r} takes a number of experts a token, not k = "soft"; leave the selector out'
            )
        scorer, selector = (build(each, allow=self.allow, sizes=sizes) for each in (self.scorer, spec))
        return Router(scorer, selector)

    def check(
        self,
        name: str,
        dim: int,
        num_experts: int,
        hidden: int,
        *,
        k: K,
        spare: int = 0,
        trial: Trial,
        depth: int,
    ) -> None:
        """Build a layer and run it once, so that mistakes show before a network is trained.

        Args:
            name: the name of the preset, for error messages.
            dim, num_experts, hidden, k, spare: the sizes of the network.
            trial: what the layer is run on, and what the network gives it.
            depth: how many layers the network has.

        Raises:
            UserError: a part does not fit the sizes, reads side information that the network does not give, or fails.
        """
        num_experts, hidden = self.sizes(num_experts, hidden, k)
        try:
            with torch.random.fork_rng(devices=[]):
                router = self.make_router(dim, num_experts, k=k)
                bank = self.make_experts(num_experts, dim, hidden, spare, default=trial.experts)
                layer = MoE(router, bank, unit=trial.unit)
            given = () if trial.context is None else (*trial.context.tokens, *trial.context.samples)
            check_reads(layer, given)
            if self.optimizer is not None and self.optimizer["type"] in WRAPPERS:
                make_optimizer("sgd", layer, SimpleNamespace(lr=1.0, weight_decay=0.0), row=self.optimizer)
            layers = {f"layers.{number}": layer.eval() for number in range(depth)}
            with torch.no_grad(), Tape(layers, [*chain(*(term.keeps for term in self.terms.values()))]) as tape:
                made = layer(trial.x, context=trial.context if layer.reads else None)
                if made.shape != trial.x.shape:
                    raise UserError(
                        f"its experts give {made.shape[-1]} numbers a token, but the network goes on with D={dim}"
                    )
                for term in self.terms.values():
                    term.fn(list(tape) if term.scope == "model" else tape[0])
        except UserError as error:
            raise UserError(f"router {name!r}: {error}") from error
        except Exception as error:  # of a part of the user's own
            raise UserError(
                f"router {name!r} does not work on two {'samples' if trial.unit else 'tokens'}: {first_line(error)}"
            ) from error

    def routers(self, k: K) -> Callable[[int, int], Router]:
        """Return a function (D, E) -> new router with ``k`` experts a token."""
        return partial(self.make_router, k=k)

    def make_experts(self, num_experts: int, dim: int, hidden: int, spare: int = 0, default: Table = RELU) -> Experts:
        """Make a bank of E experts on tokens of width D, with hidden layers of width H if they have any.

        Args:
            spare: hidden units that start at zero, see ``FeedForward``.
            default: the spec of the network's own experts, for a preset without ``experts``; by default SR-MoE's.

        Raises:
            UserError: the bank refuses its arguments, or has no spare units.
        """
        spec = self.experts or default
        if spare and "spare" not in parameters_of(part_class("experts", spec["type"])):
            raise UserError(f"experts {spec['type']!r} have no spare units; leave spare at 0")
        sizes = {"dim": dim, "num_experts": num_experts, "hidden": hidden, "bottleneck": hidden, "spare": spare}
        bank: Experts = build(spec, allow=self.allow, sizes=sizes)
        if bank.num_experts != num_experts:
            raise UserError(
                f"experts {spec['type']!r} of the row are {bank.num_experts}, but the network asks for {num_experts}; "
                f"set num_experts = {bank.num_experts}"
            )
        return bank


def experts_a_token(value: Any) -> K:
    """Return ``value`` if it is a positive number of experts or "soft".

    Raises:
        UserError: it is anything else.
    """
    if value == "soft":
        return "soft"
    if type(value) is int and value > 0:
        return value
    raise UserError(f'k = {shown([value])[1:-1]} is neither a number of experts a token nor "soft"')


def check_reads(layer: MoE, given: Collection[str]) -> None:
    """Refuse parts that read side information which the network does not give.

    Args:
        given: the names of the side information that the network gives.

    Raises:
        UserError: a part reads something else; the message names both.
    """
    for _, part in layer.parts():
        for name in part.reads:
            if name not in given:
                gives = ", ".join(given) or "none"
                raise UserError(
                    f"{type(part).__name__} reads {name!r} from the context, and this network gives {gives}"
                )


def _scaled(term: Term, factor: float) -> Term:
    if callable(term.weight):
        raise UserError("a term whose weight is a function of the step cannot be tuned")
    return replace(term, weight=term.weight * factor)
