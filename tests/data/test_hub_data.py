"""Data sets that the library ``datasets`` reads: small ones, written to disk here; nothing is fetched."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from spectralmoe.cli.app import run
from spectralmoe.data.image_data import load_data
from spectralmoe.data.text_data import load_text, part_of
from spectralmoe.json_files import read_json
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks import open_task

NAMES = ["cat", "dog"]
SUMMARY = (
    "20 images of 2 classes, split at random into 70% for training, 10% for validation and 20% for testing, "
    "read as 6 x 8, colour"
)


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    found = pytest.importorskip("datasets")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return found


def images(
    datasets, counts: dict[str, int], *, mode: str = "RGB", size=(6, 8), plain: bool = False, twice: bool = False
):
    """Split -> a table of images whose class is seen in the first pixel: 10 for a cat, 200 for a dog."""
    from PIL import Image

    kinds = {
        "picture": datasets.Image(),
        "kind": datasets.Value("string") if plain else datasets.ClassLabel(names=NAMES),
    }
    tables = {}
    for split, count in counts.items():
        labels = [n % 2 for n in range(count)]
        shape = size if mode == "L" else (*size, 3)
        pixels = [np.full(shape, 200 if label else 10, np.uint8) for label in labels]
        columns = {"picture": [Image.fromarray(each, mode) for each in pixels], "kind": labels}
        if plain:
            columns["kind"] = [NAMES[label] for label in labels]
        if twice:
            columns["coarse"], kinds["coarse"] = labels, datasets.ClassLabel(names=["x", "y"])
        tables[split] = datasets.Dataset.from_dict(columns, datasets.Features(kinds))
    return tables


def parquet(folder: Path, tables) -> str:
    folder.mkdir(exist_ok=True)
    for split, table in tables.items():
        table.to_parquet(str(folder / f"{split}-0.parquet"))
    return f"hf:{folder}"


def test_one_split_is_cut_as_a_folder_is(datasets, tmp_path):
    data = load_data(parquet(tmp_path / "pets", images(datasets, {"train": 20})))
    assert (data.name, data.classes) == (f"hf:{tmp_path / 'pets'}", ("cat", "dog"))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [14, 2, 4]
    assert (data.channels, data.image_size) == (3, (6, 8))
    for part in (data.train, data.validation, data.test):
        assert torch.equal(part.labels, (part.images[:, 0, 0, 0] > 0.5).long())
    assert data.train.images.max().item() == pytest.approx(200 / 255)
    assert data.notes == (f"hf:{tmp_path / 'pets'}: {SUMMARY}",)


def test_splits_are_kept_and_an_eighth_serves_for_validation(datasets, tmp_path):
    data = load_data(parquet(tmp_path / "pets", images(datasets, {"train": 16, "test": 6}, mode="L")))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [14, 2, 6]
    assert data.channels == 1


def test_options_name_splits_and_columns(datasets, tmp_path, user_error):
    name = parquet(tmp_path / "pets", images(datasets, {"train": 8, "validation": 4}, twice=True))
    with user_error("no split for test", ",test=SPLIT", "train, validation"):
        load_data(name)
    with user_error("several columns of type ClassLabel", ",label=COLUMN", "coarse (ClassLabel)"):
        load_data(f"{name},test=validation")
    data = load_data(f"{name},test=validation,label=coarse")
    assert (data.classes, len(data.train), len(data.test)) == (("x", "y"), 6, 4)
    assert data.name == f"{name},test=validation,label=coarse"  # what a saved model is evaluated with
    assert load_data(data.name).fingerprint == data.fingerprint


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (",labels=kind", ["unknown option", "'labels'", "did you mean 'label'"]),
        (",label=", ["label is empty"]),
        (",label=kind,label=kind", ["label is given twice"]),
        (",label=sort", ["unknown column", "'sort'", "kind, picture"]),
        (",test=tests", ["unknown split", "'tests'", "test, train"]),
        (",test=train,train=train", ["one split cannot be two parts"]),
        (",image=kind", ["'kind'", "holds no images"]),
        (",label=picture", ["'picture'", "holds no classes"]),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(options, words, datasets, tmp_path, user_error):
    name = parquet(tmp_path / "pets", images(datasets, {"train": 8, "test": 4}))
    with user_error(*words):
        load_data(name + options)


def test_classes_may_be_plain_values_and_images_are_resized(datasets, tmp_path):
    name = parquet(tmp_path / "pets", images(datasets, {"train": 20}, plain=True, size=(6, 80)))
    data = load_data(f"{name},label=kind")
    assert (data.classes, data.image_size) == (("cat", "dog"), (32, 32))
    assert load_data(f"{name},label=kind", side=12).image_size == (12, 12)


def test_images_without_a_class_are_refused(datasets, tmp_path, user_error):
    tables = images(datasets, {"train": 8, "test": 4})
    hidden = {**tables["test"].to_dict(), "kind": [-1] * 4}
    tables["test"] = datasets.Dataset.from_dict(hidden, tables["test"].features)
    with user_error("images without a class for test", ",test=SPLIT"):
        load_data(parquet(tmp_path / "pets", tables))


def test_a_folder_of_image_files_and_what_was_saved_to_disk(datasets, tmp_path):
    table = images(datasets, {"train": 20})["train"]
    table.save_to_disk(str(tmp_path / "saved"))
    for number, row in enumerate(table):
        path = tmp_path / "files" / "train" / NAMES[row["kind"]] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["picture"].save(path)
    saved, files = (load_data(f"hf:{tmp_path / name}") for name in ("saved", "files"))
    assert saved.classes == files.classes == ("cat", "dog")
    assert len(saved.train) == len(files.train) == 14


def test_nothing_is_fetched_unasked_and_then_once(datasets, tmp_path, monkeypatch, user_error):
    with user_error("'hf:some/pets' were not found", "--download"):
        load_data("hf:some/pets", data_dir=tmp_path)
    with user_error("there is no such folder"):
        load_data(f"hf:{tmp_path / 'none'}")
    asked = []

    def load_dataset(path, config):
        asked.append((path, config))
        return datasets.DatasetDict(images(datasets, {"train": 16, "test": 4}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    one = load_data("hf:some/pets,config=small", data_dir=tmp_path, download=True)
    two = load_data("hf:some/pets,config=small", data_dir=tmp_path)
    assert asked == [("some/pets", "small")]
    assert one.fingerprint == two.fingerprint
    assert one.name == "hf:some/pets,config=small"


def test_a_failure_of_datasets_is_one_line(datasets, tmp_path, user_error):
    (tmp_path / "empty").mkdir()
    with user_error(f"cannot read 'hf:{tmp_path / 'empty'}'"):
        load_data(f"hf:{tmp_path / 'empty'}")


def test_without_the_library_a_line_names_the_cure(monkeypatch, user_error):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for load, name in ((load_data, "hf:some/pets"), (load_text, "hf:some/tales")):
        with user_error("need the library datasets", "pip install spectralmoe[datasets]"):
            load(name)


def test_a_loading_script_is_never_run(datasets, tmp_path, user_error):
    folder = tmp_path / "tricks"
    folder.mkdir()
    (folder / "tricks.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with user_error("cannot read"):
        load_data(f"hf:{folder}")
    assert not (tmp_path / "ran").exists()


def tales(datasets, folder: Path, **more: list) -> str:
    rows = {"text": [f"Tale {n}. Once upon a time there were {n} bears." for n in range(120)] + ["", None], **more}
    table = datasets.Dataset.from_dict(rows)
    return parquet(folder, {"train": table.select(range(100)), "test": table.select(range(100, 122))})


def test_text_is_split_by_its_content(datasets, tmp_path, user_error):
    name = tales(datasets, tmp_path / "tales", title=["a"] * 122)
    data = load_text(name)
    assert (data.name, data.domains) == (f"text:{name}", ("tales",))
    assert sum(len(part) for part in data.parts.values()) == 120
    assert all(part_of(document.text) == part for part, documents in data.parts.items() for document in documents)
    assert data.notes == (f"{name}: 120 rows with text, of train, test; split anew by their content",)
    assert sum(len(part) for part in load_text(f"{name},split=train").parts.values()) == 100
    with user_error("unknown split", "test, train"):
        load_text(f"{name},split=valid")
    with user_error("too few documents"):
        load_text(f"{name},text=title")
    with user_error("unknown option", "config, split, text"):
        load_text(f"{name},label=title")


def test_text_is_joined_with_others(datasets, tmp_path):
    data = load_text(f"{tales(datasets, tmp_path / 'tales')},split=train+pydoc")
    assert data.domains == ("pydoc", "tales")


def test_the_columns_of_text(datasets, tmp_path, user_error):
    table = datasets.Dataset.from_dict({"story": ["One.", "Two."], "by": ["A", "B"], "year": [1, 2]})
    name = parquet(tmp_path / "tales", {"train": table})
    with user_error("several columns of type string", ",text=COLUMN", "year (int64)"):
        load_text(name)
    with user_error("column 'year' holds no text, but int"):
        load_text(f"{name},text=year")


def test_tasks_take_them(datasets, tmp_path):
    pets = parquet(tmp_path / "pets", images(datasets, {"train": 16, "test": 4}))
    task = open_task(TrainSettings(data=pets, image_size=12))
    assert (task.name, task.size, tuple(task.example().shape)) == (pets, 14, (1, 3, 12, 12))
    name = f"text:{tales(datasets, tmp_path / 'tales')}"
    assert open_task(TrainSettings(data=name)).name == name


@pytest.mark.full
def test_verbs_take_them(datasets, tmp_path, capsys):
    name = parquet(tmp_path / "pets", images(datasets, {"train": 16, "test": 4}))
    small = ["--routers", "linear", "--depths", "1", "--seeds", "1", "--epochs", "1", "--trials", "1"]
    assert run(["compare", "--data", name, *small, "--out", str(tmp_path / "out")]) == 0
    cells = read_json(tmp_path / "out" / "results.json")["cells"]
    assert [cell["router"] for cell in cells] == ["linear"]
    (model,) = (tmp_path / "out" / "models").iterdir()
    assert run(["evaluate", str(model)]) == 0
    assert "4 test images" in capsys.readouterr().out
