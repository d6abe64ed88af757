"""One training run on several processes, started by torchrun: DDP or FSDP2, with or without distributed experts."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from spectralmoe.errors import UserError, one_of
from spectralmoe.experts import HeterogeneousExperts
from spectralmoe.router import shard_routers
from spectralmoe.sharding import full, is_sharded
from spectralmoe.training.distributed.heartbeat import watched
from spectralmoe.vision import model_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["ALONE", "Ranks", "joined", "read_parallel"]

Kind = Literal["ddp", "fsdp2"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a run. Each takes its share of every batch, so that together they do what one alone would do.

    The gradients are those of one process up to rounding, with two exceptions: penalty terms and batch norms see the
    share of each process, and dropout draws other masks.

    Attributes:
        kind: None for one process alone.
        rank: this process, from 0.
        world: how many there are.
        mesh: ("efsdp", "ep"), where the processes share the experts out; else None.
    """

    kind: Kind | None = None
    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This process's part of ``n`` samples; all of them for every process if there are fewer than two for each.

        >>> [Ranks("ddp", rank, 3).share(8) for rank in range(3)]
        [slice(0, 2, None), slice(2, 5, None), slice(5, 8, None)]
        """
        if n < 2 * self.world:  # of one sample a batch norm has no statistics
            return slice(0, n)
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def weight(self, n: int) -> float:
        """Factor on the mean loss of the share, so that the mean over the processes is that of all ``n`` samples."""
        if n < 2 * self.world:
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

    def of_first(self, value: bool) -> bool:
        """The value of the first process, for all processes."""
        return value if self.kind is None else self.mean(float(value and self.first)) > 0

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        self.mean(0.0)

    def broadcast(self, text: str) -> str:
        """The text of the first process."""
        texts = [text]
        dist.broadcast_object_list(texts)
        return texts[0]

    def wrap(self, model: nn.Module) -> nn.Module:
        """What to train in place of ``model``; FSDP2 shards a copy, block by block, its experts over a mesh if there is
        one.

        ``collect`` brings the weights back.

        Raises:
            UserError: as ``parallelize_experts``; a bank that cannot be sharded.
        """
        if self.kind is None:
            return model
        if self.kind == "ddp":  # static_graph: some branches may get no gradient (class-token pooling)
            return nn.parallel.DistributedDataParallel(model, static_graph=True)
        from torch.distributed.fsdp import fully_shard

        if any(isinstance(bank, HeterogeneousExperts) and bank.given is None for bank in model.modules()):
            raise UserError(
                "--parallel fsdp2: HeterogeneousExperts count their costs on copies of themselves, which shards do not "
                "allow; give them costs, or use --parallel ddp"
            )
        sharded = copy.deepcopy(model)
        for parameter in sharded.parameters():
            parameter.data = parameter.data.contiguous()  # not channels-last, which it cannot shard
        if self.mesh is not None:
            from spectralmoe.parallel import parallelize_experts, shard_experts

            parallelize_experts(sharded, self.mesh)
            shard_experts(sharded, self.mesh)
        shard_routers(sharded)
        scalars = {parameter for parameter in sharded.parameters() if not parameter.dim()}  # which it cannot shard
        for block in model_blocks(getattr(sharded, "backbone", sharded)).values():
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


def read_parallel(text: str, num_experts: int | None = None) -> tuple[Kind, int]:
    """The kind that ``--parallel`` names, and how many processes share the experts out: ("fsdp2", 4) of "fsdp2,ep=4".

    Args:
        num_experts: E of each layer; None: there are no experts.

    Raises:
        UserError: another kind; a number that does not divide E, or the processes that torchrun started.

    >>> read_parallel("ddp"), read_parallel("fsdp2,ep=1", 8)
    (('ddp', 1), ('fsdp2', 1))
    """
    kind, _, option = text.partition(",")
    if kind not in ("ddp", "fsdp2"):
        raise one_of("--parallel", kind, ["ddp", "fsdp2", "fsdp2,ep=K"])
    if not option:
        return kind, 1  # type: ignore[return-value]
    name, _, number = option.partition("=")
    if kind != "fsdp2" or name != "ep" or not number.isdecimal() or not int(number):
        raise UserError(f"--parallel {text}: only fsdp2 takes an option, ep=K: K processes that share the experts out")
    ep, world = int(number), int(os.environ.get("WORLD_SIZE", number))
    if num_experts is None and ep > 1:
        raise UserError(f"--parallel {text}: the network has no experts to share out; leave out {option}")
    if num_experts is not None and num_experts % ep:
        raise UserError(f"--parallel {text}: {num_experts} experts cannot be shared out evenly over {ep} processes")
    if world % ep:
        raise UserError(
            f"--parallel {text}: {world} processes do not make whole groups of {ep}; start {-world % ep} more"
        )
    return "fsdp2", ep


@contextmanager
def joined(
    parallel: str | None, device: torch.device, num_experts: int | None = None
) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that torchrun started; gives them, and the device of this one.

    One that dies or fails while the block runs ends the others, see ``watched``.

    Args:
        parallel, num_experts: see ``read_parallel``.

    Raises:
        UserError: as ``read_parallel``; not started by torchrun; several processes without a kind; more processes than
            GPUs.
    """
    if parallel is None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("torchrun started several processes; add --parallel ddp or --parallel fsdp2")
        yield ALONE, device
        return
    if "RANK" not in os.environ:
        read_parallel(parallel)
        raise UserError(
            f"--parallel {parallel} needs torchrun: torchrun --nproc-per-node 2 -m spectralmoe train ... "
            f"--parallel {parallel}"
        )
    store, rank, world = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps the store when it starts all again
    shared, own = PrefixStore(f"attempt/{attempt}", store), PrefixStore(f"watched/{attempt}", store.clone())
    with watched(own, rank, world):
        kind, ep = read_parallel(parallel, num_experts)
        _quiet()
        device = _own(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=shared, rank=rank, world_size=world)
        yield Ranks(kind, rank, world, _mesh(device, world, ep) if ep > 1 else None), device
        dist.destroy_process_group()


def _quiet() -> None:
    """Silence torch's warnings that concern authors of training loops."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


def _mesh(device: torch.device, world: int, ep: int) -> DeviceMesh:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (world // ep, ep), mesh_dim_names=("efsdp", "ep"))


def _own(device: torch.device) -> torch.device:
    """The device of this process among those of its machine."""
    if device.type != "cuda":
        return device
    place, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if place >= count:
        raise UserError(
            f"torchrun started more processes than this machine has GPUs ({count}); --nproc-per-node {count}"
        )
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def _device() -> torch.device:
    return torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
