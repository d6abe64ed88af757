"""On a CUDA device: every dispatch equals the float64 loop on the CPU, compiled and not; results do not vary.

All tables, what stands around a layer, and how often the host waits, which torch itself counts here; what needs no
device for that is in tests/test_device.py.
"""

import copy
import socket
import warnings

import pytest
import torch
from seeds import shifted
from small_parts import make_regularizer
from torch import nn

from spectralmoe import (
    Balanced,
    Capacity,
    EigenbasisScorer,
    ExpertChoice,
    FeedForward,
    LinearScorer,
    MoE,
    PrototypeScorer,
    Router,
    Soft,
    Term,
    TopK,
    TopP,
    after_step,
    feed,
    penalty,
    record,
)
from spectralmoe.adaptation import Guard, adapt_one
from spectralmoe.dispatch import Grouped
from spectralmoe.models import language_moe
from spectralmoe.parallel import parallelize_experts
from spectralmoe.regularizers import load_balance, spectral_norm, stable_rank
from spectralmoe.units import Sample

pytestmark = pytest.mark.gpu

SELECTORS = {
    "top2": lambda: TopK(2),
    "soft": Soft,
    "expert_choice": lambda: ExpertChoice(2.0),
    "topp": lambda: TopP(0.5),
    "capacity": lambda: Capacity(TopK(2), 1.0),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}


def layer(selector, dispatch, hidden=32):
    torch.manual_seed(shifted(0))
    return MoE(
        Router(LinearScorer(16, 8), SELECTORS[selector]()), FeedForward(8, 16, hidden, bias=True), dispatch=dispatch
    )


def results(module, x):
    """Output and all gradients, float64 on the CPU."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view_as(y)).sum().backward()
    found = {"y": y, "x": x.grad} | {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {name: value.detach().double().cpu() for name, value in found.items()}


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp_min(1)
        assert (found[name] - value).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("hidden", [32, 30])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("dispatch", ["auto", "dense", "grouped"])
@pytest.mark.parametrize("selector", SELECTORS)
def test_dispatch_equals_the_loop(selector, dispatch, dtype, hidden):
    x = torch.randn(100, 16).to(dtype)
    expected = results(layer(selector, "loop", hidden).double(), x.double())
    module = layer(selector, dispatch, hidden).to("cuda", dtype)
    routed = module.router(x.cuda()).indices.cpu()
    if not torch.equal(routed, layer(selector, "loop", hidden).double().router(x.double()).indices):
        pytest.skip("a tie was broken differently")
    assert_close(results(module, x.cuda()), expected, TOLERANCE[dtype] * (4 if dtype == torch.bfloat16 else 1))


@pytest.mark.parametrize("hidden", [32, 30])
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_compiled_equals_eager(selector, hidden, autocast):
    module = layer(selector, "auto", hidden).cuda()
    x = torch.randn(100, 16, device="cuda")
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        expected, found = results(module, x), results(compiled, x)
    found = {name.removeprefix("_orig_mod."): value for name, value in found.items()}
    assert_close(found, expected, 2e-2 if autocast else 1e-4)


def test_two_runs_give_the_same_bits():
    module = layer("top2", "grouped").cuda()
    x = torch.randn(4096, 16, device="cuda")
    first, second = results(module, x), results(module, x)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "scorer", [PrototypeScorer, lambda d, e: EigenbasisScorer(d, e, rank=8)], ids=["proto", "eigen"]
)
def test_a_training_step_with_terms(scorer):
    module = MoE(Router(scorer(16, 8), Balanced(2, score="softmax")), FeedForward(8, 16, 32)).to("cuda", torch.bfloat16)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    terms = {"s": Term(spectral_norm, 1.0), "r": Term(stable_rank, 1.0), "b": Term(load_balance, 1.0)}
    for _ in range(3):
        with record(module) as tape:
            y = module(torch.randn(64, 16, device="cuda", dtype=torch.bfloat16))
        extra, _ = penalty(tape, terms)
        (y.square().mean() + extra).backward()
        optimizer.step()
        after_step(module, tape)
    assert y.dtype == torch.bfloat16
    assert {p.dtype for p in module.router.parameters()} == {torch.float32}
    assert module.router.selector.bias.abs().max() > 0
    basis = getattr(module.router.scorer, "basis", None)
    if basis is not None:
        assert (basis.T @ basis - torch.eye(8, device="cuda")).abs().max() < 1e-5


def on_both(module):
    """The module in float64, and a copy of it on the device: there no choice is another one by rounding."""
    module = module.double()
    return module, copy.deepcopy(module).cuda()


def test_every_router(make_router, scorer_name, selector_name):
    torch.manual_seed(shifted(0))
    bank = FeedForward(8, 16, 32)
    layer, there = on_both(MoE(make_router(scorer_name, selector_name, 16, 8), bank).eval())
    x = torch.randn(60, 16, dtype=torch.float64)
    mask = torch.arange(60) % 4 > 0
    for given in ({}, {"mask": mask}):
        routing = layer.router(x, **given)
        found = there.router(x.cuda(), **{name: value.cuda() for name, value in given.items()}, replay=routing.indices)
        expected = {"weights": routing.weights, "logits": routing.logits, "y": layer.eval()(x, **given)}
        y = Grouped()(x.cuda(), found, there.experts)
        results = {"weights": found.weights, "logits": found.logits, "y": y}
        assert {value.device.type for value in results.values()} == {"cuda"}
        assert_close({name: value.detach().cpu() for name, value in results.items()}, expected, 1e-8)


@pytest.mark.parametrize("dispatch", ["grouped", "dense", "recompute"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype)[6:])
def test_every_bank_equals_the_loop(make_bank, bank_name, dtype, dispatch):
    torch.manual_seed(shifted(0))
    bank = make_bank(bank_name, 16, 8)
    maps = bank.row_dims == 3
    layer = MoE(Router(LinearScorer(16, 8), TopK(2)), bank, unit=Sample() if maps else None).to("cuda", dtype)
    x = torch.randn(30, 16, *[3, 3][: 2 * maps], device="cuda").to(dtype)
    with torch.backends.cudnn.flags(allow_tf32=False):
        layer.dispatch = "loop"
        expected = results(layer, x)
        layer.dispatch = Grouped(recompute=True) if dispatch == "recompute" else dispatch
        assert_close(results(layer, x), expected, 4 * TOLERANCE[dtype])


class Two(nn.Module):
    """Two layers on the same tokens."""

    def __init__(self, one, two):
        super().__init__()
        self.one, self.two = one, two

    def forward(self, x):
        return self.two(self.one(x))


def test_every_term(regularizer_name):
    torch.manual_seed(shifted(0))
    term = Term(make_regularizer(regularizer_name), 1.0)
    layers = [MoE(Router(LinearScorer(16, 8), TopK(2)), FeedForward(8, 16, 32)) for _ in range(2)]
    pair, found = on_both(Two(*layers) if term.scope == "model" else layers[0]), []
    x = torch.randn(60, 16, dtype=torch.float64)
    for layer in pair:
        with record(layer, terms={"it": term}) as tape:
            layer(x.to(next(layer.parameters()).device))
        ((_, value),) = term.values(tape.records)
        value.backward()
        gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
        found.append({name: v.detach().double().cpu() for name, v in ({"value": value} | gradients).items()})
    assert_close(found[1], found[0], 1e-6)


def test_recorded_and_fed_it_is_what_it_is_on_a_cpu():
    here, there = on_both(layer("top2", "auto"))
    x, indices = torch.randn(40, 16, dtype=torch.float64), torch.randn(40, 8).argsort(-1)[:, :2]
    found = []
    for module in (here, there):
        device = module.experts.up.device
        with feed(module, indices={"": indices.to(device)}), record(module, keep=("hidden", "output")) as tape:
            y = module(x.to(device))
        with feed(module, replay=tape):
            assert torch.equal(module(x.to(device)), y)
        values = {"y": y, "hidden": tape[0].tensor("hidden"), "load": tape[0].routing.load()}
        found.append({name: value.detach().cpu() for name, value in values.items()})
    assert_close(found[1], found[0], 1e-10)


@pytest.mark.parametrize("method", ["sgd", "margin", "null_space", "low_rank", "unit"])
def test_a_correction_says_what_it_did(method):
    torch.manual_seed(shifted(0))
    bank = FeedForward(8, 16, 8, bias=True, spare=4)
    model = nn.Sequential(nn.Linear(5, 16), MoE(Router(LinearScorer(16, 8), TopK(2)), bank), nn.Linear(16, 3))
    model = model.cuda().eval()
    x, known = torch.randn(1, 5, device="cuda"), torch.randn(50, 5, device="cuda")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wanted = model(x).argsort(-1)[:, -2]
    update = adapt_one(model, x, wanted, method=method, guard=Guard([(known, model(known).argmax(-1))]))
    assert update.verdict.samples == 50
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all(name.startswith("1.experts.") for name in changed)


def waits_of(function):
    """How often the host waited for the device in ``function``."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("selector", SELECTORS)
