"""OMoE: the closed form is the recursion, steps avoid what the others saw, and it works wherever an optimizer does."""

from __future__ import annotations

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils.checkpoint import checkpoint

from spectralmoe import (
    Balanced,
    Capacity,
    EigenExperts,
    FeedForward,
    LinearScorer,
    MoE,
    Placement,
    Router,
    Soft,
    TopK,
    UserError,
    attach,
    record,
)
from spectralmoe.experts import Adapter, ConfidentExperts
from spectralmoe.optim import Muon, OrthogonalExperts, Together, make_optimizer
from spectralmoe.optim.orthogonal_experts import STATE
from spectralmoe.optim.projectors import add_inputs, others, projected, projectors

E, D, H = 3, 6, 4
WIDE = torch.float64


def layer(num_experts=E, *, selector=None, dtype=WIDE, bank=FeedForward, dim=D):
    """A layer whose router stays as it is, so that tokens go the same way after any step."""
    made = MoE(Router(LinearScorer(dim, num_experts), selector or TopK(2)), bank(num_experts, dim, H)).to(dtype)
    made.router.requires_grad_(False)
    return made


def tokens(n=30, dtype=WIDE, dim=D):
    return (torch.randn(n, dim, dtype=WIDE) + torch.linspace(-1, 2, dim, dtype=WIDE)).to(dtype)


def seen(model, x, mask=None):
    """What each expert got of the tokens x, as one list an expert."""
    chosen = model.router(x, mask=mask).indices.tolist()
    return [[token for token, row in zip(x, chosen, strict=True) if e in row] for e in range(E)]


def sums_of(model, x, mask=None):
    bank = model.experts.num_experts
    sums = [torch.zeros(bank, D, D, dtype=x.dtype), torch.zeros(bank, D, dtype=x.dtype), torch.zeros(bank).long()]
    with record(model, keep="tokens") as tape:
        model(x, mask=mask)
    for item in tape:
        add_inputs(sums, item)
    return sums


def recursion(rows, alpha, center):
    """Orthogonal weight modification, one token after the other; alpha in units of tr(sum of x x') / D."""
    mean = torch.stack([x for row in rows for x in row]).mean(0) * center
    made = []
    for row in rows:
        inputs = [x - mean for x in row]
        unit, p = sum(float(x @ x) for x in inputs) / D, torch.eye(D, dtype=WIDE)
        for x in inputs:
            p = p - torch.outer(p @ x, x @ p) / (alpha * unit + x @ p @ x)
        made.append(p)
    return torch.stack(made)


def one_step(model, optimizer, *batches):
    """A step on the sum over batches; what the first matrices of the experts moved by."""
    start = model.experts.first_weight.detach().clone()
    optimizer.zero_grad()
    for x in batches:
        model(x).square().sum().backward()
    optimizer.step()
    return model.experts.first_weight.detach() - start


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0])
def test_the_closed_form_is_the_recursion_in_any_order(alpha, center):
    model, x = layer(), tokens()
    made = projectors(*sums_of(model, x), alpha=alpha, center=center)
    for order in (torch.arange(30), torch.randperm(30)):
        torch.testing.assert_close(made, recursion(seen(model, x[order]), alpha, center), rtol=0, atol=1e-10)
    assert torch.equal(made, made.mT) or (made - made.mT).abs().max() < 1e-15
    values = torch.linalg.eigvalsh(made)
    assert values.min() > 0
    assert values.max() <= 1 + 1e-12


@pytest.mark.parametrize("match_norm", [True, False])
@pytest.mark.parametrize("on", ["gradient", "update"])
def test_steps_are_those_of_the_optimizer_and_then_projected(on, match_norm):
    model, batches = layer(), [tokens(), tokens(20), tokens(9)]
    twin = copy.deepcopy(model)
    optimizer, plain = (torch.optim.SGD(each.parameters(), lr=1e-3, weight_decay=0.1) for each in (model, twin))
    OrthogonalExperts(optimizer, model, phase=2, alpha=0.3, on=on, match_norm=match_norm)
    for x in batches[:2], batches[2:]:  # the first of two micro-batches
        assert torch.equal(one_step(model, optimizer, *x), one_step(twin, plain, *x))
    made = recursion(seen(model, torch.cat(batches)), 0.3, center=True)
    for _ in range(2):
        up = twin.experts.up.detach().clone()
        free, moved = one_step(twin, plain, batches[0]), one_step(model, optimizer, batches[0])
        decay = -1e-3 * 0.1 * up * (on == "gradient")  # SGD adds it after the hook
        for e in range(E):
            step = (free - decay)[e] @ (made.sum(0) - made[e]) / (E - 1)
            step = step * (free - decay)[e].norm() / step.norm() if match_norm else step
            torch.testing.assert_close(moved[e], step + decay[e] if on == "gradient" else step, rtol=1e-9, atol=1e-15)
        twin.load_state_dict(model.state_dict())
    state = optimizer.state[STATE]
    assert state == {"steps": 0, "gathers": True}  # the next two begin anew
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(one_step(model, optimizer, batches[1]), one_step(twin, plain, batches[1]))


