"""The monitor, and the work around an optimizer step, inside the ``Trainer`` of transformers."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spectralmoe.diagnostics import holds_moe
from spectralmoe.diagnostics.watch import watch
from spectralmoe.errors import UserError
from spectralmoe.hf.load import import_transformers
from spectralmoe.hf.watch import watch_transformers
from spectralmoe.instruments.monitor import Monitor
from spectralmoe.layers import stock_experts
from spectralmoe.steps import attach

__all__ = ["attach_callback", "trainer_callback"]


def trainer_callback(path: str | Path | None = None, *, every: int = 50, layers: bool = False) -> Any:
    """A ``TrainerCallback`` that runs a ``Monitor`` in transformers' ``Trainer``: for ``Trainer(callbacks=[...])``.

    It works with gradient accumulation and checkpointing, and sums over the ranks of a distributed run. What the
    Trainer logs beside the loss gets the values of the last report, as "moe/max_vio" and so on (``Monitor.last``).
    The callbacks of ``report_to`` run first and miss these values, unless this one is put in front of them:
    ``trainer.callback_handler.callbacks.insert(0, callback)``.

    The hooks go when the training ends. Where it may fail, use ``with trainer_callback(...) as callback:``.

    Args:
        path, every, layers: as for ``Monitor``; steps are the Trainer's.

    Raises:
        UserError: transformers or accelerate is not installed; what ``Monitor`` raises, when the training begins.
    """
    tf = _import_trainer()

    class MonitorCallback(tf.TrainerCallback):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.stack = ExitStack()
            self.monitor: Any = None
            self.logged: Any = None

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *error: Any) -> None:
            self.stack.__exit__(*error)

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.stack.close()  # of a training that failed
            watching = watch if holds_moe(model) and not stock_experts(model) else watch_transformers
            self.monitor = Monitor(model, path, every=every, layers=layers, watching=watching)
            self.stack.enter_context(self.monitor)

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.monitor.collect()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.monitor.step(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            last = self.monitor.last if self.monitor else None
            if last is not None and last is not self.logged and "loss" in logs:
                self.logged = last
                values = {f"moe/{key}": value for key, value in last.items() if key != "step" and value is not None}
                logs.update(values)
                state.log_history[-1].update(values)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.stack.close()

    return MonitorCallback()


def attach_callback(*, group: Any = None) -> Any:
    """A ``TrainerCallback`` that does ``attach`` in transformers' ``Trainer``: for ``Trainer(callbacks=[...])``.

    For models with routers of this library (``swap_routers``, ``replace_mlp``): their bases are retracted and their
    selection biases moved at each optimizer step, from the counts of all its micro-batches and ranks. The hooks go when
    the training ends.

    Args:
        group: as for ``attach``.

    Raises:
        UserError: transformers or accelerate is not installed; what ``attach`` raises, when the training begins.
    """
    tf = _import_trainer()

    class AttachCallback(tf.TrainerCallback):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.hooks = ExitStack()

        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
        ) -> None:
            self.hooks.close()  # of a training that failed
            inside = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has no hooks
            self.hooks.callback(attach(inside, model, group=group).remove)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.hooks.close()

    return AttachCallback()


def _import_trainer() -> Any:
    if find_spec("accelerate") is None:
        raise UserError("the Trainer of transformers needs accelerate; install it with 'pip install accelerate'")
    return import_transformers()
