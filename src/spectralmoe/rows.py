"""Preset: what one network of a comparison is made of, and the parts that it makes."""

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
"""Experts a token: a number, or "soft": all of them."""

RELU: Table = {"type": "feed_forward", "activation": "relu", "bias": True}
"""The experts of SR-MoE: ReLU networks with biases."""

BRANCH = {"tokens": "all", "norm": True, "start": "model"}
"""How a branch reads a model's features where a row does not say it."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What a layer of a network is tried with: a small input, and all else that the network gives its layers.

    Attributes:
        x: as the layer takes it.
        context: the side information that the network gives; None: none.
        unit: what its layers route; None: tokens.
        experts: the network's own bank, for a row without one.
    """

    x: Tensor
    context: Context | None = None
    unit: Unit | None = None
    experts: Table = field(default_factory=lambda: dict(RELU))


@dataclass(frozen=True, slots=True)
class Preset:
    """One row of a comparison.

    Attributes:
        summary: one line for ``spectralmoe list``.
        scorer, selector: their specs; what the network knows (``spectralmoe.naming.FILLED_IN``) is left out.
        soft: the selector where a token uses all experts; None: ``selector`` serves there, too.
        experts: the bank's spec; None: the network's own.
        k: experts a token; None: as many as the network asks for.
        optimizer: what goes around the optimizer of all rows, or in its place, see ``make_optimizer``; None: nothing.
        dense: no choice: one expert as wide as the k of a token together.
        terms: regularizers by name, with their weights.
        branch: of a branch behind a vision model's block: tokens, norm and start, see ``BranchSpec``.
        allow: the classes of a user's own that it names.
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
        """The same row with the weights of its terms multiplied by ``factor``."""
        return replace(self, terms={name: _scaled(term, factor) for name, term in self.terms.items()})

    def sizes(self, num_experts: int, hidden: int, k: K) -> tuple[int, int]:
        """E and H of its banks in a network with banks of these sizes and ``k`` experts a token.

        >>> Preset("", {"type": "linear"}, dense=True).sizes(8, 32, 2)
        (1, 64)
        """
        if not self.dense:
            return num_experts, hidden
        return 1, hidden * (num_experts if k == "soft" else k)

    def make_router(self, dim: int, num_experts: int, *, k: K) -> Router:
        """A new router for tokens of width D in front of E experts, ``k`` of them a token.

        Raises:
            UserError: what its parts refuse; k = "soft" for a selector that was named and takes a number.
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
        """Build a layer and run it, so that what does not fit the sizes of a network shows before it runs.

        Args:
            name: what the row is called.
            trial: what the layer is run on, and what the network gives it.
            depth: how many layers the network has.

        Raises:
            UserError: as ``make_router``, ``make_experts``, ``MoE`` and the terms; a part that reads other side
                information, or fails.
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
        """(D, E) -> a new router, with ``k`` experts a token."""
        return partial(self.make_router, k=k)

    def make_experts(self, num_experts: int, dim: int, hidden: int, spare: int = 0, default: Table = RELU) -> Experts:
        """A new bank of E experts on tokens of width D, H wide inside where they have an inside.

        Args:
            default: the bank of the network, for a row without ``experts`` of its own: that of SR-MoE.

        Raises:
            UserError: what the bank refuses; spare units for one that has none.
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
    """``value`` if it is a number of experts or "soft".

    Raises:
        UserError: anything else.
    """
    if value == "soft":
        return "soft"
    if type(value) is int and value > 0:
        return value
    raise UserError(f'k = {shown([value])[1:-1]} is neither a number of experts a token nor "soft"')


def check_reads(layer: MoE, given: Collection[str]) -> None:
    """Refuse parts that read side information which the network does not give.

    Raises:
        UserError: names the part and what it reads.
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
