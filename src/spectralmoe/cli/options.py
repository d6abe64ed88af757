"""Options that several verbs share."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from spectralmoe.cli.completion import complete_images, one_among
from spectralmoe.errors import UserError
from spectralmoe.json_files import read_json

if TYPE_CHECKING:
    import torch
    from torch import nn

    from spectralmoe.data.image_data import ImageData
    from spectralmoe.hf import TransformersModel
    from spectralmoe.models import SRMoE
    from spectralmoe.training.network import ModelMeta
    from spectralmoe.training.tasks import Task
    from spectralmoe.vision.model import VisionMoE

__all__ = [
    "ANY_DATA",
    "Allow",
    "Assign",
    "Data",
    "DataDir",
    "DeviceName",
    "Download",
    "Json",
    "Model",
    "Out",
    "PrintConfig",
    "Seed",
    "is_own",
    "load_network",
    "load_saved",
    "load_stock_model",
    "open_data",
    "read_data",
    "read_k",
    "refuse_outputs",
    "say_notes",
    "see_own_modules",
    "split_names",
    "split_numbers",
    "trust_own",
]

OUTPUTS = {
    "inspection.json": "an inspection (see its report.html)",
    "results.json": "a comparison (its models are the folders in {path}/models)",
    "fewshot.json": "few-shot results (see 'spectralmoe report {path}')",
    "bench.json": "a benchmark (see its bench.md)",
    "training.safetensors": "a training that has not ended (start the same command again)",
}
"""What verbs write that is no model: a file's name -> what the folder holds."""

ANY_DATA = "NAME|folder:PATH|hf:NAME|text:NAME|signals:NAME|restore:NAME|views:NAME"
"""What --data takes where a task of any kind is meant."""

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder that holds a saved model.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for everything that is written.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="NAME|folder:PATH|hf:NAME",
        help="Data set (see 'spectralmoe list'), image folder, or data set of Hugging Face.",
        autocompletion=complete_images,
    ),
]
DataDir = Annotated[Path | None, typer.Option("--data-dir", metavar="DIR", help="Where to look for data sets first.")]
Download = Annotated[bool, typer.Option("--download", help="Fetch a missing data set.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Random seed.")]
DeviceName = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda",
        help="Where to compute; auto: on a CUDA GPU where there is one.",
        autocompletion=one_among("auto", "cpu", "cuda"),
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text, errors too.")]
Assign = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as network.k=1; repeats."),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Print all settings of the run as TOML, and train nothing.")
]
TextFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="PATH|text:NAME|-",
        help="UTF-8 text for a Hugging Face model: a file, a folder, a text by name or standard input; several are "
        "domains.",
    ),
]
Allow = Annotated[
    list[str] | None, typer.Option("--allow", metavar="PKG:CLASS", help="A class of your own that the model may use.")
]


def split_names(text: str) -> tuple[str, ...]:
    """``"a, b"`` -> ``("a", "b")``; a table in braces is one name, whatever commas it holds.

    >>> split_names('linear, {scorer = "prototype", p = 0.7}')
    ('linear', '{scorer = "prototype", p = 0.7}')
    """
    names, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif depth and letter in "\"'":
            quote = letter
        else:
            depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth <= 0 and not quote:
            names.append("")
        else:
            names[-1] += letter
    return tuple(name.strip() for name in names if name.strip())


def read_k(text: str) -> int | str:
    """Experts a token: a number, or "soft".

    Raises:
        UserError: neither.
    """
    if text == "soft":
        return text
    if not (text.isdecimal() and int(text)):
        raise UserError(f"--k {text} is neither 'soft' nor a number of experts a token")
    return int(text)


def split_numbers(option: str, text: str) -> tuple[int, ...]:
    """``"2, 4"`` -> ``(2, 4)``.

    Raises:
        UserError: something that is not a number; names ``option``.
    """
    try:
        return tuple(int(part) for part in split_names(text))
    except ValueError as error:
        raise UserError(f"{option} {text!r} is not a list of numbers such as 2,4") from error


