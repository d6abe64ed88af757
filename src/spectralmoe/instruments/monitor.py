"""Watching the routers while a model trains: a line of numbers every so many steps, and findings as they arise."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spectralmoe.diagnostics.measure import mean_of
from spectralmoe.diagnostics.watch import Watch, watch, watched_layers
from spectralmoe.errors import UserError
from spectralmoe.instruments.document import layer_names
from spectralmoe.instruments.findings import Finding
from spectralmoe.instruments.monitor_log import FORMAT, MonitorLog
from spectralmoe.instruments.rules import layer_findings
from spectralmoe.instruments.window import Window
from spectralmoe.layers import unwrapped
from spectralmoe.movement import parallel_of, refuse_join

__all__ = ["Monitor", "OpenWatch"]


class OpenWatch(Protocol):
    """How a watch is opened: ``diagnostics.watch``, or ``hf.watch_transformers`` for a Hugging Face model."""

    def __call__(self, model: nn.Module, *, tokens: bool, training_only: bool) -> AbstractContextManager[Watch]: ...


class Monitor:
    """Counts what the routers of ``model`` do while it trains, and reports every ``every`` steps.

    Only layers in training mode count, so evaluation in between does not; nor do padding and the second forward of
    activation checkpointing. In a replayed forward the router's own choice counts (``Routing.live``). All forwards
    between two calls of ``step`` make one step (gradient accumulation). Loads, dead experts and drops are exact counts
    of all steps since the last report; entropy and near ties, which cost more, are those of the first steps after it,
    until 256 tokens or more. Between two reports nothing waits for the device.

    Where ``torch.distributed`` is initialised, every rank must call ``step``; a report sums over the ranks, and the
    first one writes. If the file exists, lines are added to it; the lines of steps that are repeated are replaced.

    Args:
        path: JSON lines are written here (``read_monitor`` reads them); None: nowhere.
        every: report at the steps whose number this divides.
        layers: also write the share of the load of each expert of each layer.
        group: process group to sum over; None: the default group.
        title: of the run; None: the model's class.
        watching: how to watch the model; for a Hugging Face model ``spectralmoe.hf.watch_transformers``.

    Attributes:
        last: the last report, None before the first: step, tokens, max_vio (mean over the layers) and max_vio_worst,
            entropy (mean), dead_experts (of all layers), dropped, near_tie (mean); None: no data.
        findings: what is wrong now.

    Raises:
        UserError: ``every`` below 1; when entered: no MoE layer, or none that can be watched; a path that cannot be
            written or holds something else.

    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
    >>> model = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16))
    >>> with Monitor(model, every=10) as monitor:
    ...     for _ in range(10):
    ...         loss = model(torch.randn(50, 8)).sum()
    ...         monitor.step()
    >>> monitor.last["step"], monitor.last["tokens"], monitor.last["dead_experts"]
    (10, 500, 0)
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | Path | None = None,
        *,
        every: int = 50,
        layers: bool = False,
        group: Any = None,
        title: str | None = None,
        watching: OpenWatch = watch,
    ) -> None:
        if every < 1:
            raise UserError(f"Monitor: every must be at least 1, got {every}")
        self.model, self.path, self.every, self.tables = model, path, every, layers
        self.group, self.watching = group, watching
        self.title = type(unwrapped(model)).__name__ if title is None else title
        self.last: dict[str, Any] | None = None
        self._active: dict[tuple[str, str], Finding] = {}
        self._log: MonitorLog | None = None
        self._watch: Watch | None = None

    @property
    def findings(self) -> list[Finding]:
        """The findings of the last report."""
        return list(self._active.values())

    def __enter__(self) -> Self:
        first = not _distributed() or dist.get_rank(self.group) == 0
        with ExitStack() as stack:
            seen = stack.enter_context(self.watching(self.model, tokens=False, training_only=True))
            self._window = Window(watched_layers("Monitor", self.model, seen), _device(self.model))
            self._log = MonitorLog(Path(self.path)) if self.path is not None and first else None
            self._watch, self._stack = seen, stack.pop_all()
        self.last, self._active = None, {}
        self._now, self._offset, self._unreported, self._begun = 0, 0, 0, False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._unreported and kind is None:
                self._report()
            elif self._unreported and not _distributed():  # other ranks may not come here
                with suppress(Exception):  # the run's own error is the one to be seen
                    self._report()
        finally:
            self._watch = None
            self._stack.close()
            if self._log is not None:
                self._log.close()

    @torch.no_grad()
    def collect(self) -> None:
        """Count the forwards up to here; between micro-batches this gives back the memory that holds their routing.

        Raises:
            UserError: outside the ``with`` block.
        """
        if self._watch is None:
            raise UserError("Monitor: open it first: 'with Monitor(model, ...) as monitor:'")
        self._window.add(self._watch.drain())

    def step(self, step: int | None = None) -> None:
        """Call once after each optimizer step.

        Args:
            step: its number, larger than the last; None: one more than the last (in the file, where a run is resumed).

        Raises:
            UserError: outside the ``with`` block; a number that does not rise; inside torch's ``Join``, where other
                ranks may not come here.
        """
        if _distributed() and dist.get_world_size(self.group) > 1:
            refuse_join(parallel_of(self.model), "outside, or give each rank its own group: Monitor(..., group=...)")
        self.collect()
        if not self._begun:
            self._begin(step)
        if step is not None and step <= self._now:
            raise UserError(
                f"Monitor.step: step {step} comes after step {self._now}; number the steps of all epochs on"
            )
        self._now = self._now + 1 if step is None else step
        self._unreported += 1
        if self._now % self.every == 0:
            self._report()

    def _begin(self, step: int | None) -> None:
        """Open the file at the first step; one without a number comes after those of the file."""
        written = self._log.begin(self._start(), step) if self._log is not None else 0
        self._offset, self._now = (written, 0) if step is None else (0, step - 1)
        self._begun = True

    @torch.no_grad()
    def _report(self) -> None:
        self._unreported = 0
        tokens, blocks = self._window.take(self._summed)
        step = self._offset + self._now
        self.last = {"step": step, "tokens": tokens, **_summary(blocks)}
        lines = [{"kind": "step", **self.last}]
        if self.tables:
            shares = {block["name"]: [round(share, 6) for share in block["load"]["share"]] for block in blocks}
            lines.append({"kind": "load", "step": step, "shares": shares})
        arisen = self._arisen(blocks)
        lines += [{"kind": "finding", "step": step, "finding": finding.as_json()} for finding in arisen]
        if self._log is not None:
            for line in lines:
                self._log.write(line)

    def _arisen(self, blocks: Sequence[dict[str, Any]]) -> list[Finding]:
        """The findings that were not there at the last report; a layer without data keeps the ones that it had."""
        arisen = []
        for block in blocks:
            findings = {(item.kind, block["name"]): item for item in layer_findings(block)}
            arisen += [item for key, item in findings.items() if key not in self._active]
            judged = block["load"]["max_vio"]["value"] is not None
            kept = {key: item for key, item in self._active.items() if key[1] != block["name"] or not judged}
            self._active = kept | findings
        return arisen

    def _start(self) -> dict[str, Any]:
        layers = [layer_names(layer) for layer in self._window.layers]
        return {"kind": "start", "format": FORMAT, "title": self.title, "layers": layers, "every": self.every}

    def _summed(self, sums: Tensor) -> Tensor:
        if _distributed():
            dist.all_reduce(sums, group=self.group)
        return sums


def _summary(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A few numbers, the same for any depth; None if no layer has data."""

    def known(part: str, name: str) -> list[float]:
        return [value for block in blocks if (value := block[part][name]["value"]) is not None]

    vios, dead = known("load", "max_vio"), known("load", "dead")
    return {
        "max_vio": mean_of(vios),
        "max_vio_worst": max(vios, default=None),
        "entropy": mean_of(known("entropy", "tokens")),
        "dead_experts": int(sum(dead)) if dead else None,
        "dropped": mean_of(known("load", "dropped")),
        "near_tie": mean_of(known("stability", "near_tie")),
    }


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
