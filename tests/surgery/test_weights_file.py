"""Weights files of others: read as tensors, refused in one line."""

from __future__ import annotations

import argparse

import pytest
import torch
from safetensors.torch import save_file

from spectralmoe import UserError
from spectralmoe.surgery.weights_file import read_tensors


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_a_state_dict_is_found(tmp_path, wrapper):
    tensors = {"a.weight": torch.randn(3, 2)}
    torch.save(tensors if wrapper is None else {wrapper: tensors, "epoch": 3}, tmp_path / "w.pth")
    assert torch.equal(read_tensors(tmp_path / "w.pth")["a.weight"], tensors["a.weight"])


def test_safetensors(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    assert read_tensors(tmp_path / "w.safetensors")["a"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("text", ["hello", "version https://git-lfs.github.com/spec/v1", "<html></html>", "{}", ""])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_text_is_refused_without_bad_advice(tmp_path, text, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_tensors(path)
    line = str(caught.value)
    assert str(path) in line
    assert "weights_only" not in line
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("found", [argparse.Namespace(x=1), {0: torch.ones(1)}, [torch.ones(1)], {"a": 3}])
def test_more_than_tensors_is_refused(tmp_path, user_error, found):
    torch.save(found, tmp_path / "w.pth")
    with user_error("w.pth"):
        read_tensors(tmp_path / "w.pth")


def test_another_file_is_refused(tmp_path, user_error):
    with user_error("nothing.pth", "no such file"):
        read_tensors(tmp_path / "nothing.pth")
    (tmp_path / "w.h5").write_bytes(b"1")
    with user_error("w.h5", ".safetensors"):
        read_tensors(tmp_path / "w.h5")
