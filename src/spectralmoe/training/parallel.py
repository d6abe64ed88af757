"""One training run on several processes, started by torchrun: DDP or FSDP2, and what each process does of it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from spectralmoe.errors import UserError, one_of
from spectralmoe.router import shard_routers
from spectralmoe.sharding import full, is_sharded
from spectralmoe.vision import model_blocks

__all__ = ["ALONE", "Ranks", "joined"]

Kind = Literal["ddp", "fsdp2"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run. Each takes its share of every batch, so that all together do what one alone would.

    The gradients are those of one process up to rounding, with two exceptions: penalty terms and batch norms see the
    share of each process, and dropout draws other masks.

    Attributes:
        kind: None for one process alone.
        rank: this process, from 0.
        world: how many there are.
    """

    kind: Kind | None = None
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This process's part of ``n`` samples; all of them, for every process, where there are too few.

        >>> [Ranks("ddp", rank, 3).share(8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
        """
        if n < self.world:
            return slice(0, n)
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def weight(self, n: int) -> float:
        """Factor on the mean loss of the share, so that the mean over the processes is that of all ``n`` samples."""
        if n < self.world:
            return 1.0
        share = self.share(n)
        return float((share.stop - share.start) * self.world / n)

    def mean(self, value: float) -> float:
        """``value`` averaged over the processes."""
        if self.kind is None:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return float(total.item()) / self.world

    def agree(self, value: bool) -> bool:
        """What the first process says."""
        return value if self.kind is None else self.mean(float(value and self.first)) > 0

    def wait(self) -> None:
        """Until all processes are here."""
        self.mean(0.0)

    def spread(self, model: nn.Module) -> nn.Module:
        """What to train in place of ``model``; FSDP2 shards a copy, block by block of its ``backbone``.

        ``collect`` brings the weights back.
        """
        if self.kind is None:
            return model
        if self.kind == "ddp":  # static_graph: some branches may get no gradient (class-token pooling)
            return nn.parallel.DistributedDataParallel(model, static_graph=True)
        from torch.distributed.fsdp import fully_shard

        sharded = copy.deepcopy(model)
        shard_routers(sharded)
        scalars = {parameter for parameter in sharded.parameters() if not parameter.dim()}  # which it cannot shard
        for block in model_blocks(sharded.get_submodule("backbone")).values():
            fully_shard(block, ignored_params=scalars)
        fully_shard(sharded, ignored_params=scalars)
        return sharded

    def reduce(self, model: nn.Module) -> None:
        """After backward: average the gradients that FSDP2 leaves to each process, those of scalars."""
        if self.kind == "fsdp2":
            for parameter in model.parameters():
                if parameter.grad is not None and not is_sharded(parameter):
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.world

    def collect(self, trained: nn.Module, model: nn.Module) -> None:
        """Give ``model`` the weights of ``trained``, which ``spread`` made of it. Every process must call."""
        if self.kind == "fsdp2":
            model.load_state_dict({name: full(value) for name, value in trained.state_dict().items()})


ALONE = Ranks()


@contextmanager
def joined(kind: str | None, device: torch.device) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that torchrun started; gives them, and the device of this one.

    Raises:
        UserError: an unknown kind; not started by torchrun; several processes without a kind.
    """
    if kind is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("torchrun started several processes; add --parallel ddp or --parallel fsdp2")
        yield ALONE, device
        return
    if kind not in ("ddp", "fsdp2"):
        raise one_of("--parallel", kind, ["ddp", "fsdp2"])
    if "RANK" not in os.environ:
        raise UserError(
            f"--parallel {kind} needs torchrun: torchrun --nproc-per-node 2 -m spectralmoe train ... --parallel {kind}"
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(kind, dist.get_rank(), dist.get_world_size()), device  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()


def _device() -> torch.device:
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
