"""The SHA-256 of files and of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from spectralmoe.sharding import full

__all__ = ["sha256_of", "sha256_of_tensors"]


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of what ``file`` holds."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def sha256_of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 over pairs of a text, such as name and shape, and the values of a tensor, bit by bit.

    >>> sha256_of_tensors([("a", torch.zeros(2)), ("", torch.ones(1))])[:8]
    '4b9b3588'
    """
    sha = hashlib.sha256()
    for text, value in tensors:
        sha.update(text.encode())
        sha.update(full(value.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