def test_the_host_waits_no_more_than_it_says(selector, dtype):
    module = layer(selector, "auto").to("cuda", dtype)
    x = torch.randn(100, 16, device="cuda", dtype=dtype)
    results(module, x)  # what a first call sets up
    forward = waits_of(lambda: module(x))
    y = module(x)
    assert forward <= 1
    if selector == "soft" or (selector == "top2" and dtype == torch.bfloat16):
        assert forward == 0
    assert waits_of(lambda: y.sum().backward()) == 0


def test_a_network_learns_under_autocast():
    torch.manual_seed(shifted(0))
    network = language_moe(20, width=32, depth=2, heads=2, num_experts=4, hidden=16).cuda()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    text, losses = torch.arange(64, device="cuda").view(4, 16) % 20, []
    for _ in range(30):
        with torch.autocast("cuda", torch.bfloat16), record(network) as tape:
            logits = network(text[:, :-1])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after_step(network, tape)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


@pytest.fixture
def alone():
    """A process group of this process alone, over NCCL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group("nccl", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cuda", (1,), mesh_dim_names=("ep",))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("selector", ["top2", "capacity"])
def test_experts_of_one_device_in_parallel(selector, dtype, alone):
    model = nn.Sequential(layer(selector, "auto").to("cuda", dtype))
    x = torch.randn(100, 16, device="cuda", dtype=dtype)
    expected = model(x)
    parallelize_experts(model, alone)
    y = model(x)
    y.square().mean().backward()
    assert_close({"y": y.detach()}, {"y": expected.detach()}, TOLERANCE[dtype])
    with record(model, keep=("hidden",)) as tape:
        assert_close({"y": model(x).detach()}, {"y": expected.detach()}, TOLERANCE[dtype])
    assert tape[0].tensor("hidden").is_cuda
