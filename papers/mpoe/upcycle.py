"""What a cell is: a dense decoder learns a text, its networks become experts in one form or another, and it goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
from spectralmoe.diagnostics.measure import mean_of
from spectralmoe.experiments.cards import Desk, Trained, small_text, try_settings
from spectralmoe.experiments.cards.contest import measures
from spectralmoe.experts import Experts, MPOExperts
from spectralmoe.layers import moe_layers
from spectralmoe.models import LanguageMoE
from spectralmoe.optim import make_optimizer
from spectralmoe.presets import find_preset
from spectralmoe.training.loop import train
from spectralmoe.training.settings import Optimization
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks import Task, open_task

__all__ = ["HIDDEN", "NARROW", "ROWS", "Sizes", "equal_width", "finetuned", "run_cell", "slowed", "start", "tune_row"]

WIDTH, HIDDEN, EXPERTS = 64, 128, 8
FACTORS = ((4, 4, 4), (4, 8, 4))
SWITCH, PRODUCTS = "switch", "products"


class Row(NamedTuple):
    """How a row goes on from the dense start.

    Attributes:
        bank: copies of the dense network, or matrix products of it; None: the network as it is.
        optimizer: what stands around AdamW, as a row of a comparison says it.
        cut: its start is as narrow as makes its experts as many numbers as the matrix products.
    """

    bank: str | None
    optimizer: dict[str, Any] | None = None
    cut: bool = False


ROWS: Mapping[str, Row] = {
    "dense": Row(None),
    "switch": Row(SWITCH),
    "switch, cut": Row(SWITCH, cut=True),
    "mpoe": Row(PRODUCTS),
    "mpoe + mask": Row(PRODUCTS, {"type": "mask_central"}),
    "mpoe + slow": Row(PRODUCTS, {"type": "upcycle:slowed"}),
}


def equal_width() -> int:
    """The hidden width at which ``FeedForward`` has as many numbers as the matrix products."""
    numbers = sum(p.numel() for p in MPOExperts(EXPERTS, WIDTH, HIDDEN, factors=FACTORS).parameters())
    return numbers // (2 * EXPERTS * WIDTH)


NARROW = equal_width()


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one form of the card.

    Attributes:
        windows: training windows of 64 bytes; the dense start reads each once, and each row once more.
        tune_windows: those of a try.
        rates: learning rates that every row tries.
    """

    windows: int
    tune_windows: int
    seeds: int
    rates: tuple[float, ...] = (3e-3, 1e-3, 6e-3)
    batch_size: int = 4
    start_rate: float = 3e-3

    def budget(self, seed: int, rate: float) -> Optimization:
        """Of what follows the start; the order of the text is another there."""
        return Optimization(epochs=1, batch_size=self.batch_size, lr=rate, seed=1_000 + seed)

    def run(self, windows: int, seed: int = 0, hidden: int = HIDDEN) -> TrainSettings:
        """The run of a dense start, ``hidden`` wide."""
        run = small_text(windows, num_experts=1, hidden=hidden, k=1)
        dense = {"preset": "dense", "experts": {"type": "feed_forward", "activation": "gelu"}}
        budget = Optimization(epochs=1, batch_size=self.batch_size, lr=self.start_rate, seed=seed)
        return run.model_copy(update={"router": dense, "optimization": budget})


def start(desk: Desk, seed: int, hidden: int, sizes: Sizes) -> LanguageMoE:
    """The dense decoder of a seed after its first look at the text."""

    def learn() -> tuple[nn.Module, Any]:
        run = sizes.run(sizes.windows, seed, hidden)
        task = _open(run)
        network = task.build(run)
        return network, train(network, task, run.optimization).epochs

    network, _ = desk.network(f"start-{hidden}-{seed}", learn)
    assert isinstance(network, LanguageMoE)
    return network.requires_grad_(True)


def upcycled(dense: LanguageMoE, row: Row, seed: int) -> LanguageMoE:
    """The decoder with its networks made into experts, all alike, behind routers that a seed draws."""
    network = copy.deepcopy(dense)
    torch.manual_seed(seed)
    for block in network.blocks if row.bank is not None else ():
        up, down = block.moe.experts.up[0].detach(), block.moe.experts.down[0].detach()
        router = Router(LinearScorer(WIDTH, EXPERTS), TopK(2, normalize=True))
        block.moe = MoE(router, bank_of(row.bank, up, down))
    return network


