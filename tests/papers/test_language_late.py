"""Parts (b) and (c) of the language card, with a tiny Llama in the place of SmolLM2."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

from dense_models import dense_model

from spectralmoe.experiments.cards import Desk, run_card
from spectralmoe.hf.routers.swapped import SwappedRouter

CARD = Path(__file__).parents[2] / "papers" / "language"


@pytest.fixture(scope="module")
def sizes(card, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    dense_model("llama_tied")[0].save_pretrained(folder)
    for domain, words in {"prose": "the cat sat on {} mats\n", "code": "for i in range({}):\n    print(i)\n"}.items():
        (folder / domain).mkdir()
        for number in range(60):
            (folder / domain / f"{number}.txt").write_text(words.format(number) * 4)
    small = {
        "model": str(folder),
        "data": f"{folder / 'prose'}+{folder / 'code'}",
        "length": 16,
        "excerpt": 60,
        "train": 200,
        "validation": 60,
        "test": 90,
    }
    return replace(card.QUICK_LATE, **small, experts=4, keep=(3, 2), calibration=4)


@pytest.fixture(scope="module")
def late(sizes, tmp_path_factory):
    from late import open_late

    return open_late(Desk(tmp_path_factory.mktemp("work"), {}), sizes)


def test_the_last_layers_go_on_from_what_those_before_them_left(sizes, late):
    from late import PARTS, excerpts

    from spectralmoe.data.text_data import load_text
    from spectralmoe.hf.load import load_transformers
    from spectralmoe.hf.training.text_windows import Passages, bits_per_byte, cut_windows
    from spectralmoe.hf.upcycling.dense import admit_dense

    whole = load_transformers(sizes.model, admit=admit_dense)
    assert len(late.model.model.layers) == 2 < len(whole.model.model.layers)
    data = load_text(sizes.data)
    texts = excerpts([d.text for d in data.parts["test"] if d.domain == "code"], sizes.test, sizes.excerpt)
    passages = late.held_out["test"]["code"]
    assert passages.size == sum(len(text.encode()) for text in texts)
    again = Passages(cut_windows(whole, texts, sizes.length), passages.size)
    assert bits_per_byte(late.model, [passages], 4) == pytest.approx(bits_per_byte(whole.model, [again], 4), rel=1e-5)
    assert [*late.held_out] == list(PARTS[1:])
    assert late.train.inputs.shape[1:] == (sizes.length, 32)
    assert len(late.train) % len(data.domains) == 0


def test_excerpts_are_of_many_documents_and_of_the_size_that_was_asked():
    from late import excerpts

    texts = [f"head {number}\nfirst line\nsecond line\nlast line" for number in range(20)]
    taken = excerpts(texts, 100, 30)
    assert sum(map(len, taken)) == 100
    assert len(taken) > 3
    assert all(any(part in text for text in texts) and len(part) <= 30 for part in taken)
    assert excerpts(texts[::-1], 100, 30) == taken


def test_rows_start_alike_and_are_tuned_alike(sizes, late):
    from upcycled import CONTROL, RATES, build, rows_of, whole

    every = replace(sizes, methods=("copy", "drop", "noise"))
    assert len(RATES) == 3
    assert len(rows_of(every)) == 1 + 3 * 3 + 1
    dense = whole(build("dense", late, every, 0), late.held_out["validation"], every)
    copied = whole(build("copy+linear", late, every, 0), late.held_out["validation"], every)
    assert dense["bits_per_byte"] == pytest.approx(copied["bits_per_byte"], rel=1e-5)
    for method in every.methods:
        experts = [
            build(f"{method}+{r}", late, every, 3).model.layers[1].mlp.experts for r in ("linear", "sr-moe", "emoe")
        ]
        for other in experts[1:]:
            assert torch.equal(other.down_proj, experts[0].down_proj)
    plain, control = (build(row, late, every, 3).model.layers[0].mlp.gate for row in ("drop+linear", CONTROL))
    assert isinstance(control, SwappedRouter)
    assert torch.equal(control.router.scorer.weight, plain.weight)


def test_training_changes_the_last_layers_alone(sizes, late):
    from upcycled import build, finetune

    for row in ("dense", "drop+linear", "drop+sr-moe"):
        model = build(row, late, sizes, 0)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        finetune(model, row, late.train, 1e-2, sizes, 0, lambda done: None)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed
        assert all(".layers." in name for name in changed)
        assert any("gate" in name for name in changed) == (row != "linear")


def test_domain_information_is_one_where_experts_and_domains_are_the_same():
    from upcycled import _routing

    assert _routing([torch.tensor([[50, 0], [0, 50]])])["domain_information"] == pytest.approx(1, abs=0.05)
    even = _routing([torch.tensor([[25, 25], [25, 25]])])
    assert even["domain_information"] in (None, pytest.approx(0, abs=0.05))
    assert even["max_vio"] == 0


@pytest.mark.full
def test_a_folder_with_part_a_goes_on_with_the_others_alone(card, sizes, tmp_path):
    scratch = replace(card.QUICK_SIZES, data="text:pydoc", vocab=300, length=16, windows=16, tune_windows=8, measured=4)

    def ran(late):
        return run_card(card.card(scratch, late), tmp_path, tmp_path / "work", 1, lambda text, done: None)[0]

    assert ran(None) == 2 * len(card.ROWS)
    first = {name: (tmp_path / name).read_bytes() for name in ("tuning.json", "results.json")}
    settings = json.loads((tmp_path / "settings.json").read_text())
    rows = 5
    assert ran(sizes) == rows + rows + 1 + 1
    assert ran(sizes) == 0
    assert {name: (tmp_path / name).read_bytes() for name in first} == first
    assert json.loads((tmp_path / "settings.json").read_text()) == {**settings, "late": sizes.settings}
    cells = json.loads((tmp_path / "upcycled.json").read_text())
    trained = [cell for cell in cells if cell["row"] != "untrained"]
    assert {cell["tokens"] for cell in trained} == {trained[0]["tokens"]}
    assert all(("max_vio" in cell) == ("+" in cell["row"]) for cell in cells)
    tuned = json.loads((tmp_path / "upcycled_tuning.json").read_text())
    assert {len(row["tries"]) for row in tuned.values()} == {3}
    (pruned,) = json.loads((tmp_path / "pruned.json").read_text())
    (same,) = [cell for cell in cells if cell["row"] == "drop+linear"]
    assert pruned["before"]["bits_per_byte"] == same["bits_per_byte"]
    assert len(pruned["after"]) == 4 * len(sizes.keep)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## Upcycled: paired differences" in text.replace("###", "##")
    assert "| reap | random | 3 | 1 |" in text
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"scratch", "upcycled", "pruned"}


def test_without_the_package_a_line_says_so_and_stored_cells_are_shown(card, sizes, monkeypatch):
    import late

    monkeypatch.setattr(late, "find_spec", lambda name: None)
    made = card.card(card.QUICK_SIZES, sizes)
    assert made.notes == [late.MISSING]
    assert [step.file for step in made.steps][2:] == ["upcycled_tuning", "upcycled", "pruned"]
    assert not any([made.steps[2].rows, made.steps[3].wanted, made.steps[4].wanted])
