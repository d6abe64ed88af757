"""What the complaint tests share: a small network of MoE blocks, and layers whose choices are set by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from seeds import shifted
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK

D, E, H = 16, 4, 24


class Block(nn.Module):
    """x + MoE(tanh(W x)), a block of somebody's model."""

    def __init__(self, selector: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.moe = MoE(Router(LinearScorer(D, E), selector), FeedForward(E, D, H))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.linear(x).tanh())


class Net(nn.Module):
    """Blocks in a row, which may be checkpointed; ``options`` go to ``torch.utils.checkpoint.checkpoint``."""

    def __init__(self, selector: Callable[[], Any], depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(selector()) for _ in range(depth))
        self.options: dict[str, Any] | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.options is None else checkpoint(block, x, **self.options)
        return x


@pytest.fixture(scope="session")
def make_net() -> Callable[..., Net]:
    """``make_net(selector=TopK(2), depth=2, **checkpointing)``: always the same weights; tokens are 16 wide, E is 4."""

    def make(selector: Callable[[], Any] = lambda: TopK(2), depth: int = 2, **checkpointing: Any) -> Net:
        with torch.random.fork_rng():
            torch.manual_seed(shifted(1))
            net = Net(selector, depth)
        net.options = checkpointing or None
        return net

    return make


@pytest.fixture(scope="session")
def chooser() -> Callable[..., MoE]:
    """``chooser(selector)``: a layer whose router reads the logits from the first E numbers of a token."""

    def make(selector: Any, **options: Any) -> MoE:
        layer = MoE(Router(LinearScorer(D, E), selector), FeedForward(E, D, H), **options)
        with torch.no_grad():
            layer.router.scorer.weight.copy_(torch.eye(E, D))
        return layer

    return make


@pytest.fixture(scope="session")
def tokens_for() -> Callable[..., Tensor]:
    """``tokens_for([0, 2, 2])``: tokens that a ``chooser`` sends to these experts first, by a margin of ``logit``."""

    def make(choices: Sequence[int], logit: float = 4.0) -> Tensor:
        x = 0.1 * torch.randn(len(choices), D)
        x[torch.arange(len(choices)), torch.tensor(choices)] += logit
        return x

    return make


@pytest.fixture(scope="session")
def router_grads() -> Callable[[nn.Module], list[Tensor]]:
    """The gradients of all routing matrices of a model."""

    def of(model: nn.Module) -> list[Tensor]:
        return [p.grad for name, p in model.named_parameters() if ".scorer." in name and p.grad is not None]

    return of
