"""The training loop: optimizer, schedule, penalty terms, checkpoints that resume to the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from spectralmoe.diagnostics import holds_moe
from spectralmoe.errors import UserError
from spectralmoe.instruments.monitor import Monitor
from spectralmoe.optim import find_schedule, make_optimizer
from spectralmoe.recorder import record
from spectralmoe.sharding import local
from spectralmoe.steps import after_step
from spectralmoe.tape import Tape
from spectralmoe.terms import Term, penalty
from spectralmoe.training.checkpoint import load_checkpoint, save_checkpoint
from spectralmoe.training.distributed.ranks import ALONE, Ranks
from spectralmoe.training.logs import Log
from spectralmoe.training.precision import autocast, loss_scaler
from spectralmoe.training.settings import Optimization
from spectralmoe.training.tasks.base import Metric, Task

__all__ = ["Diverged", "History", "Progress", "Standing", "train"]

_CHECKPOINT_SECONDS = 10.0


class Progress(Protocol):
    """A function that is told how far a run has come."""

    def __call__(self, text: str, done: float, detail: str = "") -> None:
        """``text`` is what runs now, ``done`` the share of all work, 0 to 1; ``detail`` may change at every call."""


class Diverged(UserError):
    """The loss or a weight is no longer a finite number. This need not be a mistake of the user."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Standing:
    """How a run stands after a step or an epoch.

    Attributes:
        done: share of all steps, 0 to 1.
        epochs: those that are finished, as in ``History``.
        loss: mean over the steps of the running epoch; NaN before its first.
    """

    done: float
    epochs: Sequence[Mapping[str, float]]
    loss: float


@dataclass(slots=True)
class History:
    """How a training went.

    Attributes:
        epochs: one dict an epoch: loss, ``metric`` on the validation part (NaN without one), seconds.
        metric: what the task chooses by; its key in an epoch is ``metric.key_of("validation")``.
    """

    epochs: list[dict[str, float]]
    metric: Metric

    @property
    def seconds_per_epoch(self) -> float:
        """Mean training seconds an epoch."""
        return sum(epoch["seconds"] for epoch in self.epochs) / len(self.epochs)

    @property
    def validation(self) -> float:
        """The metric on the validation part after the last epoch."""
        return self.epochs[-1][self.metric.key_of("validation")]


def train(
    model: nn.Module,
    task: Task,
    settings: Optimization,
    *,
    terms: Mapping[str, Term] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[float], None] | None = None,
    follow: Callable[[Standing], None] | None = None,
    logs: Sequence[Log] = (),
    monitor: Monitor | None = None,
    ranks: Ranks = ALONE,
) -> History:
    """Train ``model`` on the training part of ``task``; the test part is never touched. A model without MoE layers
    is trained too.

    The order of the samples depends on the seed and the epoch alone, so a run that starts again from ``checkpoint``
    ends with the same bits as one that was never stopped (on the same machine, on the CPU).

    Args:
        terms: penalty terms.
        optimizer: what the row of the network says of it, see ``make_optimizer``.
        checkpoint: file to go on from and to write to, after each epoch and every few seconds.
        progress: called with the share done, 0 to 1.
        follow: called after every step and every epoch with how the run stands.
        logs: brought up to date at the start and after every epoch.
        monitor: an open monitor of ``model``, told of every step.
        ranks: the processes that train together; ``model`` is then what ``ranks.wrap`` gave.

    Raises:
        Diverged: the loss is not finite; names the step. The last checkpoint holds finite weights.
        UserError: the checkpoint is of another run, or cannot be written.
    """
    run = _Run(model, task, settings, dict(terms or {}), checkpoint, optimizer=optimizer, monitor=monitor, ranks=ranks)

    def tell() -> None:
        standing = run.standing()
        if progress is not None:
            progress(standing.done)
        if follow is not None:
            follow(standing)

    def write() -> None:
        for log in logs:
            log.write(run.epochs)

    if run.epochs:
        write()
    while run.epoch < settings.epochs:
        run.one_epoch(tell)
        tell()
        write()
    return History(run.epochs, task.metric)