def test_what_was_seen_is_avoided_and_the_rest_is_free():
    model, x = layer(selector=TopK(1)), tokens(4)
    sums, rows = sums_of(model, x), seen(model, x)
    alpha = 1e-9
    soft, hard = projectors(*sums, alpha=alpha, center=False), projectors(*sums, center=False, rank=4)
    rounding = D**2 * torch.finfo(torch.float64).eps / alpha  # D eps tr(C) of an eigenvalue 0, over alpha tr(C) / D
    for made in (soft, hard):
        for p, row in zip(made, rows, strict=True):
            assert all((p @ token).norm() < 1e-6 * token.norm() for token in row)
            free = D - len(row)
            assert torch.linalg.eigvalsh(p)[-free:].min() > 1 - rounding
    torch.testing.assert_close(hard @ hard, hard)
    assert any(not row for row in rows) or len(rows) == E


def test_by_hand():
    """Expert 0 saw e_1, expert 1 saw e_2 twice, expert 2 nothing; alpha = 1/2 of a mean eigenvalue of 1/2."""
    outer, total = torch.zeros(3, 2, 2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    outer[0, 0, 0], outer[1, 1, 1] = 1.0, 2.0
    made = projectors(outer, total, torch.tensor([1, 2, 0]), alpha=0.5, center=False)
    want = [torch.diag(torch.tensor(row)) for row in ([0.2, 1.0], [1.0, 0.2], [1.0, 1.0])]
    torch.testing.assert_close(made, torch.stack(want))
    torch.testing.assert_close(others(made)[2], torch.diag(torch.tensor([0.6, 0.6])))
    step = projected(torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]], [[0.0, 0.0]]]), others(made), match_norm=False)
    torch.testing.assert_close(step, torch.tensor([[[1.0, 0.0]], [[1.8, 4.0]], [[0.0, 0.0]]]))
    kept = projected(torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]], [[0.0, 0.0]]]), others(made), match_norm=True)
    torch.testing.assert_close(kept[1].norm(), torch.tensor(5.0))
    assert not kept[2].any()


@pytest.mark.parametrize("match_norm", [True, False])
def test_nothing_moves_where_the_others_saw_every_direction(match_norm):
    made = projectors(*sums_of(layer(selector=Soft()), tokens()), alpha=1e-13, center=False)
    step = torch.randn(E, H, D, dtype=WIDE)
    assert projected(step, others(made), match_norm=match_norm).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, WIDE])
def test_inputs_that_are_their_mean_protect_nothing(dtype):
    x = tokens(1, dtype).expand(30, D)
    made = projectors(*sums_of(layer(dtype=dtype), x), alpha=1e-3)
    torch.testing.assert_close(made, torch.eye(D, dtype=dtype).expand(E, D, D))


@pytest.mark.parametrize("case", ["mask", "capacity", "soft", "zero experts", "none"])
def test_the_sums_are_over_what_the_experts_get(case):
    selector = {"capacity": Capacity(TopK(2), factor=0.5), "soft": Soft()}.get(case)
    model, x = layer(selector=selector), tokens(0 if case == "none" else 25)
    if case == "zero experts":
        model = MoE(Router(LinearScorer(D, E + 2), TopK(2)), FeedForward(E, D, H)).double()
    mask = torch.arange(25) % 3 > 0 if case == "mask" else None
    outer, total, count = sums_of(model, x, mask)
    with record(model, keep="input") as tape:
        model(x, mask=mask)
    blocks = tape[0].input.split(count.tolist())
    assert sum(map(len, blocks)) == len(tape[0].input)
    for e, block in enumerate(blocks):
        slow = sum((torch.outer(row, row) for row in block), torch.zeros(D, D, dtype=WIDE))
        torch.testing.assert_close(outer[e], slow)
        torch.testing.assert_close(total[e], block.sum(0))


