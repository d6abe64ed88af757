"""MoE branches behind the blocks of a model: a submodule and a forward hook.

The model's own forward stays, and so do the names of its weights; a branch adds ``<block>.moe_branch.*``. The hook is
a function of this module that finds the branch on the block it is called for, so that copies, pickles and compiled
forms of the model use their own branch.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.errors import UserError, one_of
from spectralmoe.moe import MoE
from spectralmoe.vision.blocks import block_width, choose_blocks, is_channels_first, prefix_tokens
from spectralmoe.vision.branch_spec import BranchSpec, Tokens

__all__ = ["Branch", "add_branches", "put_branch"]

Model = TypeVar("Model", bound=nn.Module)


class Branch(nn.Module):
    r"""A residual MoE branch: :math:`h_t + \alpha\,\mathrm{MoE}(h_t)` for every routed token.

    h is (B, S, D), NHWC (B, H, W, D), or NCHW (B, D, H, W) with ``channels_first``. Of a sequence (B, S, D) with
    tokens="patches" the first ``prefix`` tokens pass unchanged.

    Args:
        moe: the layer, D wide.
        prefix: number of class, distillation and register tokens in front of the patches.
        tokens: "patches" or "all".
        channels_first: whether an h of four dimensions is (B, D, H, W); None goes by which of its dimensions is D wide.
        norm: the layer reads LayerNorm(h), without factors.
        scale: start of the learnable alpha.

    Raises:
        UserError: an unknown ``tokens``, a negative prefix; in forward, features that are not D wide, or are so in both
            places with ``channels_first=None``.

    >>> from spectralmoe import Adapter, LinearScorer, Router, TopK
    >>> branch = Branch(MoE(Router(LinearScorer(8, 4), TopK(1)), Adapter(4, 8, 2)), prefix=1)
    >>> h = torch.randn(2, 5, 8)
    >>> torch.equal(branch(h)[:, 0], h[:, 0])
    True
    """

    def __init__(
        self,
        moe: MoE,
        *,
        prefix: int = 0,
        tokens: Tokens = "patches",
        channels_first: bool | None = False,
        norm: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if tokens not in ("patches", "all"):
            raise one_of("tokens of Branch", tokens, ["all", "patches"])
        if prefix < 0:
            raise UserError(f"Branch: prefix must not be negative, got {prefix}")
        self.moe, self.prefix, self.tokens = moe, prefix, tokens
        self.channels_first, self.norm, self.scale = channels_first, norm, scale
        self.alpha = nn.Parameter(torch.tensor(float(scale)))

    def forward(self, h: Tensor) -> Tensor:
        width, channels_first = self.moe.router.scorer.dim, self._has_channels_first(h)
        axis = 1 if channels_first else -1
        if h.shape[axis] != width:
            raise UserError(
                f"Branch: features of shape {tuple(h.shape)} do not have D={width} as dimension {axis}; where a block "
                "gives another layout, put_branch() a Branch(channels_first=...) of your own behind it"
            )
        if channels_first:
            return self._add(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if h.dim() == 3 and self.prefix and self.tokens == "patches":
            return torch.cat([h[:, : self.prefix], self._add(h[:, self.prefix :])], dim=1)
        return self._add(h)

    def _has_channels_first(self, h: Tensor) -> bool:
        if self.channels_first is not None or h.dim() != 4:
            return bool(self.channels_first)
        width = self.moe.router.scorer.dim
        if h.shape[1] == h.shape[-1] == width:
            raise UserError(
                f"Branch: features of shape {tuple(h.shape)} have D={width} in two places, and the block does not show "
                "its layout; put_branch() a Branch(channels_first=...) of your own behind it, or take another size"
            )
        return h.shape[1] == width

    def _add(self, h: Tensor) -> Tensor:
        y = self.moe(F.layer_norm(h, h.shape[-1:]) if self.norm else h, scale=self.alpha)
        branched: Tensor = h + y.to(h.dtype)
        return branched


def add_branches(model: Model, spec: BranchSpec) -> Model:
    """Add an MoE branch behind the chosen blocks of ``model``, in place; returns ``model``.

    It works on timm's families with blocks (ViT, DeiT, DINO, CLIP, SigLIP, Eva, BEiT, Swin, Hiera, ConvNeXt, ...); the
    width D is read from each block, the number of prefix tokens from ``model.num_prefix_tokens``. For models of other
    libraries pass the part that holds the blocks, and give the ``prefix``: ``add_branches(model.encoder, ...)`` for
    torchvision's ViT, ``add_branches(model.vit, ...)`` for Hugging Face's. New parameters have the device and dtype of
    their block (routers stay fp32) and take gradients, also where the model's are frozen.

    Unless ``start="authors"``, the model computes what it did before until the first step. In that step only the
    adapters' output matrices get a gradient from the task; from then on router and experts do, too.

    With class-token pooling only the class token of the last block reaches the head, so a branch there with
    tokens="patches" gets no gradient. The EMoE authors have it so; with tokens="all" it gets one.

    Raises:
        UserError: no blocks, or none such; a block that has a branch; what the spec's parts refuse (a rank above D).

    >>> model = nn.Module()
    >>> model.blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    >>> from spectralmoe.vision import BranchSpec
    >>> model = add_branches(model, BranchSpec.of("emoe", experts=4, bottleneck=2, blocks="last1"))
    >>> sorted(name for name, _ in model.named_parameters() if "alpha" in name)
    ['blocks.1.moe_branch.alpha']
    """
    blocks = choose_blocks(model, spec.blocks)
    for path, block in blocks.items():
        _refuse_second(path, block)
    prefix = prefix_tokens(model) if spec.prefix is None else spec.prefix
    branches = {path: _make_branch(path, block, prefix, spec) for path, block in blocks.items()}
    for path, block in blocks.items():
        put_branch(path, block, branches[path])
    return model


def put_branch(path: str, block: nn.Module, branch: Branch) -> None:
    """Make ``branch`` act behind ``block``, as its submodule ``moe_branch``.

    Raises:
        UserError: the block has a branch already.
    """
    _refuse_second(path, block)
    block.add_module("moe_branch", branch.train(block.training))
    block.register_forward_hook(_branch_behind)


def _make_branch(path: str, block: nn.Module, prefix: int, spec: BranchSpec) -> Branch:
    width = block_width(path, block)
    branch = Branch(
        spec.make_moe(width),
        prefix=prefix,
        tokens=spec.tokens,
        channels_first=is_channels_first(block, width),
        norm=spec.norm,
        scale=spec.scale,
    )
    weight = next(block.parameters(), None)
    return branch if weight is None else branch.to(weight.device, weight.dtype)


def _branch_behind(block: nn.Module, _: Any, output: Any) -> Any:
    """The forward hook of a block with a branch; of several outputs the first is the features."""
    branch = cast(Branch, block.moe_branch)
    return (branch(output[0]), *output[1:]) if isinstance(output, tuple) else branch(output)


def _refuse_second(path: str, block: nn.Module) -> None:
    if hasattr(block, "moe_branch"):
        raise UserError(f"block {path!r} has a branch already; add branches to other blocks, or to a fresh model")
