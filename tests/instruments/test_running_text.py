"""Running text: the expert that each token leans on."""

from __future__ import annotations

import torch
from seeds import generator

from spectralmoe import FeedForward, LinearScorer, MoE, Router, Soft, TopK
from spectralmoe.diagnostics import watch
from spectralmoe.instruments.running_text import passage, split_text


def seen_by(model, x):
    with watch(model) as seen, torch.no_grad():
        model(x)
        return seen.layers, seen.drain()


def test_the_expert_with_the_largest_weight_of_every_token():
    model = torch.nn.Sequential(
        MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16)),
        MoE(Router(LinearScorer(8, 3), Soft()), FeedForward(3, 8, 16)),
    )
    x = torch.randn(1, 30, 8, generator=generator(0))
    layers, calls = seen_by(model, x)
    made = passage([f"{i} " for i in range(30)], layers, calls, "numbers")
    assert (made["title"], len(made["pieces"])) == ("numbers", 30)
    for leaning, call in zip(made["layers"], calls, strict=True):
        for i, (expert, weight) in enumerate(zip(leaning["experts"], leaning["weights"], strict=True)):
            given = dict(zip(call.routing.indices[i].tolist(), call.routing.weights[i].tolist(), strict=True))
            assert abs(max(given.values()) - weight) < 1e-3
            assert given[expert] == max(given.values())


def test_no_expert_and_zero_experts_are_none():
    router = Router(LinearScorer(2, 3), TopK(1))
    model = MoE(router, FeedForward(2, 2, 4))  # the third is a zero expert
    with torch.no_grad():
        router.scorer.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 5.0], [-5.0, -5.0]]))
    layers, calls = seen_by(model, torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]]))
    (leaning,) = passage("abc", layers, calls)["layers"]
    assert leaning["experts"] == [0, 1, None]
    assert leaning["weights"][2] is None


def test_a_layer_that_routes_other_things_has_nothing_to_say():
    model = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16))
    layers, calls = seen_by(model, torch.randn(1, 30, 8))
    assert passage(["x"] * 29, layers, calls)["layers"] == [None]
    assert passage(["x"] * 30, layers, [])["layers"] == [None]


def test_the_decoder_reads_the_start_token_first():
    model = MoE(Router(LinearScorer(8, 4), TopK(1)), FeedForward(4, 8, 16))
    layers, calls = seen_by(model, torch.randn(1, 5, 8))
    plain = passage("abcde", layers, calls)["layers"][0]["experts"]
    layers[0].stack = "decoder"
    assert passage("abcde", layers, calls)["layers"][0]["experts"] == [*plain[1:], None]


def test_pieces_are_the_text_whatever_the_tokens():
    words = ["▁The", "▁c", "at", "▁sat"]  # as sentencepiece writes them: no space at the beginning

    def decode(ids):
        return "".join(words[i] for i in ids).replace("▁", " ").lstrip()

    assert split_text(torch.arange(4), decode) == ["The", " c", "at", " sat"]
    text = "naïve €5 😀!"
    pieces = split_text(torch.tensor(list(text.encode())), lambda ids: bytes(ids).decode(errors="replace"))
    assert "".join(pieces) == text
    assert pieces[-5:] == ["", "", "", "😀", "!"]
    assert split_text(torch.tensor([0x61, 0xE2]), lambda ids: bytes(ids).decode(errors="replace")) == ["a", "\ufffd"]
