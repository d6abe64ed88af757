"""Optimizers and schedules by name: each trains, and a resumed run ends with the bits of one that was never stopped."""

from __future__ import annotations

import math

import pytest
import torch
from grids import first_of
from torch.optim import Optimizer

from spectralmoe import param_groups
from spectralmoe.data.image_data import ImageData, load_data
from spectralmoe.optim import OPTIMIZERS, SCHEDULES, make_optimizer
from spectralmoe.optim.table import read_optimizer
from spectralmoe.training import loop
from spectralmoe.training.checkpoint import load_checkpoint, save_checkpoint
from spectralmoe.training.loop import train
from spectralmoe.training.network import build_network
from spectralmoe.training.settings import Network, Optimization, parse
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks import ImageTask

SMALL = Network(width=16, num_experts=4, hidden=8, k=2)
LR = {"adamw": 3e-3, "sgd": 0.1, "muon": 3e-3}


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data("digits").subset(300)


def network(data, seed=0, router="sr-moe"):
    return build_network(data, SMALL, router, 1, seed=seed)


def bits(model):
    return [value.numpy().tobytes() for value in model.state_dict().values()]


class Phased(Optimizer):
    """Plain steps in one phase, half steps along a running mean in the other; keeps both kinds of state."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        own = self.state["phases"]
        own["steps"] = own.get("steps", 0) + 1
        own["norms"] = [*own.get("norms", []), float(self.param_groups[0]["lr"])][-3:]
        own["orthogonal"] = own["steps"] % 5 < 2
        own["total"] = own.get("total", torch.zeros(2)) + torch.tensor([1.0, own["norms"][-1]])
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["calls"] = state.get("calls", 0) + 1
                    state["mean"] = 0.5 * state.get("mean", torch.zeros_like(parameter)) + 0.5 * parameter.grad
                    move = 0.5 * state["mean"] if own["orthogonal"] else parameter.grad / state["calls"]
                    parameter.sub_(group["lr"] * (move + 1e-3 * own["total"][1] * parameter))


def phased(model, settings):
    return Phased(param_groups(model, settings.weight_decay), settings.lr)


def halves(done, steps):
    return 0.5 if 2 * done < steps else 0.25


class Stop(Exception):
    pass


OWN = (f"{__name__}:phased", f"{__name__}:halves")
CASES = [  # stopped after 7 steps: in a gathering and in a projecting phase
    ("adamw", "cosine", {"type": "orthogonal_experts", "phase": 3}),
    ("muon", "cosine", {"type": "orthogonal_experts", "phase": 4, "on": "update", "rank": 3}),
    (*OWN, None),
    ("muon", "cosine", {"type": f"{__name__}:gentle", "share": 0.5}),
    *[(name, schedule, None) for name in OPTIMIZERS for schedule in SCHEDULES][::2],
]


def gentle(model, settings, *, share):
    return torch.optim.AdamW(param_groups(model, settings.weight_decay), lr=share * settings.lr)


@pytest.mark.parametrize(
    "case", first_of(5, CASES), ids=lambda case: "-".join(str(v).rpartition(":")[2][:30] for v in case)
)
def test_each_trains_and_resumes_to_the_same_bits(data, case, tmp_path, monkeypatch):
    optimizer, schedule, row = case
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", 0.0)  # a checkpoint after every step
    budget = Optimization(
        optimizer=optimizer, schedule=schedule, epochs=4, batch_size=64, lr=LR.get(optimizer, 0.1), seed=3
    )
    undisturbed = network(data)
    epochs = train(undisturbed, ImageTask(data), budget, optimizer=row).epochs
    assert epochs[-1]["loss"] < epochs[0]["loss"] - 0.1
    calls, path = 0, tmp_path / "training.safetensors"

    def stop(share: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise Stop

    with pytest.raises(Stop):
        train(network(data), ImageTask(data), budget, optimizer=row, checkpoint=path, progress=stop)
    torch.manual_seed(99)
    resumed = network(data, seed=77)  # other initial weights: all must come from the file
    train(resumed, ImageTask(data), budget, optimizer=row, checkpoint=path)
    assert bits(resumed) == bits(undisturbed)


def test_a_checkpoint_keeps_every_kind_of_state(data, tmp_path):
    model, path = network(data), tmp_path / "training.safetensors"
    optimizer = phased(model, Optimization())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(7):
        optimizer.step()
    save_checkpoint(path, model, optimizer, {"epoch": 1})
    again = phased(model, Optimization())
    assert load_checkpoint(path, model, again)["epoch"] == 1
    kept, loaded = optimizer.state["phases"], again.state["phases"]
    assert {**kept, "total": None} == {**loaded, "total": None}
    assert (loaded["steps"], loaded["orthogonal"], type(loaded["orthogonal"])) == (7, False, bool)
    assert torch.equal(kept["total"], loaded["total"])
    for parameter in model.parameters():
        assert again.state[parameter]["calls"] == 7
        assert torch.equal(again.state[parameter]["mean"], optimizer.state[parameter]["mean"])


@pytest.mark.parametrize(
    "value", [{1, 2}, (1, 2), {"inside": torch.ones(1)}, object()], ids=["set", "tuple", "tensor", "object"]
)
def test_state_that_a_checkpoint_cannot_keep_is_named(data, value, tmp_path, user_error):
    model = network(data)
    optimizer = phased(model, Optimization())
    optimizer.state["phases"]["odd"] = value
    with user_error("'odd'", type(value).__name__, "JSON"):
        save_checkpoint(tmp_path / "training.safetensors", model, optimizer, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", [1, 7, 40])
def test_schedules_by_hand(steps):
    for done in range(steps):
        assert SCHEDULES["cosine"](done, steps) * 3e-3 == 3e-3 * 0.5 * (1 + math.cos(math.pi * done / steps))
        assert SCHEDULES["linear"](done, steps) == pytest.approx((steps - done) / steps)
        assert SCHEDULES["constant"](done, steps) == 1
    assert all(0 <= schedule(done, steps) <= 1 for schedule in SCHEDULES.values() for done in range(steps))


def two_rates(model, settings):
    first, *others = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD([{"params": [first], "lr": 2 * settings.lr}, {"params": others}], lr=settings.lr)


def test_a_schedule_scales_the_rate_of_each_group(data, monkeypatch):
    rates, step = [], torch.optim.SGD.step

    def spy(self, *args, **kwargs):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    wanted = {"optimizer": f"{__name__}:two_rates", "schedule": "linear", "warmup": 0.5}
    train(network(data), ImageTask(data), Optimization(epochs=2, batch_size=60, lr=0.01, **wanted))
    half = math.ceil(len(data.train) / 60)
    factors = [(i + 1) / (half + 1) for i in range(half)] + [1 - i / half for i in range(half)]
    assert rates == [[pytest.approx(0.02 * f), pytest.approx(0.01 * f)] for f in factors]


def broken(model, settings):
    raise RuntimeError("no such thing.\nsecond line")


def nothing(model, settings):
    return None


def test_mistakes_are_named(data, user_error):
    model = network(data)
    for kind, name, words in (
        ("optimizer", "muno", ("did you mean 'muon'", "adamw")),
        ("schedule", "cosin", ("did you mean 'cosine'", "linear")),
    ):
        with user_error("F.toml", f"optimization.{kind}", f"unknown {kind} {name!r}", *words):
            parse(TrainSettings, {"data": "digits", "optimization": {kind: name}}, "F.toml")
    for name, words in (
        ("muno", ("did you mean 'muon'", "pkg:factory")),
        (f"{__name__}:missing", ("'missing'",)),
        ("nowhere_at_all:factory", ("cannot import",)),
        (f"{__name__}:LR", ("no function",)),
        (f"{__name__}:broken", ("no such thing",)),
        (f"{__name__}:nothing", ("NoneType", "not a torch optimizer")),
    ):
        with user_error(*words):
            make_optimizer(name, model, Optimization())
    for row, words in (
        (3, ("neither a name nor a table",)),
        ({"phase": 3}, ("neither a name nor a table", "orthogonal_experts")),
        ("orthogonal", ("did you mean 'orthogonal_experts'",)),
        ({"type": "orthogonal_experts", "phases": 3}, ("phases", "did you mean 'phase'")),
        ({"type": "muon", "lr": 0.1}, ("unknown argument of 'muon' 'lr'",)),
        ({"type": f"{__name__}:gentle"}, ("needs the argument 'share'",)),
    ):
        with user_error(*words):
            read_optimizer(row)
    with user_error("'orthogonal_experts' fails", "(optimizer, model)", "not supported"):
        make_optimizer("sgd", model, Optimization(), row={"type": "orthogonal_experts", "alpha": "3"})
