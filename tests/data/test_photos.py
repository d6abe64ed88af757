"""Photographs: parts that share none, whatever the files are called, and what is no photograph."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from seeds import generator

from spectralmoe.data import photos
from spectralmoe.data.photos import PHOTO_PARTS, Photo, load_photos, patches_of


def folder_of(root, count, *, colour=False, prefix="p"):
    """Files of random pixels; those of one number hold the same, whatever they are called."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        shape = (20, 24, 3) if colour else (20, 24)
        np.save(root / f"{prefix}{number}.npy", torch.rand(shape, generator=generator(number)).numpy())
    return root


def digests(photos_of_part):
    return {hashlib.sha256(photo.pixels.numpy().tobytes()).hexdigest() for photo in photos_of_part}


def test_a_folder_is_split_by_content_and_each_content_is_read_once(tmp_path):
    folder_of(tmp_path / "one", 12)
    folder_of(tmp_path / "one" / "below", 12, prefix="again")
    folder_of(tmp_path / "two", 12, prefix="z")
    one, two = (load_photos(f"folder:{tmp_path / name}") for name in ("one", "two"))
    assert [len(one.parts[part]) for part in PHOTO_PARTS] == [9, 1, 2]
    assert [digests(one.parts[part]) for part in PHOTO_PARTS] == [digests(two.parts[part]) for part in PHOTO_PARTS]
    assert len(set.union(*(digests(one.parts[part]) for part in PHOTO_PARTS))) == 12


def test_colours_are_read_as_grey_and_the_notes_say_so(tmp_path):
    data = load_photos(f"folder:{folder_of(tmp_path, 3, colour=True)}")
    assert data.parts["train"][0].pixels.shape == (1, 20, 24)
    assert "read as grey: " in data.notes[1]


def test_what_cannot_be_had_is_an_error_of_one_line(tmp_path, user_error, monkeypatch):
    with user_error("unknown photographs 'photo'", "photos", "folder:PATH"):
        load_photos("photo")
    with user_error("does not exist"):
        load_photos(f"folder:{tmp_path / 'none'}")
    with user_error("has 2 different images; at least 3"):
        load_photos(f"folder:{folder_of(tmp_path, 2)}")
    monkeypatch.setattr(photos, "find_spec", lambda name: None)
    with user_error("skimage/data", "pip install spectralmoe[restore]", "restore:folder:PATH"):
        load_photos("photos")


def test_the_packaged_photographs_are_in_one_part_each():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    data = load_photos("photos")
    names = {part: {photo.name for photo in data.parts[part]} for part in PHOTO_PARTS}
    assert names["test"] == {"chelsea", "china", "grace_hopper"}
    assert names["validation"] == {"coffee", "flower"}
    assert "motorcycle_left" in names["train"]
    assert sum(map(len, names.values())) == len(set.union(*names.values())) == 19
    assert "motorcycle_right" not in names["train"]  # the other view of the same scene
    for photo in data.parts["test"]:
        assert photo.pixels.shape[0] == 1
        assert 0 <= float(photo.pixels.min()) < float(photo.pixels.max()) <= 1


def test_patches_lie_beside_each_other_and_plain_ones_are_left_out():
    picture = torch.rand(1, 9, 13, generator=generator(0))
    picture[0, :4, :4] = 0.5
    patches = patches_of([Photo("p", picture)], 4)
    want = {tuple(picture[0, r : r + 4, c : c + 4].flatten().tolist()) for r in (0, 4) for c in (0, 4, 8)}
    want.remove((0.5,) * 16)
    assert patches.shape == (5, 1, 4, 4)
    assert {tuple(patch.flatten().tolist()) for patch in patches} == want


def test_a_photograph_smaller_than_a_patch_gives_none():
    small, large = Photo("small", torch.rand(1, 20, 40)), Photo("large", torch.rand(1, 64, 32))
    assert torch.equal(patches_of([small, large], 32), patches_of([large], 32))