def bank_of(kind: str | None, up: Tensor, down: Tensor) -> Experts:
    """Experts that are all the network of ``up`` (H, D) and ``down`` (D, H)."""
    hidden, dim = up.shape
    if kind == PRODUCTS:
        return MPOExperts(EXPERTS, dim, hidden, factors=FACTORS).from_dense(up, down)
    bank = FeedForward(EXPERTS, dim, hidden)
    with torch.no_grad():
        bank.up.copy_(up.expand_as(bank.up))
        bank.down.copy_(down.expand_as(bank.down))
    return bank


def finetuned(
    row: str,
    desk: Desk,
    seed: int,
    rate: float,
    sizes: Sizes,
    windows: int,
    progress: Callable[[float], None] | None = None,
) -> tuple[Trained, LanguageMoE]:
    """A row after its own look at the text, and what it started from."""
    kind = ROWS[row]
    begin = upcycled(start(desk, seed, NARROW if kind.cut else HIDDEN, sizes), kind, seed)
    network, task = copy.deepcopy(begin), _open(sizes.run(windows))
    around = {**kind.optimizer, "seed": seed} if row == "mpoe + mask" and kind.optimizer else kind.optimizer
    terms = {} if kind.bank is None else find_preset("linear+load_balance").terms
    history = train(network, task, sizes.budget(seed, rate), terms=terms, optimizer=around, progress=progress)
    return Trained(network, task, history), begin


def tune_row(row: str, desk: Desk, progress: Callable[[float], None], *, sizes: Sizes) -> dict[str, Any]:
    """The learning rate of a row that the validation part prefers under seed 0, and all that were tried."""
    torch.set_num_threads(1)

    def validation(setting: Mapping[str, Any]) -> tuple[float, None]:
        trained, _ = finetuned(row, desk, 0, setting["lr"], sizes, sizes.tune_windows)
        return trained.history.validation, None

    metric = _open(sizes.run(sizes.tune_windows)).metric
    tried = try_settings([{"lr": rate} for rate in sizes.rates], validation, progress, metric)
    return {row: {"setting": dict(tried.setting), "tries": tried.tries}}


def run_cell(cell: Mapping[str, Any], desk: Desk, progress: Callable[[float], None], *, sizes: Sizes) -> dict[str, Any]:
    """One cell: bits of the test part before and after, numbers of the experts, and how far their cores moved."""
    torch.set_num_threads(1)
    row, seed = cell["row"], cell["seed"]
    rate = desk.tuned["tuning"][row]["setting"]["lr"]
    trained, begin = finetuned(row, desk, seed, rate, sizes, sizes.windows, progress)
    banks = [layer.experts for layer in moe_layers(trained.network).values() if isinstance(layer, MoE)]
    return {
        **measures(trained),
        "bits_before": trained.task.score(begin, "test")["bits_per_byte"],
        "expert_parameters": sum(p.numel() for bank in banks for p in bank.parameters()),
        **moved(begin, trained.network),
    }


@torch.no_grad()
def moved(begin: nn.Module, network: nn.Module) -> dict[str, float | None]:
    """How far central and own cores have come, over their norm at the start: means over matrices."""
    found: dict[str, list[float]] = {"moved_central": [], "moved_own": []}
    before = dict(begin.named_parameters())
    for name, value in network.named_parameters():
        key = "moved_central" if name.endswith(".central") else "moved_own"
        if ".left." in name or ".right." in name or key == "moved_central":
            found[key].append(float((value - before[name]).norm() / before[name].norm()))
    return {key: mean_of(values) if values else None for key, values in found.items()}


def slowed(model: nn.Module, settings: Any) -> Optimizer:
    """The control of the mask: each step of a central core is that of AdamW times sqrt(1/E), without a draw."""
    optimizer = make_optimizer(settings.optimizer, model, settings)
    banks = [module for module in model.modules() if isinstance(module, MPOExperts)]
    cores = [(core, bank.num_experts**-0.5) for bank in banks for core in bank.central]
    before: list[Tensor] = []

    @torch.no_grad()
    def keep(*_: Any) -> None:
        before[:] = [core.clone() for core, _ in cores]

    @torch.no_grad()
    def shorten(*_: Any) -> None:
        for (core, share), was in zip(cores, before, strict=True):
            core.copy_(was + share * (core - was))

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(shorten)
    return optimizer


def _open(run: TrainSettings) -> Task:
    """The task of a run, read once a process."""
    return _opened(run.train_size)


@cache
def _opened(windows: int) -> Task:
    return open_task(small_text(windows))
