"""What the adaptation tests share: tiny networks trained on the digits, and what every test asks of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from seeds import shifted
from torch import Tensor, nn

from spectralmoe import FeedForward, LinearScorer, ModuleExperts, MoE, PrototypeScorer, Router, Soft, TopK
from spectralmoe.adaptation import Guard
from spectralmoe.data.image_data import ImageData, load_data
from spectralmoe.models import sr_moe
from spectralmoe.training.loop import train
from spectralmoe.training.settings import Optimization
from spectralmoe.training.tasks import ImageTask

ROUTERS: dict[str, Any] = {
    "top1": lambda d, e: Router(LinearScorer(d, e), TopK(1)),
    "top2": lambda d, e: Router(LinearScorer(d, e), TopK(2)),
    "soft": lambda d, e: Router(PrototypeScorer(d, e, temperature=d**0.5 / 2), Soft()),
}


@pytest.fixture(scope="session")
def data() -> ImageData:
    return load_data("digits").subset(200)


@pytest.fixture(scope="session")
def _trained(data: ImageData) -> dict[str, nn.Module]:
    found = {}
    for name, router in ROUTERS.items():
        torch.manual_seed(shifted(0))
        model = sr_moe(10, width=16, depth=2, num_experts=4, hidden=8, spare=8, router=router, centred=name == "soft")
        train(model, ImageTask(data), Optimization(epochs=6, batch_size=32))
        found[name] = model.eval()
    return found


@pytest.fixture(scope="session")
def network(_trained: dict[str, nn.Module]) -> Callable[[str], nn.Module]:
    """``network(name)``: a copy of the trained network called "top1", "top2" or "soft"."""
    return lambda name: copy.deepcopy(_trained[name])


@pytest.fixture(scope="session")
def make_guard(data: ImageData) -> Callable[..., Guard]:
    """``make_guard(**arguments)``: a guard over the validation part."""
    return partial(Guard, [(data.validation.images, data.validation.labels)])


@pytest.fixture(scope="session")
def wrong(data: ImageData) -> Callable[..., list[int]]:
    """``wrong(model, count)``: the first test images that the model gets wrong."""

    @torch.no_grad()
    def find(model: nn.Module, count: int) -> list[int]:
        return (model(data.test.images).argmax(-1) != data.test.labels).nonzero().flatten()[:count].tolist()

    return find


@pytest.fixture(scope="session")
def snapshot() -> Callable[[nn.Module], dict[str, Tensor]]:
    """``snapshot(model)``: a copy of its state."""
    return lambda model: {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="session")
def changed() -> Callable[..., list[str]]:
    """``changed(model, state)``: what is not, bit by bit, as it was; "name[e]" for stacked experts."""

    def find(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
        found = []
        for name, value in model.state_dict().items():
            if torch.equal(value, state[name]):
                continue
            stacked = ".experts." in name and name.split(".")[-1] in ("up", "down", "up_bias", "down_bias")
            experts = [e for e in range(len(value)) if not torch.equal(value[e], state[name][e])] if stacked else []
            found += [f"{name}[{e}]" for e in experts] or [name]
        return found

    return find


@pytest.fixture(scope="session")
def untouched(snapshot: Any, changed: Any) -> Callable[..., Any]:
    """``with untouched(model)``: after the block all weights, buffers, modes and gradient flags are as before."""

    @contextmanager
    def check(model: nn.Module) -> Iterator[None]:
        state, modes = snapshot(model), [module.training for module in model.modules()]
        flags = [parameter.requires_grad for parameter in model.parameters()]
        yield
        assert changed(model, state) == []
        assert [module.training for module in model.modules()] == modes
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert all(parameter.grad is None for parameter in model.parameters())

    return check


class Pooled(nn.Module):
    """Sequences (B, S, D) -> logits: two residual MoE layers, mean over S, a linear head; no ``split``."""

    def __init__(self, bank: Callable[[], Any], k: int | None, classes: int) -> None:
        super().__init__()
        self.first, self.second = (
            MoE(Router(LinearScorer(6, 3), Soft() if k is None else TopK(k)), bank()) for _ in range(2)
        )
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = x + self.second(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


@pytest.fixture(scope="session")
def pooled() -> Callable[..., nn.Module]:
    """``pooled(kind="stacked", k=2, classes=4)``: a model without ``split`` on (B, S, 6); kind also "modules"."""
    banks = {
        "stacked": lambda: FeedForward(3, 6, 5, bias=True, spare=2),
        "modules": lambda: ModuleExperts([nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)) for _ in "abc"]),
    }

    def make(kind: str = "stacked", k: int | None = 2, classes: int = 4) -> nn.Module:
        torch.manual_seed(shifted(1))
        return Pooled(banks[kind], k, classes).eval()

    return make
