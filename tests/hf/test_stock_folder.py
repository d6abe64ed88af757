"""Folders that plain transformers loads are written whole, also where the folder is a mount point."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from families import build

from spectralmoe.errors import UserError
from spectralmoe.hf import load_transformers
from spectralmoe.hf.stock_folder import save_stock


def test_a_folder_that_cannot_be_replaced_gets_the_files(tmp_path, monkeypatch):
    def busy(path, target):
        raise OSError(errno.EBUSY, "Device or resource busy")

    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(Path, "replace", busy)
    save_stock(build("mixtral"), None, tmp_path / "volume")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["volume"]
    assert load_transformers(str(tmp_path / "volume")).model.num_parameters() > 0


def test_what_the_system_says_is_one_line(tmp_path, monkeypatch):
    def full(path, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left"):
        save_stock(build("mixtral"), None, tmp_path / "out")
