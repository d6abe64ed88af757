"""Training timm models with MoE parts: what is frozen stays, the loss is its equation, many processes are as one."""

import itertools
import math
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import ends, start
from grids import first_of
from safetensors.torch import save_file
from seeds import shifted

from spectralmoe import UserError, load, save
from spectralmoe.cli.app import run
from spectralmoe.data.image_data import ImageData, Split, load_data
from spectralmoe.json_files import read_json
from spectralmoe.layers import moe_layers
from spectralmoe.training.loop import train
from spectralmoe.training.settings import parse
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.settings.vision import MoEParts
from spectralmoe.training.tasks import ImageTask
from spectralmoe.training.vision import load_weights, make_spec

TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
BACKBONE = {"name": "vit_tiny_patch16_224", "arguments": TINY}
FAITHFUL = {
    "router": {"preset": "emoe-faithful", "rank": 8},
    "experts": 4,
    "bottleneck": 4,
    "blocks": "all",
    "tokens": "all",
}
BUDGET = {"epochs": 2, "batch_size": 64, "seed": 3}


@pytest.fixture(scope="module")
def data():
    return load_data("digits").subset(300)


def settings(backbone=None, moe=FAITHFUL, **optimization):
    values = {"data": "digits", "backbone": {**BACKBONE, **(backbone or {})}, "moe": moe}
    return parse(TrainSettings, {**values, "optimization": {**BUDGET, **optimization}}, "test")


def build_vision(data, wanted):
    return ImageTask(data).build(wanted)


def run_training(network, data, wanted, **options):
    optimization = wanted.optimization
    task = ImageTask(data, label_smoothing=optimization.label_smoothing, mixup=optimization.mixup)
    return train(network, task, optimization, **options)


def trained(data, wanted, **options):
    network = build_vision(data, wanted)
    run_training(network, data, wanted, terms=wanted.preset.terms, **options)
    return network


def bits(model):
    return {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("moe", [FAITHFUL, {**FAITHFUL, "kind": "replace_mlp", "k": "soft", "blocks": "last1"}])
def test_a_frozen_backbone_is_the_same_to_the_bit(data, moe):
    wanted = settings({"frozen": True, "arguments": {**TINY, "drop_path_rate": 0.3}}, moe)
    network = build_vision(data, wanted)
    before = bits(network)
    run_training(network, data, wanted)
    moved = {name for name, value in bits(network).items() if value != before[name]}
    parts = tuple(f"backbone.{path}." for path in network.parts())
    assert {name for name in moved if not name.startswith((*parts, "backbone.head."))} == set()
    assert {"backbone.head.weight", "backbone.head.bias"} <= moved
    assert all(any(name.startswith(part) for name in moved) for part in parts)


def test_without_freezing_everything_moves(data):
    wanted = settings()
    network = build_vision(data, wanted)
    before = bits(network)
    run_training(network, data, wanted)
    still = {name for name, value in bits(network).items() if value == before[name]}
    assert not {name for name in still if "moe_branch" not in name}


def test_a_dense_backbone_is_trained_too(data, tmp_path):
    network = trained(data, settings(moe=None))
    save(network, tmp_path)
    assert bits(load(tmp_path)) == bits(network)


def test_label_smoothing_and_mixup_are_their_equations():
    torch.manual_seed(shifted(0))
    images, labels, classes = torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 2, 3, 1, 0]), 4
    split = Split(images, labels)
    task = ImageTask(ImageData("six", split, split, split, tuple("abcd")), label_smoothing=0.2, mixup=0.4)
    mixed = task.batch(torch.arange(6), np.random.default_rng((5, 7)))
    logits = torch.randn(6, classes)
    draw = np.random.default_rng((5, 7))
    share, order = draw.beta(0.4, 0.4), draw.permutation(6)
    assert 0 < share < 1
    total = 0.0
    for i, j in enumerate(order):
        expected = share * images[i].double() + (1 - share) * images[j].double()
        assert torch.allclose(mixed.images[i].double(), expected, atol=1e-6)
        target = [0.2 / classes] * classes
        target[labels[i]] += 0.8 * share
        target[labels[j]] += 0.8 * (1 - share)
        norm = math.log(sum(math.exp(float(value)) for value in logits[i]))
        total -= sum(t * (float(value) - norm) for t, value in zip(target, logits[i], strict=True))
    assert float(task.loss(lambda _: logits, mixed)) == pytest.approx(total / 6, rel=1e-5)
    again = task.batch(torch.arange(6), np.random.default_rng((5, 7)))
    assert torch.equal(again.images, mixed.images)
    other = task.batch(torch.arange(6), np.random.default_rng((5, 8)))
    assert not torch.equal(other.images, mixed.images)


