"""Windows of text hold every token once as a target; bits per byte are those of a slow loop."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from spectralmoe.hf.language import TransformersModel
from spectralmoe.hf.training.text_windows import IGNORED, Passages, Windows, bits_per_byte, cut_windows, hold_out


class Counting(torch.nn.Module):
    """A model of 300 tokens whose logits are a table's row of the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(300, 300))
        text = SimpleNamespace(vocab_size=300, bos_token_id=256)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def forward(self, input_ids, use_cache=False):
        assert not self.training
        return SimpleNamespace(logits=self.table[input_ids])


def loaded():
    return TransformersModel(Counting(), name="counting")


def targets(windows):
    """(token before, token) of everything that is to be predicted."""
    return [
        (before, label)
        for part in windows
        for ids, labels in zip(part.inputs.tolist(), part.labels.tolist(), strict=True)
        for before, label in zip(ids[:-1], labels[1:], strict=True)
        if label != IGNORED
    ]


@pytest.mark.parametrize("length", [2, 3, 5, 8, 100])
def test_every_token_is_predicted_once_from_the_one_before(length):
    texts = ["abcdefg", "xyz", "ä"]
    windows = cut_windows(loaded(), texts, length)
    pairs = [pair for text in texts for pair in zip([256, *text.encode()], text.encode(), strict=False)]
    assert targets(windows) == pairs
    assert windows[0].inputs.shape[1] == length
    assert all(len(part) == 1 and 1 < part.inputs.shape[1] < length for part in windows[1:])


def test_a_sample_is_what_a_forward_takes():
    windows = cut_windows(loaded(), ["abcdefg"], 4)[0]
    assert windows[1]["input_ids"].tolist() == [99, 100, 101, 102]
    assert Windows(torch.randn(2, 4, 8), windows.labels)[1]["inputs_embeds"].shape == (4, 8)


def test_bits_per_byte_by_a_slow_loop():
    model, texts = loaded(), ["the cat sat", "on the mät"]
    size = sum(len(text.encode()) for text in texts)
    table = model.model.table.double().tolist()
    bits = 0.0
    for text in texts:
        for before, token in zip([256, *text.encode()], text.encode(), strict=False):
            total = sum(math.exp(value) for value in table[before])
            bits -= math.log2(math.exp(table[before][token]) / total)
    model.model.train()
    for length, rows in ((4, 1), (6, 3), (50, 2)):
        passages = Passages(cut_windows(model, texts, length), size)
        assert bits_per_byte(model.model, [passages], rows) == [pytest.approx(bits / size, rel=1e-5)]
    assert model.model.training


def test_equal_logits_cost_the_logarithm_of_their_number():
    model = loaded()
    torch.nn.init.zeros_(model.model.table)
    passages = Passages(cut_windows(model, ["abc"], 3), 3)
    assert bits_per_byte(model.model, [passages], 1) == [pytest.approx(math.log2(300))]


def test_documents_are_held_out_whole_and_always_the_same_ones():
    documents = [f"document {number}\n" * 5 for number in range(20)]
    train, held = hold_out(documents, 0.2)
    assert sorted(train + held) == sorted(documents)
    assert sum(map(len, held)) >= 0.2 * sum(map(len, documents)) > sum(map(len, held[:-1]))
    assert hold_out(documents[::-1], 0.2) == (train, held)
    assert set(hold_out([*documents, "more"], 0.2)[1]) - {"more"} <= set(documents[:20])
    assert all(map(len, hold_out(["a" * 100, "b"], 0.9)))  # one is left on either side


def test_of_one_document_the_end_is_held_out():
    assert hold_out(["abcdefghij"], 0.2) == (["abcdefgh"], ["ij"])
    (train,), (held,) = hold_out(["one\ntwo\nthree\nfour\n"], 0.3)
    assert (train, held) == ("one\ntwo\n", "three\nfour\n")


def test_no_more_text_than_was_asked_for():
    train, held = hold_out(["ää" * 50, "b" * 10, "c" * 90], 0.1, size=101)
    assert sum(len(text.encode()) for text in train + held) in (100, 101)  # a letter is not cut
