"""Routers by name. A row says in plain values what differs between two networks: scorer, selector, terms, experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from spectralmoe.errors import UserError, first_line, one_of
from spectralmoe.experts import Experts
from spectralmoe.moe import MoE
from spectralmoe.naming import Table, named, own_names, part_class, read_part, read_table, read_term, shown
from spectralmoe.parts import Part
from spectralmoe.router import Router
from spectralmoe.scorers import Scorer
from spectralmoe.spec import build, describe, find_class, parameters_of
from spectralmoe.terms import Term

__all__ = ["PRESETS", "K", "Preset", "experts_a_token", "find_preset"]

K = int | Literal["soft"]
"""Experts a token: a number, or "soft": all of them."""

_PROTOTYPES = {"type": "prototype", "scale": "= dim ** -0.5"}  # tokens come at norm sqrt(D)
_BALANCED = {
    "selector": {"type": "balanced", "score": "softmax", "normalize": False, "rate": 1e-2},
    "soft": {"type": "soft_balanced", "rate": 1e-2},
}

PRESETS: dict[str, dict[str, Any]] = {
    "linear": {"summary": "dot-product gate", "scorer": "linear"},
    "linear+load_balance": {
        "summary": "dot-product gate with the Switch loss",
        "scorer": "linear",
        "terms": {"load_balance": 1e-2},
    },
    "linear+balanced": {
        "summary": "dot-product gate with the loss-free selection bias",
        "scorer": "linear",
        **_BALANCED,
    },
    "cosine": {"summary": "cosine gate", "scorer": "cosine"},
    "prototype": {"summary": "distance to learned prototypes", "scorer": _PROTOTYPES},
    "sr-moe": {
        "summary": "prototypes with both spectral terms and the loss-free bias (SR-MoE)",
        "scorer": _PROTOTYPES,
        **_BALANCED,
        "terms": {"spectral_penalty": {"weight": 0.1, "reduce": "sum"}},
    },
    "eigenbasis": {
        "summary": "energy shares in an orthonormal basis, sharpened (EMoE, the paper's equations, tau 0.1)",
        "scorer": {"type": "eigenbasis", "rank": "= min(dim, 4 * num_experts)", "temperature": 0.1},
    },
    "emoe": {
        "summary": "energy on the sides of principal directions (EMoE, the default form)",
        "scorer": "principal",
    },
    "emoe-faithful": {
        "summary": "energy shares in an orthonormal basis of rank 128 (EMoE, as its authors have it)",
        "scorer": {"type": "eigenbasis", "rank": "= min(128, dim)", "temperature": 1.0},
        "branch": {"tokens": "patches", "norm": False, "start": "authors"},
    },
}
"""Name -> row, whose keys are those of ``Preset``, and ``preset``: the row that it starts from."""

_KEYS = ("preset", "summary", "scorer", "selector", "soft", "experts", "k", "terms", "branch")
_KIND_OF = {"scorer": "scorer", "selector": "selector", "soft": "selector", "experts": "experts"}
_BRANCH = {"tokens": "all", "norm": True, "start": "model"}


@dataclass(frozen=True, slots=True)
class Preset:
    """One row of a comparison.

    Attributes:
        summary: one line for ``spectralmoe list``.
        scorer, selector: their specs; what the network knows (``spectralmoe.naming.FILLED_IN``) is left out.
        soft: the selector where a token uses all experts; None: ``selector`` serves there, too.
        experts: the bank's spec; None: the network's own.
        k: experts a token; None: as many as the network asks for.
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
    terms: Mapping[str, Term] = field(default_factory=dict)
    branch: Table = field(default_factory=lambda: dict(_BRANCH))
    allow: tuple[str, ...] = ()

    def strengthened(self, factor: float) -> Preset:
        """The same row with the weights of its terms multiplied by ``factor``."""
        return replace(self, terms={name: _scaled(term, factor) for name, term in self.terms.items()})

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

    def check(self, dim: int, num_experts: int, hidden: int, *, k: K, spare: int = 0) -> None:
        """Build a layer once, so that what does not fit the sizes of a network shows before it runs.

        Raises:
            UserError: as ``make_router``, ``make_experts`` and ``MoE``; a part that reads side information.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                router = self.make_router(dim, num_experts, k=k)
                layer = MoE(router, self.make_experts(num_experts, dim, hidden, spare))
            for part in layer.modules():
                if isinstance(part, Part) and part.reads:
                    who = f"{type(part).__name__} reads {part.reads[0]!r} from the context"
                    raise UserError(f"{who}, and this network gives none")
        except UserError as error:
            raise UserError(f"router {self.summary!r}: {error}") from error

    def routers(self, k: K) -> Callable[[int, int], Router]:
        """(D, E) -> a new router, with ``k`` experts a token."""
        return partial(self.make_router, k=k)

    def make_experts(self, num_experts: int, dim: int, hidden: int, spare: int = 0) -> Experts:
        """A new bank of E experts on tokens of width D, H wide inside where they have an inside.

        Without ``experts`` of its own a row has the bank of SR-MoE: ReLU networks with biases.

        Raises:
            UserError: what the bank refuses; spare units for one that has none.
        """
        spec = self.experts or {"type": "feed_forward", "activation": "relu", "bias": True}
        if spare and "spare" not in parameters_of(part_class("experts", spec["type"])):
            raise UserError(f"experts {spec['type']!r} have no spare units; leave spare at 0")
        sizes = {"dim": dim, "num_experts": num_experts, "hidden": hidden, "bottleneck": hidden, "spare": spare}
        bank: Experts = build(spec, allow=self.allow, sizes=sizes)
        return bank


def find_preset(row: str | Table) -> Preset:
    """The row that a name or a table stands for.

    Args:
        row: a name in ``PRESETS``; a table, or its text ``{scorer = "prototype", selector = "topp", p = 0.7}``;
            ``pkg:object`` of a user's own: a scorer's class, a table, a ``Preset``, or a function that returns one.
            Keys of a table are those of ``Preset`` and ``preset``, a row to start from; what is left are arguments
            of its parts, each for the one part that takes it.

    Raises:
        UserError: an unknown name, part or argument; an argument that is missing or fits two parts; an object of
            another kind; a scorer of a user's own that does not work.

    >>> preset = find_preset('{preset = "sr-moe", rate = 1e-3}')
    >>> preset.selector["rate"], list(preset.terms)
    (0.001, ['spectral_penalty'])
    """
    if isinstance(row, str) and row.strip().startswith("{"):
        return _checked(shown(row), read_table(row))
    if isinstance(row, Mapping):
        return _checked(shown(row), row)
    if row in PRESETS:
        return _checked(row, PRESETS[row])
    if ":" not in row:
        raise one_of("router", row, [*PRESETS, "pkg:object"])
    found = find_class(row)
    if isinstance(found, type) and issubclass(found, Scorer):
        return _checked(row, {"summary": f"a class of your own, {row}", "scorer": row})
    if callable(found) and not isinstance(found, type | Preset):
        found = found()
    if isinstance(found, Preset):
        return found
    if isinstance(found, Mapping):
        return _checked(row, found)
    raise UserError(
        f"router {row!r} is not a subclass of spectralmoe.Scorer, nor a preset: a dict, or a function that returns one"
    )


def _checked(name: str, row: Table) -> Preset:
    try:
        preset = _read(name, row)
        _try_own(preset)
    except UserError as error:
        raise error if name in PRESETS else UserError(f"router {name!r}: {error}") from error
    return preset


def _read(name: str, row: Table) -> Preset:
    """The row of a table, laid over the one that it starts from."""
    start = find_preset(row["preset"]) if "preset" in row else None
    if start is None and "scorer" not in row:
        raise UserError('it has no scorer: add scorer = "linear" or preset = "sr-moe"')
    terms, branch = row.get("terms", {}), row.get("branch", {})
    for key, value, example in (("terms", terms, "{load_balance = 0.01}"), ("branch", branch, '{tokens = "patches"}')):
        if not isinstance(value, Mapping):
            raise UserError(f"{key} is no table such as {example}")
    for key in branch:
        if key not in _BRANCH:
            raise one_of("key of branch", key, _BRANCH)
    base = start or Preset("", {})
    return Preset(
        summary=row.get("summary", name),
        **_parts(row, base),
        k=experts_a_token(row["k"]) if "k" in row else base.k,
        terms={**base.terms, **{key: read_term(key, value, base.terms.get(key)) for key, value in terms.items()}},
        branch={**base.branch, **branch},
        allow=(*base.allow, *own_names({key: value for key, value in row.items() if key != "preset"})),
    )


def _parts(row: Table, base: Preset) -> dict[str, Any]:
    """The parts that ``row`` names, else those of ``base``, each with the loose arguments that it takes."""
    parts: dict[str, Any] = {key: getattr(base, key) for key in _KIND_OF}
    if "selector" in row:
        parts["soft"] = None
    parts |= {key: named(kind, row[key]) for key, kind in _KIND_OF.items() if key in row}
    parts = {key: part for key, part in parts.items() if part is not None}
    takes = {key: _arguments(_KIND_OF[key], part["type"]) for key, part in parts.items()}
    for argument, value in row.items():
        if argument in _KEYS:
            continue
        takers = [key for key in parts if argument in takes[key]]
        kinds = [key for key in takers if key != "soft"]
        if not takers:
            raise one_of("key", argument, {*_KEYS, *(known for names in takes.values() for known in names)})
        if len(kinds) > 1:
            both = " and ".join(kinds)
            raise UserError(f"{both} both take {argument}; write it into one of them, {kinds[0]} = {{type = ...}}")
        parts |= {key: {**parts[key], argument: value} for key in takers}
    return {"soft": None} | {key: read_part(_KIND_OF[key], part) for key, part in parts.items()}


def _arguments(kind: str, name: str) -> list[str]:
    """What may be said of a part in a row: its arguments but for those that the network gives, or keys of the row."""
    return [known for known in parameters_of(part_class(kind, name)) if known not in ("dim", "num_experts", *_KEYS)]


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


def _scaled(term: Term, factor: float) -> Term:
    if callable(term.weight):
        raise UserError("a term whose weight is a function of the step cannot be tuned")
    return replace(term, weight=term.weight * factor)


def _try_own(preset: Preset) -> None:
    """Build a user's scorer and run two tokens, so that a mistake shows at once and not after training."""
    spec = preset.scorer
    if ":" not in spec["type"] or len(spec) > 1:  # arguments may belong to other sizes than those tried here
        return
    try:
        with torch.random.fork_rng(devices=[]):
            scorer = build(spec, allow=preset.allow, sizes={"dim": 8, "num_experts": 4})
            logits = scorer(torch.zeros(2, 8))
        describe(scorer)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"it does not work as {spec['type']}(8, 4) on two tokens: {first_line(error)}") from error
    if logits.shape != (2, 4) or logits.dtype != torch.float32:
        raise UserError(f"it gives {logits.dtype} logits of shape {tuple(logits.shape)}, not fp32 of (N, E)")
