"""A small language model: a decoder with an MoE layer in every block.

Rotary positions: Su et al., "RoFormer", arXiv 2104.09864, section 3.2.2. RMSNorm: Zhang and Sennrich, arXiv 1910.07467,
in front of each part of a block. SwiGLU experts: Shazeer, arXiv 2002.05202. Output matrix tied to the embedding: Press
and Wolf, arXiv 1608.05859. Without biases, as in Llama (Touvron et al., arXiv 2302.13971, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Context
from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.errors import UserError
from spectralmoe.experts import FeedForward
from spectralmoe.models.build import ExpertsFactory, RouterFactory, layers_of
from spectralmoe.moe import MoE
from spectralmoe.router import Router
from spectralmoe.scorers import LinearScorer
from spectralmoe.selectors import Balanced, Soft
from spectralmoe.torch_private import transforming

__all__ = ["Cache", "CausalAttention", "DecoderBlock", "LanguageMoE", "balanced_router", "language_moe"]

ROPE_BASE, RMS_EPS = 10_000.0, 1e-6


class LanguageMoE(nn.Module):
    r"""A decoder that maps tokens (B, S) int64 to logits (B, S, V) of the next tokens. ``language_moe`` builds one.

    It is made of an embedding, blocks, an RMSNorm and a linear head. The logits at position s depend on the tokens up
    to s alone, as long as the routers choose for each token by itself (``ExpertChoice`` and ``Capacity`` do not).

    Args:
        blocks: the blocks, all of width D.
        vocab: V.
        tied: whether the head's matrix is that of the embedding.

    Raises:
        UserError: there is no block, or the blocks differ in width. In forward: the tokens are not (B, S) integers, or,
            on a CPU, one is not in the vocabulary.

    >>> model = language_moe(256, width=32, depth=2, num_experts=4, hidden=16)
    >>> model(torch.tensor([[72, 101, 108]])).shape
    torch.Size([1, 3, 256])
    >>> model.generate(torch.tensor([[72, 101, 108]]), 5, temperature=0).shape
    torch.Size([1, 8])
    """

    def __init__(self, blocks: Sequence[DecoderBlock], vocab: int, *, tied: bool = True) -> None:
        super().__init__()
        widths = sorted({block.attention.dim for block in blocks})
        if not widths:
            raise UserError("LanguageMoE: depth must be at least 1")
        if len(widths) > 1:
            raise UserError(f"LanguageMoE: all blocks must be equally wide, got {widths}")
        self.vocab, self.tied = vocab, tied
        self.embedding = nn.Embedding(vocab, widths[0])
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(widths[0], eps=RMS_EPS)
        self.head = nn.Linear(widths[0], vocab, bias=False)
        nn.init.normal_(self.embedding.weight, std=widths[0] ** -0.5)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return logits (B, S, V) for tokens (B, S).

        Args:
            cache: keys and values of earlier tokens; those of these tokens are added to it.
        """
        x = self.embedding(self._checked(tokens))
        for block in self.blocks:
            x = block(x, cache)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def _checked(self, tokens: Tensor) -> Tensor:
        """The tokens as int64; a device, a graph and a transform are not asked for their values."""
        if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise UserError(f"LanguageMoE: takes tokens (B, S) of integers, got {tokens.dtype} {tuple(tokens.shape)}")
        tokens = tokens.long()
        traced = torch.compiler.is_compiling() or transforming() or type(tokens) is not Tensor
        if tokens.device.type == "cpu" and tokens.numel() and not traced:
            least, most = (int(end) for end in tokens.aminmax())
            if least < 0 or most >= self.vocab:
                wrong = least if least < 0 else most
                raise UserError(f"LanguageMoE: token {wrong} is not in the vocabulary, which has 0 to {self.vocab - 1}")
        return tokens

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        count: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        cached: bool = True,
    ) -> Tensor:
        """Continue ``tokens`` (B, S) by ``count`` tokens, drawn one by one in evaluation mode: (B, S + count).

        Args:
            temperature: the number by which logits are divided; with 0 the largest is taken.
            top_k: from how many of the largest logits a token is drawn; None is all.
            generator: the generator of the draws, on the device of the tokens; None is torch's own.
            cached: whether keys and values are kept instead of computed again for every token.

        Raises:
            UserError: there is no token to start from, ``count`` or the temperature is negative, or top_k < 1.
        """
        if tokens.shape[-1] < 1 or count < 0:
            raise UserError(f"generate: needs a token to start from and count >= 0, got {tokens.shape[-1]} and {count}")
        if not temperature >= 0 or (top_k is not None and top_k < 1):
            raise UserError(f"generate: temperature must be >= 0 and top_k >= 1, got {temperature} and {top_k}")
        cache, unread = (Cache() if cached else None), tokens
        with evaluation_mode(self):
            for _ in range(count):
                logits = self(unread, cache)[:, -1].float()
                drawn = _draw(logits, temperature, top_k, generator)
                tokens = torch.cat([tokens, drawn], 1)
                unread = drawn if cached else tokens
        return tokens


