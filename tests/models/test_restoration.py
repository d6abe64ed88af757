"""The restoration network: any unit in its MoE place, side information, whole images of any size."""

from __future__ import annotations

import copy

import pytest
import torch
from seeds import generator, shifted
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spectralmoe import ContextScorer, LinearScorer, Router, Soft, TopK, load, record, save
from spectralmoe.context import Rows
from spectralmoe.models import RestorationBlock, RestorationMoE, restoration_moe
from spectralmoe.scorers.base import Scorer
from spectralmoe.units import Pixel, Sample, Token

SIZES = {"width": 8, "num_experts": 3, "hidden": 6, "stem": 4}


def made(**changes):
    torch.manual_seed(shifted(0))
    model = restoration_moe(**{**SIZES, **changes}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def images_of(count=2, channels=1, height=8, width=8):
    return torch.rand(count, channels, height, width, generator=generator(1))


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_it_is_the_equation(scale):
    model, images = made(scale=scale), images_of()
    (block,) = model.blocks
    fine = F.gelu(model.first(images))
    x = model.down(fine)
    x = x + F.gelu(block.local(F.layer_norm(x.movedim(1, -1), (8,), *block.local_norm.parameters()).movedim(-1, 1)))
    rows = F.layer_norm(x.movedim(1, -1), (8,), *block.moe_norm.parameters())
    score, chosen = (rows @ block.moe.router.scorer.weight.T).softmax(-1).max(-1, keepdim=True)
    outputs = [block.moe.experts.expert(rows.flatten(0, -2), e).view_as(rows) for e in range(3)]
    x = x + sum((chosen == e) * score * y for e, y in enumerate(outputs)).movedim(-1, 1)
    back = F.pixel_shuffle(model.up(x), scale)
    assert x.shape == (2, 8, 8 // scale, 8 // scale)
    torch.testing.assert_close(model(images), images + model.last(F.gelu(fine + back)))


def test_before_training_images_come_back_and_afterwards_all_parameters_have_a_gradient():
    torch.manual_seed(shifted(0))
    images = images_of(channels=3)
    assert torch.equal(restoration_moe(**SIZES)(images), images)
    model = made(router=lambda dim, experts: Router(LinearScorer(dim, experts), TopK(3)))
    model(images).square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in model.parameters())


def test_positions_are_routed_alike_as_pixels_and_as_tokens():
    pixel, token = made(unit=Pixel()), made(unit=Token())
    token.load_state_dict(pixel.state_dict())
    images = images_of(height=7, width=5)
    torch.testing.assert_close(pixel(images), token(images))


def test_a_whole_sample_meets_the_experts_that_it_chose():
    model, images = made(unit=Sample(), scale=2), images_of(5)
    with record(model) as tape:
        together = model(images)
    assert tape[0].routing.logits.shape == (5, 3)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone)


def test_colours_are_restored_each_by_itself_whatever_the_size():
    model, images = made(scale=4), images_of(2, 3, 9, 14)
    apart = torch.cat([model(images[:, c : c + 1]) for c in range(3)], 1)
    torch.testing.assert_close(model(images), apart)


class MapScorer(Scorer):
    """Logits from the mean of the degraded image."""

    reads = ("map",)

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(dim, num_experts)
        self.weight = nn.Parameter(torch.ones(num_experts, 1))

    def forward(self, x: torch.Tensor, *, context: Rows | None = None) -> torch.Tensor:
        return (context or {})["map"].flatten(1).mean(1, keepdim=True) @ self.weight.T


def test_routers_read_severity_and_map_by_name():
    severity = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    model = made(severities=2, router=lambda d, e: Router(ContextScorer(d, e, width=2), TopK(1)))
    images = images_of(1).expand(2, -1, -1, -1)
    with record(model) as tape:
        model(images, severity=severity)
        model(images)
    told, untold = (item.routing.logits.view(2, -1, 3) for item in tape)
    scorer = model.blocks[0].moe.router.scorer
    torch.testing.assert_close(told[:, 0], severity @ scorer.weight.T + scorer.bias)
    torch.testing.assert_close(untold[:, 0], scorer.bias.expand(2, 3))
    model = made(unit=Sample(), router=lambda d, e: Router(MapScorer(d, e), TopK(1)))
    images = images_of(2, 3)
    with record(model) as tape:
        model(images)
    want = images.mean((2, 3)).flatten()[:, None] * model.blocks[0].moe.router.scorer.weight.T
    torch.testing.assert_close(tape[0].routing.logits, want)


@pytest.mark.parametrize("unit", [Pixel(), Sample(), Token()], ids=lambda unit: type(unit).__name__)
def test_saved_and_loaded_it_is_the_same(unit, tmp_path):
    model, images = made(unit=unit, depth=2, scale=4), images_of()
    save(model, tmp_path)
    again = load(tmp_path)
    assert type(again.blocks[1].moe.unit) is type(unit)
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("unit", [Pixel(), Sample(), Token()], ids=lambda unit: type(unit).__name__)
def test_it_works_in_16_bits_with_recomputation_and_as_a_copy(unit):
    model, images = made(unit=unit, router=lambda dim, e: Router(LinearScorer(dim, e), Soft())), images_of(3)
    want = model(images)
    assert torch.equal(copy.deepcopy(model)(images), want)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images), want, rtol=0.1, atol=0.1 * float(want.detach().abs().max()))
    probe = torch.rand(images.shape, generator=generator(2))
    plain = torch.autograd.grad((want * probe).sum(), list(model.parameters()))
    again = checkpoint(model, images, use_reentrant=False)
    for got, grad in zip(torch.autograd.grad((again * probe).sum(), list(model.parameters())), plain, strict=True):
        torch.testing.assert_close(got, grad)


def test_any_module_of_tokens_may_stand_in_the_place():
    model = RestorationMoE([RestorationBlock(nn.Linear(8, 8), 8)], stem=4)
    images = images_of(height=7)
    assert model(images).shape == images.shape


def test_misuse_is_an_error_of_one_line(user_error):
    with user_error("blocks of one width", "no block"):
        RestorationMoE([])
    with user_error("blocks of one width", "[4, 8]"):
        RestorationMoE([RestorationBlock(nn.Identity(), 4), RestorationBlock(nn.Identity(), 8)])
    with user_error("at least 1, got 4, 0, 4"):
        made(scale=0)
    with user_error("takes images (B, C, H, W), got [1, 8, 8]"):
        made()(images_of(1)[0])
    with user_error("severity is (2, 4), got [2, 3]"):
        made()(images_of(), severity=torch.zeros(2, 3))
