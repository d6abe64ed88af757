"""How an expert is made of the dense MLP.

``copy``: Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", arXiv 2212.05055,
section 3: every expert is the MLP. Differs: no token is dropped.

``drop``: Nakamura et al., "Drop-Upcycling: Training Sparse Mixture of Experts with Partial Re-initialization", arXiv
2502.19261, section 3: a share of each expert's hidden units is drawn anew, the same units in all three matrices, from
normal distributions with the mean and the standard deviation of what they replace.

``noise``: the copies of sparse upcycling plus Gaussian noise, counted in standard deviations of each matrix.

``virtual``: He et al., "Upcycling Large Language Models into Mixture of Experts", arXiv 2410.07524, their "virtual
group" initialisation: the MLP is split into G shards of F/G hidden units, and expert e is shard e mod G; the router's
rows are alike for the shards of a copy, so that all of them are chosen together, and the shards' outputs are scaled.
Differs: the scale is G, on the down projection alone, as the weights of stock routers sum to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spectralmoe.hf.upcycling.dense import Mlp

__all__ = ["METHODS", "Method", "copy", "drop", "noise", "virtual"]


@dataclass(frozen=True, slots=True)
class Method:
    """A way to make experts.

    Attributes:
        expert: (MLP, e, number, draw) -> expert e; the number is the ratio or the granularity.
        ratio: the usual ratio; None where it takes none.
        splits: experts are shards, as many of a copy as the granularity says.
    """

    expert: Callable[[Mlp, int, float, torch.Generator], Mlp]
    ratio: float | None = None
    splits: bool = False


def copy(mlp: Mlp, e: int, _: float, draw: torch.Generator) -> Mlp:
    """The MLP itself."""
    return mlp


def drop(mlp: Mlp, e: int, ratio: float, draw: torch.Generator) -> Mlp:
    """The MLP with floor(ratio * F) of its hidden units drawn anew."""
    hidden = mlp.gate.shape[0]
    units = torch.randperm(hidden, generator=draw)[: int(ratio * hidden)].to(mlp.gate.device)
    gate, up, down = (value.clone() for value in mlp)
    gate[units], up[units] = _drawn_like(gate[units], draw), _drawn_like(up[units], draw)
    down[:, units] = _drawn_like(down[:, units], draw)
    return Mlp(gate, up, down)


def noise(mlp: Mlp, e: int, ratio: float, draw: torch.Generator) -> Mlp:
    """The MLP plus noise of ``ratio`` times the standard deviation of each matrix."""
    return Mlp(*(value + ratio * value.std() * _normal(value, draw) for value in mlp))


def virtual(mlp: Mlp, e: int, granularity: float, draw: torch.Generator) -> Mlp:
    """Shard e mod G of the MLP's hidden units, its output scaled by G."""
    shards = int(granularity)
    size = mlp.gate.shape[0] // shards
    units = slice(e % shards * size, (e % shards + 1) * size)
    return Mlp(mlp.gate[units], mlp.up[units], shards * mlp.down[:, units])


METHODS = {
    "copy": Method(copy),
    "drop": Method(drop, ratio=0.5),
    "noise": Method(noise, ratio=0.1),
    "virtual": Method(virtual, splits=True),
}


def _drawn_like(value: Tensor, draw: torch.Generator) -> Tensor:
    """Numbers with the mean and the standard deviation of those of ``value``."""
    if not value.numel():
        return value
    mean, spread = value.float().mean(), value.float().std(correction=0)
    return (mean + spread * _normal(value, draw).float()).to(value.dtype)


def _normal(value: Tensor, draw: torch.Generator) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(value.shape, generator=draw).to(value.device, value.dtype)