class _Run:
    """The state of one training run between two steps."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: Optimization,
        terms: dict[str, Term],
        checkpoint: Path | None,
        *,
        optimizer: Mapping[str, Any] | None,
        monitor: Monitor | None,
        ranks: Ranks,
    ) -> None:
        self.model, self.task, self.settings, self.terms, self.checkpoint = model, task, settings, terms, checkpoint
        self.ranks, self.routed, self.monitor = ranks, holds_moe(model), monitor
        self.device = next(model.parameters()).device
        self.scaler = loss_scaler(settings.precision, self.device)
        self.optimizer = make_optimizer(settings.optimizer, model, settings, row=optimizer)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.schedule = find_schedule(settings.schedule)
        self.batches = math.ceil(task.size / settings.batch_size)
        self.epoch, self.batch, self.loss_sum, self.seconds = 0, 0, 0.0, 0.0
        self.epochs: list[dict[str, float]] = []
        self.tapes: list[Tape] = []  # of steps since the last that was not left out
        self.saved_at = time.monotonic()
        state = load_checkpoint(checkpoint, model, self.optimizer) if checkpoint else None
        if state is not None:
            self.epoch, self.batch = state["epoch"], state["batch"]
            self.loss_sum, self.seconds, self.epochs = state["loss_sum"], state["seconds"], state["epochs"]
            self.scaler.load_state_dict(state.get("scaler", {}))

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.epoch * self.batches + self.batch

    def standing(self) -> Standing:
        loss = self.loss_sum / self.batch if self.batch else math.nan
        return Standing(self.step / (self.batches * self.settings.epochs), tuple(self.epochs), loss)

    def one_epoch(self, tell: Callable[[], None]) -> None:
        order = _order(self.task.size, self.settings.seed, self.epoch)
        self.model.train()
        started = time.monotonic()
        for chosen in order.split(self.settings.batch_size)[self.batch :]:
            self.loss_sum += self.one_step(chosen)
            self.batch += 1
            if self.monitor is not None:
                self.monitor.step(self.step)
            if self.ranks.of_first(time.monotonic() - self.saved_at > _CHECKPOINT_SECONDS):
                self.seconds += time.monotonic() - started
                self.check_weights()
                self.save()
                started = time.monotonic()
            tell()
        self.seconds += time.monotonic() - started
        self.check_weights()
        metric = self.task.metric
        value = self.task.score(self.model, "validation").get(metric.key, math.nan)
        self.epochs.append(
            {"loss": self.loss_sum / self.batches, metric.key_of("validation"): value, "seconds": self.seconds}
        )
        self.epoch, self.batch, self.loss_sum, self.seconds = self.epoch + 1, 0, 0.0, 0.0
        self.save()

    def one_step(self, chosen: Tensor) -> float:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = self.scheduled(rate)
        batch = self.task.batch(chosen, np.random.default_rng((self.settings.seed, self.step)))
        part = batch.part(self.ranks.share(len(chosen)), self.device)
        with (
            record(self.model, terms=self.terms) if self.routed else nullcontext() as tape,
            autocast(self.settings.precision, self.device),
        ):
            loss = self.task.loss(self.model, part)
        loss = self.ranks.weight(len(chosen)) * loss + self.extra(tape)
        value = self.ranks.mean(float(loss.detach()))
        if not math.isfinite(value):
            self.stop(f"the loss is {value}")
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.ranks.reduce(self.model)
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        self.tapes += [] if tape is None else [tape]
        if self.tapes and self.scaler.get_scale() >= scale:  # else the step was left out, and counts with the next
            after_step(self.model, *self.tapes)
            self.tapes = []
        return value

    def extra(self, tape: Tape | None) -> Tensor | float:
        """The penalty terms."""
        if tape is None:
            return 0.0
        try:
            return penalty(tape, self.terms, step=self.step)[0]
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            self.stop("a routing matrix has no finite spectrum")

    def scheduled(self, rate: float) -> float:
        """The learning rate of this step: linear warm-up to ``rate``, then the schedule."""
        total = self.batches * self.settings.epochs
        warm = self.settings.warmup * total
        if self.step < warm:
            return rate * (self.step + 1) / (warm + 1)
        return rate * self.schedule(self.step - warm, total - warm)

    def check_weights(self) -> None:
        """Raise ``Diverged`` if a weight is not finite, so that no checkpoint holds such weights."""
        for name, value in self.model.state_dict().items():
            if self.ranks.mean(float(not torch.isfinite(local(value)).all())):
                self.stop(f"{name} is not finite")

    def save(self) -> None:
        self.saved_at = time.monotonic()
        if self.checkpoint is None:
            return
        state: dict[str, Any] = {"epoch": self.epoch, "batch": self.batch, "epochs": self.epochs}
        state |= {"loss_sum": self.loss_sum, "seconds": self.seconds, "scaler": self.scaler.state_dict()}
        save_checkpoint(self.checkpoint, self.model, self.optimizer, state, ranks=self.ranks)

    def stop(self, reason: str) -> NoReturn:
        kept = ""
        if self.checkpoint is not None and self.checkpoint.exists():
            kept = f"; the last good checkpoint is kept in {self.checkpoint}"
        raise Diverged(f"training diverged at step {self.step} (epoch {self.epoch + 1}): {reason}{kept}")


def _order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))
