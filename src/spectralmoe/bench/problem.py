"""One MoE layer as a problem: sizes, weights, tokens, and the right output."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.routing import Routing

__all__ = ["Activation", "Form", "Problem", "Sizes", "dtype_name", "experts_one_by_one", "route", "title"]

Activation = Literal["gelu", "swiglu"]
Form = Literal["forward", "forward and backward"]

MARGIN = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Tokens keep this distance between the logits of the last chosen expert and the next: no rounding changes a choice."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """N tokens, D width, H hidden width, E experts, K slots a token.

    >>> print(Sizes(4096, 256, 1024, 8, 2))
    N4096 D256 H1024 E8 k2
    """

    n: int
    d: int
    h: int
    e: int
    k: int

    def __str__(self) -> str:
        return f"N{self.n} D{self.d} H{self.h} E{self.e} k{self.k}"

    def flops(self, activation: Activation, form: Form) -> float:
        """Of the expert GEMMs alone."""
        matrices = 3 if activation == "swiglu" else 2
        return 2.0 * self.n * self.k * self.d * self.h * matrices * (1 if form == "forward" else 3)


def title(sizes: Sizes, activation: Activation, dtype: torch.dtype, form: Form) -> str:
    """The name of a case about one layer."""
    return f"{sizes} {activation} {dtype_name(dtype)} {form}"


def dtype_name(dtype: torch.dtype) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")


class Problem:
    """A softmax top-k router with renormalised weights in front of E experts without bias, and tokens to send through.

    All candidates share the weights: ``router`` (E, D), ``up`` (E, H, D) or (E, 2H, D) for swiglu, ``down`` (E, D, H).
    The router's matrix is fp32 and holds numbers that ``dtype`` has too.

    Args:
        batches: how many batches of N tokens there are. Each run of any candidate takes the next one, so that it meets
            neither experts nor kernels that another has just warmed up for it.
        weights: share those of another problem.

    Attributes:
        stream: the batches, each (N, D), again and again.  x: the first.  gradient: of the output, (N, D).
    """

    def __init__(
        self,
        sizes: Sizes,
        activation: Activation,
        dtype: torch.dtype,
        device: torch.device,
        *,
        batches: int = 1,
        weights: Problem | None = None,
        seed: int = 0,
    ) -> None:
        self.sizes, self.activation, self.dtype, self.device = sizes, activation, dtype, device
        source = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, fan_in: int) -> Tensor:
            drawn: Tensor = torch.randn(shape, device=device, generator=source) * fan_in**-0.5
            return drawn.to(dtype)

        d, h, e = sizes.d, sizes.h, sizes.e
        if weights is None:
            self.router = normal(e, d, fan_in=d).float()
            self.up = normal(e, 2 * h if activation == "swiglu" else h, d, fan_in=d)
            self.down = normal(e, d, h, fan_in=h)
        else:
            self.router, self.up, self.down = weights.router, weights.up, weights.down
        tokens = self._clear_tokens(sizes.n * batches, source)
        self.stream = itertools.cycle(tokens.split(sizes.n))
        self.x, self.gradient = tokens[: sizes.n], normal(sizes.n, d, fan_in=1)

    def title(self, form: Form) -> str:
        """The name of a case about this problem."""
        return title(self.sizes, self.activation, self.dtype, form)

    def flops(self, form: Form) -> float:
        """Of the expert GEMMs alone."""
        return self.sizes.flops(self.activation, form)

    def _clear_tokens(self, count: int, source: torch.Generator) -> Tensor:
        """``count`` normal tokens whose choice of experts no rounding can change."""
        kept, have = [], 0
        while have < count:
            x = torch.randn(max(count, 64), self.sizes.d, device=self.device, generator=source).to(self.dtype)
            if self.sizes.k < self.sizes.e:
                best = (x.double() @ self.router.double().T).topk(self.sizes.k + 1).values
                x = x[best[:, -2] - best[:, -1] > MARGIN[self.dtype]]
            kept.append(x)
            have += len(x)
        return torch.cat(kept)[:count].contiguous()

    @cached_property
    def routing(self) -> Routing:
        """What the router decides for ``x``, without gradient."""
        return route(self.x.float(), self.router, self.sizes.k)

    @cached_property
    def output(self) -> dict[str, Tensor]:
        """The right output for ``x``, in float64."""
        with torch.no_grad():
            routing = route(self.x.double(), self.router.double(), self.sizes.k)
            return {"output": experts_one_by_one(self.x.double(), routing, self.up, self.down, self.activation)}

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """The right output and gradients (of x, router, up, down), in float64."""
        x, router = (t.double().requires_grad_() for t in (self.x, self.router))
        up, down = ([w.double().requires_grad_() for w in stack] for stack in (self.up, self.down))
        y = experts_one_by_one(x, route(x, router, self.sizes.k), up, down, self.activation)
        y.backward(self.gradient.double())
        stacks = {"up": up, "down": down}
        stacked = {name: torch.stack([_gradient(w) for w in stack]) for name, stack in stacks.items()}
        return {"output": y.detach(), "x": _gradient(x), "router": _gradient(router), **stacked}

    def truth(self, form: Form) -> dict[str, Tensor]:
        """The output and the gradients that a candidate must compute."""
        return self.output if form == "forward" else self.gradients


def route(x: Tensor, router: Tensor, k: int) -> Routing:
    """Softmax scores, the k largest, renormalised to sum 1 (a single one is left as it is)."""
    logits = x @ router.T
    scores = logits.softmax(-1)
    best = scores.topk(k)
    weights = best.values / best.values.sum(-1, keepdim=True) if k > 1 else best.values
    return Routing(logits, weights, best.indices, scores)


def experts_one_by_one(
    x: Tensor, routing: Routing, up: Tensor | Sequence[Tensor], down: Tensor | Sequence[Tensor], activation: Activation
) -> Tensor:
    """What ``dispatch="loop"`` gives, each expert on all its tokens at once, in the precision of ``x``."""
    y = torch.zeros_like(x)
    for e, (first, second) in enumerate(zip(up, down, strict=True)):
        tokens, slots = (routing.indices == e).nonzero(as_tuple=True)
        if len(tokens):
            h = F.linear(x[tokens], first.to(x.dtype))
            a = F.gelu(h) if activation == "gelu" else F.silu(h[:, : h.shape[1] // 2]) * h[:, h.shape[1] // 2 :]
            y.index_add_(0, tokens, F.linear(a, second.to(x.dtype)) * routing.weights[tokens, slots, None])
    return y


def _gradient(leaf: Tensor) -> Tensor:
    """An expert that no token chose has a gradient of zero."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
