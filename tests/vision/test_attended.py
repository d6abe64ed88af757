"""Vision transformers whose experts read what the attention gave, and experts of a form of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from seeds import shifted
from torch.nn import functional as F

from spectralmoe import BasisScorer, ContextScorer, EigenExperts, LinearScorer, Router, TopK, attach, load, record, save
from spectralmoe.linalg import orthonormality_error
from spectralmoe.vision import BranchSpec, add_branches, replace_mlp
from spectralmoe.vision.attended import AttendedBlock
from spectralmoe.vision.model import vision_moe

pytest.importorskip("timm")

ROW = {"preset": "ermoe-context", "threshold": 0.1}


def spec_of(row=ROW, **changes):
    return BranchSpec.of(row, **{"k": 2, "experts": 4, "blocks": "all", **changes})


def around(dim, experts):
    """A router whose weights sum to 1 and whose logits read the attention's output."""
    return Router(ContextScorer(dim, experts, key="attended", width=dim), TopK(2, normalize=True))


@pytest.mark.parametrize("name", ["vit", "deit3", "dinov2_reg", "clip", "siglip"])
def test_the_model_stays_and_its_routers_read_what_the_attention_gave(name, make_vision, images, close):
    """Copies of the MLP: the output is that of the dense model, and names of weights stay."""
    model = make_vision(name).double()
    expected, names, images = model(images.double()), list(model.state_dict()), images.double()
    replace_mlp(model, BranchSpec(router=around, experts=3, blocks="all"))
    block = model.blocks[1]
    read = []
    handle = block.attn.register_forward_hook(lambda *call: read.append(call[-1]))
    with record(model) as tape:
        close(model(images), expected)
    handle.remove()
    assert isinstance(block, AttendedBlock)
    assert [name for name in names if ".mlp." not in name] == [n for n in model.state_dict() if ".mlp." not in n]
    weight, bias = block.mlp.router.scorer.weight, block.mlp.router.scorer.bias
    close(tape[1].routing.logits, F.linear(read[0], weight.double(), bias.double()).flatten(0, 1))


def test_logits_are_cosines_in_the_bases_of_the_layers_own_bank(make_vision, same):
    model = replace_mlp(make_vision("vit"), spec_of(), init="random").double()
    block = model.blocks[0]
    assert type(block.mlp.experts) is EigenExperts
    assert block.mlp.router.scorer.bank is block.mlp.experts
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    with record(block) as tape:
        y = block(x)
    attended = block.attn(block.norm1(x))
    tokens, bases = block.norm2(x + attended), block.mlp.experts.right
    logits = [F.cosine_similarity(tokens @ basis, attended @ basis, dim=-1) for basis in bases]
    same(tape[0].routing.logits, torch.stack(logits, -1).flatten(0, 1), [x, bases])
    assert y.shape == x.shape


@pytest.mark.parametrize("row", ["ermoe", ROW], ids=["energy", "context"])
def test_trained_saved_and_loaded(row, tmp_path):
    model = vision_moe("vit_tiny_patch16_224", 3, channels=1, arguments={"img_size": 16, "embed_dim": 24, "depth": 2})
    replace_mlp(model.backbone, spec_of(row), init="random")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    attach(optimizer, model)
    images = torch.rand(4, 1, 16, 16)
    for _ in range(2):
        model(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    bases = [block.mlp.experts.right for block in model.backbone.blocks]
    assert all(float(orthonormality_error(basis).max()) < 1e-5 for basis in bases)
    save(model.eval(), tmp_path)
    for twin in (load(tmp_path), copy.deepcopy(model)):
        assert torch.equal(twin(images), model(images))
        assert all(block.mlp.router.scorer.bank is block.mlp.experts for block in twin.backbone.blocks)


def test_recomputed_blocks_give_the_same_gradients(make_vision, images, close, gradients):
    model = replace_mlp(make_vision("vit"), spec_of(), init="random").double().train()
    grads = []
    for again in (False, True):
        model.set_grad_checkpointing(again)
        grads.append(gradients(model(images.double()).square().sum(), model.parameters()))
    for one, two in zip(*grads, strict=True):
        close(one, two)


def test_what_cannot_be_is_one_line(make_vision, user_error):
    for name in ("swin", "beit", "convnext", "hiera"):
        with user_error("router reads 'attended'", "use another router"):
            replace_mlp(make_vision(name), spec_of(), init="random")
    with user_error("no copies of the MLP", "init='random'"):
        replace_mlp(make_vision("vit"), spec_of({"scorer": "linear", "experts": "eigen", "rank": 2}))
    with user_error("branches have adapters"):
        add_branches(make_vision("vit"), spec_of("ermoe"))
    with user_error("BasisScorer", "EigenExperts", "FeedForward"):
        router = BranchSpec(router=lambda d, e: Router(BasisScorer(d, e), TopK(2)), experts=4, blocks="all")
        replace_mlp(make_vision("vit"), router, init="random")


def test_under_one_seed_banks_of_their_own_start_alike(make_vision):
    starts, model = [], make_vision("vit")
    for row in ("ermoe", {"scorer": "linear", "experts": "eigen", "rank": 6}):
        torch.manual_seed(shifted(3))
        twin = replace_mlp(copy.deepcopy(model), spec_of(row), init="random")
        starts.append([value for block in twin.blocks for value in block.mlp.experts.state_dict().values()])
    assert all(map(torch.equal, *starts))


def test_a_bank_of_its_own_has_the_width_of_the_spec(make_vision):
    row = {"scorer": "linear", "experts": {"type": "feed_forward", "activation": "swiglu"}}
    model = replace_mlp(make_vision("vit"), spec_of(row, bottleneck=10), init="random")
    layer = model.blocks[0].mlp
    assert (layer.experts.width, layer.experts.activation) == (10, "swiglu")
    assert type(layer.router.scorer) is LinearScorer
    assert not isinstance(model.blocks[0], AttendedBlock)
