"""Tensors in safetensors files: names and shapes from the headers, numbers a piece at a time when asked for.

A file is read with plain reads into the piece that is wanted, not mapped: memory stays as small as the piece, whatever
the size of the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.files import exists
from spectralmoe.json_files import read_json

__all__ = ["FLOATS", "Stored", "passed_over", "stored_in_file", "stored_tensors"]

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The kinds of numbers that are read, as a header names them."""

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_CONVERT = "pickles can run code and are never read; save the model again with save_pretrained, as safetensors"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that lies in a file.

    Attributes:
        name: in the file.
        kind: of its numbers: "BF16", "F32", "U8", ...
        shape: its shape.
        file: where it lies.
        start: its first byte there.
        version: of the file: it changes when the file is written or replaced.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    file: Path
    start: int
    version: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def piece(self, first: int, count: int) -> Stored:
        """The ``count`` numbers of the flattened tensor from ``first`` on, as a tensor of one dimension."""
        return replace(self, shape=(count,), start=self.start + first * self._dtype().itemsize)

    def read(self) -> Tensor:
        """Its numbers in fp32, in its shape.

        Raises:
            UserError: numbers of a kind that is not in ``FLOATS``; a file that has changed since its header was read.
        """
        numbers = torch.empty(self.size, dtype=self._dtype())
        try:
            with self.file.open("rb", buffering=0) as file:
                same = _version(file.fileno()) == self.version
                file.seek(self.start)
                got = file.readinto(numbers.view(torch.uint8).numpy().data) if self.size else 0
        except OSError as error:
            raise UserError(f"cannot read {self.file}: {error.strerror or error}") from error
        if got != numbers.nbytes:
            raise UserError(f"{self.file} ends inside the tensor {self.name!r}; fetch it again")
        if not same:
            raise UserError(f"{self.file} was written while it was read; start again when its writer has ended")
        return numbers.float().view(self.shape)

    def _dtype(self) -> torch.dtype:
        if self.kind not in FLOATS:
            raise UserError(f"{self.file}: the tensor {self.name!r} holds {self.kind}, not floating-point numbers")
        return FLOATS[self.kind]


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Name -> tensor of one file or of a model folder: shards with their index, whole, or all its ``*.safetensors``.

    Raises:
        UserError: no such path; no safetensors files; a file that is cut short or is none; shards or tensors that the
            index names and that are not there; an adapter of PEFT without its model.
    """
    if not exists(path):
        raise UserError(f"{path}: no such file or folder; give a folder with safetensors files, or one such file")
    if path.is_dir():
        return _in_folder(path)
    if path.suffix != ".safetensors":
        why = _CONVERT if path.suffix in _PICKLES else "its name does not end in .safetensors"
        raise UserError(f"{path} is not a safetensors file: {why}")
    return stored_in_file(path)


def passed_over(folder: Path) -> str | None:
    """A sentence on the file that ``stored_tensors`` leaves out of a folder with a whole file and an index, or None.

    One of the two was left by an earlier save. transformers would load the whole file.
    """
    if not (folder / WHOLE).is_file() or not (folder / INDEX).is_file():
        return None
    places = _places(folder)
    if WHOLE in places.values():
        return None
    if _shards_are_there(folder, places):
        return (
            f"{WHOLE} beside the shards of {INDEX} was passed over, but transformers would load it: remove one of them"
        )
    return f"{INDEX} names no file that is there and was passed over: remove it"


def _in_folder(folder: Path) -> dict[str, Stored]:
    places = _places(folder) if (folder / INDEX).exists() else {}
    if places and (_shards_are_there(folder, places) or not (folder / WHOLE).exists()):
        return _in_shards(folder, places)
    if (folder / WHOLE).exists():
        return stored_in_file(folder / WHOLE)
    if (folder / ADAPTER).is_file():
        raise _is_adapter(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(item.name for item in folder.iterdir() if item.suffix in _PICKLES)
        why = f"it holds {pickled[0]}, but {_CONVERT}" if pickled else "give the folder that save_pretrained wrote"
        raise UserError(f"{folder} holds no safetensors files: {why}")
    by_name: dict[str, Stored] = {}
    for file in files:
        tensors = stored_in_file(file)
        if both := sorted(by_name.keys() & tensors.keys()):
            first = by_name[both[0]].file.name
            raise UserError(f"{folder}: {both[0]!r} stands in {first} and in {file.name}; give one of the files")
        by_name |= tensors
    return by_name


def _is_adapter(folder: Path) -> UserError:
    config = read_json(folder / ADAPTER)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return UserError(
        f"{folder} holds an adapter of PEFT, not a model: inspect the model that it was trained on"
        f"{f' ({base})' if base else ''}, or merge the two (merge_and_unload) and save the result"
    )


def _places(folder: Path) -> dict[str, str]:
    """Tensor -> name of its shard, as the index tells."""
    index = read_json(folder / INDEX)
    place = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(place, dict) or not place or not all(map(_is_file_name, place.values())):
        raise UserError(f"{folder / INDEX} holds no weight_map from tensors to files beside it; fetch it again")
    return place


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value not in ("", "..") and Path(value).name == value


def _shards_are_there(folder: Path, places: Mapping[str, str]) -> bool:
    """Whether at least one shard of the index exists: an index without any is a leftover."""
    return any(os.path.isfile(folder / shard) for shard in set(places.values()))


def _in_shards(folder: Path, place: Mapping[str, str]) -> dict[str, Stored]:
    shards = sorted(set(place.values()))
    if missing := [shard for shard in shards if not os.path.isfile(folder / shard)]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder} lacks {missing[0]}{more}, named by {INDEX}; fetch what is missing")
    tensors = {shard: stored_in_file(folder / shard) for shard in shards}
    if lost := [name for name, shard in place.items() if name not in tensors[shard]]:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(f"{folder / place[lost[0]]} lacks {lost[0]!r}{more}, placed there by {INDEX}; fetch both again")
    return {name: tensors[shard][name] for name, shard in place.items()}


def stored_in_file(file: Path) -> dict[str, Stored]:
    """Name -> tensor of one safetensors file.

    Raises:
        UserError: it cannot be read, is cut short or is none.
    """
    try:
        with safe_open(file, framework="numpy"):  # holds the header against itself and the length of the file
            pass
        with file.open("rb") as opened:
            version = _version(opened.fileno())
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (SafetensorError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} is not a whole safetensors file ({reason}); fetch or save it again") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from error
    header.pop("__metadata__", None)
    return {
        name: Stored(name, entry["dtype"], tuple(entry["shape"]), file, 8 + length + entry["data_offsets"][0], version)
        for name, entry in header.items()
    }


def _version(handle: int) -> tuple[int, ...]:
    state = os.fstat(handle)
    return state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size
