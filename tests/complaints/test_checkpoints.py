"""Files that lose experts without a word, files that no longer load, adapters that are not applied.

Threads: Megatron-LM #5844; Tutel #186, #206, #248; peft #2527, #2710, #3340; unsloth-zoo #647; bitsandbytes #1849.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, load, record, save
from spectralmoe.adaptation import adapt_one, apply_update
from spectralmoe.saving import read_config
from spectralmoe.vision import BranchSpec, add_branches

OLD = Path(__file__).parents[1] / "golden" / "format_1"


def make_layer(**options):
    return MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 12, **options))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(make_layer() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class LowRank(nn.Module):
    """W_e + B_e A_e for every expert: (E, H, D)."""

    def __init__(self, weight, rank=2):
        super().__init__()
        e, h, d = weight.shape
        self.b, self.a = nn.Parameter(0.1 * torch.randn(e, h, rank)), nn.Parameter(0.1 * torch.randn(e, rank, d))

    def forward(self, weight):
        return weight + self.b @ self.a


def rewrite(folder, edit):
    """Change the tensors of a saved folder, and its description with them."""
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


EDITS = {
    "experts left out": lambda tensors: {n: t for n, t in tensors.items() if ".experts." not in f".{n}"},
    "one matrix left out": lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("experts.down")},
    "other names": lambda tensors: {n.replace("experts.", "mlp_experts."): t for n, t in tensors.items()},
    "fewer experts": lambda tensors: {n: t[:2].clone() if "experts." in n else t for n, t in tensors.items()},
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("into", [False, True], ids=["built", "into"])
def test_megatron_5844_no_expert_stays_random(tmp_path, edit, into, user_error):
    """Megatron-LM #5844: A converter dropped every expert of a Mixtral, left them random and reported success.

    Here a file that lacks expert tensors, names them otherwise or holds fewer is refused with their names, and a model
    that was to be filled stays as it was.
    """
    layer, other = (make_layer() for _ in range(2))
    save(layer, tmp_path)
    rewrite(tmp_path, edit)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with user_error("does not fit the model", "experts."):
        load(tmp_path, into=other if into else None)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_tutel_186_old_files_still_load(close):
    """Tutel #186: An update of the library could not read the published checkpoints any more.

    Here a folder that the first version wrote, kept among the tests, still gives its output.
    """
    meta = read_config(OLD)["meta"]
    close(load(OLD)(torch.tensor(meta["input"])), torch.tensor(meta["output"]))


def test_tutel_206_and_248_files_do_not_know_how_many_machines_there_were(tmp_path):
    """Tutel #206, Tutel #248: Files of 32 experts from 32 devices could not be read on one or two, and a merging script
    failed on them.

    Here there is one file, whole, whatever wrote it; no process group is needed to read it, run it or save it. Two
    processes are in ``test_distributed.py``.
    """
    assert not torch.distributed.is_initialized()
    layer, x = MoE(Router(LinearScorer(8, 32), TopK(2)), FeedForward(32, 8, 12)), torch.randn(20, 8)
    save(layer, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["experts.up"].shape == (32, 12, 8)
    assert torch.equal(load(tmp_path)(x), layer.eval()(x))


@pytest.mark.parametrize("dispatch", ["grouped", "dense", "loop", "kept"])
def test_peft_2527_and_3340_low_rank_factors_on_every_expert(dispatch, close):
    """peft #2527, peft #3340: Adapters could not be put on stacked expert weights, later only one of them.

    Here the stacked weights are ordinary parameters: torch's own parametrization reaches them through every dispatch,
    twice, and the factors alone take gradients.
    """
    layer = MoE(
        Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 12), dispatch="auto" if dispatch == "kept" else dispatch
    ).requires_grad_(False)
    bank, x = layer.experts, torch.randn(20, 8)
    up, down = bank.up.clone(), bank.down.clone()
    for name in ("up", "down", "up", "down"):
        parametrize.register_parametrization(bank, name, LowRank(getattr(bank, name)))
    for name, weight in (("up", up), ("down", down)):
        factors = bank.parametrizations[name]
        close(getattr(bank, name), weight + factors[0].b @ factors[0].a + factors[1].b @ factors[1].a)
    with record(layer, keep=("hidden",) if dispatch == "kept" else ()):
        y = layer(x)
    plain = FeedForward(4, 8, 12)
    plain.load_state_dict({"up": bank.up, "down": bank.down})
    close(y, MoE(layer.router, plain)(x))
    y.square().sum().backward()
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert all(p.grad.any() for p in trained.values())


def test_unsloth_zoo_647_merging_keeps_the_expert_part(tmp_path):
    """unsloth-zoo #647: Merging an adapter into the weights left out what it had done to the experts.

    Here the merged layer gives the same output, before and after saving; one that is saved unmerged is either read back
    whole or refused, never read without the factors.
    """
    layer, x = make_layer().eval(), torch.randn(20, 8)
    before = layer(x)
    parametrize.register_parametrization(layer.experts, "up", LowRank(layer.experts.up))
    adapted = layer(x)
    assert not torch.allclose(adapted, before, atol=1e-3)
    save(layer, tmp_path / "apart")
    with pytest.raises(ValueError, match="Parametrized"):
        load(tmp_path / "apart")
    with pytest.raises(ValueError, match="other MoE layers"):
        load(tmp_path / "apart", into=make_layer())
    parametrize.remove_parametrizations(layer.experts, "up", leave_parametrized=True)
    save(layer, tmp_path / "merged")
    assert torch.equal(layer(x), adapted)
    assert torch.equal(load(tmp_path / "merged")(x), adapted)


def test_peft_2710_a_second_adapter_is_applied_or_refused(tmp_path, user_error):
    """peft #2710: The second adapter on a model was silently not applied.

    Here two one-expert updates from files are both in force, in the order given, and one that is there already or does
    not fit is refused; so is a second branch on a block.
    """
    x, model, fresh = torch.randn(40, 8), Classifier().eval(), Classifier().eval()
    fresh.load_state_dict(model.state_dict())
    for number, layer in enumerate(("layers.0", "layers.1")):
        sample = x[[number]]
        wrong = int(model(sample).argsort()[0, 1])
        update = adapt_one(model, sample, wrong, layers=[layer], lr=0.1, max_steps=500)
        assert list(update.touched) == [layer]
        update.save(tmp_path / layer)
    for layer in ("layers.0", "layers.1"):
        before = fresh(x)
        apply_update(fresh, tmp_path / layer)
        assert not torch.allclose(fresh(x), before)
        with user_error("was applied to this model already"):
            apply_update(fresh, tmp_path / layer)
    assert torch.equal(fresh(x), model(x))
    blocks = nn.Module()
    blocks.blocks = nn.ModuleList([nn.Linear(8, 8)])
    spec = BranchSpec(router=lambda d, e: Router(LinearScorer(d, e), TopK(2)), experts=4, bottleneck=2, blocks="all")
    add_branches(blocks, spec)
    with user_error("'blocks.0' has a branch already"):
        add_branches(blocks, spec)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_bitsandbytes_1849_a_cast_reaches_every_stacked_expert(tmp_path, dtype):
    """bitsandbytes #1849: Tools that look for linear modules leave stacked experts in 16 bit, nine tenths of the model,
    and say nothing.

    Nothing here quantises; what changes precision at all (a cast, saving, loading) reaches every expert.
    """
    layer = make_layer(bias=True).to(dtype)
    save(layer, tmp_path)
    for tensors in (layer.experts.state_dict(), load(tmp_path).experts.state_dict()):
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}
