"""On a device: every tensor is there, the host waits where it says so and nowhere else; shown without a device.

A stand-in (tests/stand_in.py) has values and gradients, and writes down each wait; torch's own fake tensors refuse what
the host would have to know.
"""

from __future__ import annotations

import copy

import pytest
import torch
from seeds import shifted
from small_parts import make_regularizer
from stand_in import CUDA, OnDevice, StandIn, inside, on_stand_in, run_backward
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from spectralmoe import (
    BasisScorer,
    Capacity,
    Context,
    ContextScorer,
    EigenExperts,
    FeedForward,
    Grouped,
    LinearScorer,
    MoE,
    Monitor,
    Placement,
    Router,
    Term,
    TopK,
    after_step,
    feed,
    record,
)
from spectralmoe.adaptation import Guard, adapt_one
from spectralmoe.models import language_moe, restoration_moe, signal_moe, sr_moe, views_moe
from spectralmoe.scorers import SpectrumScorer, StatisticsMemory
from spectralmoe.units import Sample

D, E, N = 16, 8, 9
MASK = torch.arange(N) % 3 > 0


@pytest.fixture
def device():
    with StandIn() as device:
        yield device


def there(x: torch.Tensor) -> OnDevice:
    return OnDevice(x.clone())


def backward(y):
    run_backward(y.float().square().sum())


def gradients_are_there(module):
    return all(isinstance(p.grad, OnDevice) for p in module.parameters() if p.grad is not None)


def on_both(layer, x, **given):
    """(output and gradient of x on the CPU, the same on the stand-in, waits of the forward, of the backward)."""
    results, twin = [], on_stand_in(copy.deepcopy(layer))
    with StandIn() as device:
        for module, move in ((layer, torch.clone), (twin, there)):
            rows = move(x).requires_grad_()
            torch.manual_seed(shifted(1))
            y = module(rows, **{name: move(value) for name, value in given.items()})
            forward = list(device.waits)
            backward(y)
            results.append((y, rows.grad))
    (y, d_x), (made, d_made) = results
    assert made.device == CUDA
    assert made.dtype == y.dtype
    assert gradients_are_there(twin)
    return (y, d_x), (inside(made), inside(d_made)), forward, device.waits[len(forward) :]


# The stand-in itself.


ASKS = {
    "item": lambda x: x[0].item(),
    "int": lambda x: int(x.sum()),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "equal": lambda x: torch.equal(x, x + 1),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "assign": lambda x: x.index_put_((x > 0,), x.new_ones(())),
    "repeat": lambda x: torch.repeat_interleave(x, x.abs().long()),
    "unique": lambda x: x.unique(),
    "to": lambda x: x.to("cpu"),
    "cpu": lambda x: x.cpu(),
    "from": lambda x: torch.ones(3).to("cuda"),
    "list": lambda x: torch.tensor([1.0], device="cuda"),
    "index": lambda x: x[[0, 2]],
}


@pytest.mark.parametrize("ask", ASKS)
def test_the_stand_in_notes_each_wait(device, ask):
    ASKS[ask](there(torch.tensor([2.0, -1.0, 3.0])))
    assert len(device.waits) == 1


def test_the_stand_in_refuses_a_tensor_that_is_elsewhere_and_knows_what_nobody_waits_for(device):
    x = there(torch.randn(3, 4))
    y = (x + 2).where(x > 0, 0).softmax(-1) @ torch.randn(4, 2, device="cuda")
    y = y.index_select(0, torch.arange(3, device=y.device)) + torch.ones(3, 1).to("cuda", non_blocking=True)
    assert (y.device, device.waits) == (CUDA, [])
    with pytest.raises(RuntimeError, match="one device"):
        y + torch.ones(3, 1)


# The contract grid.


FORMS = {"bf16": (torch.bfloat16, False), "fp32": (torch.float32, False), "masked": (torch.bfloat16, True)}
FORMS |= {"fp32-masked": (torch.float32, True)}


