"""Which expert takes which patch: laid out as the image is, without the tokens in front."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectralmoe import Adapter, LinearScorer, MoE, Router, Soft, TopK, record
from spectralmoe.vision import BranchSpec, add_branches, patch_experts, replace_mlp


def by_size(selector=None):
    """A layer on tokens (..., 2) whose expert is the larger coordinate."""
    scorer = LinearScorer(2, 2)
    with torch.no_grad():
        scorer.weight.copy_(torch.eye(2))
    return MoE(Router(scorer, selector or TopK(1)), Adapter(2, 2, 3))


@pytest.mark.parametrize("selector", [TopK(1), TopK(2), Soft()], ids=lambda part: type(part).__name__)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_patches_lie_as_in_the_image(selector, prefix):
    expected = torch.tensor([[[0, 1, 1], [1, 0, 0]], [[1, 1, 1], [0, 0, 1]]])
    patches = nn.functional.one_hot(expected.flatten(1), 2).float()
    front = torch.zeros(2, prefix, 2)
    front[..., 1] = 9.0
    with record(layer := by_size(selector)) as tape:
        layer(torch.cat([front, patches], 1))
    assert torch.equal(patch_experts(tape[0], (2, 3)), expected)


def test_maps_have_a_grid_of_their_own():
    expected = torch.tensor([[[0, 1, 1], [1, 0, 0]]])
    with record(layer := by_size()) as tape:
        layer(nn.functional.one_hot(expected, 2).float())
    assert torch.equal(patch_experts(tape[0]), expected)


@pytest.mark.parametrize("grid", [None, (3, 3), (2,), (0, 2)])
def test_a_grid_that_does_not_fit_is_one_line(grid, user_error):
    with record(layer := by_size()) as tape:
        layer(torch.randn(2, 7, 2))
    with user_error("grid="):
        patch_experts(tape[0], grid)


def test_a_grid_for_maps_is_one_line(user_error):
    with record(layer := by_size()) as tape:
        layer(torch.randn(2, 3, 3, 2))
    with user_error("grid=(2, 2)"):
        patch_experts(tape[0], (2, 2))


@pytest.mark.parametrize("put", [add_branches, replace_mlp])
def test_of_a_timm_model(put):
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    put(vit, BranchSpec.of("linear", k="soft", experts=3, bottleneck=4, blocks="all"))
    with torch.no_grad(), record(vit.eval()) as tape:
        vit(torch.rand(5, 3, 32, 32))
    for item in tape:
        experts = patch_experts(item, vit.patch_embed.grid_size)
        assert experts.shape == (5, 4, 4)
        assert torch.equal(experts.flatten(1), item.routing.top_expert().view(5, 17)[:, 1:])
