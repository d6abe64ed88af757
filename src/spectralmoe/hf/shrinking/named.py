"""Which experts of a Hugging Face model stay, or are joined, as the caller names them: checked against its layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spectralmoe.errors import UserError, one_of
from spectralmoe.hf.layer import HFLayer
from spectralmoe.stacks import chosen_experts

__all__ = ["blocks_of", "check_number", "given_groups", "kept_experts"]


def kept_experts(owner: str, layers: Mapping[str, HFLayer], keep: Mapping[str, Sequence[Any]]) -> dict[str, list[int]]:
    """Experts that the caller named, in ascending order, equally many in every layer and group."""
    _check_names(owner, layers, keep)
    kept = {name: sorted(chosen_experts(owner, keep[name], layer.num_experts)) for name, layer in layers.items()}
    for name, experts in kept.items():
        if len(set(experts)) < len(experts):
            raise UserError(f"{owner}: an expert can be kept only once, got {list(keep[name])} for {name}")
    _check_kept(owner, layers, kept)
    return kept


def given_groups(
    owner: str, layers: Mapping[str, HFLayer], groups: Mapping[str, Sequence[Any]]
) -> dict[str, list[list[int]]]:
    """Groups that the caller named and experts that stay alone, in the order of their first experts."""
    _check_names(owner, layers, groups)
    given = {}
    for name, layer in layers.items():
        if not all(isinstance(group, Sequence) and group for group in groups[name]):
            raise UserError(f"{owner}: groups are lists of experts, such as [[0, 3], [1, 2]], got {groups[name]!r}")
        chosen = [sorted(chosen_experts(owner, group, layer.num_experts)) for group in groups[name]]
        members = [e for group in chosen for e in group]
        for group in chosen:
            if len({e // len(blocks_of(layer)[0]) for e in group}) > 1:
                raise UserError(
                    f"{owner}: {name} chooses in {layer.groups[0]} groups; {group} reaches over two of them"
                )
        if (twice := next((e for e in members if members.count(e) > 1), None)) is not None:
            raise UserError(f"{owner}: groups must not overlap, but expert {twice} of {name} is named twice")
        given[name] = sorted([*chosen, *([e] for e in range(layer.num_experts) if e not in members)])
    _check_kept(owner, layers, {name: [group[0] for group in chosen] for name, chosen in given.items()})
    return given


def _check_names(owner: str, layers: Mapping[str, HFLayer], keep: Mapping[str, Sequence[Any]]) -> None:
    """Raise unless all layers are named, and no other, each with a list."""
    for name, wanted in keep.items():
        if name not in layers:
            raise one_of(f"layer of {owner}", name, layers)
        if not isinstance(wanted, Iterable):
            raise UserError(f"{owner}: a layer is given a list, or all layers one number; got {wanted!r} for {name}")
    if missing := [name for name in layers if name not in keep]:
        raise UserError(f"{owner}: every layer keeps equally many experts, but {missing[0]} was not named")


def _check_kept(owner: str, layers: Mapping[str, HFLayer], kept: Mapping[str, Sequence[int]]) -> None:
    """Raise unless all layers and all groups that experts are chosen in keep equally many, and enough."""
    numbers = {len(experts) for experts in kept.values()}
    for name, experts in kept.items():
        if len(numbers) > 1:
            raise UserError(f"{owner}: every layer keeps equally many experts, got {sorted(numbers)}")
        check_number(owner, layers[name], len(experts))
        blocks = blocks_of(layers[name])
        if len({sum(e in block for e in experts) for block in blocks}) > 1:
            raise UserError(f"{owner}: {name} chooses in {len(blocks)} groups, which must keep equally many experts")


def check_number(owner: str, layer: HFLayer, keep: int) -> None:
    """Raise unless tokens can choose among ``keep`` experts."""
    k, (groups, on) = layer.top_k or 1, layer.groups
    if keep < k:
        raise UserError(f"{owner}: keep={keep} is less than the {k} experts that each token chooses in {layer.name}")
    if keep == layer.num_experts or groups == 1:
        return
    if keep % groups or keep // groups < 2:
        raise UserError(
            f"{owner}: keep={keep} does not go into the {groups} groups of {layer.name} (n_group) with at least 2 "
            f"experts each; keep a multiple of {groups}, from {2 * groups}"
        )
    if on * (keep // groups) < k:
        raise UserError(
            f"{owner}: with keep={keep} the {on} groups that a token of {layer.name} may choose from hold "
            f"{on * (keep // groups)} experts, less than the {k} that it chooses"
        )


def blocks_of(layer: HFLayer) -> list[range]:
    """The groups that experts are chosen in, as runs of experts; one group without."""
    size = layer.num_experts // layer.groups[0]
    return [range(start, start + size) for start in range(0, layer.num_experts, size)]
