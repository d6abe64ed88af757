"""Thresholds of the findings, and their cures: in code for layers of this library, as commands for a known model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["CURES", "THRESHOLDS", "cures_for"]

THRESHOLDS = {
    "dead_experts": 1.0,  # experts with less than DEAD_SHARE of an even load
    "collapse": 0.75,  # concentration: 0 is even, 1 is all tokens on the same K experts
    "sequence_collapse": 0.75,  # the same inside single sequences
    "imbalance": 2.0,  # MaxVio: the busiest expert has three times an even load
    "near_tie": 0.5,  # share of tokens whose choice is decided by 1% of a score
    "precision_flip": 0.05,  # share of tokens that bf16 sends elsewhere; or twice that of a sound router, if more
    "homogeneous": 0.5,  # mean squared cosine of the experts' outputs for the same token
    "duplicates": 0.98,  # the same for one pair of experts; for weights, their cosine
    "dropped_slots": 0.05,  # share of slots that a capacity emptied
    "no_router": 0.01,  # spread of the rows of the routing matrix; here, the value or less
    "empty_expert": 1.0,  # experts whose weights are all zero
}
"""A finding is made when the value reaches this."""

_BALANCE = "Balanced(k) (a loss-free bias), Term(load_balance, 1e-2), or PrincipalScorer, which starts balanced"

CURES = {
    "dead_experts": f"balance the load: {_BALANCE}",
    "collapse": f"balance the load: {_BALANCE}; check the learning rate of the router",
    "sequence_collapse": "balance inside sequences too: Term(load_balance, 1e-2) on single sequences, or ExpertChoice",
    "imbalance": f"balance the load: {_BALANCE}",
    "near_tie": (
        "widen the margins: a lower temperature (CosineScorer, PrototypeScorer), no weight decay on the router; "
        "routing_radius tells how far single tokens are from a change"
    ),
    "precision_flip": (
        "route in fp32, as Router does in models of any precision; elsewhere keep the router and its input in float32"
    ),
    "homogeneous": (
        "make the experts differ: Term(stable_rank, 1e-2), or start them apart (replace_mlp(init='random'))"
    ),
    "dropped_slots": "raise the factor of Capacity(selector, factor), or use TopK or Balanced, which drop nothing",
    "no_router": "the router was never trained, or lost: fetch or save the checkpoint again, or start it anew",
    "empty_expert": "the expert was never trained, or lost: fetch or save the checkpoint again",
    "no_router_gradient": "use TopK(1, normalize=False): a weight that is always 1 gives the router no gradient",
    "balance_off": "pass output_router_logits=True, or set the coefficient to 0 and use Term(load_balance, 1e-2)",
    "no_balancing": "add Term(load_balance, 1e-2) on the recorded routing, or move the biases as Balanced does",
    "probabilities_as_logits": "take the routing from watch_transformers, not from the model's router_logits",
    "double_softmax": "set router_aux_loss_coef=0 and add Term(load_balance, 1e-2) yourself",
    "not_finite": "go back to a checkpoint from before the weights stopped being finite",
    "no_data": "give more tokens (--tokens) or a larger data set",
    "no_choice": (
        "more data do not help: with one expert, or all of them, there is no choice to judge, and the scores do not "
        "show a choice that noise or the experts made"
    ),
    "not_run": "run the model on data: inspect without --router-only or --gates-only",
    "half_precision": "inspect a checkpoint in float32, where there is one (--dtype float32)",
}
"""The cure of a finding, by kind, for layers of this library."""


def cures_for(model: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The cures of the findings in one model: commands for it where there are some, else ``CURES``.

    Args:
        model: of an inspection document; ``library`` says whose it is, ``source`` is its folder or name, ``swapped``
            that its routers are of this library.
        layers: of the document.

    >>> model = {"library": "transformers", "source": "./Mixtral-8x7B"}
    >>> cures_for(model, [])["imbalance"]
    'balance the load: spectralmoe finetune ./Mixtral-8x7B --terms load_balance=1e-2 --text FILE --out DIR'
    """
    library, source = model.get("library"), model.get("source")
    if library == "transformers" and source:
        cures = CURES | _for_transformers(source)
        if any(layer.get("stack") for layer in layers):  # an encoder beside a decoder: finetune and prune take none
            return cures
        normalises = (model.get("training") or {}).get("norm_topk_prob") is not None
        trainings = _trainings(source, "norm_topk_prob to false" if normalises else "num_experts_per_tok to 2")
        if model.get("swapped"):
            return cures | {kind: text for kind, text in trainings.items() if "--router" not in text}
        return _with_prune(cures | trainings, source, layers, model.get("groups") or 1)
    if library == "spectralmoe" and source:
        train = "spectralmoe train --config F.toml --router linear+balanced --out DIR"
        balance = dict.fromkeys(("dead_experts", "collapse", "imbalance"), f"balance the load: {train}; or {_BALANCE}")
        return CURES | balance | {"not_run": f"run the model on data: {_command('inspect', source)}"}
    return dict(CURES)


