"""Presets: routers by name. A preset says in plain values what differs between the networks of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from spectralmoe.errors import UserError, first_line, one_of
from spectralmoe.naming import Table, named, own_names, part_class, read_part, read_row, read_term, shown
from spectralmoe.optim.table import arguments_of, read_optimizer
from spectralmoe.rows import BRANCH, Preset, experts_a_token
from spectralmoe.scorers import Scorer
from spectralmoe.spec import build, describe, find_class, parameters_of

__all__ = ["PRESETS", "Preset", "find_preset"]

_PROTOTYPES = {"type": "prototype", "scale": "= dim ** -0.5"}  # tokens come at norm sqrt(D)
_BALANCED = {
    "selector": {"type": "balanced", "score": "softmax", "normalize": False, "rate": 1e-2},
    "soft": {"type": "soft_balanced", "rate": 1e-2},
}
_GROUPS = "= max(1, num_experts // 4)"  # of four siblings; the interval suits runs of some hundred steps
_DROPOUT = {"type": "cluster_dropout", "selector": {"type": "topk"}, "groups": _GROUPS, "interval": 10}
_MIXERS = [  # four, each of twice the rank and the reach of the one before it
    {"type": "patch_mixer", "rank": f"= max(2, dim // {share})", "window": window}
    for share, window in ((8, 2), (4, 4), (2, 8), (1, 16))
]
_EIGEN = {"type": "eigen", "rank": "= max(1, dim // num_experts)"}

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
    "synergy": {
        "summary": "dot-product gate with losses on hidden activations and neighbouring layers (synergistic losses)",
        "scorer": "linear",
        "terms": {"load_balance": 1e-2, "activation_overlap": 2e-3, "path_coupling": 1e-3},
    },
    "specialization": {
        "summary": "dot-product gate with losses on outputs and scores (Advancing Expert Specialization)",
        "scorer": "linear",
        "terms": {"load_balance": 1e-2, "output_overlap": 0.1, "score_variance": 0.5},
    },
    "l2r": {
        "summary": "saturated inner products with several anchors in a low-rank space, with the loss-free bias (L2R)",
        "scorer": {"type": "saturated", "anchors": 4, "gain": 9.0},
        **_BALANCED,
    },
    "moec": {
        "summary": "cosine gate on groups of experts: even within a group, half of it left out in training (MoEC)",
        "scorer": {"type": "cosine", "proj_dim": "= min(32, dim)"},
        "selector": _DROPOUT,
        "soft": {**_DROPOUT, "selector": {"type": "soft"}},
        "terms": {"load_balance": 1e-2, "cluster_variance": {"weight": 1.0, "groups": _GROUPS}},
    },
    "ermoe": {
        "summary": "energy of the token in the experts' own bases, at least 1/E of it (ERMoE, without attention)",
        "scorer": {"type": "basis", "score": "energy"},
        "selector": {"type": "threshold", "threshold": "= 1 / num_experts"},
        "soft": {"type": "soft"},
        "experts": _EIGEN,
    },
    "ermoe-context": {
        "summary": "cosine of token and attention output in the experts' own bases (ERMoE, behind attention)",
        "scorer": {"type": "basis", "score": "context"},
        "selector": {"type": "threshold", "threshold": 0.5},
        "soft": {"type": "soft"},
        "experts": _EIGEN,
    },
    "mumoe": {
        "summary": "entmax over all experts, which are slices of one factorised tensor (muMoE, CP form)",
        "scorer": "linear",
        "selector": {"type": "entmax", "norm": True},
        "experts": {"type": "multilinear", "rank": "= max(1, 3 * dim // 4)"},
        "k": "soft",
    },
    "mumoe-tr": {
        "summary": "entmax over all experts, which are slices of a ring of tensors (muMoE, tensor-ring form)",
        "scorer": "linear",
        "selector": {"type": "entmax", "norm": True},
        "experts": {"type": "multilinear", "form": "tr", "rank": "= max(1, 3 * dim // 16)"},
        "k": "soft",
    },
    "omoe": {
        "summary": "dot-product gate; experts step orthogonally to the inputs of the others (OMoE)",
        "scorer": "linear",
        "optimizer": "orthogonal_experts",
    },
    "mpoe": {
        "summary": "dot-product gate with the Switch loss; matrix product experts share a central core (MPOE)",
        "scorer": "linear",
        "experts": "mpo",
        "optimizer": "mask_central",
        "terms": {"load_balance": 1e-2},
    },
    "mofme": {
        "summary": "dot-product gate of five passes with dropout; experts scale and shift the token (MoFME's experts)",
        "scorer": {"type": "monte_carlo", "scorer": "linear"},
        "selector": {"type": "topk", "normalize": True},
        "experts": "modulated",
    },
    "confsmoe": {
        "summary": "dot-product gate; experts weigh their outputs by how sure they are (ConfSMoE)",
        "scorer": "linear",
        "selector": {"type": "unweighted", "selector": "topk"},
        "experts": {
            "type": "confident",
            "experts": {"type": "feed_forward", "activation": "gelu", "bias": True},
        },
    },
    "moce-ir": {
        "summary": "four experts of unequal cost on whole maps, importance in inverse proportion to cost (MoCE-IR)",
        "scorer": "linear",
        "selector": "noisy_topk",
        "experts": {"type": "heterogeneous", "modules": _MIXERS},
        "terms": {"complexity_balance": 1e-2},
    },
    "phyg-moe": {
        "summary": "gate on a signal's spectrum, top-1, with the Switch loss and a price on costly experts (PhyG-MoE)",
        "scorer": "spectrum",
        "selector": {"type": "noisy_topk", "noise_std": 0.5},
        "k": 1,
        "terms": {"load_balance": 0.3, "expected_cost": 0.03},
    },
    "dense": {
        "summary": "no experts: one network as wide as the experts of a token together",
        "scorer": "linear",
        "k": 1,
        "dense": True,
    },
}
"""Name -> a table with keys of ``Preset``, and ``preset``, the preset that it starts from."""

_KEYS = ("preset", "summary", "scorer", "selector", "soft", "experts", "k", "optimizer", "dense", "terms", "branch")
_KIND_OF = {"scorer": "scorer", "selector": "selector", "soft": "selector", "experts": "experts"}


def find_preset(row: str | Table) -> Preset:
    """Return the preset that a name or a table stands for.

    Args:
        row: a name in ``PRESETS``; a table, or its text ``{scorer = "prototype", selector = "topp", p = 0.7}``; or an
            object of your own as ``pkg:object``: a scorer's class, a table, a ``Preset``, or a function that returns
            one. The keys of a table are those of ``Preset``, and ``preset``, the one to start from. All other keys are
            arguments, and go to the part (scorer, selector, experts) that takes them.

    Raises:
        UserError: a name, part or argument is unknown; an argument is missing or fits two parts; the object is of
            another kind; or a scorer of your own does not work.

    >>> preset = find_preset('{preset = "sr-moe", rate = 1e-3}')
    >>> preset.selector["rate"], list(preset.terms)
    (0.001, ['spectral_penalty'])
    """
    name = shown(row)
    said = read_row(row)
    table = said if isinstance(said, Mapping) else _called(said)
    if isinstance(table, Preset):
        return table
    try:
        preset = _read(name, table)
        _try_own(preset)
    except UserError as error:
        raise error if name in PRESETS else UserError(f"router {name!r}: {error}") from error
    return preset


def _called(name: object) -> Table | Preset:
    """The row of ``PRESETS`` called ``name``, or what an object of the user's own stands for."""
    if not isinstance(name, str):
        raise UserError(f"router {name!r} is neither a name nor a table")
    if name in PRESETS:
        return PRESETS[name]
    if ":" not in name:
        raise one_of("router", name, [*PRESETS, "pkg:object"])
    loaded = find_class(name)
    if isinstance(loaded, type) and issubclass(loaded, Scorer):
        return {"summary": f"a class of your own, {name}", "scorer": name}
    if callable(loaded) and not isinstance(loaded, type | Preset):
        try:
            loaded = loaded()
        except Exception as error:
            raise UserError(f"router {name!r} fails when it is called: {first_line(error)}") from error
    if isinstance(loaded, Preset | Mapping):
        return loaded
    raise UserError(
        f"router {name!r} is not a subclass of spectralmoe.Scorer, nor a preset: a dict, or a function that returns one"
    )


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
        if key not in BRANCH:
            raise one_of("key of branch", key, BRANCH)
    base = start or Preset("", {})
    return Preset(
        summary=row.get("summary", name),
        **_parts(row, base),
        k=experts_a_token(row["k"]) if "k" in row else base.k,
        dense=bool(row.get("dense", base.dense)),
        terms={**base.terms, **{key: read_term(key, value, base.terms.get(key)) for key, value in terms.items()}},
        branch={**base.branch, **branch},
        allow=(*base.allow, *own_names({key: value for key, value in row.items() if key != "preset"})),
    )


def _parts(row: Table, base: Preset) -> dict[str, Any]:
    """The parts that ``row`` names, else those of ``base``, each with the loose arguments that it takes."""
    parts: dict[str, Any] = {key: getattr(base, key) for key in (*_KIND_OF, "optimizer")}
    if "selector" in row:
        parts["soft"] = None
    parts |= {key: named(kind, row[key]) for key, kind in _KIND_OF.items() if key in row}
    if "optimizer" in row:
        parts["optimizer"] = read_optimizer(row["optimizer"])
    parts = {key: part for key, part in parts.items() if part is not None}
    takes = {key: _arguments(key, part["type"]) for key, part in parts.items()}
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
    read = {key: read_part(_KIND_OF[key], part) for key, part in parts.items() if key in _KIND_OF}
    return {"soft": None, "optimizer": parts.get("optimizer")} | read


def _arguments(key: str, name: str) -> list[str]:
    """The arguments of a part that a row may set: all but those that the network sets and the keys of the row."""
    known = arguments_of(name) if key == "optimizer" else parameters_of(part_class(_KIND_OF[key], name))
    return [argument for argument in known if argument not in ("dim", "num_experts", *_KEYS)]


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
