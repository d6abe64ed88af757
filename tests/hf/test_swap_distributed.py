"""Swapped routers on two gloo processes against one: DDP and FSDP2, with a term, padding and the selection bias.

Run as a script, this file is one of the two processes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import batch, build
from gloo_ranks import RANKS, Ranks, work
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from spectralmoe import Term, attach, penalty, record, shard_routers
from spectralmoe.hf import swap_routers
from spectralmoe.layers import moe_layers
from spectralmoe.regularizers import router_z

pytest.importorskip("transformers")

TERMS = {"z": Term(router_z, 0.1)}


def swapped() -> Any:
    model = build("deepseek_v3", num_hidden_layers=2).train()
    swap_routers(model)
    return model


def inputs_of(model: Any, rank: int) -> dict[str, torch.Tensor]:
    """Other text on each rank; one row has padding."""
    ids = batch(model, seed=rank)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def loss_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with record(model) as tape:
        loss = model(**inputs).loss
    assert all(int(item.routing.mask.sum()) == 43 for item in tape)
    return loss + penalty(tape, TERMS)[0]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def step(model: Any, losses: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The gradients, and the selection biases after one step by hooks."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, model)
    sum(losses()).backward()
    named = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = {name: whole(grad) for name, grad in named.items()}
    optimizer.step()
    biases = {name: layer.router.selector.selector.bias for name, layer in moe_layers(model).items()}
    return {"gradients": gradients, "biases": {name: whole(bias) for name, bias in biases.items()}}


def ddp(rank, folder):
    model = swapped()
    inputs, parallel = inputs_of(model, rank), DistributedDataParallel(model)
    return step(parallel, lambda: [loss_of(parallel, inputs)])


def fsdp(rank, folder):
    model = swapped()
    inputs = inputs_of(model, rank)
    shard_routers(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return step(model, lambda: [loss_of(model, inputs)])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return Ranks(__file__, tmp_path_factory.mktemp("ranks"), seconds=400)


@pytest.mark.parametrize("check", [ddp, fsdp])
def test_gradients_and_biases_are_those_of_one_process(ranks, check, close):
    model = swapped()
    want = step(model, lambda: [loss_of(model, inputs_of(model, rank)) / RANKS for rank in range(RANKS)])
    for found in ranks(check):
        for kind, values in want.items():
            assert found[kind].keys() == values.keys()
            for name, value in values.items():
                close(found[kind][name], value)


if __name__ == "__main__":
    work([ddp, fsdp])
