"""Branches: nothing changes with alpha 0, the sum by hand otherwise, and the model's own ways all stay."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from seeds import shifted
from torch import nn
from torch.nn import functional as F

from spectralmoe import (
    Adapter,
    EigenbasisScorer,
    LinearScorer,
    MoE,
    Router,
    Term,
    TopK,
    after_step,
    load,
    penalty,
    record,
    save,
)
from spectralmoe.layers import moe_layers
from spectralmoe.regularizers import REGULARIZERS
from spectralmoe.spec import PARTS, build, describe
from spectralmoe.vision import (
    Branch,
    BranchSpec,
    add_branches,
    choose_blocks,
    model_blocks,
    put_branch,
    replace_mlp,
)
from spectralmoe.vision.blocks import block_width


def small(top, k=2, **more):
    return BranchSpec(**{"router": top(k), "experts": 4, "bottleneck": 3, "blocks": "all", "start": "authors", **more})


def emoe(*, faithful=False, rank=6, tau=None, **more):
    row = {"preset": "emoe-faithful" if faithful else "emoe", "rank": rank}
    row |= {} if tau is None else {"temperature": tau}
    return BranchSpec.of(row, **{"experts": 4, "bottleneck": 3, "blocks": "all", "start": "authors", **more})


def branches_of(model):
    return [block.moe_branch for block in model_blocks(model).values() if hasattr(block, "moe_branch")]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def slow_moe(moe, token, k):
    """sum_e w_e E_e(h) of one token (D,): top-k of a linear softmax, weights not renormalised."""
    shares = (moe.router.scorer.weight.to(token) @ token).softmax(-1)
    chosen = sorted(range(4), key=lambda e: -shares[e].item())[:k]
    up, down = moe.experts.up.to(token), moe.experts.down.to(token)
    return sum(shares[e] * (down[e] @ gelu(up[e] @ token)) for e in chosen)


def slow_branch(branch, h, *, first, k):
    """h (..., D) with alpha * MoE added to each token from ``first`` on."""
    rows = [list(sequence) for sequence in h.reshape(len(h), -1, h.shape[-1])]
    for row in rows:
        row[first:] = [token + branch.alpha * slow_moe(branch.moe, token, k) for token in row[first:]]
    return torch.stack([torch.stack(row) for row in rows]).view(h.shape)


# nothing changes with alpha 0


@pytest.mark.parametrize("tokens", ["patches", "all"])
def test_a_zero_branch_leaves_the_model_as_it_is(family, make_vision, top, images, tokens):
    model = make_vision(family)
    expected, names = model(images), list(model.state_dict())
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    assert add_branches(model, small(top, scale=0.0, tokens=tokens)) is model
    assert torch.equal(model(images), expected)
    assert [name for name in model.state_dict() if ".moe_branch." not in name] == names
    assert len(branches_of(model)) == len(model_blocks(model))
    found = model.load_state_dict(plain, strict=False)
    assert not found.unexpected_keys
    assert found.missing_keys
    assert all(".moe_branch." in name for name in found.missing_keys)


# the start


@pytest.mark.parametrize("spec", [emoe, small])
@pytest.mark.parametrize("name", ["vit", "swin", "convnext_atto"])
def test_a_model_starts_as_it_was_and_learns(spec, name, make_vision, top, images):
    model = make_vision(name)
    expected = model(images)
    add_branches(model, spec(start="model", tokens="all") if spec is emoe else spec(top, start="model", tokens="all"))
    assert torch.equal(model(images), expected)
    branches = branches_of(model)
    banks, scorers = ([getattr(b.moe, part) for b in branches] for part in ("experts", "router"))
    assert all(torch.equal(bank.down, torch.zeros_like(bank.down)) for bank in banks)
    assert all(len({tuple(row.flatten().tolist()) for row in bank.up}) == 4 for bank in banks)  # experts that differ
    optimizer = torch.optim.SGD([p for b in branches for p in b.parameters()], lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        with record(model) as tape:
            loss = F.cross_entropy(model.train()(images), torch.tensor([0, 1]))
        loss.backward()
        assert all(bank.down.grad.any() for bank in banks)
        for parameter in [*(b.alpha for b in branches), *(bank.up for bank in banks)]:
            assert bool(parameter.grad.any()) == (step == 1)
        routed = [p.grad for router in scorers for p in router.parameters() if p.grad is not None]
        assert bool(routed and any(grad.any() for grad in routed)) == (step == 1)
        optimizer.step()  # routers stay as they are: experts that learned in the first step are used in the second
    after_step(model, tape)
    assert not torch.equal(model.eval()(images), expected)


def routings_of(model, images):
    with record(model) as tape, torch.no_grad():
        model(images)
    return [item.routing for item in tape]


def test_the_authors_start_changes_the_model(make_vision, images):
    model = make_vision("vit")
    expected = model(images)
    add_branches(model, BranchSpec.of("emoe-faithful", experts=4, bottleneck=3, blocks="all"))
    assert all(branch.moe.experts.down.any() for branch in branches_of(model))
    assert not torch.allclose(model(images), expected, atol=1e-3)


def test_which_start_a_form_takes(top, user_error):
    forms = BranchSpec.of("emoe"), BranchSpec.of("emoe-faithful"), BranchSpec(router=top(1))
    assert [spec.start for spec in forms] == ["model", "authors", "model"]
    assert BranchSpec.of("emoe-faithful", start="model").start == "model"
    with user_error("start", "'zero'", "authors, model"):
        BranchSpec.of("emoe", start="zero")
    assert small(top, start="model", scale=0.0).make_moe(8).experts.down.any()  # alpha is 0: both would stand still


# models of other libraries, which hold their blocks one level down


def vit_of(library):
    if library == "torchvision":
        models = pytest.importorskip("torchvision.models")
        return models.VisionTransformer(32, 8, 2, 2, 24, 48, num_classes=5).eval(), "model.encoder", "2 x EncoderBlock"
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5)
    model = transformers.ViTForImageClassification(config).eval()
    return model, "model.vit" if hasattr(model.vit, "layers") else "model.vit.encoder", "2 x ViTLayer"


@pytest.mark.parametrize("library", ["torchvision", "transformers"])
@pytest.mark.parametrize("surgery", [add_branches, replace_mlp])
def test_models_of_other_libraries(library, surgery, top, images, user_error):
    model, part, there = vit_of(library)
    whole = lambda: getattr(out := model(images), "logits", out)  # noqa: E731
    expected = whole()
    spec = BranchSpec(router=top(None), experts=4, bottleneck=3, blocks="all", prefix=1)
    with user_error(type(model).__name__, "no blocks of its own", there, f"pass {part}"):
        surgery(model, spec)
    inside = model.get_submodule(part.removeprefix("model."))
    surgery(inside, spec)
    torch.testing.assert_close(whole(), expected, atol=1e-5, rtol=1e-5)
    slots = [routing.indices.numel() for routing in routings_of(model, images)]
    assert slots == [4 * 2 * (16 if surgery is add_branches else 17)] * 2  # 16 patches; an MLP sees all tokens


@pytest.mark.parametrize("name", ["vit", "deit3", "clip", "dinov2_reg", "siglip", "dinov3", "eva02"])
def test_dynamic_image_size(name, make_vision, top):
    model, images = make_vision(name, dynamic_img_size=True), torch.randn(2, 3, 48, 40)
    expected = model(images)
    add_branches(model, small(top, scale=0.0))
    assert torch.equal(model(images), expected)


# the sum by hand


@pytest.mark.parametrize("tokens", ["patches", "all"])
@pytest.mark.parametrize("name", ["vit", "dinov2_reg", "siglip"])
def test_a_vit_run_block_by_block(name, tokens, make_vision, top, images, same):
    model, images = make_vision(name).double(), images.double()
    plain = copy.deepcopy(model)
    add_branches(model, small(top, blocks="1,2", tokens=tokens, scale=0.7))
    first = {"vit": 1, "dinov2_reg": 5, "siglip": 0}[name] if tokens == "patches" else 0
    h = plain.norm_pre(plain.patch_drop(plain._pos_embed(plain.patch_embed(images))))
    for index, block in enumerate(plain.blocks):
        h = block(h)
        if index:
            h = slow_branch(model.blocks[index].moe_branch, h, first=first, k=2)
    same(model(images), plain.forward_head(plain.norm(h)), [p for b in branches_of(model) for p in b.parameters()])
    same(model.forward_features(images), plain.norm(h), [b.alpha for b in branches_of(model)])


@pytest.mark.parametrize("name", ["swin", "hiera", "convnext", "beit", "dinov3"])
def test_each_layout_gets_the_same_sum(name, make_vision, top, images, close):
    model, images = make_vision(name).double(), images.double()
    plain = copy.deepcopy(model)
    add_branches(model, small(top, scale=0.7))
    for path, block in model_blocks(plain).items():
        branch, first = model.get_submodule(path).moe_branch, {"beit": 1, "dinov3": 5}.get(name, 0)

        def by_hand(_, __, h, branch=branch, first=first):
            if name == "convnext":
                return slow_branch(branch, h.permute(0, 2, 3, 1), first=0, k=2).permute(0, 3, 1, 2)
            return slow_branch(branch, h, first=first, k=2)

        block.register_forward_hook(by_hand)
    close(model(images), plain(images))


def test_norm_is_in_front_of_router_and_experts(close):
    branch = Branch(MoE(Router(LinearScorer(8, 4), TopK(2)), Adapter(4, 8, 3)), norm=True, scale=0.5).double()
    h = torch.randn(2, 5, 8, dtype=torch.float64)
    normalised = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    pairs = zip(h, normalised, strict=True)
    by_hand = [[x + 0.5 * slow_moe(branch.moe, y, 2) for x, y in zip(*r, strict=True)] for r in pairs]
    close(branch(h), torch.stack([torch.stack(row) for row in by_hand]))


def slow_emoe(branch, h, k):
    """The authors' layer on one token h (D,), from core equations: energies, masks, gamma, bias, tau, gate, experts."""
    scorer, bank = branch.moe.router.scorer, branch.moe.experts
    basis, masks = scorer.basis.double(), scorer.mask_logits.double()
    energy = [(basis[:, j] @ h) ** 2 for j in range(6)]
    shares = [value / (sum(energy) + 1e-6) for value in energy]
    masks = [row.exp() / row.exp().sum() for row in masks]  # over experts, for each direction
    logits = [sum(scorer.gain[j] * masks[j][e] * shares[j] for j in range(6)) + scorer.bias[e] for e in range(4)]
    exps = [(value / 0.5).exp() for value in logits]
    gates = [value / sum(exps) for value in exps]
    chosen = sorted(range(4), key=lambda e: -gates[e].item())[:k]
    return h + branch.alpha * sum(gates[e] * (bank.down[e] @ gelu(bank.up[e] @ h)) for e in chosen)


