"""How routers of upcycled models start: each start by its equation, from what the dense model's MLPs read."""

from __future__ import annotations

import warnings

import pytest
import torch
from dense_models import dense_model
from seeds import generator

from spectralmoe.hf import upcycle

tf = pytest.importorskip("transformers")

LAYER = 1


@pytest.fixture(scope="module")
def model():
    return dense_model("llama")[0]


def text(seed, rows=3, length=40, low=4, high=260):
    return torch.randint(low, high, (rows, length), generator=generator(seed))


def read_by_mlp(model, ids):
    """What the MLP of ``LAYER`` reads for one sequence without padding, (S, D) in float64."""
    states = model.model(ids[None], output_hidden_states=True).hidden_states
    block = model.model.layers[LAYER]
    rotary = model.model.rotary_emb(states[LAYER], torch.arange(ids.numel())[None])
    attended, _ = block.self_attn(block.input_layernorm(states[LAYER]), position_embeddings=rotary, attention_mask=None)
    return block.post_attention_layernorm(states[LAYER] + attended)[0].detach().double()


def rows_of(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        moe = upcycle(model, **{"experts": 4, "k": 2, **options})
    return moe.model.layers[LAYER].mlp.gate.weight.detach().double()


def test_random_rows_have_the_size_of_initial_weights(model):
    rows = rows_of(model, experts=64)
    assert abs(float(rows.std()) / 0.02 - 1) < 6 / (2 * rows.numel()) ** 0.5
    torch.testing.assert_close(rows_of(model, experts=64, scale=0.5), 25 * rows)


def test_prompts_give_the_means_of_their_sets(model):
    """Padding is no part of a mean; a set may be several batches; rows are centred and of one length."""
    sets = [text(seed, low=4 + 60 * seed, high=64 + 60 * seed) for seed in range(4)]
    mask = torch.ones_like(sets[0])
    mask[1, 25:] = 0
    calibration = [{"input_ids": sets[0], "attention_mask": mask}, [{"input_ids": one[None]} for one in sets[1]]]
    calibration += sets[2:]
    got = rows_of(model, router="prompts", calibration=calibration)
    means = []
    for number, ids in enumerate(sets):
        lengths = [40, 25 if number == 0 else 40, 40]
        read = torch.cat([read_by_mlp(model, row[:length]) for row, length in zip(ids, lengths, strict=True)])
        means.append(sum(read) / len(read))
    middle = sum(means) / 4
    for row, mean in zip(got, means, strict=True):
        expected = (mean - middle) / (mean - middle).norm() * 0.02 * 32**0.5
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-6)


def test_principal_rows_are_two_sides_of_the_leading_directions(model):
    ids = text(0, rows=6)
    got = rows_of(model, router="principal", calibration=[{"input_ids": ids[:4]}, {"input_ids": ids[4:]}])
    torch.testing.assert_close(got[1::2], -got[0::2])
    x = torch.cat([read_by_mlp(model, row) for row in ids])
    mean = x.mean(0)
    rest = x - mean - torch.outer((x - mean) @ mean, mean) / (mean @ mean)  # across the mean
    _, sizes, directions = torch.linalg.svd(rest, full_matrices=False)
    assert sizes[0] > 1.001 * sizes[1] > 1.001**2 * sizes[2], "directions that are not apart"
    for row, size, direction in zip(got[0::2], sizes, directions, strict=False):
        expected = direction * 0.02 * 32**0.5 * len(x) ** 0.5 / size
        torch.testing.assert_close(row * (row @ direction).sign(), expected, rtol=1e-3, atol=1e-4)
    logits = x @ got.T
    torch.testing.assert_close(logits.mean(0), torch.zeros(4).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(logits.std(0), torch.full((4,), 0.02 * 32**0.5).double(), rtol=1e-2, atol=0)


def test_an_odd_number_of_experts_has_one_side_left(model):
    calibration = [{"input_ids": text(0, rows=6)}]
    three, four = (rows_of(model, experts=e, router="principal", calibration=calibration) for e in (3, 4))
    torch.testing.assert_close(three, four[:3])


def test_shards_of_a_copy_share_a_row(model):
    rows = rows_of(model, experts=8, k=4, method="virtual", router="principal", calibration=[{"input_ids": text(0)}])
    assert all(torch.equal(row, rows[4 * (e // 4)]) for e, row in enumerate(rows))
    assert torch.equal(rows[4], -rows[0])


def test_experts_and_router_are_drawn_apart(model):
    """The experts do not depend on the router's start; the model is left in its mode and without hooks."""
    options = {"experts": 4, "k": 2, "method": "noise"}
    model.train()
    plain = upcycle(model, **options)
    other = upcycle(model, **options, router="principal", calibration=[{"input_ids": text(0)}])
    for name, value in plain.named_parameters():
        assert torch.equal(value, other.get_parameter(name)) != name.endswith("gate.weight"), name
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()
