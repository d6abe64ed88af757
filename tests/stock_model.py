"""A language model in the form of transformers' own, of no family and without transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from seeds import generator
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["StockLayer", "StockModel"]

E, K, D = 4, 2, 8


class Gate(nn.Linear):
    """A router: logits, weights and indices."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits = super().forward(x)
        return logits, *logits.softmax(-1).topk(K)


class StockLayer(nn.Module):
    """A MoE layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = Gate(D, E), nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x: Tensor) -> Tensor:
        _, weights, indices = self.gate(x.flatten(0, 1))
        every = torch.stack([expert(x).flatten(0, 1) for expert in self.experts], 1)
        return (every.gather(1, indices[..., None].expand(-1, -1, D)) * weights[..., None]).sum(1).view_as(x)


class Stack(nn.Module):
    """The module that holds the numbered layers."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(vocabulary, D), nn.ModuleList(StockLayer() for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


class StockModel(nn.Module):
    """With the loss of transformers' causal language models."""

    def __init__(self, vocabulary: int = 64) -> None:
        super().__init__()
        self.loss_type, self.config = "ForCausalLM", SimpleNamespace(is_encoder_decoder=False)
        self.model, self.head = Stack(vocabulary), nn.Linear(D, vocabulary)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator(parameter.numel())))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, num_items_in_batch: Any = None
    ) -> dict[str, Tensor]:
        logits = self.head(self.model(input_ids, attention_mask=attention_mask))[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return {"loss": loss / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)}