def test_no_mixup_leaves_the_batch(data):
    batch = ImageTask(data).batch(torch.tensor([4, 1]), np.random.default_rng(0))
    assert torch.equal(batch.images, data.train.images[[4, 1]])
    assert torch.equal(batch.labels, data.train.labels[[4, 1]])
    assert batch.others is None


class Stop(Exception):
    pass


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stop_at", [2, 7])
def test_a_resumed_run_ends_with_the_same_bits(data, precision, stop_at, tmp_path, monkeypatch):
    monkeypatch.setattr("spectralmoe.training.loop._CHECKPOINT_SECONDS", 0.0)
    dropping = {"arguments": {**TINY, "drop_path_rate": 0.3}}
    wanted = settings(dropping, precision=precision, mixup=0.3, label_smoothing=0.1)
    undisturbed = trained(data, wanted)
    calls = 0

    def stop(share):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Stop

    path = tmp_path / "training.safetensors"
    with pytest.raises(Stop):
        trained(data, wanted, checkpoint=path, progress=stop)
    resumed = build_vision(data, settings(dropping, seed=9))
    run_training(resumed, data, wanted, checkpoint=path)
    assert bits(resumed) == bits(undisturbed)


def test_bf16_keeps_the_bases_orthonormal(data):
    network = trained(data, settings(precision="bf16", lr=1e-2, mixup=0.2))
    for layer in moe_layers(network).values():
        basis = layer.router.scorer.basis.detach()
        assert basis.dtype == torch.float32
        assert float((basis.T @ basis - torch.eye(8)).abs().max()) < 1e-5
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_gradient_checkpointing_changes_nothing(data):
    plain = trained(data, settings(epochs=1))
    saving = trained(data, settings({"gradient_checkpointing": True}, epochs=1))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(saving.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_fp16_without_cuda_is_one_line(data, user_error):
    wanted = settings(precision="fp16")
    with user_error("fp16", "CUDA", "bf16"):
        run_training(build_vision(data, wanted), data, wanted)


@pytest.mark.parametrize("router", ["emoe", "linear", "faithful"])
def test_branches_start_as_the_dense_model_unless_asked_otherwise(data, router):
    moe = {
        "blocks": "all",
        "bottleneck": 4,
        **({**FAITHFUL, "start": "model"} if router == "faithful" else {"router": router}),
    }
    dense, images = build_vision(data, settings(moe=None)).eval(), data.test.images[:5]
    assert torch.equal(build_vision(data, settings(moe=moe)).eval()(images), dense(images))
    assert not torch.equal(build_vision(data, settings(moe={**moe, "start": "authors"})).eval()(images), dense(images))


NORMALIZED = {"preset": "linear", "normalize": True}


@pytest.mark.parametrize("row", [{"k": "soft"}, {"k": 2, "router": NORMALIZED}], ids=["soft", "top-2"])
def test_replacing_mlps_by_copies_starts_as_the_dense_model(data, row):
    dense = build_vision(data, settings(moe=None)).eval()
    moe = build_vision(data, settings(moe={"kind": "replace_mlp", "blocks": "all", **LINEAR, **row})).eval()
    images = data.test.images[:5]
    torch.testing.assert_close(moe(images), dense(images), rtol=1e-5, atol=1e-5)


LINEAR = {"router": "linear", "experts": 3}


@pytest.mark.parametrize("routers", [("linear", "prototype"), ("linear", "emoe")])
def test_all_routers_start_with_the_same_experts_and_backbone(data, routers):
    same = {**FAITHFUL, "start": "authors"}
    rows = [{**same, "router": router} for router in routers]
    one, two = (build_vision(data, settings(moe=row)).state_dict() for row in rows)
    for name, value in one.items():
        if ".router." not in name:
            assert torch.equal(value, two[name]), name


@pytest.mark.parametrize(
    ("moe", "words"),
    [
        ({"router": "liner"}, ("unknown router 'liner'", "emoe", "linear")),
        ({"router": {"preset": "linear", "tau": 0.1}}, ("unknown key 'tau'", "scorer")),
        ({"router": {"preset": "emoe", "experts": "adapter"}}, ("branches have adapters",)),
        ({"blocks": "last9"}, ("last9",)),
        ({"kind": "replace_mlp", "router": "linear"}, ("soft", "normalize", "random")),
        ({"router": {"preset": "emoe-faithful", "rank": 99}}, ("99", "D=16")),
    ],
)
def test_moe_parts_that_cannot_be_are_one_line(data, moe, words, user_error):
    with user_error(*words):
        build_vision(data, settings(moe={"blocks": "all", **moe}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"backbone": {"name": "x", "wings": 1}}, ("unknown key 'wings'", "frozen")),
        ({"moe": {"experts": 0}}, ("moe.experts",)),
        ({"moe": {"blocks": [1, "a"]}}, ("moe.blocks",)),
        ({"moe": {"bottleneck": 0}}, ("moe.bottleneck",)),
        ({"optimization": {"precision": "fp8"}}, ("optimization.precision",)),
        ({"moe": {"wings": 1}}, ("unknown key 'wings'", "bottleneck")),
        ({"moe": {"router": 3}}, ("moe.router", "got 3")),
    ],
)
def test_settings_that_are_wrong_are_one_line(values, words, user_error):
    with user_error("F.toml", *words):
        parse(TrainSettings, {"data": "digits", "backbone": BACKBONE, **values}, "F.toml")


