"""Path coupling: a term on the paths that tokens take from the experts of one layer to those of the next.

Hu et al., "Synergistic Intra- and Cross-Layer Regularization Losses for MoE Expert Specialization", arXiv 2602.14159,
equation 7, the coupling loss R_cp. No public code.
Differs: means over tokens and pairs of layers instead of sums; ``form="paths"`` is ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from spectralmoe.errors import UserError, one_of
from spectralmoe.routing import Routing
from spectralmoe.tape import Record, of_model

__all__ = ["path_coupling"]


@of_model
def path_coupling(records: Iterable[Record], *, form: Literal["mass", "paths"] = "mass") -> Tensor:
    r"""Reward tokens that take the same paths from the experts of one layer to those of the next.

    p are the scores of a token, normalised to sum 1 over all experts (``routing.probs``), and A_t its chosen experts;
    p' and A' are those of the next layer. :math:`J_{ev} = \frac1N \sum_t p_{te}\,p'_{tv} [e \in A_t][v \in A'_t]` is
    the mass of the path from expert e to expert v. The value is the mean over all pairs of neighbouring layers of

    - "mass" (the paper's): :math:`-\sum_{ev} J_{ev}`, from -1 to 0. This is the mean over the tokens of minus the
      product of :math:`\sum_{e \in A_t} p_{te}` and the same sum of the next layer. So it rewards sharp scores, and
      does not see which expert follows which. Use a balance term with it.
    - "paths": minus the mutual information, in nats, of J divided by its sum. It is :math:`-\log E` if the expert of
      one layer determines that of the next and all are used evenly, and 0 if it says nothing about it. With few tokens
      it is biased away from 0.

    Only real tokens count; without one the value is 0. A layer that is called several times is paired call by call. If
    the choice was replayed, the router's own choice is taken.

    Args:
        records: the records of all layers, in the order of the layers: a tape.
        form: "mass" or "paths".

    Raises:
        UserError: there is one layer alone; neighbouring layers do not see the same tokens, by number, shape or mask;
            the form is unknown; or "mass" would be constant, because a token uses all experts or its scores are
            normalised over the chosen ones.

    >>> import torch
    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
    >>> layers = torch.nn.Sequential(*(MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 8)) for _ in "ab"))
    >>> for layer in layers:
    ...     _ = layer.router.scorer.weight.data.zero_()  # so each expert has probability 1/4
    >>> with record(layers) as tape:
    ...     y = layers(torch.randn(32, 8))
    >>> round(path_coupling(tape).item(), 4), abs(round(path_coupling(tape, form="paths").item(), 4))
    (-0.25, 0.0)
    """
    if form not in ("mass", "paths"):
        raise one_of("form of path_coupling", form, ["mass", "paths"])
    couple = _mass if form == "mass" else _information
    values = []
    for layers in _calls(records):
        if form == "mass":
            for item in layers:
                _refuse_constant(item)
        chosen = [_chosen(item.routing.unforced) for item in layers]
        for (one, two), (a, b) in zip(pairwise(layers), pairwise(chosen), strict=True):
            _refuse_other_tokens(one, two)
            values.append(couple(a, b.to(a.device), one.routing))
    return torch.stack([value.to(values[0].device) for value in values]).mean()


def _mass(a: Tensor, b: Tensor, tokens: Routing) -> Tensor:
    return -tokens.real(a.sum(1) * b.sum(1))


def _information(a: Tensor, b: Tensor, tokens: Routing) -> Tensor:
    """Minus the mutual information of the paths between scores (N, E) and (N, E')."""
    with torch.autocast(a.device.type, enabled=False):
        joint = a.T @ b
    smallest = torch.finfo(joint.dtype).tiny
    joint = joint / joint.sum().clamp_min(smallest)
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return -(joint * (joint.clamp_min(smallest).log() - apart.clamp_min(smallest).log())).sum()


def _chosen(routing: Routing) -> Tensor:
    """The scores of the chosen experts (N, E), normalised over all of them; 0 elsewhere and for tokens not real."""
    return torch.where(routing.members(), routing.probs, 0)


def _calls(records: Iterable[Record]) -> list[tuple[Record, ...]]:
    """The records of all layers, call by call."""
    if isinstance(records, Record):
        raise UserError(
            'path_coupling takes the records of all layers; weigh it with Term(path_coupling, ..., scope="model")'
        )
    layers: dict[str, list[Record]] = {}
    for item in records:
        layers.setdefault(item.name, []).append(item)
    names = ", ".join(layers) or "none"
    if len(layers) < 2:
        raise UserError(
            f"path_coupling couples neighbouring layers, but was given the records of one alone ({names}); it needs a "
            "network of two or more"
        )
    if len({len(of_layer) for of_layer in layers.values()}) > 1:
        raise UserError(f"path_coupling needs layers that are called equally often; it was given {names}")
    return list(zip(*layers.values(), strict=True))


def _refuse_other_tokens(one: Record, two: Record) -> None:
    a, b = one.routing, two.routing
    differ = ""
    if len(a.logits) != len(b.logits):
        differ = f"N={len(a.logits)} and N={len(b.logits)}"
    elif a.shape is not None and b.shape is not None and a.shape != b.shape:
        differ = f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    elif not _equal(a.mask, b.mask):
        differ = "other tokens masked"
    if differ:
        raise UserError(
            f"path_coupling: layers {one.name!r} and {two.name!r} do not see the same tokens in the same order "
            f"({differ}); name those that do with Term(layers=...)"
        )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b.to(a.device)))


def _refuse_constant(item: Record) -> None:
    routing = item.routing.unforced
    if isinstance(routing.score, Tensor):  # named scores leave no expert without any
        members = routing.members()
        others = routing.score.masked_fill(members, 0)  # what padding scores is nobody's
        others = others if routing.mask is None else others[routing.mask]
        constant = bool(members.any()) and not bool(others.any())
    else:
        fills = item.router is None or item.router.fills
        constant = fills and routing.indices.shape[1] >= routing.num_experts
    if constant:
        raise UserError(
            f"path_coupling has no gradient: in layer {item.name!r} the chosen experts of a token hold all of its "
            'scores; take fewer experts a token, scores over all experts, or form="paths"'
        )
