"""Cutting labelled data into parts, class by class, in an order that depends on the labels alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectralmoe.errors import UserError

__all__ = ["stratified"]


def stratified(
    labels: Tensor, shares: Sequence[float], classes: Sequence[str], source: str, about: str = ""
) -> list[Tensor]:
    """Cut the indices of ``labels`` (N,) into parts by ``shares``, class by class, in a fixed random order.

    Every part holds at least one of each class, and each prefix of a part holds the classes in their proportions.

    Args:
        source, about: where the labels are from and how that was read, for the message of an error.

    Raises:
        UserError: a class has fewer members than there are parts.

    >>> train, test = stratified(torch.tensor([0, 1] * 4), (0.5, 0.5), ("a", "b"), "here")
    >>> len(train), len(test), sorted(torch.cat([train, test]).tolist())
    (4, 4, [0, 1, 2, 3, 4, 5, 6, 7])
    """
    counts = labels.bincount(minlength=len(classes)).tolist()
    for name, count in zip(classes, counts, strict=True):
        if count < len(shares):
            few = f"class {name!r} has too few images in {source!r}: {count}, needs at least {len(shares)}"
            raise UserError(f"{few} ({about})" if about else few)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pieces = []
    for label, count in enumerate(counts):
        later = [max(1, round(count * share)) for share in shares[1:]]
        members = shuffled[labels[shuffled] == label]
        pieces.append(torch.split(members, [count - sum(later), *later]))
    return [_interleave(part) for part in zip(*pieces, strict=True)]


def _interleave(groups: Sequence[Tensor]) -> Tensor:
    """Merge index tensors so that every prefix draws on each in proportion to its length."""
    place = torch.cat([(torch.arange(len(group)) + 0.5).double() / len(group) for group in groups])
    return torch.cat(list(groups))[place.argsort(stable=True)]
