"""Module experts: any modules of your own as experts."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError, first_line
from spectralmoe.experts.base import Experts
from spectralmoe.experts.flops import count_flops
from spectralmoe.stacks import chosen_experts, shares_of
from spectralmoe.torch_private import in_backward

__all__ = ["ModuleExperts"]


class ModuleExperts(Experts):
    """Holds given modules as experts; each maps rows (M, *S) to rows of the same shape.

    Each module is called by itself, which is slower than experts with stacked weights, such as ``FeedForward``.

    Args:
        modules: the experts.
        reads: names of side information that the modules read. Its P numbers stand behind the token, so the modules
            then map (M, D + P) to (M, D).

    >>> import torch
    >>> bank = ModuleExperts([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())])
    >>> bank(torch.randn(5, 8), torch.tensor([3, 2])).shape
    torch.Size([5, 8])
    """

    def __init__(self, modules: Sequence[nn.Module], *, reads: Sequence[str] = ()) -> None:
        super().__init__(len(modules))
        self.experts, self.reads = nn.ModuleList(modules), tuple(reads)

    def spec_arguments(self) -> dict[str, object]:
        """Return the constructor arguments that are not attributes of the same name."""
        return {"modules": self.experts}

    def expert(self, x: Tensor, e: int) -> Tensor:
        try:
            y: Tensor = self.experts[e](x)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if torch.compiler.is_compiling() or len(x) or in_backward():
                raise
            raise UserError(
                f"ModuleExperts: expert {e} ({type(self.experts[e]).__name__}) must take zero rows too, as one gets "
                f"that no token chose, but of {tuple(x.shape)} it says: {first_line(error)}"
            ) from error
        return y

    def expert_parameters(self, e: int) -> dict[str, Tensor]:
        return dict(self.experts[e].named_parameters())

    def costs(self, shape: Sequence[int] = ()) -> Tensor:
        """Count the floating-point operations of each module on one row of ``shape`` (*S): (E,) float64.

        Without a shape it returns two for each number in the module's matrices and kernels. That is the cost of one
        position of the row, without what grows faster than the row, such as a Fourier transform.
        """
        if not shape:
            return super().costs()
        return torch.tensor([count_flops(module, shape) for module in self.experts], dtype=torch.float64)

    def select(self, indices: Sequence[int] | Tensor) -> ModuleExperts:
        chosen = chosen_experts("ModuleExperts.select", indices, self.num_experts)
        return self._with([copy.deepcopy(self.experts[e]) for e in chosen])

    def averaged(
        self, groups: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None
    ) -> ModuleExperts:
        """Return a bank of means, as ``Experts.averaged``; the modules of a group must be built alike.

        Raises:
            UserError: two modules of a group differ in class, or in names or shapes of their tensors.
        """
        members, shares = shares_of(f"{type(self).__name__}.averaged", groups, weights, self.num_experts)
        means = [self._mean(group, share.tolist()) for group, share in zip(members, shares, strict=True)]
        return self._with(means)

    @torch.no_grad()
    def _mean(self, group: list[int], shares: list[float]) -> nn.Module:
        states = [self.experts[e].state_dict() for e in group]
        forms = [
            (type(self.experts[e]), {n: t.shape for n, t in state.items()})
            for e, state in zip(group, states, strict=True)
        ]
        for e, form in zip(group, forms, strict=True):
            if form != forms[0]:
                raise UserError(f"ModuleExperts: experts {group[0]} and {e} are not built alike, so they have no mean")
        mean = copy.deepcopy(self.experts[group[0]])
        for name, value in mean.state_dict().items():
            if value.is_floating_point():
                value.copy_(sum(share * state[name].double() for share, state in zip(shares, states, strict=True)))
        return mean

    def _with(self, modules: Sequence[nn.Module]) -> ModuleExperts:
        """A copy of this bank with other modules."""
        bank = copy.deepcopy(self, {id(self.experts): nn.ModuleList(modules)})
        bank.num_experts = len(modules)
        return bank
