"""Merging: each group of experts becomes one network, and the router goes on choosing among all experts.

Li et al., "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy" (M-SMoE), arXiv
2310.01334, section on merging; authors' code: github.com/UNITES-Lab/MC-SMoE (MIT). Differs: hidden units are not
permuted into alignment before they are averaged; the number of networks is given for each layer; nothing is factorised
afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from spectralmoe.compression.edit import edited, layers_of, rebuilt, whole_number
from spectralmoe.compression.evidence import Evidence
from spectralmoe.compression.prune import most_salient
from spectralmoe.errors import UserError
from spectralmoe.moe import MoE
from spectralmoe.stacks import chosen_experts
from spectralmoe.tape import Record

__all__ = ["group_by_affinity", "merge"]

Model = TypeVar("Model", bound=nn.Module)
Groups = int | Sequence[Sequence[int]]


def merge(
    model: Model,
    groups: Groups | Mapping[str, Groups],
    *,
    by: str | None = "frequency",
    evidence: Iterable[Record] = (),
    seed: int = 0,
) -> Model:
    r"""Return a copy of ``model`` in which each group of experts is one network; the model stays as it is.

    .. math:: \theta_g = \sum_{i \in g} s_i \theta_i \Big/ \sum_{i \in g} s_i

    s_i is the saliency ``by`` of expert i; if it is 0 for a whole group, all count alike. The router stays as it is: a
    token that chose expert i gets the network of i's group with the weight of i (``Placement``). Replicas of an expert
    are averaged, too.

    Args:
        model: an ``MoE``, or a model that holds some.
        groups: how many networks each layer keeps; or lists of experts, where experts in no list stay as they are; or
            layer name -> one of these. A number makes groups around the most salient experts (``group_by_affinity``).
        by: the saliency, as in ``prune``; None weighs all alike, and needs lists of experts.
        evidence: the tape of calibration data, as in ``prune``.
        seed: the seed of the saliency "random".

    Raises:
        UserError: groups overlap, are empty or name a zero expert or no expert; the experts cannot be averaged; the
            scorer reads the experts; ``by=None`` is given with a number; or the evidence is wrong, as in ``prune``.

    >>> from spectralmoe import FeedForward, LinearScorer, Router, TopK
    >>> layer = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16))
    >>> small = merge(layer, [[0, 3]], by=None)
    >>> small.router.num_experts, small.experts.num_experts, small.placement.table.flatten().tolist()
    (4, 3, [0, 1, 2, 0])
    """
    layers = layers_of("merge", model)
    known = Evidence("merge", layers, evidence, seed)

    def merged(name: str, layer: MoE, groups: Groups) -> MoE:
        networks = [e for e in range(layer.router.num_experts) if layer.places(e)]
        if isinstance(groups, int):
            number = whole_number("merge", f"the networks of layer {name!r}", groups, 1, len(networks))
            if by is None:
                raise UserError("merge: a number of networks needs a saliency; give by='frequency', or the groups")
            saliency = known.saliency(by, name, layer)
            clusters = group_by_affinity(saliency[networks], known.affinity(name, layer)[networks][:, networks], number)
            return _merged(layer, [[networks[i] for i in group] for group in clusters], saliency)
        alike = torch.ones(layer.router.num_experts)
        return _merged(layer, _disjoint(layer, groups), alike if by is None else known.saliency(by, name, layer))

    return edited("merge", model, layers, groups, merged)


def group_by_affinity(saliency: Tensor, affinity: Tensor, number: int) -> list[list[int]]:
    """Make ``number`` groups around the most salient experts; every other expert joins the one with most affinity.

    Args:
        saliency: (E,).
        affinity: (E, E), larger for experts that are closer to each other.

    >>> affinity = torch.tensor([[1.0, 0.1, 0.9], [0.1, 1.0, 0.2], [0.9, 0.2, 1.0]])
    >>> group_by_affinity(torch.tensor([0.5, 0.3, 0.2]), affinity, 2)
    [[0, 2], [1]]
    """
    centres = most_salient(saliency, number)
    groups = {centre: [centre] for centre in centres}
    for e in range(len(saliency)):
        if e not in groups:
            groups[centres[int(affinity[e, centres].argmax())]].append(e)
    return [sorted(group) for group in groups.values()]


def _disjoint(layer: MoE, groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """The groups, each with experts that compute something, none of them twice."""
    if not isinstance(groups, Sequence) or not all(isinstance(group, Sequence) for group in groups):
        raise UserError(f"merge: takes a number or lists of experts, such as [[0, 3], [1, 2]], got {groups!r}")
    chosen = [chosen_experts("merge", group, layer.router.num_experts) for group in groups]
    members = [e for group in chosen for e in group]
    for e in members:
        if members.count(e) > 1:
            raise UserError(f"merge: groups must not overlap, but expert {e} is named {members.count(e)} times")
        if not layer.places(e):
            raise UserError(f"merge: expert {e} is a zero expert, which has no network to merge; leave it out")
    return chosen


def _merged(layer: MoE, groups: list[list[int]], saliency: Tensor) -> MoE:
    """One network a group; experts that no group names stay with those that share their places already."""
    rest: dict[tuple[int, ...], list[int]] = {}
    for e in range(layer.router.num_experts):
        if layer.places(e) and not any(e in group for group in groups):
            rest.setdefault(tuple(layer.places(e)), []).append(e)
    networks = sorted([*groups, *rest.values()], key=min)
    members, weights = [], []
    for group in networks:
        shares = (saliency[group] if saliency[group].any() else torch.ones(len(group))).tolist()
        places = [layer.places(e) for e in group]
        members.append([place for row in places for place in row])
        weights.append([share / len(row) for share, row in zip(shares, places, strict=True) for _ in row])
    network_of = {e: [number] for number, group in enumerate(networks) for e in group}
    table = [network_of.get(e, []) for e in range(layer.router.num_experts)]
    return rebuilt(layer, layer.experts.averaged(members, weights), table)