def _for_transformers(source: str) -> dict[str, str]:
    """What can be done with any model of transformers."""
    return {
        "not_run": f"run the model on text: {_command('inspect', source, '--text', 'FILE')}",
        "no_data": f"give more tokens: {_command('inspect', source, '--tokens', '32768', '--text', 'FILE')}",
        "half_precision": (
            "look at a checkpoint in float32, where there is one: "
            f"{_command('inspect', source, '--dtype', 'float32', '--text', 'FILE')}"
        ),
        "dropped_slots": "raise expert_capacity in its config.json",
    }


def _with_prune(cures: dict[str, str], source: str, layers: Sequence[Mapping[str, Any]], groups: int) -> dict[str, str]:
    """With what leaves experts out, or merges them, before all else that is done about experts that are alike."""
    dead = [int(((layer.get("load") or {}).get("dead") or {}).get("value") or 0) for layer in layers]
    files = ("--text", "FILE", "--out", "DIR")
    if spared := _keep(layers, min(dead, default=0), groups):
        text = _command("prune", source, "--keep", str(spared), "--by", "frequency", *files)
        cures["dead_experts"] = f"{cures['dead_experts']}; or leave them out: {text}"
    if half := _keep(layers, layers[0]["experts"] // 2 if layers else 0, groups):
        text = _command("prune", source, "--keep", str(half), "--merge", *files)
        cures["homogeneous"] = f"merge experts that are alike: {text}; or {cures['homogeneous']}"
    return cures


def _trainings(source: str, uncertain: str) -> dict[str, str]:
    """The cures that train the model on.

    Args:
        uncertain: the change of its config with which a weight says how sure the router is.
    """

    def finetune(*options: str) -> str:
        return _command("finetune", source, *options, "--text", "FILE", "--out", "DIR")

    balance = finetune("--terms", "load_balance=1e-2")
    balanced = f"balance the load: {balance}"
    coefficient = "set router_aux_loss_coef to 0 in its config.json and train with a term"
    return {
        "dead_experts": balanced,
        "collapse": f"{balanced}; or change the router: {finetune('--router', 'sr-moe')}",
        "sequence_collapse": balanced,
        "imbalance": balanced,
        "near_tie": f"widen the margins with another router: {finetune('--router', 'sr-moe')}",
        "precision_flip": f"give it routers that stay in fp32: {finetune('--router', 'linear')}",
        "homogeneous": f"make the experts differ: {finetune('--terms', 'stable_rank=1e-2')}",
        "dropped_slots": f"raise expert_capacity in its config.json, or {balanced}",
        "no_router": f"fetch or save the checkpoint again, or train the routers: {finetune('--train', 'routers')}",
        "no_router_gradient": f"set {uncertain} in its config.json and train on: {finetune()}",
        "balance_off": f"train with a balance term: {balance}",
        "no_balancing": f"train with a balance term: {balance}",
        "double_softmax": f"{coefficient}: {balance}",
    }


def _keep(layers: Sequence[Mapping[str, Any]], gone: int, groups: int) -> int | None:
    """How many experts stay when ``gone`` of every layer go, whole in every group; None where that leaves no choice."""
    counts = {layer["experts"] for layer in layers}
    if len(counts) != 1 or gone < 1:
        return None
    (total,), most = counts, max(layer.get("top_k") or 1 for layer in layers)
    left = -(-(total - gone) // groups) * groups
    return left if total > left > most and (groups == 1 or left >= 2 * groups) else None


def _command(verb: str, source: str, *options: str) -> str:
    return shlex.join(["spectralmoe", verb, source, *options])
