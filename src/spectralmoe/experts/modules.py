"""Any modules as experts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from spectralmoe.experts.base import Experts

__all__ = ["ModuleExperts"]


class ModuleExperts(Experts):
    """A bank of given modules, each mapping rows (M, *S) to rows of that shape: one call an expert, which takes longer.

    >>> import torch
    >>> bank = ModuleExperts([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())])
    >>> bank(torch.randn(5, 8), torch.tensor([3, 2])).shape
    torch.Size([5, 8])
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__(len(modules))
        self.experts = nn.ModuleList(modules)

    def spec_arguments(self) -> dict[str, object]:
        """Constructor arguments that are not attributes of the same name."""
        return {"modules": self.experts}

    def expert(self, x: Tensor, e: int) -> Tensor:
        y: Tensor = self.experts[e](x)
        return y

    def expert_parameters(self, e: int) -> dict[str, Tensor]:
        return dict(self.experts[e].named_parameters())
