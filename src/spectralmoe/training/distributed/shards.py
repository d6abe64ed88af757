"""Checkpoints by ``torch.distributed.checkpoint``: each process writes its part; any number of processes read them.

A checkpoint is a folder inside the folder of all, in the format of torch and with one more file, ``state.safetensors``.
It is written under another name, takes its own when it is whole, and the older ones go; so the newest folder counts.
"""

from __future__ import annotations

import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from spectralmoe.errors import UserError
from spectralmoe.files import flush, make_folder, part_folder, writing
from spectralmoe.training.distributed.ranks import Ranks

__all__ = ["STATE", "newest", "read_sizes", "read_tensors", "write_shards"]

STATE = "state.safetensors"
"""What the first process alone knows; without it a folder is no checkpoint."""


def write_shards(
    place: Path, tensors: dict[str, Tensor], own: dict[str, Tensor], metadata: dict[str, str], *, ranks: Ranks
) -> None:
    """Write the checkpoint ``place``, the last one by its name, and remove those before it.

    Every process of ``ranks`` must call.

    Args:
        tensors: sharded ones, or the same on every process.
        own, metadata: tensors and texts that the first process writes.

    Raises:
        UserError: the folder cannot be written, or is not the same folder for all processes.
    """
    parent = place.parent
    if ranks.first:
        make_folder(parent)
    with writing(place), part_folder(parent) if ranks.first else nullcontext(parent) as own_part:
        part = Path(ranks.broadcast(str(own_part)))
        if not part.is_dir():
            raise UserError(
                f"rank {ranks.rank} does not see {part}, which the first process made; --out must be a folder that "
                "all machines share"
            )
        try:
            save(dict(tensors), checkpoint_id=part / place.name)
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise UserError(f"cannot write {place}: rank {rank}: {cause}") from error
        if ranks.first:
            save_file(own, part / place.name / STATE, metadata)
            flush(part / place.name / STATE)
            before = _folders(parent)
            (part / place.name).replace(place)
            for folder in before:
                shutil.rmtree(folder, ignore_errors=True)
    ranks.barrier()


def newest(parent: Path) -> list[Path]:
    """The last checkpoint that is whole, if there is one."""
    return _folders(parent)[-1:]


def read_sizes(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """The shapes and types of all tensors in a checkpoint, as wholes."""
    found = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` in place from a checkpoint, each sharded as it is here.

    Raises:
        ValueError: a tensor that is not in it, or has another shape.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            load(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())
        except CheckpointException as error:
            raise ValueError(next(iter(error.failures.values()))[0]) from error


def _folders(parent: Path) -> list[Path]:
    """All whole checkpoints, the last one last."""
    return sorted(folder for folder in parent.iterdir() if (folder / STATE).is_file() and folder.name[0] != ".")
