"""Weights files of others: read as tensors, refused in one line."""

from __future__ import annotations

import argparse

import pytest
import torch
from safetensors.torch import save_file

from spectralmoe import UserError
from spectralmoe.checkpoints.weights_file import read_tensors, without_prefix


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "module", "model_ema", "state_dict_ema"])
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


def test_weights_come_before_their_average(tmp_path):
    both = {"state_dict_ema": {"a": torch.zeros(1)}, "state_dict": {"a": torch.ones(1)}}
    torch.save(both, tmp_path / "w.pth")
    assert read_tensors(tmp_path / "w.pth")["a"].item() == 1


def test_what_the_file_holds_instead_is_said(tmp_path, user_error):
    torch.save({"student": {"a": torch.ones(1)}, "teacher": {"a": torch.ones(1)}}, tmp_path / "w.pth")
    with user_error("it holds 'student', 'teacher'", "'state_dict'"):
        read_tensors(tmp_path / "w.pth")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "net.0."])
def test_a_prefix_of_all_names_is_taken_off(prefix):
    wanted = ["blocks.0.weight", "head.weight"]
    tensors = {f"{prefix}{name}": torch.full((1,), float(i)) for i, name in enumerate(wanted)}
    found = without_prefix(tensors, wanted)
    assert {name: value.item() for name, value in found.items()} == {"blocks.0.weight": 0.0, "head.weight": 1.0}


@pytest.mark.parametrize("names", [["module.a", "other.b"], ["module.a", "a"], ["x.y"], ["x"]])
def test_names_that_stay(names):
    tensors = {name: torch.ones(1) for name in names}
    assert without_prefix(tensors, ["a", "module.b"]).keys() == tensors.keys()


@pytest.mark.parametrize("name", ["a\0b.pth", "x" * 300 + ".pth"])
def test_names_that_no_file_system_has(tmp_path, user_error, name):
    with user_error():
        read_tensors(tmp_path / name)