@pytest.mark.parametrize("k", ["soft", 1, 2])
def test_the_faithful_form_is_the_authors_layer(k, make_vision, same):
    spec = emoe(faithful=True, k=k, tau=0.5, blocks="last1")
    model = add_branches(make_vision("dinov2_reg").double(), spec)
    (branch,) = branches_of(model)
    for parameter in (branch.moe.router.scorer.gain, branch.moe.router.scorer.bias, branch.alpha):
        parameter.data += 0.3 * torch.randn_like(parameter)
    h = torch.randn(2, 8, 24, dtype=torch.float64, requires_grad=True)
    rows = [
        [*sequence[:5], *(slow_emoe(branch, token, 4 if k == "soft" else k) for token in sequence[5:])]
        for sequence in h
    ]
    same(branch(h), torch.stack([torch.stack(row) for row in rows]), [h, *branch.parameters()])


def test_the_two_forms():
    faithful, default = BranchSpec.of("emoe-faithful"), BranchSpec.of("emoe")
    assert (faithful.tokens, faithful.norm, faithful.scale, faithful.bottleneck) == ("patches", False, 1.0, 192)
    router = faithful.make_router(192)
    assert isinstance(router.scorer, EigenbasisScorer)
    assert (router.scorer.rank, router.scorer.temperature, router.scorer.eps) == (128, 1.0, 1e-6)
    assert (router.selector.k, router.selector.normalize) == (1, False)
    assert (default.tokens, default.norm) == ("all", True)
    one_change = BranchSpec.of("emoe-faithful", tokens="all", norm=True)  # for an ablation
    assert (one_change.tokens, one_change.norm) == ("all", True)
    assert faithful.make_router(32).scorer.rank == 32
    assert BranchSpec.of("emoe", k="soft").make_router(32).soft
    router = pickle.loads(pickle.dumps(emoe(rank=5, tau=0.3))).make_router(32)
    assert (router.scorer.rank, router.scorer.temperature) == (5, 0.3)