def test_weights_come_from_files_and_folders(data, tmp_path, user_error):
    source = build_vision(data, settings(moe=None, seed=8))
    state = source.backbone.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save({"model": state}, tmp_path / "w.pth")
    save(source, tmp_path / "folder")
    for name in ("w.safetensors", "w.pth", "folder"):
        network = build_vision(data, settings({"checkpoint": str(tmp_path / name)}, moe=None))
        assert bits(network.backbone) == bits(source.backbone)
    torch.save({"state_dict_ema": {f"module._orig_mod.{k}": v for k, v in state.items()}}, tmp_path / "ema.pth")
    network = build_vision(data, settings({"checkpoint": str(tmp_path / "ema.pth")}, moe=None))
    assert bits(network.backbone) == bits(source.backbone)
    other = build_vision(data, settings(moe=None))
    head = bits(other.backbone.head)
    other.new_head(3)
    load_weights(other, tmp_path / "w.pth")
    assert other.backbone.head.weight.shape == (3, 16)
    assert head
    save_file(
        {**{k: v for k, v in state.items() if k != "pos_embed"}, "more": torch.zeros(1)}, tmp_path / "x.safetensors"
    )
    with user_error("x.safetensors does not fit", "missing 'pos_embed'", "extra 'more'"):
        load_weights(other, tmp_path / "x.safetensors")
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    for name, words in (("broken.pth", "not a torch weights file"), ("none.pth", "no such file")):
        with user_error(name, words):
            load_weights(other, tmp_path / name)
    torch.save({"model": [1]}, tmp_path / "list.pth")
    with user_error("no state dict"):
        load_weights(other, tmp_path / "list.pth")


def test_two_sources_of_weights_are_refused(data, user_error):
    with user_error("pretrained and checkpoint"):
        build_vision(data, settings({"pretrained": True, "checkpoint": "x.pth"}))


def test_presets_bring_their_terms():
    rows = {"linear+load_balance": ["load_balance"], "emoe": [], "omoe": []}
    presets = {row: settings(moe={"router": row}).preset for row in rows}
    assert {row: list(preset.terms) for row, preset in presets.items()} == rows
    assert presets["omoe"].optimizer == {"type": "orthogonal_experts"}
    dense = settings(moe=None).preset
    assert (dense.terms, dense.optimizer) == ({}, None)
    assert make_spec(MoEParts(router="linear", k=2)).make_router(8).selector.k == 2


# Several processes

