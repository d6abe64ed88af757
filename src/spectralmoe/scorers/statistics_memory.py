"""Statistics memory: it gives shifted inputs of a router or a layer the mean and the spread of the training tokens.

After the memory-guided adaptive instance normalisation of Yang et al., "Towards Generalized Range-View LiDAR
Segmentation in Adverse Weather", arXiv 2506.08979, module RDC, for the reflectance of range images. Written
from the equation; no authors' code was read. Differs: it stands in front of a router or an MoE layer, which that paper
does not have; it is made of running means instead of learned values, and aligns in evaluation alone; small groups of
tokens move less; a stream of inputs may share statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from spectralmoe.errors import UserError, check_whole, one_of
from spectralmoe.linalg import without_autocast
from spectralmoe.parts import Part, in_full_precision
from spectralmoe.sharding import assign_

__all__ = ["StatisticsMemory"]

_LEAST_SPREAD = 1e-3  # of the memory's: what varies less within a group is not blown up further


class StatisticsMemory(Part):
    r"""Aligns each group of tokens with the tokens of training: their mean and spread, feature by feature.

    .. math::
        a = \frac{x - m}{s}\,\bar\sigma + \bar\mu,\quad \bar\mu = \sum_p a_p \mu_p,\quad
        \bar\sigma^2 = \sum_p a_p \big(\sigma_p^2 + (\mu_p - \bar\mu)^2\big)

    m and s (D,) are the mean and the standard deviation of a group of n tokens. :math:`\mu_p` and :math:`\sigma_p` are
    those of the training tokens near slot p, one of P cluster centres. The share :math:`a_p` of slot p in a group is
    the mean over its tokens of :math:`\mathrm{softmax}_p(-\frac12 \|(x - \mu_p)/\sigma\|^2)`, with :math:`\sigma` the
    standard deviation of all training tokens. One slot undoes a shift :math:`x \mapsto c \odot x + b`, c > 0, of a
    whole group exactly, and makes all groups alike; more slots keep groups apart, and undo less of a shift.

    A group of n < ``least`` tokens says little of its mean and spread: m and :math:`s^2` are mixed with
    :math:`\bar\mu` and :math:`\bar\sigma^2`, whose share is :math:`1 - (n - 1)/(least - 1)`. A single token stays as
    it is.

    In training tokens pass unchanged, and the slots follow them after each step (``after_step`` or ``attach``) as
    running means without gradient. Evaluation aligns nothing before the first step. A layer takes the memory as
    ``MoE(..., memory=...)``. Elsewhere call it like any module, and after each step its ``statistics`` and ``update``.

    Args:
        dim: D.
        slots: P, how many cluster centres of the training tokens are kept apart.
        momentum: the share of the running means that a step keeps, in [0, 1); the first 1/(1 - momentum) steps count
            alike.
        where: "router" aligns what the router of a layer reads, "layer" also what its experts read.
        over: what a group is. "sample": the tokens x[b] of x (B, ..., D), or all rows of x (N, D). This is not for
            causal models, whose tokens must not depend on later ones, and not for rows that are whole images of few
            classes, which lose what tells the classes apart. "stream": all tokens that were given to ``observe``;
            before that, nothing is aligned.
        least: from how many tokens on a group's own statistics are used unmixed, at least 2.

    Raises:
        UserError: an argument is out of range, or there are several slots over a stream. In forward and ``observe``: x
            has another width, or the mask another shape.

    >>> from torch import zeros
    >>> memory, x = StatisticsMemory(4), torch.randn(1000, 4)
    >>> memory.update(memory.statistics(x, zeros(0)))  # as a step does
    >>> torch.allclose(memory.eval()(1.3 * x + 0.5), x, atol=1e-5)
    True

    With ``over="stream"`` a trained model adapts to a stream of shifted inputs without labels. Go layer by layer,
    because a layer reads what the layers before it have aligned; call ``forget`` first, so that the tape holds
    unaligned tokens::

        for name, layer in moe_layers(model.eval()).items():
            layer.memory.forget()
            with torch.no_grad(), record(model, keep=("tokens",)) as tape:
                for batch in shifted:
                    model(batch)
            for item in tape.layer(name):
                layer.memory.observe(item.tokens, item.routing.mask)
    """

    streams_tokens = True

    share: Tensor
    mean: Tensor
    variance: Tensor
    updates: Tensor
    stream_count: Tensor
    stream_mean: Tensor
    stream_variance: Tensor

    def __init__(
        self,
        dim: int,
        *,
        slots: int = 1,
        momentum: float = 0.99,
        where: Literal["router", "layer"] = "router",
        over: Literal["sample", "stream"] = "sample",
        least: int = 16,
    ) -> None:
        super().__init__()
        for name, value, smallest in (("dim", dim, 1), ("slots", slots, 1), ("least", least, 2)):
            check_whole("StatisticsMemory", name, value, smallest)
        if not 0 <= momentum < 1:
            raise UserError(f"StatisticsMemory: momentum must lie in [0, 1), got {momentum}")
        for name, word, known in (("where", where, ["router", "layer"]), ("over", over, ["sample", "stream"])):
            if word not in known:
                raise one_of(f"StatisticsMemory {name}", word, known)
        if over == "stream" and slots > 1:
            raise UserError(
                f"StatisticsMemory: over='stream' knows no groups to tell apart by slots={slots}; use slots=1"
            )
        self.dim, self.slots, self.momentum = dim, slots, momentum
        self.where, self.over, self.least = where, over, least
        start = torch.zeros(1, dim) if slots == 1 else torch.randn(slots, dim)  # apart, in spreads of the first tokens
        self.register_buffer("share", torch.full((slots,), 1 / slots))
        self.register_buffer("mean", start)
        self.register_buffer("variance", torch.ones(slots, dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("stream_count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("stream_mean", torch.zeros(dim))
        self.register_buffer("stream_variance", torch.zeros(dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Align x (B, ..., D) or (N, D) in evaluation; in training return x itself.

        Args:
            mask: (B, ...) or (N,), True for real tokens. Padding does not enter the statistics, and what is returned
                in its place has no meaning.
        """
        self._check(x, mask)
        if self.training:
            return x
        samples = 1 if x.dim() > 2 else 0  # how many leading dimensions count samples
        sizes = math.prod(x.shape[:samples]), math.prod(x.shape[samples:-1])
        groups = x.reshape(*sizes, self.dim).to(torch.promote_types(x.dtype, torch.float32))
        if mask is None:
            real = groups.new_ones(sizes)
        else:
            padding = ~mask.reshape(sizes).bool()
            groups, real = groups.masked_fill(padding[..., None], 0), (~padding).to(groups.dtype)
        return _aligned(groups, real, self).to(x.dtype).view(x.shape)

    def beside(self, queries: Tensor, units: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what the router and the experts of a layer read instead of ``queries`` and ``units``."""
        aligned = self(queries, mask)
        return aligned, aligned if self.where == "layer" else units

    def statistics(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Return sums over the tokens near each slot: their number, x - mu and its square; (P, 1 + 2D)."""
        return _sums(tokens.to(self.mean.dtype), self)

    def update(self, statistics: Tensor) -> None:
        """Move the slots by ``statistics``, summed over micro-batches and ranks."""
        count, shift, square = statistics.split([1, self.dim, self.dim], 1)
        usable = (count.sum() != 0) & statistics.isfinite().all()
        taken, updates = torch.stack([usable.long(), self.updates]).tolist()  # at once: on a device the host waits
        if not taken:
            return
        self.updates += 1
        if not updates:
            mean = shift.sum(0) / count.sum()
            variance = (square.sum(0) / count.sum() - mean.square()).clamp_min(0)
            assign_(self.mean, mean + variance.sqrt() * self.mean)
            assign_(self.variance, variance.expand_as(square))
            return
        weight = max(1 / (updates + 1), 1 - self.momentum)
        new = weight * count[:, 0] / count.sum()
        self.share.mul_(1 - weight).add_(new)
        part = (new / self.share.clamp_min(torch.finfo(new.dtype).tiny))[:, None]  # of a slot, the share that is new
        shift, square = (sums / count.clamp_min(torch.finfo(count.dtype).tiny) for sums in (shift, square))
        self.mean += part * shift
        assign_(self.variance, ((1 - part) * self.variance + part * square - (part * shift).square()).clamp_min(0))

    @torch.no_grad()
    def observe(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the tokens x (..., D), or those where ``mask`` (...) is True, to the statistics of the stream.

        Give it unaligned tokens: after the first call, what the layer reads is aligned. The statistics add up over the
        calls in this process; ``forget`` starts anew. Tokens that are not finite are left out.
        """
        self._check(x, mask)
        tokens = (x if mask is None else x[mask.bool()]).reshape(-1, self.dim).to(self.stream_mean.dtype)
        tokens = tokens[tokens.isfinite().all(-1)]
        if not len(tokens):
            return
        before = int(self.stream_count)
        part, shift = len(tokens) / (before + len(tokens)), tokens.mean(0) - self.stream_mean
        spread = (1 - part) * self.stream_variance + part * tokens.var(0, correction=0)
        self.stream_variance.copy_(spread + part * (1 - part) * shift.square())
        self.stream_mean.add_(part * shift)
        self.stream_count += len(tokens)

    def forget(self) -> None:
        """Forget the statistics of the stream; until ``observe`` is called again, nothing is aligned."""
        for buffer in (self.stream_count, self.stream_mean, self.stream_variance):
            buffer.zero_()

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.shape[-1] != self.dim:
            raise UserError(f"StatisticsMemory: tokens are {x.shape[-1]} wide, but it was made for D={self.dim}")
        if mask is not None and mask.shape != x.shape[:-1]:
            shapes = f"{tuple(mask.shape)}, but the tokens have {tuple(x.shape[:-1])}"
            raise UserError(f"StatisticsMemory: mask has shape {shapes}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatisticsMemory:
        super()._apply(in_full_precision(fn), recurse)  # type: ignore[no-untyped-call]
        return self


@without_autocast
def _aligned(x: Tensor, real: Tensor, memory: StatisticsMemory) -> Tensor:
    """Groups x (B, S, D), of which ``real`` (B, S) is 1 for tokens and 0 for padding, with the memory's statistics."""
    near, weight = _nearness(x, memory), real[..., None]
    count = real.sum(1)[:, None]
    filled = count.clamp_min(1)
    share = (near * weight).sum(1) / filled if memory.slots > 1 else x.new_ones(len(x), 1)
    goal, goal_variance = _mixture(share, memory)
    if memory.over == "stream":
        count = memory.stream_count.to(x.dtype).expand_as(count)
        mean, variance = (each.to(x.dtype).expand_as(goal) for each in (memory.stream_mean, memory.stream_variance))
    else:
        mean = x.sum(1) / filled
        variance = ((x - mean[:, None]).square() * weight).sum(1) / filled
    own = ((count - 1) / (memory.least - 1)).clamp(0, 1)
    mean, variance = goal + own * (mean - goal), goal_variance + own * (variance - goal_variance)
    floor = _LEAST_SPREAD**2 * goal_variance + torch.finfo(x.dtype).tiny
    gain = (goal_variance / torch.maximum(variance, floor)).clamp_min(torch.finfo(x.dtype).tiny).sqrt()
    aligned = (x - mean[:, None]) * gain[:, None] + goal[:, None]
    moves = (memory.updates > 0) & (count > 1)
    return torch.where(moves[..., None], aligned, x)


@without_autocast
def _sums(x: Tensor, memory: StatisticsMemory) -> Tensor:
    """``StatisticsMemory.statistics`` of the tokens x (N, D); at the first step mu is 0 and all slots share alike."""
    if int(memory.updates):
        near, centre = _nearness(x, memory), memory.share @ memory.mean
        offset = memory.mean - centre
    else:
        x = x.double()  # of squares far from zero a small variance is left
        near, centre = x.new_full((len(x), memory.slots), 1 / memory.slots), x.new_zeros(memory.dim)
        offset = torch.zeros_like(memory.mean, dtype=x.dtype)
    y, count = x - centre, near.sum(0)[:, None]
    first, second = near.T @ y, near.T @ y.square()
    return torch.cat([count, first - count * offset, second - 2 * offset * first + count * offset.square()], 1)


def _nearness(x: Tensor, memory: StatisticsMemory) -> Tensor:
    """How much each token x (..., D) belongs to each slot: (..., P), rows of sum 1."""
    if memory.slots == 1:
        return x.new_ones(*x.shape[:-1], 1)
    _, variance = _mixture(memory.share.to(x.dtype)[None], memory)
    spread = variance.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
    scaled, slots = x / spread, memory.mean.to(x.dtype) / spread
    return (scaled @ slots.T - slots.square().sum(-1) / 2).softmax(-1)


def _mixture(share: Tensor, memory: StatisticsMemory) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, D) of tokens of which ``share`` (B, P) belongs to each slot."""
    means, variances = memory.mean.to(share.dtype), memory.variance.to(share.dtype)
    mean = share @ means
    return mean, share @ variances + (share[..., None] * (means - mean[:, None]).square()).sum(1)