# what the model can do, it still can


@pytest.mark.parametrize("name", ["vit", "siglip", "dinov3", "beit", "swin", "hiera", "convnext"])
def test_gradient_checkpointing_changes_nothing(name, make_vision, top, images):
    model = add_branches(make_vision(name), small(top))
    direction = torch.randn(2, 5)

    def gradients():
        torch.manual_seed(shifted(1))  # drop paths
        model.train()
        model.zero_grad()
        with record(model) as tape:
            (model(images) * direction).sum().backward()
        return [parameter.grad for parameter in model.parameters()], len(tape)

    plain, calls = gradients()
    model.set_grad_checkpointing()
    runs = []
    model_blocks(model).popitem()[1].register_forward_pre_hook(lambda *_: runs.append(1))
    again, calls_again = gradients()
    assert len(runs) == 2  # it was run again
    assert calls == calls_again == len(branches_of(model))
    for one, two in zip(plain, again, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "swin", "convnext"])
def test_intermediate_features_show_the_branch(name, make_vision, top, images):
    model = make_vision(name)
    before = model.forward_intermediates(images, intermediates_only=True)
    add_branches(model, small(top, blocks=[-1]))
    after = model.forward_intermediates(images, intermediates_only=True)
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True] * (len(before) - 1) + [False]


