"""Windows of text: cut through all documents, spread over domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spectralmoe.data.text_sources import Document
from spectralmoe.data.vocabulary import SEPARATOR, Vocabulary

__all__ = ["Windows", "cut_windows", "in_turns", "measured"]


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of S + 1 tokens each; the last S are predicted.

    Attributes:
        tokens: (B, S + 1).
        domains: (B, S), the domain of each predicted token.
    """

    tokens: Tensor
    domains: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, chosen: Tensor | slice) -> Windows:
        return Windows(self.tokens[chosen], self.domains[chosen])

    def part(self, chosen: slice, device: torch.device) -> Windows:
        """Some of the windows, on ``device``, in the types that a network takes."""
        return Windows(self.tokens[chosen].to(device).long(), self.domains[chosen].to(device).long())


def cut_windows(documents: Sequence[Document], domains: Sequence[str], vocabulary: Vocabulary, length: int) -> Windows:
    """Windows of ``length`` + 1 tokens, each beginning with the last token of the one before, through all documents."""
    encoded = vocabulary.encode_all([document.text for document in documents])
    separator = np.array([SEPARATOR], np.int32)
    tokens = np.concatenate([part for one in encoded for part in (separator, one)])
    places = np.array([domains.index(document.domain) for document in documents], np.int16)
    owner = np.repeat(places, [1 + len(one) for one in encoded])
    count = max(len(tokens) - 1, 0) // length
    inside = torch.arange(count)[:, None] * length + torch.arange(length + 1)
    return Windows(torch.from_numpy(tokens)[inside], torch.from_numpy(owner)[inside[:, 1:]])


def measured(windows: Windows, most: int) -> Tensor:
    """Which windows are measured: up to ``most`` of each domain, spread evenly over it. A window is of the domain of
    its first predicted token.
    """
    chosen = []
    for domain in windows.domains[:, 0].unique():
        there = (windows.domains[:, 0] == domain).nonzero().flatten()
        chosen.append(there[torch.linspace(0, len(there) - 1, min(most, len(there))).round().long()])
    return torch.cat(chosen)


def in_turns(windows: Windows, count: int) -> Windows:
    """``count`` windows in equal numbers from each domain as far as they last, spread evenly over each."""
    owners = windows.domains[:, 0].long()
    there = owners.bincount()
    quota = torch.zeros_like(there)
    while (left := count - int(quota.sum())) > 0:
        open_domains = (quota < there).nonzero().flatten()
        share = max(1, left // len(open_domains))
        for domain in open_domains[:left]:
            quota[domain] += min(share, int(there[domain] - quota[domain]))
    chosen = []
    for domain, many in enumerate(quota.tolist()):
        members = (owners == domain).nonzero().flatten()
        if many:
            chosen.append(members[torch.linspace(0, len(members) - 1, many).round().long()])
    return windows[torch.cat(chosen)]