@pytest.mark.parametrize("form", ["bf16", *(pytest.param(name, marks=pytest.mark.full) for name in [*FORMS][1:])])
def test_a_layer_waits_once_at_most_and_never_where_its_slots_are_known(
    make_router, scorer_name, selector_name, form, close
):
    waits_as_known(make_router(scorer_name, selector_name, D, E), *FORMS[form], close)


@pytest.mark.parametrize("form", [*FORMS][1:])
def test_other_forms_with_each_selector(make_selector, selector_name, form, close):
    waits_as_known(Router(LinearScorer(D, E), make_selector(selector_name)), *FORMS[form], close)


def waits_as_known(router, dtype, masked, close):
    layer = MoE(router, FeedForward(E, D, 8)).to(dtype)
    given = {"mask": MASK} if masked else {}
    here, made, forward, behind = on_both(layer, torch.randn(N, D).to(dtype), **given)
    for one, two in zip(here, made, strict=True):
        close(two.float(), one.float(), dtype)
    known = router.soft or (router.fills and not masked and dtype == torch.bfloat16)
    assert len(forward) == (0 if known else 1), forward
    assert behind == []


def layer_of(make_bank, name):
    bank = make_bank(name, D, E)
    return MoE(Router(LinearScorer(D, E), TopK(2)), bank, unit=Sample() if bank.row_dims == 3 else None)


def rows_of(layer, n=N):
    return torch.randn(n, D, *[3] * ((layer.experts.row_dims or 1) - 1))


@pytest.mark.grid(dtype=[torch.float32, torch.bfloat16], n=[N, 0], recompute=[False, True])
def test_a_bank_waits_once_at_most(make_bank, bank_name, dtype, n, recompute, close):
    layer = layer_of(make_bank, bank_name).to(dtype)
    layer.dispatch = Grouped(recompute=recompute)
    x = rows_of(layer, n).to(dtype)
    here, made, forward, behind = on_both(layer, x)
    for one, two in zip(here, made, strict=True):
        close(two.float(), one.float(), dtype)
    assert len(forward) == layer.experts.reads_loads(there(x)), forward
    assert behind == []


def test_recording_waits_no_more_than_the_layer(make_bank, bank_name, device):
    layer = layer_of(make_bank, bank_name)
    x, counts = rows_of(layer), torch.zeros(E, dtype=torch.int64)
    unknown = {"hidden"} if layer.experts.hidden(x[:0], counts) is None else set()
    layer = on_stand_in(layer)
    with record(layer, keep=tuple(sorted(set(layer.keepable) - unknown))) as tape:
        y = layer(there(x))
    assert len(device.waits) <= 1, device.waits
    backward(y)
    after_step(layer, tape)
    kept = [tape[0].tensor(name) for name in layer.keepable if name not in unknown]
    assert all(isinstance(values, OnDevice) for values in kept)


KNOWN = {
    "bias": lambda: MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 8, bias=True)),
    "swiglu": lambda: MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 8, activation="swiglu")),
    "shared": lambda: MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 8), shared=nn.Linear(D, D)),
    "placement": lambda: MoE(
        Router(LinearScorer(D, 3), TopK(2)), FeedForward(4, D, 8), placement=Placement([[0], [1, 2], [3]])
    ),
    "memory": lambda: MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 8), memory=StatisticsMemory(D)),
}
UNKNOWN = {
    "zero-experts": lambda: MoE(Router(LinearScorer(D, E + 2), TopK(2)), FeedForward(E, D, 8)),
    "capacity": lambda: MoE(Router(LinearScorer(D, E), Capacity(TopK(2), 1.0)), FeedForward(E, D, 8)),
    "zero-expert-of-a-placement": lambda: MoE(
        Router(LinearScorer(D, 3), TopK(2)), FeedForward(2, D, 8), placement=Placement([[0], [], [1]])
    ),
}