def test_a_copy_uses_its_own_branch(make_vision, top, images):
    model = add_branches(make_vision("vit"), small(top, tokens="all"))
    expected = model(images)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(images), expected)
    with torch.no_grad():
        twin.blocks[1].moe_branch.alpha.zero_()
    assert not torch.equal(twin(images), expected)
    assert torch.equal(model(images), expected)
    with torch.no_grad():
        model.blocks[0].moe_branch.alpha.zero_()
    assert not torch.equal(model(images), expected)


@pytest.mark.parametrize("name", ["vit", "swin", "convnext"])
def test_pickle(name, make_vision, top, images):
    model = add_branches(make_vision(name), small(top))
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), model(images))


@pytest.mark.parametrize("faithful", [True, False])
def test_compile_takes_the_model_whole(faithful, make_vision, images, close):
    torch.compiler.reset()
    model = add_branches(make_vision("vit", depth=1), emoe(faithful=faithful, blocks="all"))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(images)
    close(y, model(images))
    y.sum().backward()
    found = [parameter.grad.clone() for parameter in branches_of(model)[0].moe.experts.parameters()]
    model.zero_grad()
    model(images).sum().backward()
    for one, two in zip(found, branches_of(model)[0].moe.experts.parameters(), strict=True):
        close(one, two.grad)
    torch.compiler.reset()


@pytest.mark.parametrize(("name", "k"), [("vit", 1), ("vit", "soft"), ("convnext", 2)])
def test_export(name, k, make_vision, images, close):
    model = add_branches(make_vision(name), emoe(k=k, blocks=[-1]))
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        close(program.module()(images), model(images))


def test_autocast_and_low_precision(make_vision, images, close):
    model = add_branches(make_vision("vit"), emoe(faithful=True))
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images)
    close(y.float(), expected, torch.bfloat16)
    low = copy.deepcopy(model).to(torch.bfloat16)
    assert low(images.bfloat16()).dtype == torch.bfloat16
    fresh = add_branches(make_vision("vit").to(torch.bfloat16), emoe(faithful=True))
    branch = branches_of(fresh)[0]
    assert branch.moe.experts.up.dtype == torch.bfloat16
    assert branch.moe.router.scorer.basis.dtype == torch.float32
    assert fresh(images.bfloat16()).dtype == torch.bfloat16


# training


def gradient_of_alphas(model, images):
    F.cross_entropy(model.train()(images), torch.tensor([1, 3])).backward()
    return [bool(branch.alpha.grad is not None and branch.alpha.grad != 0) for branch in branches_of(model)]


@pytest.mark.parametrize("k", ["soft", 1, 2])
def test_every_branch_of_the_default_form_learns(k, make_vision, images):
    assert gradient_of_alphas(add_branches(make_vision("vit"), emoe(k=k)), images) == [True] * 3


