"""Checkpoints of transformers' ``Trainer`` that hold the experts when it goes on from them: ``resume_safe``.

The Trainer of transformers 5 writes a checkpoint in the layout of the hub, where each expert is a tensor, and reads it
with ``load_state_dict``, which knows stacked experts alone: it warns and goes on with those of the start
(https://github.com/huggingface/transformers/issues/48805). This module can go when that is fixed; a test reports it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

from torch import nn

from spectralmoe.errors import UserError

__all__ = ["resume_safe"]


def resume_safe(trainer: Any) -> None:
    """Make the checkpoints of this Trainer complete for ``resume_from_checkpoint`` and ``load_best_model_at_end``.

    They are written in the model's own layout, which ``from_pretrained`` reads as well; ``trainer.save_model()`` and
    ``model.save_pretrained()`` write the layout of the hub as before. Only this trainer is changed. A checkpoint that
    lacks tensors of the model, such as one that was written without this, is refused. Nothing changes for adapters of
    PEFT.

    Raises:
        UserError: when a checkpoint is loaded: it lacks tensors of the model.
    """
    write, warn = trainer._save_checkpoint, trainer._issue_warnings_after_load

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        save = getattr(model, "save_pretrained", None)
        if save is None or "save_original_format" not in inspect.signature(save).parameters:
            write(*args, **kwargs)
            return
        model.save_pretrained = partial(save, save_original_format=False)
        try:
            write(*args, **kwargs)
        finally:
            del model.save_pretrained

    def refuse_partial(result: Any) -> None:
        if lost := _lost(trainer.model, result.missing_keys):
            raise UserError(
                f"the checkpoint lacks {len(lost)} tensors of the model, such as {lost[0]}: it was written without "
                "resume_safe(trainer); start anew, or from what from_pretrained makes of it"
            )
        warn(result)

    trainer._save_checkpoint, trainer._issue_warnings_after_load = save_checkpoint, refuse_partial


def _lost(model: nn.Module, missing: Sequence[str]) -> list[str]:
    """Which of the names that a checkpoint lacks are of tensors that it does not hold under another name (tied)."""
    kinds = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    tensors, absent = dict(chain(*kinds)), set(missing)
    present = {id(tensor) for name, tensor in tensors.items() if name not in absent}
    return [name for name in missing if name in tensors and id(tensors[name]) not in present]
