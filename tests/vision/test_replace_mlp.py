"""Experts in place of an MLP: the same function at step 0, of every kind of MLP that looks at one token at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spectralmoe import (
    Balanced,
    Capacity,
    ExpertChoice,
    FeedForward,
    LinearScorer,
    ModuleExperts,
    MoE,
    NoisyTopK,
    Router,
    Soft,
    SoftBalanced,
    TopK,
    TopP,
    after_step,
    record,
)
from spectralmoe.layers import moe_layers
from spectralmoe.selectors import ClusterDropout, Threshold, Unweighted
from spectralmoe.units import Pixel
from spectralmoe.vision import BranchSpec, add_branches, model_blocks, replace_mlp
from spectralmoe.vision.replace_mlp import OnePixel

timm = pytest.importorskip("timm")

STACKED = ["vit", "deit3", "dinov2_reg", "clip", "siglip", "dinov3", "beit", "swin", "hiera"]
STACKED += ["convnext", "convnext_atto", "eva02_glu", "dinov2_swiglu"]  # the last two have a packed SiLU gate
MODULES = ["clip_quickgelu", "siglip_tanh"]  # other activations
MODULES += ["eva02"]  # a gate with an inner norm
ROUTERS = {"soft": {}, "top-2": {"k": 2, "normalize": True}}


def spec_of(top, *, blocks="all", experts=3, **router):
    return BranchSpec(router=top(**router), experts=experts, blocks=blocks)


def bank_of(block):
    return block.mlp.experts


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", [*STACKED, *MODULES])
def test_copies_compute_what_the_mlp_did(name, router, make_vision, top, images):
    model = make_vision(name)
    expected = model(images)
    assert replace_mlp(model, spec_of(top, **ROUTERS[router])) is model
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)
    kinds = {type(bank_of(block)) for block in model_blocks(model).values()}
    assert kinds == ({FeedForward} if name in STACKED else {ModuleExperts})
    assert len(moe_layers(model)) == len(model_blocks(model))


def test_copies_keep_float64(make_vision, top, images, close):
    model = make_vision("vit").double()
    for parameter in model.parameters():
        parameter.data *= 1.1  # no longer numbers of fp32
    expected = model(images.double())
    close(replace_mlp(model, spec_of(top))(images.double()), expected)  # to 1e-10


def with_weights_of(dense, bank, e):
    """The MLP with the weights of expert e."""
    one = copy.deepcopy(dense)
    if isinstance(bank, ModuleExperts):
        one.load_state_dict(bank.experts[e].state_dict())
        return one
    stacks = {"fc1.weight": bank.up, "fc1.bias": bank.up_bias, "fc2.weight": bank.down, "fc2.bias": bank.down_bias}
    for name, parameter in one.named_parameters():
        parameter.data = stacks[name][e].data.view_as(parameter)
    return one


@pytest.mark.parametrize("name", [*STACKED, *MODULES])
def test_experts_that_moved_apart_are_mixed_as_their_mlps_would_be(name, make_vision, top, close):
    _, block = model_blocks(make_vision(name).double()).popitem()
    dense, channels = block.mlp, 1 if name == "convnext_atto" else -1
    host = nn.Module()
    host.blocks = nn.ModuleList([block])
    replace_mlp(host, spec_of(top, k=2, normalize=True))
    bank, router = bank_of(block), next(m for m in block.modules() if isinstance(m, Router))
    for parameter in bank.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    x = torch.randn(2, 3, 4, router.scorer.dim).double().movedim(-1, channels)
    routing = router(x.movedim(channels, -1))
    weights = torch.zeros(24, 3).double().scatter(1, routing.indices, routing.weights).view(2, 3, 4, 3)
    outputs = [with_weights_of(dense, bank, e)(x) for e in range(3)]
    close(block.mlp(x), sum(weights[..., e].unsqueeze(channels) * y for e, y in enumerate(outputs)))


def mlp_of(*layers):
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module()])
    model.blocks[0].mlp = nn.Sequential(*layers)
    return model


@pytest.mark.parametrize(
    ("layers", "stacked"),
    [
        ((nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)), "relu"),
        ((nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.0), nn.Identity(), nn.Linear(12, 8)), "gelu"),
        ((nn.Linear(8, 12, bias=False), nn.GELU(), nn.Linear(12, 8, bias=False)), "gelu"),
        ((nn.Linear(8, 12, bias=False), nn.GELU(), nn.Linear(12, 8)), None),
        ((nn.Linear(8, 12), nn.GELU(approximate="tanh"), nn.Linear(12, 8)), None),
        ((nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 8)), None),
        ((nn.Linear(8, 12), nn.PReLU(init=0.0), nn.Linear(12, 8)), None),  # a ReLU that will learn
        ((nn.Linear(8, 12), nn.GELU(), nn.Dropout(0.5), nn.Linear(12, 8)), None),
        ((nn.Linear(8, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 8)), None),
        ((nn.Linear(8, 8),), None),
    ],
)
def test_what_is_stacked(layers, stacked, top):
    model = mlp_of(*layers).eval()
    x = torch.randn(4, 5, 8)
    expected = model.blocks[0].mlp(x)
    bank = replace_mlp(model, spec_of(top)).blocks[0].mlp.experts
    torch.testing.assert_close(model.blocks[0].mlp(x), expected)
    assert isinstance(bank, FeedForward if stacked else ModuleExperts)
    assert not stacked or bank.activation == stacked


@pytest.mark.parametrize(("act", "groups"), [(nn.SiLU(), 1), (nn.GELU(), 4)], ids=["SiLU", "groups"])
def test_a_convolutional_mlp_with_more_inside_becomes_modules(act, groups, top, close):
    model = mlp_of(nn.Conv2d(8, 12, 1, groups=groups), act, nn.Conv2d(12, 8, 1))
    x = torch.randn(2, 8, 3, 5)
    expected = model.blocks[0].mlp(x)
    layer = replace_mlp(model, spec_of(top, k=2, normalize=True)).blocks[0].mlp
    assert isinstance(layer.unit, Pixel)
    assert all(isinstance(expert, OnePixel) for expert in layer.experts.experts)
    close(layer(x), expected)


class Residual(nn.Sequential):
    """Looks like a plain MLP, but is not."""

    def forward(self, x):
        return x + super().forward(x)


class Mean(nn.Module):
    def forward(self, x):
        return x + x.mean((1, 2), keepdim=True)


def test_what_is_no_function_of_one_token_is_refused(make_vision, top, user_error):
    for name in ("convnextv2", "convnextv2_atto", "pvt_v2"):  # global response norm; depthwise convolutions
        model = make_vision(name)
        before = list(model.state_dict())
        with user_error("'stages.0.blocks.0'", "mixes tokens", "add_branches"):
            replace_mlp(model, spec_of(top))
        assert list(model.state_dict()) == before
    untrained = timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8))  # its response norm is 0
    with user_error("mixes tokens"):
        replace_mlp(untrained, spec_of(top))
    for layers in (
        (nn.Conv2d(8, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 1)),
        (nn.Linear(8, 8), Mean(), nn.Linear(8, 8)),
        (Residual(nn.Linear(8, 8)), nn.Linear(8, 9)),
    ):
        with user_error("'blocks.0'", "mixes tokens"):
            replace_mlp(mlp_of(*layers), spec_of(top))
    disguised = mlp_of()
    disguised.blocks[0].mlp = Residual(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    with user_error("'blocks.0'", "Residual"):
        replace_mlp(disguised, spec_of(top))


@pytest.mark.parametrize(
    ("selector", "allowed"),
    [
        (Soft, True),
        (lambda: Soft(score="sigmoid", normalize=True), True),
        (lambda: TopK(2, normalize=True), True),
        (lambda: TopK(3), True),  # all of E = 3
        (lambda: Balanced(2), True),
        (lambda: NoisyTopK(2, normalize=True), True),
        (lambda: TopP(0.5, normalize=True), True),
        (SoftBalanced, True),
        (lambda: TopK(1), False),
        (lambda: TopK(2), False),
        (lambda: Soft(score="sigmoid"), False),
        (lambda: Balanced(2, normalize=False), False),
        (lambda: Capacity(TopK(2, normalize=True), 1.0), False),
        (lambda: ExpertChoice(2.0), False),
        (lambda: ClusterDropout(TopK(2, normalize=True), 1, rate=0.3), True),
        (lambda: Threshold(2, 0.9), True),
        (lambda: Threshold(2, 0.9, fallback="none"), False),
        (lambda: ClusterDropout(Threshold(2, 0.9, fallback="none"), 1, rate=0.3), False),
        (lambda: Unweighted(TopK(2, normalize=True)), False),
        (lambda: ClusterDropout(Unweighted(TopK(2, normalize=True)), 1, rate=0.3), False),
    ],
)
def test_copies_need_weights_that_sum_to_one(selector, allowed, user_error):
    model, x = mlp_of(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)), torch.randn(20, 8)
    expected = model.blocks[0].mlp(x)
    spec = BranchSpec(router=lambda d, e: Router(LinearScorer(d, e), selector()), experts=3, blocks="all")
    if allowed:
        torch.testing.assert_close(replace_mlp(model, spec).blocks[0].mlp(x), expected)
        return
    with user_error("sum to 1", "soft", "k >= 2"):
        replace_mlp(model, spec)
    assert not isinstance(model.blocks[0].mlp, MoE)
    replace_mlp(model, spec, init="random")


@pytest.mark.parametrize("name", ["vit", "eva02", "convnext_atto", "clip"])
def test_random_experts_differ_and_have_the_scale_of_a_fresh_mlp(name, make_vision, top, images):
    model = make_vision(name)
    block = next(iter(model_blocks(model).values()))
    fan_in = next(block.mlp.parameters()).shape[1]
    replace_mlp(model, spec_of(top, k=1, blocks=[0]), init="random")
    bank = bank_of(block)
    first = bank.up if isinstance(bank, FeedForward) else [next(expert.parameters()) for expert in bank.experts]
    assert not torch.equal(first[0], first[1])
    assert max(float(weight.detach().abs().max()) for weight in first) <= fan_in**-0.5 + 1e-6
    assert model(images).isfinite().all()


def test_only_the_mlp_of_the_chosen_blocks_changes(make_vision, top):
    model = make_vision("vit", init_values=0.1, drop_path_rate=0.2)
    before, block = dict(model.state_dict()), model.blocks[1]
    kept = [block.ls2, block.drop_path2, block.norm2]
    replace_mlp(model, spec_of(top, blocks=[1]))
    assert [block.ls2, block.drop_path2, block.norm2] == kept
    after = model.state_dict()
    assert [name for name in before if name not in after] == [
        f"blocks.1.mlp.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    ]
    assert all(name in before or name.startswith("blocks.1.mlp.") for name in after)


def test_training_moves_the_experts_apart(make_vision, top, images):
    model = replace_mlp(make_vision("vit"), spec_of(top, k=2, normalize=True)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        with record(model) as tape:
            F.cross_entropy(model(images), torch.tensor([1, 3])).backward()
        optimizer.step()
        after_step(model, tape)
    assert [item.name for item in tape] == [f"blocks.{i}.mlp" for i in range(3)]
    experts = model.blocks[0].mlp.experts
    assert not torch.equal(experts.up[0], experts.up[1])


def test_frozen_and_low_precision_models(make_vision, top, images):
    model = make_vision("vit").to(torch.bfloat16).requires_grad_(requires_grad=False)
    expected = model(images.bfloat16())
    layer = replace_mlp(model, spec_of(top, blocks=[0])).blocks[0].mlp
    assert layer.experts.up.dtype == torch.bfloat16
    assert layer.router.scorer.weight.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in layer.parameters())
    assert not model.blocks[1].mlp.fc1.weight.requires_grad
    torch.testing.assert_close(model(images.bfloat16()), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["vit", "eva02", "convnext_atto"])
def test_experts_of_a_frozen_mlp_can_be_trained_and_keep_its_mode(name, training, make_vision, top):
    model = make_vision(name).requires_grad_(requires_grad=False).train(training)
    replace_mlp(model, spec_of(top))
    for block in model_blocks(model).values():
        assert all(parameter.requires_grad for parameter in block.mlp.parameters())
        assert all(module.training == training for module in block.mlp.modules())


def test_random_numbers_of_the_check_are_its_own(top):
    model, router = mlp_of(nn.Linear(8, 8)), top()(8, 3)
    state = torch.get_rng_state()
    replace_mlp(model, BranchSpec(router=lambda *_: router, experts=3, blocks="all"))
    assert torch.equal(torch.get_rng_state(), state)


def test_branches_behind_experts(make_vision, top, images):
    model = make_vision("convnext_atto")
    expected = model(images)
    replace_mlp(model, spec_of(top))
    add_branches(model, BranchSpec.of("emoe", experts=2, bottleneck=2, blocks="all", scale=0.0))
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


def test_mistakes(make_vision, top, user_error):
    model = make_vision("vit")
    with user_error("init", "'copies'", "copy", "random"):
        replace_mlp(model, spec_of(top), init="copies")
    with user_error("'last9'", "3 blocks"):
        replace_mlp(model, spec_of(top, blocks="last9"))
    with user_error("ResNet", "no blocks"):
        replace_mlp(make_vision("resnet"), spec_of(top))
    with user_error("'blocks.0'", "no .mlp", "but ", "add_branches"):
        replace_mlp(make_vision("vit_parallel"), spec_of(top))
    replace_mlp(model, spec_of(top, blocks=[1]))
    with user_error("'blocks.1'", "already"):
        replace_mlp(model, spec_of(top))
    assert not isinstance(model.blocks[0].mlp, MoE)