def test_on_patches_alone_the_last_block_learns_nothing_under_class_token_pooling(make_vision, images):
    faithful = emoe(faithful=True)
    assert gradient_of_alphas(add_branches(make_vision("vit"), faithful), images) == [True, True, False]
    averaged = make_vision("vit", global_pool="avg")
    assert gradient_of_alphas(add_branches(averaged, faithful), images) == [True] * 3


@pytest.mark.parametrize("faithful", [True, False])
def test_two_steps_of_training(faithful, make_vision, images):
    model = add_branches(make_vision("vit").requires_grad_(requires_grad=False), emoe(faithful=faithful)).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} <= {id(p) for branch in branches_of(model) for p in branch.parameters()}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    before = [parameter.detach().clone() for parameter in trained]
    terms = {"balance": Term(REGULARIZERS["load_balance"], 1e-2)}
    for _ in range(2):
        optimizer.zero_grad()
        with record(model) as tape:
            loss = F.cross_entropy(model(images), torch.tensor([1, 3]))
        extra, _ = penalty(tape, terms)
        (loss + extra).backward()
        optimizer.step()
        after_step(model, tape)
    assert list(moe_layers(model)) == [f"blocks.{i}.moe_branch.moe" for i in range(3)]
    assert [item.name for item in tape] == list(moe_layers(model))
    for branch in branches_of(model):
        basis = branch.moe.router.scorer.basis.detach()
        assert float((basis.T @ basis - torch.eye(6)).abs().max()) < 1e-5
    assert sum(not torch.equal(*pair) for pair in zip(before, trained, strict=True)) > len(trained) / 2


def test_of_several_outputs_the_first_is_the_features():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Linear(8, 8)

        def forward(self, x):
            return self.mlp(x), "state", 3

    block, h = Pair(), torch.randn(2, 5, 8)
    expected = block(h)[0]
    branch = Branch(emoe(faithful=True).make_moe(8))
    put_branch("blocks.0", block, branch)
    features, *rest = block(h)
    assert torch.equal(features, branch(expected))
    assert rest == ["state", 3]


@pytest.mark.parametrize("training", [True, False])
def test_a_branch_has_the_mode_and_the_form_it_was_asked_for(training, make_vision):
    model = add_branches(make_vision("vit").train(training), emoe(scale=0.3))
    for branch in branches_of(model):
        assert all(module.training == training for module in branch.modules())
        assert (branch.norm, branch.tokens, branch.prefix) == (True, "all", 1)
        assert float(branch.alpha.detach()) == pytest.approx(0.3)


# descriptions and mistakes


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_model_with_branches_is_saved_and_filled_again(name, make_vision, images, tmp_path):
    model = add_branches(make_vision(name), emoe(faithful=True))
    save(model, tmp_path)
    again = load(tmp_path, into=add_branches(make_vision(name), emoe(faithful=True)))
    assert torch.equal(again(images), model(images))


def test_a_branch_is_described_and_built_again():
    spec = emoe(faithful=True)
    branch = Branch(spec.make_moe(8), prefix=2, tokens="all", norm=True, scale=0.3)
    tables = PARTS | {"branch": Branch}
    again = build(describe(branch, tables=tables), tables=tables)
    again.load_state_dict(branch.state_dict())
    h = torch.randn(2, 5, 8)
    assert torch.equal(again(h), branch(h))
    assert (again.prefix, again.tokens, again.norm, again.scale) == (2, "all", True, 0.3)


def test_a_second_branch_is_refused_and_nothing_is_touched(make_vision, top, images, user_error):
    model = add_branches(make_vision("vit"), small(top, blocks=[2]))
    expected, names = model(images), list(model.state_dict())
    with user_error("'blocks.2'", "already"):
        add_branches(model, small(top, blocks="last2"))
    with user_error("'blocks.2'", "already"):
        put_branch("blocks.2", model.blocks[2], branches_of(model)[0])
    assert list(model.state_dict()) == names
    assert torch.equal(model(images), expected)
    add_branches(model, small(top, blocks=[0], scale=0.0))
    assert torch.equal(model(images), expected)