@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_other_forms_of_a_layer(name, close):
    layer = (KNOWN | UNKNOWN)[name]().bfloat16()
    here, made, forward, behind = on_both(layer, torch.randn(N, D).bfloat16())
    for one, two in zip(here, made, strict=True):
        close(two.float(), one.float(), torch.bfloat16)
    assert len(forward) == (name in UNKNOWN), forward
    assert behind == []


class Two(nn.Module):
    """Two layers on the same tokens."""

    def __init__(self, one, two):
        super().__init__()
        self.one, self.two = one, two

    def forward(self, x, mask=None):
        return self.two(self.one(x, mask=mask), mask=mask)


@pytest.mark.grid(masked=[False, True])
def test_a_term_waits_once_at_most(regularizer_name, masked, device):
    term = Term(make_regularizer(regularizer_name), 1.0)
    layers = [MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 8)) for _ in range(2)]
    layer = on_stand_in(Two(*layers) if term.scope == "model" else layers[0])
    with record(layer, terms={"it": term}) as tape:
        layer(there(torch.randn(N, D)), mask=there(MASK) if masked else None)
    device.waits.clear()
    ((_, value),) = term.values(tape.records)
    run_backward(value)
    assert len(device.waits) <= 1, device.waits
    assert (value.device, value.dtype) == (CUDA, torch.float32)
    assert gradients_are_there(layer)


def step(router, device):
    """The waits of what is done after the second step of a layer."""
    layer = on_stand_in(MoE(router, FeedForward(E, D, 8)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        with record(layer) as tape:
            backward(layer(there(torch.randn(N, D))))
        optimizer.step()
        device.waits.clear()
        after_step(layer, tape)
    assert all(isinstance(x, OnDevice) for x in (*layer.parameters(), *layer.buffers()))
    return device.waits


def test_after_a_step_a_scorer_asks_little(make_scorer, scorer_name, device):
    waits = step(Router(make_scorer(scorer_name, D, E), TopK(2)), device)
    assert len(waits) <= 3, waits  # running statistics: whether they have begun, twice, and whether to take these


def test_after_a_step_a_selector_asks_once_at_most(make_selector, selector_name, device):
    waits = step(Router(LinearScorer(D, E), make_selector(selector_name)), device)
    assert len(waits) <= (selector_name == "soft_balanced"), waits


# What stands around a layer.


def test_feed_and_replay(device, close):
    layer = MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 8))
    x, indices = torch.randn(N, D), torch.randn(N, E).argsort(-1)[:, :2]
    with feed(layer, indices={"": indices}, mask=MASK):
        expected = layer(x)
    layer = on_stand_in(layer)
    with feed(layer, indices={"": there(indices)}, mask=there(MASK)), record(layer) as tape:
        close(inside(layer(there(x))), expected)
    device.waits.clear()
    with feed(layer, replay=tape):
        close(inside(layer(there(x))), expected)
    assert len(device.waits) == 1, device.waits


def test_a_monitor_adds_no_wait_to_most_steps(device):
    model = on_stand_in(nn.Sequential(MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 8))))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Monitor(model)
    for _ in range(3):
        backward(model(there(torch.randn(N, D))))
        optimizer.step()
    assert len(device.waits) == 3, device.waits  # of the layer itself


@pytest.mark.full
@pytest.mark.parametrize("method", ["sgd", "null_space"])
def test_a_correction(method, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.get_rng_state())
    bank = FeedForward(E, D, 8, bias=True, spare=4)
    model = nn.Sequential(nn.Linear(5, D), MoE(Router(LinearScorer(D, E), TopK(2)), bank), nn.Linear(D, 3))
    model = on_stand_in(model.eval())
    x, known = there(torch.randn(1, 5)), there(torch.randn(20, 5))
    wanted = model(x).argmin(-1)
    update = adapt_one(model, x, wanted, method=method, guard=Guard([(known, model(known).argmax(-1))]))
    assert update.verdict.samples == 20


def context_layer():
    return MoE(Router(ContextScorer(D, 4, width=3, hidden=4), TopK(1)), FeedForward(4, D, 8))