CONFIG = """
data = "digits"
train_size = 103

[backbone]
name = "vit_tiny_patch16_224"
gradient_checkpointing = {checkpointing}

[backbone.arguments]
img_size = 8
patch_size = 4
embed_dim = 16
depth = 2
num_heads = 2

[moe]
{moe}
experts = 4
bottleneck = 4
blocks = "all"

[optimization]
epochs = 1
batch_size = 50
lr = 1e-3
mixup = 0.2
"""
FORMS = {
    "faithful": CONFIG.format(checkpointing="true", moe='router = {preset = "emoe-faithful", rank = 8}\nk = "soft"'),
    "balanced": CONFIG.format(checkpointing="false", moe='router = "linear+balanced"\nk = "soft"'),
}


TEXT = """
data = "text:pydoc"
router = "linear+balanced"
depth = 1
train_size = 20
text = {length = 12, heads = 2, measured = 4}
network = {width = 8, hidden = 6, num_experts = 4}
optimization = {epochs = 1, batch_size = 8}
"""
DIGITS = """
data = "digits"
router = "linear"
depth = 1
train_size = 44
network = {width = 8, hidden = 6, num_experts = 4}
optimization = {epochs = 1, batch_size = 21, optimizer = "sgd", lr = 0.1}
"""
KINDS = ("ddp", "fsdp2")
OTHERS = {"text": TEXT, "digits": DIGITS}
SHARDS = "fsdp2,ep=2"
RUNS = [("faithful", "fsdp2"), ("text", SHARDS)]  # by default; --full: of each form all kinds
ALL_RUNS = [*itertools.product(FORMS, KINDS), *itertools.product(OTHERS, [SHARDS]), ("digits", "ddp")]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def one_of_two(rank: int, folder: Path, runs: list[str]) -> None:
    """What torchrun starts twice: the command line, once for each form and kind."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for form, kind, port in map(str.split, runs):
        os.environ["MASTER_PORT"] = port
        out = folder / f"{form}-{kind}"
        code = run(["train", "--config", str(folder / form), "--out", str(out), "--parallel", kind, "--device", "cpu"])
        if code:
            sys.exit(code)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, request):
    """The folder of what two processes trained: FORM-KIND."""
    folder = tmp_path_factory.mktemp("two")
    for form, text in {**FORMS, **OTHERS}.items():
        (folder / form).write_text(text)
    runs = ALL_RUNS if request.config.getoption("--full") else RUNS
    words = [f"{form} {kind} {free_port()}" for form, kind in runs]
    codes = ends([start(__file__, rank, folder, *words) for rank in range(2)], seconds=300)
    assert codes == [0, 0]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", first_of(2, ["faithful", "text", "balanced"]))
def test_two_processes_are_as_one(form, two_processes, tmp_path):
    assert run(["train", "--config", str(two_processes / form), "--out", str(tmp_path), "--device", "cpu"]) == 0
    expected = load(tmp_path).state_dict()
    losses = [epoch["loss"] for epoch in read_json(tmp_path / "history.json")["epochs"]]
    for out in two_processes.glob(f"{form}-*"):
        found = load(out).state_dict()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert [epoch["loss"] for epoch in read_json(out / "history.json")["epochs"]] == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.full
def test_shards_of_a_network_with_a_batch_norm_are_as_copies(two_processes):
    """Its statistics are those of the share of each process, so one process alone has others."""
    one, two = (load(two_processes / f"digits-{kind}").state_dict() for kind in ("ddp", "fsdp2,ep=2"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_one_process_reads_what_two_wrote_in_shards(two_processes):
    """The finished run goes on with nothing, from the shards: it saves the same model, whole."""
    out = two_processes / "text-fsdp2,ep=2"
    assert (out / "training.shards").exists()
    before = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").unlink()
    assert run(["train", "--config", str(two_processes / "text"), "--out", str(out), "--device", "cpu"]) == 0
    assert (out / "model.safetensors").read_bytes() == before


def test_parallel_without_torchrun_is_one_line(tmp_path, monkeypatch):
    from spectralmoe.training.distributed.ranks import joined

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="needs torchrun"), joined("ddp", torch.device("cpu")):
        pass
    with pytest.raises(UserError, match="unknown --parallel 'dpp'"), joined("dpp", torch.device("cpu")):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="add --parallel ddp"), joined(None, torch.device("cpu")):
        pass


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_of_two(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
