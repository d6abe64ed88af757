"""A network that classifies samples of several views, some of which may be missing.

Zheng, Zhang, Guo, Xu, Maennel & Chen, "Rethinking Gating Mechanism in Sparse MoE: Handling Arbitrary Modality Inputs
with Confidence-Guided Gate" (ConfSMoE), arXiv 2505.19525: attention among the views' tokens, experts for the views that
are there, and a second imputation of the missing ones from the experts' outputs. Written from the equations.
Differs: each view has one token and a linear embedding, and the head reads the mean over the views. The block is in the
post-norm form throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.errors import UserError
from spectralmoe.experts import FeedForward
from spectralmoe.models.build import ExpertsFactory, RouterFactory, layers_of
from spectralmoe.moe import MoE

__all__ = ["SparseCrossImputer", "ViewsBlock", "ViewsMoE", "views_moe"]


class SparseCrossImputer(nn.Module):
    r"""Replaces missing tokens by a sum over the present tokens that fit them best: tokens (B, V, D) -> (B, V, D).

    .. math:: a = \mathrm{softmax}_{j\ \mathrm{there}} \left( \frac{(W_q t)^\top W_k t_j}{\sqrt{D}} \right), \quad
        t \leftarrow \mathrm{LN}\Bigl(t + \sum_{j \in \mathrm{top}(a)} a_j W_k t_j\Bigr)

    t is the placeholder of a missing token. The sum is over the ``keep`` largest a, which are not normalised again, and
    the values are the projected keys. Present tokens are not changed; if there is none, the sum is 0. This is the
    second stage of ConfSMoE, which keeps (V - 1) S / 4 of the tokens for V views of S tokens.

    Args:
        dim: D.
        keep: from how many tokens a missing one is made.

    Raises:
        UserError: ``keep`` is below 1 or above the number of tokens.

    >>> imputer, tokens = SparseCrossImputer(8, keep=1), torch.randn(2, 3, 8)
    >>> present = torch.tensor([[True, True, True], [True, False, True]])
    >>> (imputer(tokens, present) == tokens).all(-1).tolist()
    [[True, True, True], [True, False, True]]
    """

    def __init__(self, dim: int, keep: int) -> None:
        super().__init__()
        if keep < 1:
            raise UserError(f"SparseCrossImputer: keep must be at least 1 token, got {keep}")
        self.dim, self.keep = dim, keep
        self.query, self.key = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Return tokens (B, V, D) in which those with ``present`` (B, V) False are replaced."""
        if self.keep > tokens.shape[1]:
            raise UserError(f"SparseCrossImputer: keep={self.keep}, but a sample has {tokens.shape[1]} tokens")
        keys = self.key(tokens)
        logits = self.query(tokens) @ keys.mT * self.dim**-0.5
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        there = present[:, None, :]
        shares = logits.masked_fill(~there, -torch.finfo(logits.dtype).max).softmax(-1).masked_fill(~there, 0)
        largest = shares.topk(self.keep, dim=-1)
        kept = torch.zeros_like(shares).scatter(-1, largest.indices, largest.values)
        filled = self.norm(tokens + kept.to(keys.dtype) @ keys)
        return torch.where(present[..., None], tokens, filled.to(tokens.dtype))


class ViewsBlock(nn.Module):
    r"""A block of attention among the views' tokens, an MoE layer for the views that are there, and an imputer.

    .. math:: t \leftarrow \mathrm{LN}(t + \mathrm{Attention}(t)), \qquad t \leftarrow \mathrm{LN}(t + \mathrm{MoE}(t))

    Args:
        moe: the MoE layer, of width D.
        heads: the number of attention heads.
        imputer: replaces the tokens of missing views; None leaves their placeholders.

    Raises:
        UserError: D is not a multiple of the heads.
    """

    def __init__(self, moe: MoE, heads: int, imputer: SparseCrossImputer | None = None) -> None:
        super().__init__()
        dim = moe.router.scorer.dim
        if heads < 1 or dim % heads:
            raise UserError(f"ViewsBlock: the width D={dim} must be a multiple of the {heads} heads")
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attention_norm, self.moe_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.moe, self.imputer = moe, imputer

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, V, D / heads)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.attention_norm(x + self.out(attended))
        x = self.moe_norm(x + self.moe(x, mask=present))
        return x if self.imputer is None else self.imputer(x, present)


class ViewsMoE(nn.Module):
    """A classifier that maps samples of V views (B, F + V) to logits (B, C). ``views_moe`` builds one.

    A row holds the values of all views side by side, F in all, and then one number for each view: 1 if it is there, 0
    if it is missing and its values are a placeholder. The network has an embedding for each view, the blocks, the mean
    over the views, and a linear head.

    Args:
        blocks: the blocks, all of width D.
        widths: how many values each view has.
        num_classes: C.

    Raises:
        UserError: there is no block or no view. In forward: rows have another width.

    >>> from spectralmoe import LinearScorer, Router, TopK
    >>> model = views_moe(5, (4, 6), router=lambda dim, experts: Router(LinearScorer(dim, experts), TopK(2)))
    >>> model(torch.rand(3, 4 + 6 + 2)).shape
    torch.Size([3, 5])
    """

    def __init__(self, blocks: Sequence[ViewsBlock], widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        if not blocks or not widths:
            raise UserError(f"ViewsMoE: needs a block and a view, got {len(blocks)} and {len(widths)}")
        dim = blocks[0].moe.router.scorer.dim
        self.widths, self.num_classes = list(widths), num_classes
        self.embeddings = nn.ModuleList(nn.Linear(width, dim) for width in widths)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        views = len(self.widths)
        if inputs.dim() != 2 or inputs.shape[1] != sum(self.widths) + views:
            raise UserError(
                f"ViewsMoE: takes (B, {sum(self.widths) + views}), values and flags of {views} views, "
                f"got {tuple(inputs.shape)}"
            )
        *values, flags = inputs.split([*self.widths, views], 1)
        present = flags > 0.5
        x = torch.stack([embed(view) for embed, view in zip(self.embeddings, values, strict=True)], 1)
        for block in self.blocks:
            x = block(x, present)
        logits: Tensor = self.head(x.mean(1))
        return logits


def views_moe(
    num_classes: int,
    widths: Sequence[int],
    *,
    router: RouterFactory,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    num_experts: int = 8,
    hidden: int = 32,
    experts: ExpertsFactory | None = None,
    keep: int = 0,
) -> ViewsMoE:
    """Build a ``ViewsMoE`` of ``depth`` equal blocks.

    With the same seed, two networks that differ only in their routers start with the same other weights, because the
    routers' draws leave torch's random generator as it was.

    Args:
        num_classes, widths: C, and how many values each view has.
        router: a function (D, E) -> router.
        width, depth, heads, num_experts, hidden: D, the number of blocks, the heads of each attention, E, H.
        experts: a function (E, D, H) -> bank; None makes GELU networks with biases.
        keep: from how many tokens the ``SparseCrossImputer`` of each block makes a missing view; 0 leaves it out.
    """
    banks = [(experts or _gelu)(num_experts, width, hidden) for _ in range(depth)]
    blocks = [ViewsBlock(layer, heads) for layer in layers_of(banks, router, width, num_experts)]
    network = ViewsMoE(blocks, widths, num_classes)
    if keep:  # last, so that networks with and without start alike
        for block in blocks:
            block.imputer = SparseCrossImputer(width, keep)
    return network


def _gelu(num_experts: int, dim: int, hidden: int) -> FeedForward:
    return FeedForward(num_experts, dim, hidden, activation="gelu", bias=True)
