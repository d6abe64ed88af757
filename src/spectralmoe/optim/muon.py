"""Muon: an optimizer that makes all singular values of a matrix's momentum about equal before it steps.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024),
https://kellerjordan.github.io/posts/muon; the size of a step as in Liu et al., "Muon is Scalable for LLM Training",
arXiv 2502.16982, section 2.2. ``torch.optim.Muon`` is the same for single matrices. Differs: each matrix of a stack
(E, H, D), such as the experts of a layer, is treated by itself; the iteration runs in fp32 (theirs in bf16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectralmoe.errors import UserError
from spectralmoe.optim.plain import Rates
from spectralmoe.optim.together import Together
from spectralmoe.steps import param_groups

__all__ = ["Muon", "muon", "orthogonalised"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(Optimizer):
    r"""Steps along orthogonalised momentum, with decoupled weight decay.

    .. math::
        M \leftarrow \mu M + (1 - \mu) G, \qquad
        W \leftarrow (1 - \eta\lambda) W - 0.2\,\eta\sqrt{\max(H, D)}\;\mathrm{orth}((1 - \mu) G + \mu M)

    G is the gradient of a matrix W (H, D), M its momentum, and orth is ``orthogonalised``. The factor
    :math:`0.2\sqrt{\max(H, D)}` gives a step about the root mean square of an AdamW step, so that AdamW's learning
    rates fit.

    Args:
        params: matrices (H, D) and stacks of matrices (E, H, D), or groups of them.
        lr, weight_decay: eta and lambda.
        momentum: mu.

    Raises:
        UserError: a parameter has neither two nor three dimensions.

    >>> w = nn.Parameter(torch.zeros(2, 2, 2))
    >>> optimizer = Muon([w], lr=0.1)
    >>> (w * torch.tensor([[1.0, 0.0], [0.0, 1.0]])).sum().backward()
    >>> optimizer.step()
    >>> bool((w.diagonal(dim1=1, dim2=2) < -0.02).all())
    True
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, weight_decay: float = 0.0, *, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    raise UserError(
                        f"Muon: takes matrices and stacks of them, got a parameter of shape {tuple(parameter.shape)}; "
                        "give it to AdamW"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step with all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, mu = self.state[parameter], group["momentum"]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        average = state["momentum"].lerp_(gradient, 1 - mu)
        direction = orthogonalised(gradient.lerp(average, mu))
        size = 0.2 * group["lr"] * max(parameter.shape[-2:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction.to(parameter.dtype), alpha=-size)


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    r"""Move the singular values of each matrix (..., H, D) close to 1, between about 0.7 and 1.2; zeros stay zeros.

    It repeats :math:`X \leftarrow a X + (b X X^\top + c (X X^\top)^2) X`, ``steps`` times, from
    :math:`X = G / \|G\|_F`.

    >>> orthogonalised(torch.tensor([[3.0, 0.0], [0.0, 2.0]])).svd().S.sub(1).abs().max() < 0.35
    tensor(True)
    """
    a, b, c = _COEFFICIENTS
    x: Tensor = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def muon(model: nn.Module, settings: Rates) -> Optimizer:
    """Muon for matrices and the stacked matrices of experts, AdamW for the rest, as one optimizer."""
    decayed, exempt = param_groups(model, settings.weight_decay)
    matrices = {**decayed, "params": [p for p in decayed["params"] if p.dim() in (2, 3)]}
    others = {**decayed, "params": [p for p in decayed["params"] if p.dim() not in (2, 3)]}
    rest = [group for group in (others, exempt) if group["params"]]
    if not matrices["params"]:
        return torch.optim.AdamW(rest or [others], lr=settings.lr)
    first = Muon([matrices], lr=settings.lr)
    return Together(first, torch.optim.AdamW(rest, lr=settings.lr)) if rest else first
