"""The gate: what is right passes, what is wrong is reported and never timed."""

import random
from itertools import islice

import pytest
import torch
from grids import one_of_each
from seeds import shifted

from spectralmoe import MoE
from spectralmoe.bench.case import Candidate, Case, measure
from spectralmoe.bench.gate import TOLERANCE, difference
from spectralmoe.bench.problem import Problem, Sizes
from spectralmoe.bench.subject import Subject, candidate, spectralmoe_layer

CPU = torch.device("cpu")
FORMS = ["forward", "forward and backward"]


SMALL = Sizes(48, 8, 16, 4, 2)


def problem(activation="gelu", dtype=torch.float32, sizes=SMALL, **options):
    return Problem(sizes, activation, dtype, CPU, **options)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_truth_is_what_the_plain_loop_gives_in_float64(activation, k):
    p = problem(activation, torch.float64, Sizes(20, 8, 16, 4, k))
    layer = spectralmoe_layer(p)
    assert isinstance(layer.module, MoE)
    layer.module.dispatch = "loop"
    layer.module.double()
    x = p.x.clone().requires_grad_()
    y = layer.module(x)
    y.backward(p.gradient)
    found = {"output": y, "x": x.grad, **layer.gradients()}
    for name, right in p.truth("forward and backward").items():
        torch.testing.assert_close(found[name], right, rtol=0, atol=1e-6)  # the router's matrix is of fp32
    torch.testing.assert_close(p.truth("forward")["output"], p.truth("forward and backward")["output"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("form", FORMS)
def test_our_layer_passes(activation, dtype, form):
    p = problem(activation, dtype, Sizes(256, 32, 64, 8, 2))
    assert candidate(spectralmoe_layer(p), p, form).check() is None


def wrong(p, change):
    """Our layer with a mistake in it."""
    right = spectralmoe_layer(p)
    return Subject("wrong", right.module, lambda x: change(right.module, x), right.gradients, "peer")


def dropped_slot(layer, x):
    """The last token has lost an expert."""
    y = layer(x)
    return torch.cat([y[:-1], y[-1:] * 0.5])


MISTAKES = {
    "one token": (dropped_slot, "output is off"),
    "a constant": (lambda layer, x: layer(x) + 1e-3, "output is off"),
    "nan": (
        lambda layer, x: layer(x) * torch.where(torch.arange(len(x)) == 3, torch.nan, 1.0)[:, None],
        "output is off",
    ),
    "shape": (lambda layer, x: layer(x)[1:], "output has shape"),
}


@one_of_each(mistake=MISTAKES, form=FORMS)
def test_a_wrong_output_is_caught(mistake, form):
    p = problem()
    change, said = MISTAKES[mistake]
    case = Case("t", "c", [candidate(wrong(p, change), p, form)], CPU)
    gate = measure(case, 1, random.Random(shifted(0)), lambda *_: None)["candidates"][0]
    assert gate["gate"].startswith("failed: ")
    if not (mistake == "shape" and form != "forward"):  # there the backward refuses first
        assert said in gate["gate"]
    assert gate["value"] is None


@pytest.mark.parametrize("leaf", ["x", "router", "up", "down"])
def test_a_wrong_gradient_behind_a_right_output_is_caught(leaf):
    p = problem()
    right = spectralmoe_layer(p)

    def gradients():
        found = right.gradients()
        if leaf in found:
            found[leaf] = found[leaf] * torch.where(torch.arange(len(found[leaf])) == 2, 1.01, 1.0).view(
                -1, *[1] * (found[leaf].dim() - 1)
            )
        return found

    call = (lambda x: right.call(x.detach() + 0 * x)) if leaf == "x" else right.call
    given = candidate(Subject("wrong", right.module, call, gradients, "peer"), p, "forward and backward")
    assert given.check().startswith(f"{leaf} is off")
    assert candidate(Subject("fine", right.module, call, gradients, "peer"), p, "forward").check() is None


def test_who_fails_is_never_timed_and_who_is_not_gated_never_counts():
    runs = {"wrong": 0, "raises": 0, "unlike": 0, "ours": 0}

    def count(name):
        runs[name] += 1

    def broken():
        raise RuntimeError("no kernel\nDetails")

    case = Case(
        "t",
        "c",
        [
            Candidate("wrong", lambda: count("wrong"), "peer", check=lambda: "output is off"),
            Candidate("raises", lambda: count("raises"), "peer", check=broken),
            Candidate("broken", broken, "unlike"),
            Candidate("unlike", lambda: count("unlike"), "unlike"),
            Candidate("ours", lambda: count("ours"), "ours", check=lambda: None),
        ],
        CPU,
    )
    found = measure(case, 3, random.Random(shifted(0)), lambda *_: None)
    gates = {c["name"]: c["gate"] for c in found["candidates"]}
    assert gates == {
        "wrong": "failed: output is off",
        "raises": "failed: RuntimeError: no kernel",
        "broken": "failed: RuntimeError: no kernel",
        "unlike": "not gated",
        "ours": "passed",
    }
    assert runs["wrong"] == runs["raises"] == 0
    assert runs["ours"] > 3
    assert [row["over"] for row in found["ratios"]] == ["unlike"]  # no fastest peer: nobody passed


def test_a_counted_candidate_must_have_a_check():
    with pytest.raises(ValueError, match="needs a check"):
        Candidate("fast", lambda: None, "peer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tolerance_is_of_the_largest_element(dtype):
    right = {"output": torch.tensor([100.0, 0.0], dtype=torch.float64)}
    bound = 100 * TOLERANCE[dtype]
    assert difference({"output": torch.tensor([100.0, 0.9 * bound])}, right, dtype) is None
    assert difference({"output": torch.tensor([100.0, 1.1 * bound])}, right, dtype).startswith("output is off")
    assert difference({}, right, dtype) == "output has shape None, not [2]"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rounding_changes_the_choice_of_a_token(dtype):
    p = problem(dtype=dtype, sizes=Sizes(300, 16, 8, 32, 3), batches=2)
    batches = list(islice(p.stream, 4))
    assert batches[0] is batches[2]
    for x in batches[:2]:
        logits = x.double() @ p.router.double().T
        assert torch.equal(p.router, p.router.to(dtype).float())
        rounded = torch.nn.functional.linear(x, p.router.to(dtype)).double()
        assert torch.equal(logits.topk(3).indices.sort().values, rounded.topk(3).indices.sort().values)