def basis_layer():
    scorer = BasisScorer(D, 4, bank=EigenExperts(4, D, 3), score="energy")
    return MoE(Router(scorer, TopK(2)), scorer.bank)


NETWORKS = {
    "context": (context_layer, lambda: {"context": Context(samples={"severity": there(torch.rand(2, 3))})}, (2, 5, D)),
    "spectrum": (
        lambda: MoE(Router(SpectrumScorer(D, 4), TopK(1)), FeedForward(4, D, 8)),
        lambda: {"context": Context(tokens={"map": there(torch.randn(N, 2, 16))})},
        (N, D),
    ),
    "basis": (basis_layer, dict, (N, D)),
    "language": (lambda: language_moe(20, width=16, depth=1, heads=2, num_experts=4, hidden=8), dict, None),
    "sr_moe": (lambda: sr_moe(5, width=16, depth=1, num_experts=4, hidden=8), dict, (3, 1, 28, 28)),
    "signal": (lambda: signal_moe(3, width=8), dict, (3, 128)),
    "restoration": (lambda: restoration_moe(width=8, hidden=8, stem=4), dict, (2, 3, 16, 16)),
    "views": (
        lambda: views_moe(
            3, (4, 5), router=lambda d, e: Router(LinearScorer(d, e), TopK(2)), width=8, heads=2, depth=1, keep=1
        ),
        dict,
        (N, 11),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_and_gates_with_side_information(name, device):
    make, given, shape = NETWORKS[name]
    network = on_stand_in(make())
    y = network(there(torch.randint(20, (2, 7)) if shape is None else torch.rand(shape)), **given())
    assert (y.device, y.dtype) == (CUDA, torch.float32)
    backward(y)
    assert gradients_are_there(network)
    assert len(device.waits) == 1, device.waits  # one layer, in fp32


# Torch's fake tensors.


def fake(module):
    """``module`` with fake CUDA tensors in the place of its own; inside a ``FakeTensorMode``."""
    for part in module.modules():
        for kept in (part._parameters, part._buffers):
            for name, x in kept.items():
                if x is not None:
                    new = torch.empty(x.shape, dtype=x.dtype, device="cuda")
                    kept[name] = nn.Parameter(new, x.requires_grad) if isinstance(x, nn.Parameter) else new
    return module


@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.full)])
@torch.no_grad()
def test_fake_tensors_run_through_where_slots_are_known_and_ask_where_not(
    make_router, scorer_name, selector_name, masked
):
    layer = MoE(make_router(scorer_name, selector_name, D, E), FeedForward(E, D, 8)).bfloat16()
    known = layer.router.soft or (layer.router.fills and not masked)
    with FakeTensorMode():
        layer, x = fake(layer), torch.empty(N, D, dtype=torch.bfloat16, device="cuda")
        mask = torch.empty(N, dtype=torch.bool, device="cuda") if masked else None
        routing = layer.router(x, mask=mask)
        assert {value.device for value in (routing.logits, routing.weights, routing.indices)} == {CUDA}
        if known:
            y = layer(x, mask=mask)
            assert (y.device, y.dtype, y.shape) == (CUDA, torch.bfloat16, x.shape)
        else:
            with pytest.raises(DataDependentOutputException):
                layer(x, mask=mask)


@torch.no_grad()
def test_every_bank_makes_its_tensors_on_a_fake_device(make_bank, bank_name):
    layer = layer_of(make_bank, bank_name).bfloat16()
    x = rows_of(layer)
    with FakeTensorMode():
        layer, x = fake(layer), torch.empty(x.shape, dtype=torch.bfloat16, device="cuda")
        weights = torch.empty(N, E, dtype=torch.bfloat16, device="cuda")
        for y in (layer.experts.mix(x, weights), layer.experts.expert(x, 1)):
            assert (y.device, y.dtype, y.shape) == (CUDA, torch.bfloat16, x.shape)
        try:
            assert layer(x).device == CUDA
        except DataDependentOutputException:
            assert layer.experts.reads_loads(x)
