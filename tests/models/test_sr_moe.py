"""The image network: its stages against the equations, and a fair start for every row of a comparison."""

import pytest
import torch
from torch.nn import functional as F

from spectralmoe import LinearScorer, PrototypeScorer, Router, TopK, UserError
from spectralmoe.compare.cell import active_flops
from spectralmoe.models import SRMoE, Stage, sr_moe


@pytest.mark.parametrize("residual", [True, False])
def test_forward_is_the_equation(residual):
    model = sr_moe(
        5, channels=2, width=12, depth=3, num_experts=4, hidden=6, residual=residual, mean=[0.3] * 2, std=[0.2] * 2
    )
    model = model.double().eval()
    images = torch.rand(4, 2, 9, 11, dtype=torch.float64)
    z = model.stem.project(model.stem.convolutions((images - 0.3) / 0.2))
    for stage in model.stages:
        linear, _, norm = stage.processor
        p = F.layer_norm(F.relu(z @ linear.weight.T + linear.bias), (12,), norm.weight, norm.bias)
        distance = (p[:, None] - stage.moe.router.scorer.prototypes).square().sum(-1)
        weights = (-distance).softmax(-1)
        bank = stage.moe.experts
        y = torch.zeros_like(z)
        for e in range(4):
            hidden = F.relu(p @ bank.up[e].T + bank.up_bias[e])
            y += weights[:, e, None] * (hidden @ bank.down[e].T + bank.down_bias[e])
        z = z + y if residual else y
    expected = model.head(model.norm(z))
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


def test_rows_of_a_comparison_start_alike():
    def network(scorer):
        torch.manual_seed(0)
        return sr_moe(10, router=lambda d, e: Router(scorer(d, e), TopK(2)))

    first, second = network(LinearScorer).state_dict(), network(PrototypeScorer).state_dict()
    shared = [name for name in first if ".router." not in name]
    assert len(shared) > 20
    assert all(torch.equal(first[name], second[name]) for name in shared)


def test_classify_goes_on_from_any_stage():
    model = sr_moe(10, depth=3).eval()
    images = torch.rand(2, 1, 28, 28)
    features = model.stem(images)
    for first in range(3):
        torch.testing.assert_close(model.classify(features, first), model(images))
        features = model.stages[first](features)


def test_active_flops_count_only_the_used_experts():
    image = torch.rand(1, 28, 28)
    flops = {
        k: active_flops(
            sr_moe(10, width=64, depth=2, hidden=32, router=lambda d, e, k=k: Router(LinearScorer(d, e), TopK(k))),
            image,
        )
        for k in (1, 2, 8)
    }
    expert = 2 * 2 * 64 * 32  # two GEMVs of 64 x 32
    assert flops[2] - flops[1] == 2 * expert
    assert flops[8] - flops[1] == 2 * 7 * expert


def test_sizes_that_do_not_fit():
    with pytest.raises(UserError, match="depth must be at least 1"):
        sr_moe(10, depth=0)
    model = sr_moe(10, width=64, depth=1)
    with pytest.raises(UserError, match="64 wide, but the stem gives D=32"):
        SRMoE(sr_moe(10, width=32).stem, [Stage(model.stages[0].moe)], 10)