def gathered(model, forward):
    """The sums after one step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    OrthogonalExperts(optimizer, model, phase=2)
    forward().float().square().sum().backward()
    optimizer.step()
    return [value for value in optimizer.state[STATE].values() if isinstance(value, torch.Tensor)]


def test_autocast_checkpoints_and_compiled_layers_gather_the_same(close):
    x, first = tokens(dtype=torch.float32), layer(dtype=torch.float32)
    want = sums_of(first, x)

    def autocast(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    forwards = {
        "autocast": autocast,
        "checkpoint": lambda model: checkpoint(model, x.clone().requires_grad_(), use_reentrant=False),
        "compiled": lambda model: torch.compile(model, backend="eager", fullgraph=True)(x),
    }
    for forward in forwards.values():
        model = copy.deepcopy(first)
        *got, count = gathered(model, lambda f=forward, m=model: f(m))
        assert torch.equal(count, want[2])
        close(got[0], want[0])
        close(got[1], want[1])


def test_tokens_that_are_not_finite_are_left_out():
    """As after an overflow in 16 bits, whose step a gradient scaler did not take."""
    model, x = layer(), tokens(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    OrthogonalExperts(optimizer, model, phase=2)
    broken = tokens(3)
    broken[0, 0], broken[1, 1] = torch.inf, torch.nan
    model(broken)
    model(x).sum().backward()
    optimizer.step()
    got = [optimizer.state[STATE][f".{key}"] for key in ("outer", "sum", "count")]
    for value, want in zip(got, sums_of(model, torch.cat([broken[2:], x])), strict=True):
        torch.testing.assert_close(value, want)
    one_step(model, optimizer, x)


def test_evaluation_gathers_nothing():
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    OrthogonalExperts(optimizer, model)
    model.eval()(tokens())
    optimizer.step()
    assert optimizer.state[STATE] == {"steps": 1, "gathers": True}


@pytest.mark.parametrize("bank", [FeedForward, Adapter, lambda *sizes: FeedForward(*sizes, activation="swiglu")])
def test_banks_and_precisions(bank):
    model, x = layer(bank=bank, dtype=torch.bfloat16), tokens(dtype=torch.bfloat16)
    model.experts = ConfidentExperts(model.experts).bfloat16()
    optimizer = Together(Muon([model.experts.first_weight], lr=1e-2), torch.optim.AdamW([model.experts.bias]))
    OrthogonalExperts(optimizer, model, phase=1)
    moved = [one_step(model, optimizer, x) for _ in range(2)]
    assert all(each.isfinite().all() and each.any() for each in moved)


def test_with_attach_every_part_still_moves():
    model = layer(selector=Balanced(2), dtype=torch.float32)
    model.router.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    OrthogonalExperts(optimizer, model, phase=1)
    attach(optimizer, model)
    for _ in range(2):
        one_step(model, optimizer, tokens(dtype=torch.float32))
    assert model.router.selector.bias.any()


def test_a_gradient_scaler_changes_nothing_and_a_step_left_out_counts_for_none():
    model = layer(dtype=torch.float32)
    twin, x = copy.deepcopy(model), tokens(dtype=torch.float32)
    optimizer, plain = (torch.optim.SGD(each.parameters(), lr=1e-3) for each in (model, twin))
    for each, of in ((optimizer, model), (plain, twin)):
        OrthogonalExperts(each, of, phase=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor, gathers in ((1.0, False), (torch.inf, False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale(factor * model(x).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.state[STATE]["gathers"] == gathers
    for _ in range(2):
        one_step(twin, plain, x)
    torch.testing.assert_close(model.experts.up, twin.experts.up)


@pytest.mark.parametrize("steps", range(1, 8, 2))
def test_it_goes_on_from_its_state(steps):
    """In an optimizer that stood somewhere else in its phases."""
    model, x = layer(), [tokens() for _ in range(12)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    OrthogonalExperts(optimizer, model, phase=3)
    for i in range(steps):
        one_step(model, optimizer, x[i])
    twin = layer()
    again = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    OrthogonalExperts(again, twin, phase=3)
    for i in range(8 - steps):
        one_step(twin, again, x[i])
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in range(steps, 12):
        assert torch.equal(one_step(model, optimizer, x[i]), one_step(twin, again, x[i]))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("steps", [0, 3, 5])
@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_distributed_checkpoints_keep_all_of_it(name, steps, tmp_path):
    """As part of the state of a parameter, read into the state of an optimizer that has made no step."""
    model, x = layer(dtype=torch.float32), [tokens(dtype=torch.float32) for _ in range(9)]
    twin = layer(dtype=torch.float32)
    optimizer, again = (make_optimizer(name, of, SimpleNamespace(lr=1e-2, weight_decay=0.1)) for of in (model, twin))
    for each, of in ((optimizer, model), (again, twin)):
        OrthogonalExperts(each, of, phase=2)
    for i in range(steps):
        one_step(model, optimizer, x[i])
    optimizer.zero_grad()
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path)
    read = {"optimizer": get_optimizer_state_dict(twin, again)}
    dcp.load(read, checkpoint_id=tmp_path)
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, again, read["optimizer"])
    assert all(again.state[STATE][key] == optimizer.state[STATE][key] for key in ("steps", "gathers"))
    for i in range(steps, 9):
        assert torch.equal(one_step(model, optimizer, x[i]), one_step(twin, again, x[i]))


def test_a_state_without_projectors_begins_anew():
    model, plain = layer(), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    optimizer = torch.optim.SGD([model.experts.up], lr=1.0)
    OrthogonalExperts(optimizer, model, phase=1)
    one_step(model, optimizer, tokens())
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.state[STATE] == {"steps": 0, "gathers": True}


@pytest.mark.parametrize(("made", "loaded", "steps"), [(1, 2, 1), (1, 2, 2), (2, 1, 2)])
def test_a_state_of_other_layers_is_refused(made, loaded, steps, user_error):
    """In either phase; while it gathers, layers may be missing that met no token."""
    optimizers = []
    for layers in (made, loaded):
        model = nn.Sequential(*(layer() for _ in range(layers)))
        optimizers.append(torch.optim.SGD(model.parameters(), lr=1e-3))
        OrthogonalExperts(optimizers[-1], model, phase=2)
        for _ in range(steps):
            model(tokens()).sum().backward()
            optimizers[-1].step()
    ours, theirs = (each.state_dict() for each in optimizers)
    names = {1: "'0'", 2: "'0', '1'"}
    with user_error(f"of layers {names[loaded]}, ", f"the trained ones are {names[made]}"):
        optimizers[0].load_state_dict({**ours, "state": theirs["state"]})


def test_removed_it_leaves_nothing():
    model = layer()
    twin = copy.deepcopy(model)
    optimizer, plain = (torch.optim.SGD(each.parameters(), lr=1e-3) for each in (model, twin))
    for phase in (1, 5):
        hooked = OrthogonalExperts(optimizer, model, phase=phase)
        assert model.watching
        one_step(model, optimizer, tokens())
        hooked.remove()
        assert not model.watching
        assert STATE not in optimizer.state
    twin.load_state_dict(model.state_dict())
    x = tokens()
    assert torch.equal(one_step(model, optimizer, x), one_step(twin, plain, x))


def test_it_ends_with_its_optimizer():
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    kept = OrthogonalExperts(optimizer, model)
    del optimizer
    gc.collect()
    assert not model.watching
    kept.remove()


def test_closures():
    model, x = layer(), tokens(600)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    hooked = OrthogonalExperts(optimizer, model, phase=1)
    for arguments, named in (((closure,), {}), ((), {"closure": closure})):
        with pytest.raises(UserError, match="within the step; use on="):
            optimizer.step(*arguments, **named)
    hooked.remove()
    OrthogonalExperts(optimizer, model, phase=1, on="update", alpha=1e-9, center=False, rank=None, match_norm=False)
    optimizer.step(closure)
    start = model.experts.up.detach().clone()
    optimizer.step(closure)
    assert (model.experts.up - start).abs().max() < 1e-6  # the tokens of each expert span all


def test_misuse_is_one_line(user_error):
    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=1e-3)

    model = layer()
    with user_error("takes a torch optimizer", "MoE"):
        OrthogonalExperts(model, sgd(model))
    with user_error("one expert", "no others"):
        OrthogonalExperts(sgd(one := layer(1, selector=TopK(1))), one)
    for wrong in ({"phase": 0}, {"phase": 1.5}, {"alpha": 0.0}, {"alpha": torch.nan}, {"rank": 0}):
        (name, value), *_ = wrong.items()
        with user_error(f"{name}={value}"):
            OrthogonalExperts(sgd(model), model, **wrong)
    with user_error("'updates'", "did you mean 'update'"):
        OrthogonalExperts(sgd(model), model, on="updates")
    with user_error(f"rank={D}", "no direction"):
        OrthogonalExperts(sgd(model), model, rank=D)
    eigen = MoE(Router(LinearScorer(D, E), TopK(1)), EigenExperts(E, D, 2))
    with user_error("EigenExperts", "FeedForward"):
        OrthogonalExperts(sgd(eigen), eigen)
    placed = MoE(Router(LinearScorer(D, 2), TopK(1)), FeedForward(E, D, H), placement=Placement([[0, 1], [2]]))
    with user_error("placement"):
        OrthogonalExperts(sgd(placed), placed)
    with user_error("not trained by this SGD"):
        OrthogonalExperts(torch.optim.SGD(model.router.parameters(), lr=1.0), model)
    optimizer = sgd(model)
    OrthogonalExperts(optimizer, model)
    with user_error("projectors already"):
        OrthogonalExperts(optimizer, model)
    for freeze in (lambda bank: bank, lambda bank: bank.first_weight):
        freeze((frozen := layer()).experts).requires_grad_(False)
        with user_error("no bank of experts is trained"):
            OrthogonalExperts(sgd(frozen), frozen)
