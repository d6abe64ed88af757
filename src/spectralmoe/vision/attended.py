"""The block of a vision transformer that also passes the output of its attention to its MoE layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from spectralmoe.context import Context
from spectralmoe.errors import UserError
from spectralmoe.moe import MoE
from spectralmoe.vision.random_weights import with_random_weights

__all__ = ["AttendedBlock", "check_attends", "put_layer"]


class AttendedBlock(nn.Module):
    r"""A pre-norm block whose MoE layer gets the attention's output as ``attended``.

    .. math:: a = \mathrm{Attention}(\mathrm{LN}(x)),\quad x \leftarrow x + \lambda_1 a,\quad
        x \leftarrow x + \lambda_2\,\mathrm{MoE}(\mathrm{LN}(x), a)

    Args:
        block: timm's, whose parts it takes over under the same names.

    Raises:
        AttributeError: a block without such parts.
    """

    norm1: nn.Module
    attn: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        for name in ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"):
            self.add_module(name, block.get_submodule(name))
        self.training = block.training

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        attended = self.attn(self.norm1(x), **masks)
        x = x + self.drop_path1(self.ls1(attended))
        moved = self.mlp(self.norm2(x), context=Context(tokens={"attended": attended}))
        y: Tensor = x + self.drop_path2(self.ls2(moved))
        return y


def put_layer(model: nn.Module, path: str, layer: nn.Module) -> None:
    """Put ``layer`` into ``model`` at ``path``, that of a block's MLP.

    Where its parts read ``attended``, an ``AttendedBlock`` takes the block's place (``check_attends``).

    Raises:
        AttributeError: no such place.
    """
    place, _, name = path.rpartition(".")
    block = model.get_submodule(place)
    setattr(block, name, layer)
    if isinstance(layer, MoE) and "attended" in layer.reads:
        above, _, last = place.rpartition(".")
        model.get_submodule(above).add_module(last, AttendedBlock(block))


@torch.no_grad()
def check_attends(path: str, block: nn.Module, dim: int) -> None:
    """Refuse a block that does not compute what an ``AttendedBlock`` of its parts does, under random weights.

    Raises:
        UserError: it computes something else.
    """
    trial, draw = with_random_weights(block)
    trial.eval().mlp = _AsItIs()
    x = torch.randn(2, 4, dim, generator=draw)
    try:
        fits = torch.allclose(AttendedBlock(trial)(x), trial(x), rtol=1e-4, atol=1e-4)
    except Exception:  # whatever the block's own code says to lone tokens, or to parts that it does not have
        fits = False
    if not fits:
        raise UserError(
            f"block {path!r} ({type(block).__name__}): its router reads 'attended', but it is no block of a vision "
            "transformer (norm, attention, norm, MLP) that could give what its attention gave; use another router"
        )


class _AsItIs(nn.Module):
    """An MLP, or a layer with a context, that gives its input."""

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        return x
