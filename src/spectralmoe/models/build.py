"""The MoE layers of a network, by functions that make their experts and routers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from spectralmoe.experts import Experts
from spectralmoe.moe import MoE
from spectralmoe.router import Router
from spectralmoe.units import Unit

__all__ = ["ExpertsFactory", "RouterFactory", "layers_of"]

RouterFactory = Callable[[int, int], Router]
"""(D, E) -> router."""

ExpertsFactory = Callable[[int, int, int], Experts]
"""(E, D, H) -> bank."""


def layers_of(
    banks: Sequence[Experts], router: RouterFactory, width: int, num_experts: int, *, unit: Unit | None = None
) -> list[MoE]:
    """Build a layer around each bank, with a router by ``router(width, num_experts)``.

    The routers' draws leave torch's random generator as it was. So under one seed, networks that differ only in their
    routers start with the same other weights.
    """
    with torch.random.fork_rng(devices=[]):
        routers = [router(width, num_experts) for _ in banks]
    return [MoE(each, bank, unit=unit) for each, bank in zip(routers, banks, strict=True)]
