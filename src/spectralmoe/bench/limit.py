"""The limit: the arithmetic of a layer and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.bench.case import Candidate
from spectralmoe.bench.problem import Problem

__all__ = ["IdealLayer", "matmul_rate"]

How = Literal["bmm", "mm"]


class IdealLayer:
    """The expert GEMMs and the activation on ideally balanced experts: no router, no permutation, no autograd.

    Every expert has N K / E rows (rounded up; where there are fewer slots than experts, one row for each slot). All
    matmuls of a forward and a backward are there: outputs, gradients of the inputs and of the weights.

    Args:
        how: "bmm", or "mm" for a loop over the experts.

    >>> from spectralmoe.bench.problem import Sizes
    >>> problem = Problem(Sizes(6, 8, 16, 4, 2), "gelu", torch.float32, torch.device("cpu"))
    >>> [tuple(t.shape) for t in IdealLayer(problem, "mm").forward_and_backward()]
    [(4, 3, 8), (4, 3, 8), (4, 16, 8), (4, 8, 16)]
    """

    def __init__(self, problem: Problem, how: How) -> None:
        sizes = problem.sizes
        experts = min(sizes.e, sizes.n * sizes.k)
        rows = -(-sizes.n * sizes.k // experts)
        source = torch.Generator(problem.device).manual_seed(0)
        shape = (experts, rows, sizes.d)
        self.x, self.gradient = (
            torch.randn(shape, device=problem.device, generator=source).to(problem.dtype) for _ in range(2)
        )
        self.up, self.down = problem.up[:experts], problem.down[:experts]
        self._multiply = torch.bmm if how == "bmm" else _multiply_one_by_one
        self._act, self._act_backward = _ACTIVATIONS[problem.activation]

    def operands(self) -> tuple[Tensor, ...]:
        """The tensors that exist before a run."""
        return self.x, self.up, self.down

    def forward(self) -> Tensor:
        """y = act(x up') down'."""
        return self._multiply(self._act(self._multiply(self.x, self.up.mT)), self.down.mT)

    def forward_and_backward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, and the gradients of x, up and down."""
        h = self._multiply(self.x, self.up.mT)
        a = self._act(h)
        y = self._multiply(a, self.down.mT)
        d_down = self._multiply(self.gradient.mT, a)
        d_h = self._act_backward(self._multiply(self.gradient, self.down), h)
        return y, self._multiply(d_h, self.up), self._multiply(d_h.mT, self.x), d_down


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int) -> Candidate:
    """One large matmul, for the share of the machine's own rate."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return Candidate(f"matmul {size}", lambda: torch.mm(a, b), "rate", flops=2.0 * size**3)


def _multiply_one_by_one(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for left, right, place in zip(a.unbind(), b.unbind(), out.unbind(), strict=True):
        torch.mm(left, right, out=place)
    return out


def _swiglu(h: Tensor) -> Tensor:
    gate, value = h.chunk(2, -1)
    return F.silu(gate) * value


def _swiglu_backward(d_a: Tensor, h: Tensor) -> Tensor:
    gate, value = h.chunk(2, -1)
    d_h = torch.empty_like(h)
    d_gate, d_value = d_h.chunk(2, -1)
    torch.mul(d_a, F.silu(gate), out=d_value)
    torch.ops.aten.silu_backward.grad_input(d_a * value, gate, grad_input=d_gate)
    return d_h


_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "swiglu": (_swiglu, _swiglu_backward),
}
