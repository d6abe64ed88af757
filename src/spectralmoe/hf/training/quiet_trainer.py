"""The ``Trainer`` of transformers without output of its own: a callback follows it, a checkpoint resumes it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spectralmoe.errors import UserError
from spectralmoe.hf.load import import_transformers
from spectralmoe.json_files import read_json

__all__ = ["follow_trainer", "last_checkpoint", "quiet_trainer"]

STATE = "trainer_state.json"


def quiet_trainer(model: Any, samples: Any, folder: Path, *, callbacks: Sequence[Any], **arguments: Any) -> Any:
    """A ``Trainer`` that logs the loss of every step to its ``state.log_history`` and nowhere else.

    Args:
        samples: a data set of the arguments of the model's forward, with labels.
        folder: of its checkpoints; the last one is kept.
        arguments: more of ``TrainingArguments``.

    Raises:
        UserError: transformers or accelerate is not installed.
    """
    tf = import_transformers()
    if find_spec("accelerate") is None:
        raise UserError("the Trainer of transformers needs accelerate; install it with 'pip install accelerate'")
    options = tf.TrainingArguments(
        str(folder),
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_total_limit=1,
        remove_unused_columns=False,
        **arguments,
    )
    trainer = tf.Trainer(
        model, options, train_dataset=samples, data_collator=tf.default_data_collator, callbacks=list(callbacks)
    )
    trainer.remove_callback(tf.PrinterCallback)
    return trainer


def follow_trainer(
    *,
    begin: Callable[[], dict[str, Any]],
    every: int,
    score: Callable[[], dict[str, Any]],
    tell: Callable[[Any, float], None],
) -> Any:
    """A ``TrainerCallback`` that writes scores into the log of the training, which its checkpoints hold.

    The last step has no checkpoint: the model is saved after it.

    Args:
        begin: gives what is logged as step 0; not called when a training is resumed.
        every: steps between two calls of ``score``, which is called after the last step, too.
        score: gives what is logged after these steps.
        tell: gets the ``TrainerState`` and the loss of every step, before a checkpoint is written.
    """
    tf = import_transformers()

    class Follow(tf.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not state.log_history:
                state.log_history.append({"step": 0, **begin()})

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            last = state.global_step == state.max_steps
            control.should_save &= not last  # what goes on from the last step does one more
            if last or state.global_step % every == 0:
                state.log_history.append({"step": state.global_step, **score()})

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                tell(state, logs["loss"])

    return Follow()


def last_checkpoint(folder: Path) -> tuple[Path, list[dict[str, Any]]] | None:
    """The last whole checkpoint in ``folder`` with its log; what a killed training left half written is removed.

    A checkpoint's state is written last.
    """
    whole = {}
    for path in folder.glob("checkpoint-*"):
        try:
            state = read_json(path / STATE)
            whole[int(state["global_step"])] = path, list(state["log_history"])
        except (UserError, LookupError, TypeError, ValueError):
            shutil.rmtree(path)
    return whole[max(whole)] if whole else None
