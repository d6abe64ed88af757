"""Bytes and byte pairs: no text changes on the way, and merges are those of the training text."""

from __future__ import annotations

import json
import pickle
import sys

import pytest

from spectralmoe.data.vocabulary import SEPARATOR, Vocabulary

TEXTS = ["the cat sat on the mat\n" * 5, "  def f(x):\n\treturn x\n" * 3, "Grüße → 😀 \r\n  end "]


@pytest.fixture(scope="module")
def learned():
    pytest.importorskip("tokenizers")
    return Vocabulary.learn(TEXTS, 300)


def test_bytes_are_themselves():
    vocabulary = Vocabulary()
    assert vocabulary.size == 256
    assert vocabulary.encode("aß") == [97, 195, 159]
    assert vocabulary.decode([97, 195, 159]) == "aß"
    assert vocabulary.decode([97, 195]) == "a\N{REPLACEMENT CHARACTER}"
    assert vocabulary.lengths.tolist() == [1] * 256
    assert vocabulary.decode([97, SEPARATOR, 98]) == "a\n\nb"


def test_no_text_changes_on_the_way(learned):
    for text in [*TEXTS, "unseen words, ümläuts\n\n\t x", " ", "", "\x7f\x01"]:
        tokens = learned.encode(text)
        assert learned.decode(tokens) == text
        assert int(learned.lengths[tokens].sum()) == len(text.encode())
        assert SEPARATOR not in tokens


def test_merges_are_of_frequent_pairs_and_shorten_the_text(learned):
    assert learned.size <= 300
    assert learned.merges
    assert b" the" in learned.tokens
    assert len(learned.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    for token, (left, right) in enumerate(learned.merges, 256):
        assert learned.tokens[token] == learned.tokens[left] + learned.tokens[right]


def test_it_learns_the_same_again_and_reads_back_from_json(learned):
    assert Vocabulary.learn(TEXTS, 300).merges == learned.merges
    again = Vocabulary.of_json(json.loads(json.dumps(learned.as_json())))
    assert again.tokens == learned.tokens
    assert again.encode(TEXTS[0]) == learned.encode(TEXTS[0])
    assert pickle.loads(pickle.dumps(learned)).encode(TEXTS[1]) == learned.encode(TEXTS[1])


def test_a_merge_by_hand():
    pytest.importorskip("tokenizers")
    vocabulary = Vocabulary([(116, 104), (256, 101)])
    assert vocabulary.tokens[256:] == [b"th", b"the"]
    assert vocabulary.encode("then th") == [257, 110, 32, 256]


def test_errors(user_error, monkeypatch):
    with user_error("token 256 merges (1, 300)"):
        Vocabulary([(1, 300)])
    for broken in ({}, {"merges": [[1]]}, {"merges": 5}, None):
        with user_error("vocabulary: no list of merges"):
            Vocabulary.of_json(broken)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert Vocabulary().encode("a") == [97]
    assert Vocabulary([(97, 98)]).decode([256]) == "ab"
    with user_error("needs tokenizers", "spectralmoe[text]"):
        Vocabulary([(97, 98)]).encode("ab")