def test_what_cannot_be_added_changes_nothing(make_vision, user_error):
    model = make_vision("vit")
    for spec, words in (
        (emoe(faithful=True, rank=128), ("rank", "D=24", "128")),
        (emoe(faithful=True, rank=0), ("rank", "D=24", "0")),
        (emoe(faithful=True, tau=0.0), ("temperature", "0.0")),
        (emoe(blocks="last6"), ("'last6'", "3 blocks")),
    ):
        with user_error(*words):
            add_branches(model, spec)
        assert not branches_of(model)
    with user_error("ResNet", "no blocks"):
        add_branches(make_vision("resnet"), emoe())


@pytest.mark.parametrize(
    ("argument", "value", "word"),
    [
        ("bottleneck", 0, "bottleneck"),
        ("bottleneck", -3, "-3"),
        ("bottleneck", 1.5, "1.5"),
        ("experts", 0, "experts"),
        ("tokens", "patch", "patches"),
        ("tokens", "", "patches"),
        ("scale", math.nan, "nan"),
        ("k", "top3", "soft"),
        ("k", 0, "k = 0"),
    ],
)
def test_values_that_cannot_be(argument, value, word, top, user_error):
    with user_error(argument, word):
        BranchSpec.of("emoe", **{argument: value})
    if argument != "k":
        with user_error(argument, word):
            BranchSpec(**{"router": top(1), argument: value})


def test_branch_arguments(user_error):
    moe = emoe(faithful=True, rank=4).make_moe(8)
    with user_error("tokens", "'class'", "patches"):
        Branch(moe, tokens="class")
    with user_error("prefix", "-1"):
        Branch(moe, prefix=-1)
    with user_error("(2, 3, 9)", "D=8", "dimension -1"):
        Branch(moe)(torch.randn(2, 3, 9))
    with user_error("(2, 3, 4, 8)", "D=8", "dimension 1"):
        Branch(moe, channels_first=True)(torch.randn(2, 3, 4, 8))


@pytest.mark.parametrize("name", ["poolformer", "convnext"])
def test_maps_that_are_as_wide_as_their_channels(make_vision, top, name, close):
    model = make_vision(name)
    block = next(iter(model_blocks(model).values()))
    width = block_width("first", block)
    x = torch.randn(1, width, 5, width)
    h = block(x)
    add_branches(model, small(top, blocks=[0]))
    close(block(x).movedim(1, -1), slow_branch(block.moe_branch, h.movedim(1, -1).double(), first=0, k=2))


def test_a_layout_that_only_the_shape_tells(user_error):
    moe = MoE(Router(LinearScorer(8, 4), TopK(1)), Adapter(4, 8, 2))
    branch, h = Branch(moe, channels_first=None), torch.randn(2, 8, 3, 5)
    assert torch.equal(branch(h), Branch(moe, channels_first=True)(h))
    for last in (h.movedim(1, -1), h[..., 0].mT):
        assert torch.equal(branch(last), Branch(moe)(last))
    for shape in ((2, 8, 8, 8), (2, 8, 3, 8)):
        with user_error(str(shape), "D=8 in two places", "channels_first=..."):
            branch(torch.randn(shape))
    with user_error("(2, 3, 4, 5)", "D=8"):
        branch(torch.randn(2, 3, 4, 5))


def test_chosen_blocks_alone_get_a_branch(make_vision, top):
    model = add_branches(make_vision("swin"), small(top, blocks="1"))
    assert [path for path, block in model_blocks(model).items() if hasattr(block, "moe_branch")] == [
        "layers.1.blocks.0"
    ]
    assert choose_blocks(model, "1")["layers.1.blocks.0"].moe_branch.moe.router.scorer.dim == 32


def test_alpha_scales_a_shared_expert_too(close):
    torch.manual_seed(shifted(0))
    moe = MoE(Router(LinearScorer(8, 4), TopK(1)), Adapter(4, 8, 2), shared=torch.nn.Linear(8, 8))
    h = torch.randn(2, 5, 8)
    assert torch.equal(Branch(moe, scale=0.0)(h), h)
    close(Branch(moe, scale=0.5)(h), h + 0.5 * moe(h))


@pytest.mark.parametrize("blocks", [3, None, 1.5, [True], "last99999999999"])
def test_a_choice_of_blocks_that_makes_no_sense_is_one_line(blocks, user_error):
    model = torch.nn.Module()
    model.blocks = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    with user_error("blocks"):
        add_branches(model, BranchSpec.of("emoe", experts=4, bottleneck=2, blocks=blocks))
