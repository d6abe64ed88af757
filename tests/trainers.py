"""transformers' Trainer on tiny models: sequences, and a Trainer that takes them in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from seeds import generator
from torch import Tensor, nn

__all__ = ["InOrder", "batch_of", "make_trainer", "sequences", "swap_balanced"]

ENDS = 15


def sequences(count: int, length: int = 24, *, vocabulary: int = 64, padded: bool = False) -> list[dict[str, Tensor]]:
    """Random sequences with labels; if ``padded``, with padding at the end of most."""
    made = []
    for i in range(count):
        ids = torch.randint(4, vocabulary, (length,), generator=generator(i))
        mask = torch.arange(length) < (length - ENDS + 1 + i % ENDS if padded else length)
        made.append({"input_ids": ids * mask, "attention_mask": mask.long(), "labels": torch.where(mask, ids, -100)})
    return made


def batch_of(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The items as one batch."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


class InOrder(list[dict[str, Tensor]]):
    """A data set that the Trainer's sampler cannot shuffle: it asks by place, and gets the next."""

    def __init__(self, items: list[dict[str, Tensor]]) -> None:
        super().__init__(items)
        self.next = 0

    def __getitem__(self, place: Any) -> Any:
        item = super().__getitem__(self.next % len(self))
        self.next += 1
        return item


def make_trainer(model: nn.Module, folder: Path, data: list[dict[str, Tensor]], **options: Any) -> Any:
    """A Trainer on the CPU without a log and, unless asked, without checkpoints; plain SGD."""
    from transformers import Trainer, TrainingArguments

    more = {name: options.pop(name) for name in ("callbacks", "eval_dataset", "optimizers") if name in options}
    fixed: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    plain: dict[str, Any] = {"optim": "sgd", "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    arguments = TrainingArguments(str(folder), **{**fixed, **plain, "max_grad_norm": 0.0, **options})
    return Trainer(model, arguments, train_dataset=data, **more)


def swap_balanced(model: nn.Module) -> None:
    """Give every layer a router with a selection bias: the family's own rule if it has one."""
    from spectralmoe.hf import swap_routers
    from spectralmoe.hf.layers import find_layers

    layer = find_layers(model)[0]
    score = "sigmoid" if type(layer.router).__name__.startswith("Llama4") else "softmax"
    own = layer.correction_bias is not None
    spec = {"type": "balanced", "k": layer.top_k, "score": score, "normalize": False}
    swap_routers(model, selector=None if own else spec)
