"""Checkpoints in shards: other numbers of processes read them to the same bits, and a killed save leaves the last one.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from dying import killed
from gloo_ranks import Ranks as Processes
from gloo_ranks import work
from seeds import generator, shifted
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh

from spectralmoe.models import language_moe
from spectralmoe.optim import make_optimizer
from spectralmoe.sharding import full, is_sharded
from spectralmoe.training.checkpoint import SHARDS, load_checkpoint, save_checkpoint
from spectralmoe.training.distributed import shards
from spectralmoe.training.distributed.ranks import ALONE, Ranks

RATES = SimpleNamespace(lr=0.01, weight_decay=0.1)
FILE = "training.safetensors"


def make(ranks=ALONE, draw=1):
    torch.manual_seed(shifted(draw))
    network = ranks.wrap(language_moe(11, width=8, depth=1, heads=2, num_experts=4, hidden=6))
    return network, make_optimizer("adamw", network, RATES)


def together(ep):
    """All processes, ``ep`` of them with the experts."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world // ep, ep), mesh_dim_names=("efsdp", "ep"))
    return Ranks("fsdp2", dist.get_rank(), world, mesh if ep > 1 else None)


def train(network, optimizer, ranks, steps=2):
    tokens = torch.randint(0, 11, (4, 6), generator=generator(2))
    for _ in range(steps):
        optimizer.zero_grad()
        network(tokens[ranks.share(4)]).square().mean().backward()
        ranks.reduce(network)
        optimizer.step()


def values(network, optimizer):
    """Everything, gathered: weights, and the optimizer's state by the place of its parameter."""
    found = {name: full(value).clone() for name, value in network.state_dict().items()}
    for owner, entry in optimizer.state_dict()["state"].items():
        found |= {f"{owner}.{key}": full(value).clone() for key, value in entry.items()}
    return found


def stage(rank, folder):
    """Go on from the checkpoint of the stage before, and write the next one; the first stage trains."""
    number, ep = map(int, folder.name.split("-")[1:3])
    path = folder.parent / "chain" / FILE
    ranks = together(ep)
    network, optimizer = make(ranks, draw=number)
    state = load_checkpoint(path, network, optimizer)
    if state is None:
        train(network, optimizer, ranks)
    else:
        assert state["batch"] == number - 1
    save_checkpoint(path, network, optimizer, {"epoch": 0, "batch": number}, ranks=ranks)
    sharded = sum(is_sharded(parameter) for parameter in network.parameters())
    return values(network, optimizer), sharded


def alone(path, number):
    """One process without a group: reads, and writes one file."""
    network, optimizer = make(draw=number)
    assert load_checkpoint(path, network, optimizer)["batch"] == number - 1
    save_checkpoint(path, network, optimizer, {"epoch": 0, "batch": number})
    return values(network, optimizer)


def run_stage(tmp_path_factory, number, processes, ep):
    folder = tmp_path_factory.mktemp(f"stage-{number}-{ep}-")
    (folder.parent / "chain").mkdir(exist_ok=True)
    found = Processes(__file__, folder, 300, processes)(stage)
    for value, sharded in found:
        same(value, found[0][0])
        assert sharded > 4
    return found[0][0], folder.parent / "chain"


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.full
@pytest.mark.slow
def test_what_two_processes_wrote_one_goes_on_from(tmp_path_factory):
    expected, chain = run_stage(tmp_path_factory, 1, 2, 2)
    assert [folder.name for folder in (chain / f"training{SHARDS}").iterdir()] == ["epoch000000-batch00000001"]
    assert expected["0.exp_avg"].any()
    same(alone(chain / FILE, 2), expected)
    assert [path.name for path in chain.iterdir()] == [FILE]
    (chain / FILE).unlink()


@pytest.mark.full
@pytest.mark.slow
def test_four_two_one_four(tmp_path_factory):
    """Experts over 4 processes, 2, 1, 4; then over two of four, from the file of a process alone too."""
    expected, chain = run_stage(tmp_path_factory, 1, 4, 4)
    for number, (processes, ep) in enumerate([(2, 2), (1, 1), (4, 4), (4, 2), (4, 1)], 2):
        same(run_stage(tmp_path_factory, number, processes, ep)[0], expected)
    same(alone(chain / FILE, 7), expected)
    assert not (chain / f"training{SHARDS}").exists()
    same(run_stage(tmp_path_factory, 8, 4, 2)[0], expected)
    assert not (chain / FILE).exists()


def saving(path, batch, monkeypatch):
    """``killed``'s work: a save of step ``batch``, with a moment before each thing that it does."""

    def observed(moment, call):
        def called(*arguments, **options):
            moment()
            return call(*arguments, **options)

        return called

    def work(moment):
        for owner, name in ((FileSystemWriter, "finish"), (shards, "save_file"), (shards.shutil, "rmtree")):
            monkeypatch.setattr(owner, name, observed(moment, getattr(owner, name)))
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        network, optimizer = make(ranks := together(1))
        train(network, optimizer, ranks, batch)
        save_checkpoint(path, network, optimizer, {"epoch": 0, "batch": batch}, ranks=ranks)

    return work


@pytest.mark.full
@pytest.mark.slow
def test_a_save_that_is_killed_leaves_the_last_one(tmp_path, monkeypatch):
    path = tmp_path / FILE
    assert not killed(None, saving(path, 1, monkeypatch))
    kept, moment, steps = tmp_path / "kept", 0, set()
    (tmp_path / f"training{SHARDS}").rename(kept)
    while True:
        moment += 1
        shutil.copytree(kept, tmp_path / f"training{SHARDS}", dirs_exist_ok=True)
        died = killed(moment, saving(path, 2, monkeypatch))
        network, optimizer = make(draw=2)
        batch = load_checkpoint(path, network, optimizer)["batch"]
        assert {float(entry["step"]) for entry in optimizer.state.values()} == {batch}
        steps.add((died, batch))
        if not died:
            break
        shutil.rmtree(tmp_path / f"training{SHARDS}")
    assert moment > 5
    assert steps == {(True, 1), (True, 2), (False, 2)}
    assert [folder.name for folder in (tmp_path / f"training{SHARDS}").iterdir()] == ["epoch000000-batch00000002"]


def test_other_networks_are_refused(tmp_path, user_error):
    network, optimizer = make()
    save_checkpoint(tmp_path / FILE, network, optimizer, {})
    other = language_moe(11, width=8, depth=2, heads=2, num_experts=4, hidden=6)
    with user_error("not a checkpoint of this run", "remove it"):
        load_checkpoint(tmp_path / FILE, other, make_optimizer("adamw", other, RATES))


if __name__ == "__main__":
    work((stage,))
