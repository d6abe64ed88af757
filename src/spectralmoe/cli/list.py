"""``spectralmoe list``: the names of data, routers, parts and measured values."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Annotated

import typer

from spectralmoe.cli.console import print_json, say
from spectralmoe.cli.options import Json
from spectralmoe.errors import UserError

__all__ = ["list_everything"]

PLAIN = {
    "linear": "dot product of the token with a row for each expert",
    "cosine": "angle between the token and a key of each expert",
    "prototype": "distance of the token to a prototype of each expert",
    "eigenbasis": "energy of the token along orthonormal directions",
    "principal": "share of the token's energy on each side of orthonormal directions",
    "context": "what is known beside the token, such as how badly a sample is degraded",
    "saturated": "bounded inner products with anchors of each expert in a low-rank space",
    "spectrum": "log powers of frequency bands, entropy and flatness of a map or signal given beside the token",
    "basis": "fit of the token to the experts' own bases (bank: eigen)",
    "topk": "the k experts with the largest scores for each token",
    "noisy_topk": "top-k of noisy logits in training, of the logits in evaluation",
    "expert_choice": "each expert takes its best tokens, as many as its capacity allows",
    "topp": "the smallest set of experts whose scores sum to p",
    "threshold": "of the k best experts of a token those whose score reaches a threshold",
    "balanced": "top-k of scores plus a bias that evens the load; the weights never see the bias",
    "soft": "all experts for each token, weighted by their scores",
    "soft_balanced": "all experts for each token, with a bias on the weights that evens the load",
    "capacity": "another selector whose experts take a limited number of tokens",
    "cluster_dropout": "another selector, some experts of each group left out in training",
    "group_limited": "another selector, choosing in the best groups of experts alone",
    "feed_forward": "networks of two layers, their weights stacked",
    "adapter": "narrow networks to be added to the output of a frozen layer",
    "eigen": "linear maps with orthonormal bases of their own",
    "modules": "modules of your own, in Python alone; slower than stacked weights",
    "heterogeneous": "modules of unequal cost and reach, such as patch_mixer and frequency_mixer",
    "conv": "pairs of convolutions on whole maps; only the chosen ones run",
    "monte_carlo": "another scorer, its scores calibrated in training by several passes with dropout",
    "entmax": "all experts for each token, many of them with a weight of exactly 0",
    "unweighted": "another selector, each chosen expert with the weight 1",
    "multilinear": "linear maps that are slices of one factorised tensor",
    "modulated": "a scale and a shift of the token, made from the token itself",
    "confident": "another bank whose experts say how sure they are, which weighs their output",
    "mpo": "networks of two layers as products of cores, of which the central one is common to all experts",
    "token": "each vector of (..., D): the usual unit",
    "pixel": "each position of maps (B, C, H, W) or signals (B, C, T): a vector of C channels",
    "sample": "each sample as a whole: the router reads a pooled vector, an expert gets all of it",
    "orthogonal_experts": "each expert steps orthogonally to the inputs of the others (a row's key optimizer)",
    "mask_central": "the gradient of what matrix product experts share is masked at random (a row's key optimizer)",
    "loop": "the definition: one token and one expert at a time; slow",
    "dense": "every expert on every token; for soft routing and very small layers",
    "grouped": "each expert on exactly the tokens that chose it, however uneven the load",
    "spectral_norm": "penalty on the largest singular value of the routing matrix",
    "stable_rank": "penalty on a low stable rank of the routing matrix",
    "spectral_penalty": "both spectral penalties from one decomposition",
    "orthonormality": "distance of the routing matrix from orthonormal rows",
    "load_balance": "Switch load-balancing loss; 1 for a perfectly even load",
    "output_overlap": "how much the outputs of a token's experts point in the same direction",
    "activation_overlap": "how much the hidden activations of a token's experts point in the same direction",
    "path_coupling": "minus how firmly tokens follow paths from the experts of one layer to those of the next",
    "score_variance": "minus how much an expert's scores differ between tokens",
    "complexity_balance": "how far the experts' importance is from inverse proportion to their costs",
    "cluster_variance": "how unevenly the scores are spread within groups of consecutive experts",
    "severity_balance": "an even load, in which zero experts are the cheaper the less a sample is degraded",
    "router_z": "router z-loss, which keeps logits small",
    "importance_cv2": "how unevenly the experts' importance is spread, squared",
    "expected_cost": "what the experts of a token cost by its scores, as a share of the dearest",
}
"""The parts in plain words; one without an entry is told by its docstring, less the formulas."""

HINT = (
    'A router is a preset, or a table of parts and their arguments: {scorer="prototype", selector="topp", p=0.7}, '
    '{preset="sr-moe", rate=1e-3}, {scorer="linear", terms={load_balance=0.01}}.'
)

_FORMULA = re.compile(r"\s*:math:`[^`]*`|``")
_WIDTH = 20  # of the names of a table, or more


def list_everything(
    json: Json = False,
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Print the methods of papers instead, each with its file, card and verdict."),
    ] = False,
) -> None:
    """Print data sets, texts, router presets, the parts that networks are made of, and the values that 'inspect'
    measures.

    Example: spectralmoe list
    """
    if markdown:
        from spectralmoe.experiments.cards.field import field_table

        if json:
            raise UserError("--markdown: it is a table for people; leave out --json")
        typer.echo("\n".join(field_table()))
        return
    from spectralmoe.data.image_data import DATASETS
    from spectralmoe.data.text_sources import TEXTS
    from spectralmoe.diagnostics.table import VALUES
    from spectralmoe.dispatch import DISPATCHES
    from spectralmoe.experts import EXPERTS
    from spectralmoe.optim import OPTIMIZERS, SCHEDULES, WRAPPERS
    from spectralmoe.presets import PRESETS
    from spectralmoe.regularizers import REGULARIZERS
    from spectralmoe.scorers import SCORERS
    from spectralmoe.selectors import SELECTORS
    from spectralmoe.units import UNITS

    tables = {
        "data sets": {
            **{name: _first_line(loader) for name, loader in DATASETS.items()},
            "folder:PATH": "an image folder",
            "hf:NAME": "a data set of the Hugging Face hub, or a folder, that datasets reads: hf:NAME,label=COLUMN",
            "views:NAME": "upper half, lower half and spectrum of grey images of a data set, some of them missing",
        },
        "texts": {
            **{f"text:{name}": _first_line(reader) for name, reader in TEXTS.items()},
            "text:PATH": "a file, or a folder whose subfolders are domains; several with +: text:stdlib+pydoc",
            "text:hf:NAME": "the rows of a data set that datasets reads: text:hf:NAME,split=train,text=COLUMN",
        },
        "signals": {"signals:interference": "records of 21 classes of radio interference, made from equations"},
        "photos": {
            "restore:photos": "19 photographs that installed packages ship, degraded in four ways and mixtures",
            "restore:folder:PATH": "the images of a folder, degraded likewise",
        },
        "presets": {name: row["summary"] for name, row in PRESETS.items()},
    }
    parts: dict[str, Mapping[str, object]] = {
        "scorers": SCORERS,
        "selectors": SELECTORS,
        "experts": EXPERTS,
        "units": UNITS,
        "dispatch": DISPATCHES,
        "regularizers": REGULARIZERS,
    }
    tables |= {
        title: {name: (PLAIN.get(name) or _first_line(item)) + _arguments(title, item) for name, item in part.items()}
        for title, part in parts.items()
    }
    tables["optimizers"] = {name: _first_line(item) for name, item in OPTIMIZERS.items()}
    tables["around an optimizer"] = {
        name: (PLAIN.get(name) or _first_line(item)) + _arguments("optimizers", item) for name, item in WRAPPERS.items()
    }
    tables["schedules"] = {name: _first_line(item) for name, item in SCHEDULES.items()}
    tables["values"] = {value.name: value.meaning for value in VALUES.values()}
    if json:
        print_json(tables)
        return
    for title, table in tables.items():
        typer.echo(f"{title}:")
        width = max(_WIDTH, *map(len, table))
        for name, line in table.items():
            say(f"  {name:<{width}} {line}", indent=" " * (width + 3))
    say(HINT)


def _arguments(title: str, part: object) -> str:
    """The arguments of a part that a table may set: all but those that the network sets."""
    from spectralmoe.naming import FILLED_IN
    from spectralmoe.spec import parameters_of

    if title in ("units", "dispatch"):  # which no table names
        return ""
    given = {"regularizers": 1, "optimizers": 2}.get(title, 0)
    names = list(parameters_of(part))[given:]
    filled_in = ("dim", "num_experts") if title == "scorers" else FILLED_IN  # a scorer's hidden units are its own
    free = [name for name in names if name not in filled_in]
    return f" ({', '.join(free)})" if free else ""


def _first_line(item: object) -> str:
    return _FORMULA.sub("", (inspect.getdoc(item) or "").split("\n")[0])
