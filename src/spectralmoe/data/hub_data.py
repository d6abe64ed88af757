"""Data sets by the library ``datasets`` of Hugging Face: their names with options, where they are, their columns.

Nothing of a data set is run: ``datasets`` reads tables and files, and loading scripts are no longer among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from spectralmoe.data.sources import fetched_to, one_line
from spectralmoe.errors import UserError, one_of
from spectralmoe.files import make_folder, part_folder

__all__ = ["column_of", "open_hub", "split_name", "title_of", "whole_name"]

INSTALL = "install it with 'pip install spectralmoe[datasets]'"


def split_name(given: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The source after ``hf:``, and its options ``KEY=VALUE``, each after a comma.

    Raises:
        UserError: an option that is not in ``known``, has no value, or is given twice.

    >>> split_name("uoft-cs/cifar100,label=fine_label", ["config", "label"])
    ('uoft-cs/cifar100', {'label': 'fine_label'})
    """
    source, *pieces = given.split(",")
    options: dict[str, str] = {}
    for piece in pieces:
        key, _, value = piece.partition("=")
        if key not in known:
            raise one_of(f"option of 'hf:{source}'", key, known)
        if not value or key in options:
            raise UserError(
                f"'hf:{given}': {key} is {'given twice' if value else 'empty'}; write it once, as {key}=NAME"
            )
        options[key] = value
    if not source:
        raise UserError(f"'hf:{given}' names no data set; write hf:NAME of the hub, or hf:FOLDER")
    return source, options


def whole_name(source: str, options: Mapping[str, str]) -> str:
    """The name without ``hf:`` with its path made absolute, so that it does not depend on the current folder."""
    folder = Path(source).expanduser()
    place = str(folder.resolve()) if folder.is_dir() else source
    return ",".join([place, *(f"{key}={value}" for key, value in options.items())])


def title_of(source: str) -> str:
    """The last part of a source's name.

    >>> title_of("roneneldan/TinyStories")
    'TinyStories'
    """
    return Path(source).expanduser().resolve().name


def open_hub(source: str, config: str | None, data_dir: Path | None, download: bool) -> dict[str, Any]:
    """Split -> table of a data set: of a folder; fetched before; or, with ``download``, of the hub.

    A folder holds files that ``datasets`` knows (Parquet, CSV, JSON, text, images in a subfolder a class), or what its
    ``save_to_disk`` wrote. What is fetched is kept in ``hf`` in ``data_dir``, or in the cache of this library.

    Raises:
        UserError: ``datasets`` is missing; there is no such data set, or it cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"data 'hf:{source}' need the library datasets; {INSTALL}") from error
    folder = Path(source).expanduser()
    kept = fetched_to(data_dir) / "hf" / ",".join([source.replace("/", "--"), *([config] if config else [])])
    if not folder.is_dir() and not kept.is_dir():
        if source.count("/") > 1 or source.startswith((".", "~", "/")):
            raise UserError(f"data 'hf:{source}': there is no such folder")
        if not download:
            raise UserError(
                f"data 'hf:{source}' were not found: no folder here, nor {kept}; add --download to fetch them from the "
                "Hugging Face hub"
            )
        _fetch(datasets, source, config, kept)
    place = folder if folder.is_dir() else kept
    with one_line(f"cannot read 'hf:{source}'"):
        saved = any((place / name).is_file() for name in ("dataset_dict.json", "state.json"))
        found = datasets.load_from_disk(place) if saved else datasets.load_dataset(str(place), config)
    return dict(found) if isinstance(found, dict) else {"train": found}


def column_of(table: Any, wanted: str | None, kind: str, source: str, key: str) -> str:
    """The name of the one column of a type of ``datasets``, such as ``"Image"``, or of ``wanted``, which must be there.

    Raises:
        UserError: there is no such column, or there are several of that type.
    """
    if wanted is not None:
        if wanted not in table.features:
            raise one_of(f"column of 'hf:{source}'", wanted, list(table.features))
        return wanted
    found: list[str] = [name for name, feature in table.features.items() if _type_of(feature) == kind]
    if len(found) != 1:
        there = ", ".join(f"{name} ({_type_of(feature)})" for name, feature in table.features.items())
        which = f"several columns of type {kind}" if found else f"no column of type {kind}"
        raise UserError(f"'hf:{source}' has {which}; name one by ',{key}=COLUMN': {there}")
    return found[0]


def _type_of(feature: Any) -> str:
    """The class of a feature; of a plain value its type, with one name for short and long strings."""
    value = str(getattr(feature, "dtype", "")) if type(feature).__name__ == "Value" else type(feature).__name__
    return "string" if value == "large_string" else value


def _fetch(datasets: ModuleType, source: str, config: str | None, kept: Path) -> None:
    """Load from the hub and write to the folder ``kept``, completely or not at all."""
    with one_line(f"cannot fetch 'hf:{source}' from the Hugging Face hub"):
        found = datasets.load_dataset(source, config)
    make_folder(kept.parent)
    with part_folder(kept.parent) as part, one_line(f"cannot write {kept}"):
        found.save_to_disk(part / kept.name)
        (part / kept.name).replace(kept)