class DecoderBlock(nn.Module):
    r"""A decoder block of causal attention and an MoE layer, each behind an RMSNorm and on a residual path.

    .. math:: x \leftarrow x + \mathrm{Attention}(\mathrm{RMS}(x)), \qquad x \leftarrow x +
        \mathrm{MoE}(\mathrm{RMS}(x))

    If a part of the layer reads the side information "attended" (``BasisScorer``), it gets the attention's output.

    Args:
        moe: the MoE layer, of width D.
        heads: the number of attention heads.
    """

    def __init__(self, moe: MoE, heads: int) -> None:
        super().__init__()
        dim = moe.router.scorer.dim
        self.heads = heads
        self.attention_norm, self.attention = nn.RMSNorm(dim, eps=RMS_EPS), CausalAttention(dim, heads)
        self.moe_norm, self.moe = nn.RMSNorm(dim, eps=RMS_EPS), moe

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        attended = self.attention(self.attention_norm(x), cache)
        context = Context(tokens={"attended": attended}) if "attended" in self.moe.reads else None
        x = x + attended
        y: Tensor = x + self.moe(self.moe_norm(x), context=context)
        return y


class CausalAttention(nn.Module):
    """Causal self-attention with rotary positions, x (B, S, D) -> (B, S, D): a token sees itself and those before it.

    Args:
        dim: D, a multiple of 2 * heads.
        heads: the number of heads.

    Raises:
        UserError: D is not a multiple of 2 * heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % (2 * heads):
            raise UserError(f"CausalAttention: the width D={dim} must be a multiple of twice the {heads} heads")
        self.dim, self.heads = dim, heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, S, D / heads)
        before = 0 if cache is None else cache.length(self)
        q, k = rotated(q, before), rotated(k, before)
        if cache is not None:
            k, v = cache.add(self, k, v)
        length, seen, sees = q.shape[2], k.shape[2], None
        if before and length > 1:  # a single token sees all before it
            sees = torch.ones(length, seen, dtype=torch.bool, device=x.device).tril(before)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, is_causal=not before)
        joined: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return joined


class Cache:
    """Keeps the keys and values (B, heads, S, D / heads) of the tokens that each attention has read."""

    def __init__(self) -> None:
        self.read: dict[CausalAttention, tuple[Tensor, Tensor]] = {}

    def length(self, attention: CausalAttention) -> int:
        """Return how many tokens ``attention`` has read."""
        return self.read[attention][0].shape[2] if attention in self.read else 0

    def add(self, attention: CausalAttention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values, and return those of all tokens that ``attention`` has read."""
        if attention in self.read:
            k, v = (torch.cat([old, new], 2) for old, new in zip(self.read[attention], (k, v), strict=True))
        self.read[attention] = k, v
        return k, v


def rotated(x: Tensor, first: int = 0) -> Tensor:
    r"""Apply rotary positions: turn coordinates i and i + d/2 of x (..., S, d) by the angle :math:`p\,\theta^{-2i/d}`.

    p is the position of the token, and theta is 10,000.

    Args:
        first: the position of the first of the S tokens.
    """
    half = x.shape[-1] // 2
    precise = torch.promote_types(x.dtype, torch.float32)
    turns = ROPE_BASE ** (-torch.arange(half, device=x.device, dtype=precise) / half)
    angles = torch.arange(first, first + x.shape[-2], device=x.device)[:, None] * turns
    cos, sin = angles.cos(), angles.sin()
    a, b = x.to(precise).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def balanced_router(dim: int, num_experts: int) -> Router:
    """Make a linear gate with two experts a token and a loss-free selection bias; with E < 3 all experts are used."""
    scorer = LinearScorer(dim, num_experts)
    if num_experts < 3:
        return Router(scorer, Soft())
    return Router(scorer, Balanced(2, score="softmax", normalize=False, rate=1e-2))


def language_moe(
    vocab: int,
    *,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    num_experts: int = 8,
    hidden: int = 128,
    spare: int = 0,
    router: RouterFactory = balanced_router,
    experts: ExpertsFactory | None = None,
    tied: bool = True,
) -> LanguageMoE:
    """Build a ``LanguageMoE`` of ``depth`` equal blocks.

    With the same seed, two models that differ only in their routers start with the same other weights, because the
    routers' draws leave torch's random generator as it was. Embeddings start at the standard deviation D^-1/2, so a
    tied head gives logits of variance 1, and what is added to the residual stream starts small, so that its variance
    stays bounded at any depth. With one expert the model is dense; one expert of width k * H is as wide as k experts of
    width H.

    Args:
        vocab, width, depth, heads, num_experts, hidden: V, D, the number of blocks, the heads of each attention, E, H.
        spare: how many hidden units of each expert start at zero, for later corrections (``FeedForward``).
        router: a function (D, E) -> router; the default is ``balanced_router``.
        experts: a function (E, D, H) -> bank; None makes SwiGLU networks with ``spare`` units.
        tied: whether the head's matrix is that of the embedding.
    """
    make_bank = experts or partial(FeedForward, activation="swiglu", spare=spare)
    banks = [make_bank(num_experts, width, hidden) for _ in range(depth)]
    blocks = [DecoderBlock(layer, heads) for layer in layers_of(banks, router, width, num_experts)]
    with torch.no_grad():
        for block in blocks:
            block.attention.out.weight.mul_((2 * depth) ** -0.5)
            if isinstance(block.moe.experts, FeedForward):
                block.moe.experts.down.mul_((2 * depth) ** -0.5)
    return LanguageMoE(blocks, vocab, tied=tied)


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token (B, 1) for each row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    below = logits - logits.amax(-1, keepdim=True)  # 0 at the largest, however small the temperature
    scaled = below / max(temperature, torch.finfo(below.dtype).tiny)
    if top_k is not None and top_k < logits.shape[-1]:
        scaled = scaled.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator)
