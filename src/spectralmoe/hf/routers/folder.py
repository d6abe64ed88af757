"""Models with swapped routers in folders: plain transformers loads the base model, ``load_swapped`` the swapped one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from spectralmoe.errors import UserError, first_line
from spectralmoe.files import exchange, exists, flush, make_folder, part_folder, writing
from spectralmoe.hf.load import import_transformers, load_stock, quiet
from spectralmoe.hf.routers.files import ROUTERS, put_routers, read_routers_config, stock_tensors, write_routers
from spectralmoe.hf.routers.places import refuse_adapters, swapped_routers
from spectralmoe.layers import unwrapped
from spectralmoe.manifold import warn_off_manifold
from spectralmoe.model_folder import alone
from spectralmoe.sharding import full

__all__ = ["load_swapped", "save_swapped"]


def save_swapped(model: nn.Module, folder: str | Path) -> None:
    """Write a Hugging Face model with swapped routers to ``folder``, as a stock model with routers beside it.

    The folder is what ``save_pretrained`` writes of the model with the gates that it had before the swap, so
    ``from_pretrained`` and other engines load that base model. ``load_swapped`` loads the swapped one. The folder
    appears whole or not at all; one that ``save_swapped`` wrote before is replaced, and what others have put there (a
    tokenizer) stays. A sharded model is gathered first: every rank must call, and writes the same.

    Raises:
        UserError: no layer of the model was swapped; it is no model of transformers, or holds adapters of PEFT; the
            folder cannot be written, or holds what ``save_swapped`` did not write.
    """
    stock, target = _saveable(model), Path(folder)
    swapped_routers(stock)
    warn_off_manifold(stock)
    _files_of_others(target)
    target = target.resolve()
    make_folder(target.parent)
    with writing(target / ROUTERS), part_folder(target.parent) as part:
        new = part / "new"
        new.mkdir()
        with quiet():
            try:
                whole = {name: full(value) for name, value in stock_tensors(stock).items()}
                type(stock).save_pretrained(stock, new, state_dict=whole)  # which one with copies refuses itself
            except ValueError as error:  # a quantised model that cannot be written
                raise UserError(f"transformers cannot save this model ({first_line(error)})") from error
        write_routers(stock, new)
        for path in new.iterdir():
            flush(path)
        with alone(target.parent):
            for path in _files_of_others(target):
                if not exists(new / path.name):
                    _link(path, new / path.name)
            _exchange(target, new, part / "old")


def load_swapped(folder: str | Path, *, base: nn.Module | str | Path | None = None, allow: Sequence[str] = ()) -> Any:
    """The model that ``save_swapped`` wrote to ``folder``.

    Args:
        base: the base model: in memory, where it gets the routers and is returned, or its folder; None: the stock model
            of ``folder``, loaded in evaluation mode and in the dtypes of its file.
        allow: classes outside spectralmoe's tables that the folder may name, as "pkg:Class".

    Raises:
        UserError: not such a folder, a damaged one, or a class that was not allowed; a base of other shapes, with other
            gates than the routers took the place of, or that was swapped already.
    """
    folder = Path(folder)
    read_routers_config(folder)
    model = base if isinstance(base, nn.Module) else load_stock(folder if base is None else base)
    put_routers(model, folder, allow=allow)
    return model


def _exchange(target: Path, new: Path, old: Path) -> None:
    """Put the folder ``new`` in the place of ``target``, at once where the system can; what was there goes away."""
    if not exists(target):
        new.rename(target)
        return
    if exchange(target, new):
        return
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise


def _saveable(model: nn.Module) -> Any:
    """The model of transformers that ``model`` is or wraps."""
    stock = unwrapped(model)
    refuse_adapters("save_swapped", stock)
    if away := next((name for name, value in stock.state_dict().items() if value.is_meta), None):
        raise UserError(
            f"save_swapped: {away} is not in memory (accelerate has moved it to disk); load the whole model"
        )
    if not isinstance(stock, import_transformers().PreTrainedModel):
        raise UserError(f"save_swapped: {type(stock).__name__} is no model of transformers; use save(model, folder)")
    return stock


def _link(path: str | Path, copy: str | Path) -> None:
    """Give a file or folder a second place, without a copy of the bytes where the file system can."""
    if Path(path).is_dir():
        shutil.copytree(path, copy, copy_function=_link)
        return
    try:
        os.link(path, copy)
    except OSError:
        shutil.copy2(path, copy)


def _files_of_others(target: Path) -> list[Path]:
    """The files in ``target`` that ``save_swapped`` did not write.

    Raises:
        UserError: it is a file, or holds something and no swapped model.
    """
    if not exists(target):
        return []
    if not target.is_dir():
        raise UserError(f"cannot write to {target}: it is a file, not a folder; name a folder")
    files = list(target.iterdir())
    if files and not exists(target / ROUTERS):
        raise UserError(f"{target} holds {min(files).name} and no swapped model; choose another folder")
    ours = read_routers_config(target).get("files", []) if files else []
    return [path for path in files if path.name not in ours]
