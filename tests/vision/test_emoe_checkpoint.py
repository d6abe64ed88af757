"""Old EMoE weights compute what they did: against the numbers of an independent implementation."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from spectralmoe.vision import BranchSpec, add_branches, load_emoe_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "emoe_reference_tiny.safetensors"
MODES = pytest.mark.parametrize(("mode", "k"), [("soft", "soft"), ("top1", 1), ("top2", 2)])
BLOCKS = (1, 3)


@pytest.fixture(scope="module")
def golden():
    """(tensors by name, timm arguments of the backbone, settings of the branches)."""
    with safe_open(GOLDEN, framework="pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    settings = json.loads(about["moe"])
    options = {name: settings[name] for name in ("experts", "bottleneck", "blocks")} | {"rank": settings["r"]}
    return tensors, json.loads(about["vit"]), options


@pytest.fixture
def weights(golden):
    return {name.removeprefix("weight."): value for name, value in golden[0].items() if name.startswith("weight.")}


@pytest.fixture
def make_vit(golden):
    timm = pytest.importorskip("timm")
    return lambda **more: timm.models.vision_transformer.VisionTransformer(**golden[1], **more).eval()


@pytest.fixture
def load_it(golden, make_vit, weights):
    """``load_it(k, source=weights, **more)``: the whole model."""

    def make(k=1, source=None, **more):
        return load_emoe_checkpoint(make_vit(), source or weights, k=k, **{**golden[2], **more})

    return make


@MODES
def test_logits(mode, k, golden, load_it, close):
    close(load_it(k)(golden[0]["input.images"]), golden[0][f"output.{mode}.logits"])


def test_weights_below_the_prefix_of_a_wrapper(golden, load_it, weights, close):
    model = load_it(source={"state_dict_ema": {f"module.{name}": value for name, value in weights.items()}})
    close(model(golden[0]["input.images"]), golden[0]["output.top1.logits"])


@MODES
@pytest.mark.parametrize("index", BLOCKS)
def test_a_branch_alone(mode, k, index, golden, load_it, close):
    """The reference routes all tokens that a branch is given; in the model it is given the patches alone."""
    branch, tokens = load_it(k).blocks[index].moe_branch, golden[0]["input.tokens"]
    assert (branch.prefix, branch.tokens) == (1, "patches")
    branch.tokens = "all"
    close(branch(tokens), golden[0][f"output.{mode}.branch{index}.tokens"])
    probabilities = branch.moe.router(tokens).scores.view(*tokens.shape[:2], -1)
    close(probabilities, golden[0][f"output.{mode}.branch{index}.probs"])


def test_gradients(golden, load_it, close):
    model = load_it(1)
    F.cross_entropy(model(golden[0]["input.images"]), torch.tensor([1, 2, 3])).backward()
    grads = {name.removeprefix("grad.top1.branches."): v for name, v in golden[0].items() if name.startswith("grad.")}
    assert len(grads) == 16
    for index in BLOCKS:
        branch = model.blocks[index].moe_branch
        scorer, bank = branch.moe.router.scorer, branch.moe.experts
        ours = {
            "alpha": branch.alpha.grad,
            "router.basis.Q": scorer.basis.grad,
            "router.gamma": scorer.gain.grad,
            "router.masks": scorer.mask_logits.grad.T,
            "router.bias": scorer.bias.grad,
        }
        for e in range(bank.num_experts):
            ours |= {f"experts.{e}.down.weight": bank.up.grad[e], f"experts.{e}.up.weight": bank.down.grad[e]}
        for name, gradient in ours.items():
            close(gradient, grads.pop(f"{index}.{name}", torch.zeros_like(gradient)))  # none: an expert without tokens
    assert not grads


@pytest.mark.parametrize(
    ("suffix", "wrapper"),
    [(s, w) for s in (".pth", ".pt", ".bin", None) for w in (None, "model", "state_dict")] + [(".safetensors", None)],
)
def test_sources(suffix, wrapper, tmp_path, golden, weights, load_it):
    state = {wrapper: weights, "epoch": 3} if wrapper else weights
    if suffix == ".safetensors":
        save_file(weights, tmp_path / "w.safetensors")
    elif suffix:
        torch.save(state, tmp_path / f"w{suffix}")
    source = tmp_path / f"w{suffix}" if suffix else state
    images = golden[0]["input.images"]
    assert torch.equal(load_it(source=source)(images), load_it()(images))
    if suffix:
        assert torch.equal(load_it(source=str(source))(images), load_it()(images))


@pytest.mark.parametrize("blocks", [[1, 3], "3,1", [-1, -3], (1, 3)])
def test_notations_of_the_blocks(blocks, golden, load_it):
    images = golden[0]["input.images"]
    assert torch.equal(load_it(blocks=blocks)(images), load_it()(images))


def test_tau_divides_the_logits(golden, load_it):
    tokens = golden[0]["input.tokens"]
    one, two = (load_it(tau=tau).blocks[1].moe_branch.moe.router(tokens).logits for tau in (1.0, 0.5))
    torch.testing.assert_close(2 * one, two)


def test_what_takes_no_part_may_be_missing_or_anything(golden, weights, load_it):
    images = golden[0]["input.images"]
    expected = load_it()(images)
    unused = [name for name in weights if name.endswith((".P", ".log_lambda"))]
    assert len(unused) == 4
    assert torch.equal(load_it(source={n: v for n, v in weights.items() if n not in unused})(images), expected)
    assert torch.equal(load_it(source=weights | {name: torch.ones(3) for name in unused})(images), expected)


def test_keys_that_differ_are_listed(weights, load_it, user_error):
    with user_error("missing 'branches.3.alpha'"):
        load_it(source={name: value for name, value in weights.items() if name != "branches.3.alpha"})
    with user_error("missing 'vit.cls_token'"):
        load_it(source={name: value for name, value in weights.items() if name != "vit.cls_token"})
    with user_error("extra 'vit.more'"):
        load_it(source=weights | {"vit.more": torch.ones(1)})
    with user_error("'vit.head.bias' has shape [7], the model wants [10]"):
        load_it(source=weights | {"vit.head.bias": torch.ones(7)})
    with user_error("extra 'branches.3.", "and 8 more"):
        load_it(blocks=[1])
    with user_error("missing 'branches.2."):
        load_it(blocks="last3")
    with user_error("'branches.1.router.masks' has shape [4, 16], the model wants [4, 8]"):
        load_it(rank=8)
    with user_error("missing 'branches.1.experts.4.down.weight'", "and 3 more"):
        load_it(experts=5)
    with user_error("'branches.1.experts.0.down.weight' has shape [12, 48], the model wants [24, 48]"):
        load_it(bottleneck=24)
    with user_error("missing 'branches.1.alpha'", "and "):
        load_it(source={"state_dict": {"head.weight": torch.ones(2)}})


def test_a_refused_checkpoint_leaves_the_model_alone(golden, make_vit, weights, user_error):
    vit = make_vit()
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    for options in ({"rank": 8}, {"rank": 49}, {"blocks": "last9"}, {"bottleneck": 0}, {"tau": 0.0}):
        with user_error(""):
            load_emoe_checkpoint(vit, weights, **{**golden[2], **options})
    with user_error('k = "top3"', "soft"):
        load_emoe_checkpoint(vit, weights, k="top3", **golden[2])
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    assert len(before) == len(vit.state_dict())
    branched = add_branches(vit, BranchSpec.of("emoe", blocks=[1]))
    with user_error("'blocks.1'", "already"):
        load_emoe_checkpoint(branched, weights, **golden[2])


def test_files_that_hold_no_weights(tmp_path, load_it, user_error):
    with user_error("nowhere.pth", "no such file"):
        load_it(source=tmp_path / "nowhere.pth")
    with user_error(str(tmp_path), "no such file"):
        load_it(source=tmp_path)
    for name in ("broken.pth", "broken.safetensors", "empty.pt", "notes.txt"):
        (tmp_path / name).write_bytes(b"" if name.startswith("empty") else b"not weights")
        with user_error(name):
            load_it(source=tmp_path / name)
    torch.save(Fraction(1, 2), tmp_path / "object.pth")  # no package asks torch to let this type pass
    with user_error("object.pth", "more than tensors"):
        load_it(source=tmp_path / "object.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with user_error("list.pth", "no state dict"):
        load_it(source=tmp_path / "list.pth")
    with user_error("no state dict"):
        load_it(source={"vit.head.bias": 3})
