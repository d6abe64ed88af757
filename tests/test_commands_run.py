"""The commands of README and the tutorials run, in the order of the page, at sizes that take seconds.

Those of docs/llm.md run in test_llm_docs.py, those of the cards in tests/papers, those of docs/gallery.md in
docs/images/gallery.py. Those of docs/compare.md and docs/adapt.md are read alone (tests/test_pages.py): they hold
placeholders, or take minutes at any size.
"""

from __future__ import annotations

import shutil

import pytest
from families import build
from pages import ROOT, blocks, commands

from spectralmoe.cli.app import run

SMALLER = {
    "compare": "--seeds 1 --epochs 1 --train-size 40 --trials 1",
    "train": "--set optimization.epochs=1 --set train_size=40",
    "fewshot": "--seeds 1 --epochs 1",
}
"""These verbs take minutes with the sizes of the page."""
OF_DATA = {"text:": "--set text.length=32 --set text.measured=2", "restore:": "--set restore.measured=2"}
NOT_RUN = {
    "bench": "takes minutes; tests/bench",
    "adapt": "which image is wrong differs from processor to processor; tests/cli/test_adapt.py",
}

pytestmark = [pytest.mark.full, pytest.mark.slow]


def carry_out(words):
    verb = words[0]
    data = "".join(words)
    more = [SMALLER.get(verb, "")]
    if verb in ("compare", "train"):
        more += [options for start, options in OF_DATA.items() if start in data]
    assert run([*words, *" ".join(more).split()]) == 0, words


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the pages take to be there: texts, models of Hugging Face, a photograph, networks of this library."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", "examples")
    for name in ("book.txt", "code.py"):
        (tmp_path / name).write_text("".join(f"{n}\nthe cat sat on the mat\n\n" for n in range(200)))
    build("mixtral").save_pretrained("Mixtral-8x7B")
    build("olmoe", num_experts=8).save_pretrained("OLMoE-1B-7B")
    return tmp_path


def classes(photos, count):
    """An image folder of two classes with ``count`` images each."""
    from PIL import Image

    for kind in ("cats", "dogs"):
        (photos / kind).mkdir(parents=True)
        for n in range(count):
            Image.effect_noise((20, 20), 40 + 5 * n).save(photos / kind / f"{n}.png")


def test_a_regularizer_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_terms.py").write_text(
        next(each.text for each in blocks("docs/compare.md") if each.kind == "python")
    )
    (words,) = (words for words in commands("docs/compare.md") if "my_terms" in "".join(words))
    carry_out(words)


@pytest.mark.parametrize(
    "page", ["README.md", "docs/first.md", "docs/router.md", "docs/inspect.md", "docs/vision.md", "docs/restoration.md"]
)
def test_commands_run(page, folder, monkeypatch, capsys):
    if page in ("README.md", "docs/inspect.md"):
        pytest.importorskip("transformers")
        carry_out(["train", "--data", "digits", "--router", "sr-moe", "--set", "depth=1", "--out", "runs/sr-moe"])
    if page == "docs/inspect.md":
        (folder / "book.txt").write_text("".join(f"{n}\nthe cat sat on the mat\n\n" for n in range(5000)))
        carry_out(["train", "--data", "text:pydoc", "--router", "sr-moe", "--out", "runs/language"])
    if page == "docs/vision.md":
        pytest.importorskip("timm")
        classes(folder / "photos", 30)
        text = [block.text for block in blocks(page) if block.kind == "toml"][-1]
        (folder / "mine.toml").write_text(text.replace("pretrained = true", "arguments = {depth = 2, embed_dim = 48}"))
    if page == "docs/restoration.md":
        from PIL import Image

        pytest.importorskip("skimage")
        Image.radial_gradient("L").convert("RGB").save("photo.jpg")
        (folder / "scenes").mkdir()
        for n in range(4):
            Image.effect_noise((96, 96), 40 + 20 * n).save(f"scenes/{n}.png")
    if page == "docs/router.md":
        classes(folder / "photos", 30)
        monkeypatch.syspath_prepend(str(folder))
        (folder / "my_router.py").write_text(next(block.text for block in blocks(page) if block.kind == "python"))
    ran = [words for words in commands(page) if words[0] not in NOT_RUN]
    for words in ran:
        carry_out(words)
    assert len(ran) >= 2
