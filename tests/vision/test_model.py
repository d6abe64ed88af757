"""VisionMoE: timm's own model inside, saved and loaded to the bit, and one line for every mistake."""

import copy
import dataclasses
import pickle
import sys

import pytest
import timm
import torch
from forked import output_of

from spectralmoe import Balanced, LinearScorer, ModuleExperts, Router, Soft, TopK, after_step, load, record, save
from spectralmoe.compression import merge, prune, replicate
from spectralmoe.layers import moe_layers
from spectralmoe.scorers import StatisticsMemory
from spectralmoe.vision import BranchSpec, add_branches, replace_mlp
from spectralmoe.vision.model import VisionMoE, check_images, vision_moe

TINY = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 3, "num_heads": 2}
VIT = "vit_tiny_patch16_224"
SMALL = {  # name -> timm model, arguments, channels
    "vit": (VIT, TINY, 1),
    "distilled": ("deit_tiny_distilled_patch16_224", TINY, 3),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 28, "patch_size": 1, "window_size": 7, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)},
        1,
    ),
    "eva": ("eva02_base_patch14_224", {"img_size": 28, "embed_dim": 16, "depth": 2, "num_heads": 2}, 3),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)}, 3),
}


def linear(top):
    return lambda dim, experts: Router(LinearScorer(dim, experts), top)


def branches(**changes):
    options = {"router": linear(TopK(1)), "experts": 4, "bottleneck": 4, "blocks": "last2", "start": "authors"}
    return BranchSpec(**{**options, **changes})


def tiny(**changes):
    return VisionMoE(VIT, 5, channels=1, arguments={**TINY, **changes})


def same_bits(one, two):
    one, two = one.state_dict(), two.state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("kind", ["dense", "branches", "mlp", "both"])
def test_round_trip_is_bitwise(family, kind, tmp_path, monkeypatch):
    name, arguments, channels = SMALL[family]
    model = VisionMoE(name, 5, channels=channels, arguments=arguments, mean=[0.3], std=[0.2])
    if kind in ("mlp", "both"):
        replace_mlp(model.backbone, branches(router=linear(Soft()), blocks="last1"))
    if kind in ("branches", "both"):
        add_branches(model.backbone, branches())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    save(model, tmp_path)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **k, pretrained=False))  # nobody downloads
    again = load(tmp_path)
    assert type(again) is VisionMoE
    same_bits(model, again)
    side = 32 if family == "convnext" else 28
    images = torch.rand(2, channels, side, side)
    assert torch.equal(model.eval()(images), again(images))
    assert list(again.parts()) == list(model.parts())


def test_forward_is_timm_on_normalised_images():
    model = VisionMoE(VIT, 5, arguments=TINY, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7]).eval()
    plain = timm.create_model(VIT, num_classes=5, **TINY).eval()
    plain.load_state_dict(model.backbone.state_dict())
    images = torch.rand(2, 3, 28, 28)
    normalised = torch.stack([(images[:, c] - model.mean[c]) / model.std[c] for c in range(3)], 1)
    assert torch.allclose(model(images), plain(normalised), atol=1e-6)


def test_images_are_resized_where_asked():
    model = VisionMoE(VIT, 5, channels=1, arguments=TINY, size=28).eval()
    small = torch.rand(2, 1, 14, 14)
    large = torch.nn.functional.interpolate(small, (28, 28), mode="bilinear", antialias=True)
    assert torch.equal(model(small), model(large))


def test_copies_and_pickles_use_their_own_parts():
    model = tiny().eval()
    add_branches(model.backbone, branches())
    images = torch.rand(2, 1, 28, 28)
    expected = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for p in model.backbone.blocks[2].moe_branch.parameters():
                p.add_(1)
        assert torch.equal(other(images), expected)
        model = copy.deepcopy(other)


def test_a_frozen_backbone_stays_in_evaluation_mode():
    model = tiny(drop_path_rate=0.5, proj_drop_rate=0.5)
    add_branches(model.backbone, branches())
    model.freeze()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "moe_branch" in n or n.startswith("backbone.head.")}
    model.train()
    assert not model.backbone.blocks[0].training
    assert model.backbone.blocks[2].moe_branch.moe.training
    assert model.backbone.head.training
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(model(images), model(images))


def test_freezing_acts_at_once_and_can_be_taken_back():
    model = tiny(proj_drop_rate=0.5)
    add_branches(model.backbone, branches())
    model.freeze([])
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(model(images), model(images))  # no dropout any more
    assert not model.backbone.blocks[2].moe_branch.alpha.requires_grad
    model.freeze()
    assert model.backbone.blocks[2].moe_branch.alpha.requires_grad
    assert model.backbone.blocks[2].moe_branch.training


def test_a_frozen_selection_bias_stays():
    model = tiny()
    balanced = BranchSpec(
        router=lambda d, e: Router(LinearScorer(d, e), Balanced(1, normalize=False, rate=0.1)), experts=4, bottleneck=4
    )
    add_branches(model.backbone, dataclasses.replace(balanced, blocks="all"))
    model.freeze(["blocks.0.moe_branch"])
    with record(model.train()) as tape:
        model(torch.rand(4, 1, 28, 28))
    after_step(model, tape)
    biases = [block.moe_branch.moe.router.selector.bias for block in model.backbone.blocks]
    assert biases[0].any()
    assert not biases[1].any()


def test_what_gives_no_class_logits_is_one_line(user_error):
    with user_error("class logits"):
        check_images(tiny(global_pool="", class_token=False), (28, 28))


def test_fixed_parameters_of_a_part_stay_fixed():
    model = tiny()
    add_branches(model.backbone, branches())
    alpha = model.backbone.blocks[2].moe_branch.alpha.requires_grad_(False)
    model.freeze()
    assert not alpha.requires_grad


