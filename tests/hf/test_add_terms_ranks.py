"""Terms over two ranks weigh as in one process that sees all sequences."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gloo_ranks
import pytest
import torch
from gloo_ranks import Ranks
from stock_model import StockModel
from torch.nn.parallel import DistributedDataParallel
from trainers import batch_of, sequences

from spectralmoe import Term, penalty, record
from spectralmoe.hf import add_terms
from spectralmoe.regularizers import load_balance, router_z, spectral_norm

TERMS = {"z": Term(router_z, 0.1), "norm": Term(spectral_norm, 0.1), "balance": Term(load_balance, 0.1)}


def accumulated(rank: int, folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The gradients as the Trainer makes them in two micro-batches, and those of the formula."""
    items, model = sequences(5, padded=True), StockModel()
    parts = [batch_of(part) for part in (items[:1], items[1:3], items[3:4], items[4:])]
    counts = [int((part["labels"][:, 1:] != -100).sum()) for part in parts]
    total, reference = sum(counts), copy.deepcopy(model)
    for part, count in zip(parts, counts, strict=True):
        with record(reference) as tape:
            loss = reference(**part, num_items_in_batch=total)["loss"]
        (loss + penalty(tape, TERMS)[0] * count / total).backward()
    with add_terms(model, TERMS):
        parallel = DistributedDataParallel(model)
        for part in (first := parts[2 * rank], parts[2 * rank + 1]):
            with parallel.no_sync() if part is first else torch.enable_grad():
                loss = parallel(**part, num_items_in_batch=torch.tensor(total))["loss"]
                (loss * gloo_ranks.RANKS).backward()  # as Trainer.compute_loss with average_tokens_across_devices
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return [(one.grad, two.grad) for one, two in pairs]  # type: ignore[misc]


CHECKS = (accumulated,)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any) -> Ranks:
    return Ranks(__file__, tmp_path_factory.mktemp("ranks"), 240)


def test_ranks_and_micro_batches_weigh_by_their_labels(ranks, close):
    for found in ranks(accumulated):
        for over_ranks, by_formula in found:
            close(over_ranks, by_formula)


if __name__ == "__main__":
    gloo_ranks.work(CHECKS)
