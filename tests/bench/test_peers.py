"""Peers: absent ones are left out with a note; the adapters of those that are here pass the gate."""

import sys

import pytest
import torch

from spectralmoe.bench import peers
from spectralmoe.bench.problem import Problem, Sizes
from spectralmoe.bench.subject import candidate

CPU = torch.device("cpu")
PACKAGES = {
    "transformers": "transformers",
    "torchtitan": "torchtitan",
    "st-moe-pytorch": "st_moe_pytorch",
    "mixture-of-experts": "mixture_of_experts",
    "soft-moe": "soft_moe",
}
SIZES = Sizes(128, 16, 32, 8, 2)


@pytest.mark.parametrize("peer", PACKAGES)
def test_an_absent_peer_is_left_out_with_a_note(peer, monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGES[peer], None)
    subjects, skipped = peers.find_peers(Problem(SIZES, "gelu", torch.float32, CPU), peer)
    assert subjects == []
    assert [item.name for item in skipped] == [peer]
    assert skipped[0].why.startswith("not installed (")


def test_a_peer_that_breaks_is_left_out_with_a_note(monkeypatch):
    def broken(problem):
        yield from ()
        raise TypeError("new signature")

    monkeypatch.setitem(peers.PEERS, "broken", broken)
    subjects, skipped = peers.find_peers(Problem(SIZES, "gelu", torch.float32, CPU), "naive", "broken")
    assert [s.name for s in subjects] == ["naive"]
    assert [(s.name, s.why) for s in skipped] == [("broken", "could not be built (TypeError: new signature)")]


def test_gpu_peers_say_so():
    _, skipped = peers.find_peers(Problem(SIZES, "gelu", torch.bfloat16, CPU), "megablocks", "scattermoe")
    assert [item.why for item in skipped] == ["runs on a GPU only"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("form", ["forward", "forward and backward"])
def test_the_naive_form_passes_and_the_dense_one_is_not_gated(activation, dtype, form):
    problem = Problem(SIZES, activation, dtype, CPU)
    (naive, dense), _ = peers.find_peers(problem, "naive", "dense")
    assert candidate(naive, problem, form).check() is None
    given = candidate(dense, problem, form)
    assert (given.kind, given.check) == ("unlike", None)
    given.work()


def test_the_naive_form_is_left_out_where_it_is_hopeless():
    _, skipped = peers.find_peers(Problem(Sizes(8, 8, 8, 64, 2), "gelu", torch.float32, CPU), "naive")
    assert skipped[0].why == "does 32 times the arithmetic"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["forward", "forward and backward"])
def test_transformers_blocks_pass_with_our_weights(dtype, form):
    pytest.importorskip("transformers")
    problem = Problem(SIZES, "swiglu", dtype, CPU)
    subjects, skipped = peers.find_peers(problem, "transformers")
    assert skipped == []
    assert len(subjects) == 6
    for subject in subjects:
        assert candidate(subject, problem, form).check() is None, subject.name
        assert subject.module.experts.down_proj.data_ptr() == problem.down.data_ptr()  # nothing is copied


def test_transformers_batched_form_is_left_out_where_it_would_fill_the_memory():
    pytest.importorskip("transformers")
    problem = Problem(Sizes(2**16, 8, 2**13, 4, 2), "swiglu", torch.bfloat16, CPU)
    _, skipped = peers.find_peers(problem, "transformers")
    assert [item.name for item in skipped] == [f"transformers {name} batched_mm" for name in ("Mixtral", "Qwen3-MoE")]
    assert skipped[0].why == "gathers a copy of the weights for every slot: 48 GiB a pass"


@pytest.mark.parametrize("form", ["forward", "forward and backward"])
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_torchtitan_passes_with_our_weights(form):
    pytest.importorskip("torchtitan")
    problem = Problem(SIZES, "swiglu", torch.bfloat16, CPU)
    (subject,), _ = peers.find_peers(problem, "torchtitan")
    assert candidate(subject, problem, form).check() is None


@pytest.mark.parametrize("peer", ["st-moe-pytorch", "mixture-of-experts", "soft-moe"])
@pytest.mark.parametrize("form", ["forward", "forward and backward"])
def test_others_run_and_are_not_gated(peer, form):
    pytest.importorskip(PACKAGES[peer])
    problem = Problem(SIZES, "swiglu" if peer == "st-moe-pytorch" else "gelu", torch.float32, CPU)
    (subject,), _ = peers.find_peers(problem, peer)
    assert subject.call(problem.x).shape == problem.x.shape
    weights = sum(p.numel() for p in subject.module.parameters() if p.dim() > 1)
    matrices = 3 if peer == "st-moe-pytorch" else 2
    assert weights == pytest.approx(matrices * 8 * 16 * 32, rel=0.5)  # experts of the problem's sizes, and a router
    given = candidate(subject, problem, form)
    assert (given.kind, given.check, given.flops) == ("unlike", None, 0)
    given.work()