def test_a_new_head_has_other_classes():
    model = tiny()
    model.new_head(3)
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 3)
    assert model.num_classes == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "vit_tiny_patch16_2244"}, ("unknown timm model 'vit_tiny_patch16_2244'", "vit_tiny_patch16_224")),
        ({"name": "qqqqqqqqqqqq"}, ("unknown timm model", "timm.list_models()")),
        ({"name": "hf-hub:some/where"}, ("unknown timm model",)),
        ({"arguments": {"wings": 2}}, ("vit_tiny_patch16_224", "refuses its arguments", "wings")),
        ({"arguments": {"in_chans": 3}}, ("in_chans", "channels")),
        ({"arguments": TINY, "layers": {"blocks.9.mlp": torch.nn.Identity()}}, ("no place 'blocks.9.mlp'",)),
    ],
)
def test_what_timm_refuses_is_one_line(arguments, words, user_error):
    with user_error(*words):
        VisionMoE(**{"name": VIT, "num_classes": 5, **arguments})


def test_an_image_size_that_is_refused_is_one_line(user_error):
    with user_error("refuses images of 30 x 30", "img_size", "image_size"):
        check_images(tiny(), (30, 30))
    check_images(tiny(), (28, 28))
    check_images(tiny(dynamic_img_size=True), (35, 28))


def test_weights_that_cannot_be_had(monkeypatch, user_error):
    create = timm.create_model

    def offline(*args, pretrained=False, **options):
        if pretrained:
            raise FileNotFoundError("An error happened while trying to locate the file.\nSecond line.")
        return create(*args, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with user_error("the weights of 'vit_tiny_patch16_224' could not be fetched", "checkpoint", "leave pretrained out"):
        vision_moe(VIT, 5, arguments=TINY, pretrained=True)
    with user_error("timm has no weights of 'vit_tiny_patch16_rope_mixed"):
        monkeypatch.setattr(timm, "is_model_pretrained", lambda name: False)
        monkeypatch.setattr(timm, "is_model", lambda name: True)
        monkeypatch.setattr(timm, "create_model", lambda name, **options: create(VIT, **options))
        vision_moe("vit_tiny_patch16_rope_mixed", 5, arguments=TINY, pretrained=True)


def test_pretrained_weights_bring_their_statistics(monkeypatch):
    create, fetched = timm.create_model, timm.create_model(VIT, num_classes=5, in_chans=1, **TINY)
    monkeypatch.setattr(
        timm, "create_model", lambda *a, pretrained=False, **k: fetched if pretrained else create(*a, **k)
    )
    fetched.pretrained_cfg["mean"] = (0.2, 0.4, 0.9)
    model = vision_moe(VIT, 5, channels=1, arguments=TINY, pretrained=True, mean=[0.1])
    assert model.backbone is fetched
    assert model.mean == pytest.approx([0.5])


def test_without_timm_the_extra_is_named(monkeypatch, user_error):
    monkeypatch.setitem(sys.modules, "timm", None)
    with user_error("spectralmoe[vision]"):
        tiny()


def test_importing_vision_imports_neither_timm_nor_the_hub():
    code = "import sys, spectralmoe.saving.hub, spectralmoe.vision.model; print('timm' in sys.modules, "
    code += "'huggingface_hub' in sys.modules)"
    assert output_of(code).split() == ["False", "False"]


def test_the_default_emoe_round_trip(tmp_path):
    model = tiny()
    add_branches(model.backbone, BranchSpec.of("emoe", experts=4, bottleneck=4, blocks="all", start="authors"))
    save(model, tmp_path)
    same_bits(model, load(tmp_path))


@pytest.mark.parametrize("family", ["vit", "eva", "convnext"])
def test_memories_round_trip(family, tmp_path):
    name, arguments, channels = SMALL[family]
    model = VisionMoE(name, 5, channels=channels, arguments=arguments)
    replace_mlp(model.backbone, branches(router=linear(Soft()), blocks="last1"))
    side = 32 if family == "convnext" else 28
    images = torch.rand(2, channels, side, side)
    for layer in moe_layers(model).values():
        layer.memory = StatisticsMemory(layer.router.scorer.dim, where="layer")
    with record(model) as tape:
        model(images)
    after_step(model, tape)
    save(model, tmp_path)
    twin = load(tmp_path)
    same_bits(model, twin)
    assert torch.equal(model.eval()(images / 2), twin(images / 2))


@pytest.mark.parametrize("family", ["vit", "eva"])
def test_parts_that_were_merged_replicated_and_pruned_round_trip(family, tmp_path):
    name, arguments, channels = SMALL[family]
    model = VisionMoE(name, 5, channels=channels, arguments=arguments)
    replace_mlp(model.backbone, branches(router=linear(Soft()), blocks="last1"), init="random")
    add_branches(model.backbone, branches(router=linear(TopK(1))))
    model.eval()
    images = torch.rand(2, channels, 28, 28)
    layers = {path: layer for path, layer in moe_layers(model).items() if path.endswith(".mlp")}
    assert family != "eva" or all(isinstance(layer.experts, ModuleExperts) for layer in layers.values())
    groups, copies = (dict.fromkeys(moe_layers(model), wish) for wish in ([[0, 2]], [1, 2, 1, 3]))
    kept = {path: [3, 0, 1] for path in moe_layers(model) if path not in layers}
    for small in (merge(model, groups, by=None), replicate(model, copies), prune(model, kept)):
        save(small, tmp_path)
        twin = load(tmp_path)
        same_bits(twin, small)
        with torch.no_grad():
            assert torch.equal(twin(images), small(images))