def see_own_modules(names: Sequence[str]) -> None:
    """Let ``pkg:Class`` find modules in the current folder, as ``python -m`` does."""
    if any(":" in name for name in names) and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def trust_own(rows: Any, allow: Sequence[str] | None, typed: Any) -> None:
    """Allow the import of each ``pkg:object`` that rows name; names in a settings file do not allow an import.

    Args:
        allow: the names that may be imported.
        typed: rows as the command line has them; what they name may be imported, too.

    Raises:
        UserError: a name that is in neither.
    """
    from spectralmoe.naming import own_names

    names, allowed = own_names(rows), (*(allow or ()), *own_names(typed))
    for name in names:
        if name not in allowed:
            raise UserError(f"router {name!r} is a class of your own; if you trust it, add --allow {name}")
    see_own_modules(names)


def refuse_outputs(path: Path) -> None:
    """Raise an error that names the kind of a folder or file of this library which was given as a model.

    Raises:
        UserError: it was written by a verb and holds no model.
    """
    if path.is_file() and path.suffix in (".json", ".jsonl", ".html", ".svg", ".toml"):
        raise UserError(f"{path} is a {path.suffix} file, not a model; name the folder of a model")
    weights = {file.name for file in path.glob("*.safetensors")} - {"training.safetensors"}
    if weights or (path / "config.json").is_file():
        return
    for name, what in OUTPUTS.items():
        if (path / name).is_file():
            raise UserError(f"{path} holds {what.format(path=path)}, not a model")


def is_own(folder: Path) -> bool:
    """Whether ``spectralmoe.save`` wrote this folder."""
    config = folder / "config.json"
    content = read_json(config) if config.is_file() else None
    return isinstance(content, dict) and "spectralmoe" in content


def load_stock_model(source: str, cure: str, **how: Any) -> TransformersModel:
    """A model of transformers, as ``load_transformers(source, **how)``.

    Args:
        cure: what is said of a network of this library.

    Raises:
        UserError: it is one, or something else that this library wrote; or as ``load_transformers``.
    """
    from spectralmoe.hf.load import load_transformers

    refuse_outputs(Path(source))
    if is_own(Path(source)):
        raise UserError(f"{source} holds a model of spectralmoe{cure}")
    return load_transformers(source, **how)


def load_saved(folder: Path, device: torch.device, allow: Sequence[str] | None) -> tuple[type[Task], nn.Module, Any]:
    """The task that a saved network was trained for, the network, and what its task saved beside it.

    Raises:
        UserError: not a model folder, with what it is if this library wrote it; a model that is of no task.
    """
    from spectralmoe.saving import load, read_config
    from spectralmoe.training.tasks import task_of

    refuse_outputs(folder)
    see_own_modules(allow or ())
    network, values = load(folder, allow=tuple(allow or ())), read_config(folder)["meta"]
    task = task_of(values.get("data") if isinstance(values, dict) else None)
    return task, network.to(device), task.read_meta(network, values, folder)


def load_network(
    folder: Path, device: torch.device, allow: Sequence[str] | None
) -> tuple[SRMoE | VisionMoE, ModelMeta]:
    """An image network and how it reads images.

    Raises:
        UserError: as ``load_saved``; a network of another task.
    """
    from spectralmoe.training.network import ModelMeta

    task, network, meta = load_saved(folder, device, allow)
    if not isinstance(meta, ModelMeta):
        raise UserError(f"{folder} {task.does}; adapt and fewshot are for networks that classify images")
    return cast("SRMoE | VisionMoE", network), meta


def open_data(name: str | None, meta: ModelMeta, data_dir: Path | None, download: bool) -> ImageData:
    """The data set called ``name``, or the one that the model was trained on; how it was read is said on stderr.

    Raises:
        UserError: it cannot be had, or does not fit the model.
    """
    from spectralmoe.training.network import fitting_data

    data = fitting_data(name, meta, data_dir, download)
    say_notes(data.notes)
    return data


def read_data(name: str, data_dir: Path | None, download: bool, side: int | None = None) -> ImageData:
    """The data set called ``name``; how its files were read is said on stderr.

    Raises:
        UserError: it cannot be had.
    """
    from spectralmoe.data.image_data import load_data

    data = load_data(name, data_dir=data_dir, download=download, side=side)
    say_notes(data.notes)
    return data


def say_notes(notes: Sequence[str]) -> None:
    """Print notes for the user, a line each, on stderr."""
    for note in notes:
        typer.echo(f"note: {note}", err=True)
