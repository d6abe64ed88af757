"""The work around an optimizer step: the same by hand and by hooks, whole and in micro-batches."""

from __future__ import annotations

import copy
import gc
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from spectralmoe import (
    Balanced,
    Capacity,
    EigenbasisScorer,
    FeedForward,
    LinearScorer,
    MoE,
    Monitor,
    PrincipalScorer,
    Router,
    Scorer,
    SoftBalanced,
    TopK,
    UserError,
    after_step,
    attach,
    feed,
    param_groups,
    record,
    retract,
    save,
)
from spectralmoe.manifold import off_manifold
from spectralmoe.models import sr_moe
from spectralmoe.regularizers import load_balance

N, D, E = 30, 8, 4


class Net(nn.Module):
    """Two balanced layers on eigenbases."""

    def __init__(self, dim=D):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.moes = nn.ModuleList(
            MoE(Router(EigenbasisScorer(dim, E, rank=4), Balanced(2, rate=0.01)), FeedForward(E, dim, 16))
            for _ in range(2)
        )

    def forward(self, x):
        x = self.linear(x)
        for moe in self.moes:
            x = x + moe(x)
        return x


def train(net, batches, *, hooked, micro=1):
    """SGD with momentum over the batches, each in ``micro`` equal parts."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    attachment = attach(optimizer, net) if hooked else None
    for x in batches:
        tapes = []
        for part in x.chunk(micro):
            if hooked:
                y = net(part)
            else:
                with record(net) as tape:
                    y = net(part)
                tapes.append(tape)
            (y.square().mean() / micro).backward()
        optimizer.step()
        if not hooked:
            after_step(net, *tapes)
        optimizer.zero_grad()
    if attachment is not None:
        attachment.remove()
    return optimizer


def same(one, two):
    assert one.state_dict().keys() == two.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


@pytest.mark.parametrize("micro", [1, 3])
def test_attach_equals_the_explicit_calls(micro):
    one = Net()
    two, batches = copy.deepcopy(one), torch.randn(5, N, D)
    train(one, batches, hooked=False, micro=micro)
    train(two, batches, hooked=True, micro=micro)
    same(one, two)
    assert one.moes[0].router.selector.bias.any()


def test_after_step_retracts_bases_and_moves_the_selection_bias(close):
    net, x = Net(), torch.randn(N, D)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    with record(net) as tape:
        net(x).square().sum().backward()
    before = [item.routing.indices.clone() for item in tape]
    optimizer.step()
    stepped = [moe.router.scorer.basis.detach().clone() for moe in net.moes]
    after_step(net, tape)
    for moe, raw, indices in zip(net.moes, stepped, before, strict=True):
        basis = moe.router.scorer.basis.detach()
        close(basis.T @ basis, torch.eye(4))
        triangle = basis.T @ raw  # QR with a positive diagonal
        close(basis @ triangle, raw)
        close(triangle.tril(-1), torch.zeros(4, 4))
        assert (triangle.diagonal() > 0).all()
        counts = [int((indices == e).sum()) for e in range(E)]
        want = [0.01 * ((sum(counts) > E * c) - (sum(counts) < E * c)) for c in counts]
        close(moe.router.selector.bias, want)


def test_counts_are_exact_where_floats_are_not():
    """2**24 + 1 slots for one expert and one less for the other: fp32 cannot tell them apart."""
    selector = Balanced(1, normalize=False)
    Router(LinearScorer(D, 2), selector)
    selector.update(torch.tensor([2**24 + 1, 2**24]))
    assert selector.bias.tolist() == pytest.approx([-1e-3, 1e-3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_micro_batches_count_as_one_batch(dtype):
    one = Net().to(dtype)
    two, x = copy.deepcopy(one), torch.randn(N, D, dtype=dtype)
    with record(one) as whole:
        one(x)
    tapes = []
    for part in x.split([17, 8, 5]):
        with record(two) as tape:
            two(part)
        tapes.append(tape)
    for i, item in enumerate(whole):
        counts = [tape[i].routing.counts() for tape in tapes]
        assert counts[0].dtype == torch.int64
        assert torch.equal(sum(counts), item.routing.counts())
    after_step(one, whole)
    after_step(two, *tapes)
    for a, b in zip(one.moes, two.moes, strict=True):
        assert a.router.selector.bias.dtype == torch.float32
        assert torch.equal(a.router.selector.bias, b.router.selector.bias)


@pytest.mark.parametrize("micro", [1, 3])
def test_evaluation_is_not_counted(monkeypatch, micro):
    net, x, counted = Net(), torch.randn(N, D), []
    for moe in net.moes:
        monkeypatch.setattr(moe.router.selector, "update", counted.append)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attach(optimizer, net)
    for part in x.chunk(micro):
        net.eval()(torch.randn(N, D))
        net.train()(part).square().mean().backward()
        net.eval()(torch.randn(N, D))
    want = [moe.router(h).counts() for moe, h in zip(net.moes, inputs(net, x), strict=True)]
    optimizer.step()
    assert [counts.tolist() for counts in counted] == [counts.tolist() for counts in want]
    assert counted[0].sum() == 2 * N


def inputs(net, x):
    """What each layer of ``net`` sees."""
    first = net.linear(x)
    return first, first + net.moes[0].eval()(first)


def test_remove_undoes_attach():
    net = Net()
    optimizer = train(net, torch.randn(1, N, D), hooked=True)
    bias = net.moes[0].router.selector.bias.clone()
    net(torch.randn(N, D)).square().sum().backward()
    optimizer.step()
    assert torch.equal(net.moes[0].router.selector.bias, bias)
    assert not any(moe.sinks for moe in net.moes)
    gram = net.moes[0].router.scorer.basis.T @ net.moes[0].router.scorer.basis
    assert not torch.allclose(gram, torch.eye(4), atol=1e-4)


def test_a_closure_counts_in_its_own_step():
    net, x = Net(), torch.randn(N, D)
    reference = copy.deepcopy(net)
    train(reference, x[None], hooked=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    attach(optimizer, net)

    def closure():
        loss = net(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    same(net, reference)


def test_a_copy_of_an_attached_model_is_free():
    net = Net()
    attach(torch.optim.SGD(net.parameters(), lr=0.1), net)
    net(torch.randn(N, D))
    assert not any(moe.sinks for moe in copy.deepcopy(net).moes)


# Parameter groups


class Curved(Scorer):
    """A scorer with a basis, a matrix, a vector, a scalar and a frozen matrix."""

    manifold = ("basis",)

    def __init__(self, dim, num_experts):
        super().__init__(dim, num_experts)
        self.basis = nn.Parameter(torch.eye(dim))
        self.keys = nn.Parameter(torch.randn(num_experts, dim))
        self.gain = nn.Parameter(torch.ones(dim))
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.ones(dim, dim), requires_grad=False)

    def forward(self, x, *, context=None):
        return self.scale * (x @ self.basis * self.gain) @ self.keys.T


def test_param_groups_exempt_bases_and_vectors():
    model = nn.Sequential(nn.Linear(D, D), MoE(Router(Curved(D, E), TopK(2)), FeedForward(E, D, 16)))
    decayed, exempt = param_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == [
        "0.weight",
        "1.router.scorer.keys",
        "1.experts.up",
        "1.experts.down",
    ]
    assert [names[id(p)] for p in exempt["params"]] == [
        "0.bias",
        "1.router.scorer.basis",
        "1.router.scorer.gain",
        "1.router.scorer.scale",
    ]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("tied", [False, True])
def test_param_groups_train_everything_once(tied):
    model = sr_moe(3, router=lambda dim, e: Router(EigenbasisScorer(dim, e, rank=4), TopK(2)))
    if tied:
        model.stages[1].moe.experts.up = model.stages[0].moe.experts.up
    groups = param_groups(model, 0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert len(set(grouped)) == len(grouped)
    torch.optim.AdamW(groups, lr=0.1)


def test_stacked_biases_are_not_decayed():
    layer = MoE(Router(LinearScorer(8, 4, bias=True), TopK(2)), FeedForward(4, 8, 16, bias=True))
    decayed, exempt = param_groups(layer, 0.1)
    assert {id(p) for p in decayed["params"]} == {
        id(p) for p in (layer.router.scorer.weight, layer.experts.up, layer.experts.down)
    }
    assert len(exempt["params"]) == 3


def test_tape_of_another_model_is_refused():
    first, second = (MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16)) for _ in range(2))
    with record(first) as tape:
        first(torch.randn(5, 8))
    with pytest.raises(UserError, match="another model"):
        after_step(second, tape)


# Replayed choices, frozen routers


def routed_layer(selector, scorer=None):
    return MoE(Router(scorer or LinearScorer(D, E), selector), FeedForward(E, D, 16))


SELECTORS = {
    "balanced": lambda: Balanced(2, rate=0.01),
    "soft": lambda: SoftBalanced(rate=0.05, memory=1.0),
    "capacity": lambda: Capacity(Balanced(2, rate=0.01), 2.0),
}


def bias_of(layer):
    selector = layer.router.selector
    return getattr(selector, "selector", selector).bias


@pytest.mark.parametrize("make", SELECTORS.values(), ids=SELECTORS.keys())
@pytest.mark.parametrize("hooked", [False, True])
def test_a_replayed_choice_moves_no_bias(make, hooked):
    """Nor does it beside free forwards of the same step: those alone count."""
    layer, x = routed_layer(make()), torch.randn(N, D)
    twin = copy.deepcopy(layer)
    with record(layer) as old:
        layer(x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    if hooked:
        attach(optimizer, layer)
    for _ in range(3):
        with feed(layer, replay=old), record(layer) as tape:
            layer(x).sum().backward()
        optimizer.step()
        if not hooked:
            after_step(layer, tape)
    assert not bias_of(layer).any()
    with record(twin) as alone:
        twin(x)
    after_step(twin, alone)
    with feed(layer, replay=old), record(layer) as replayed:
        layer(x).sum().backward()
    with record(layer) as free:
        layer(x).sum().backward()
    optimizer.step()
    if not hooked:
        after_step(layer, replayed, free)
    assert bias_of(layer).any()
    assert torch.equal(bias_of(layer), bias_of(twin))


def test_what_a_router_itself_decides_stands_beside_the_replayed_choice(close, gradients):
    """The balance loss and the monitor go by it: value and gradient are those of a free forward."""
    layer, x, mask = routed_layer(Capacity(TopK(2), 1.0)), torch.randn(N, D), torch.arange(N) % 5 != 0
    free = layer.router(x, mask=mask)
    forced = replace(free, indices=(free.indices + 1) % E)
    replayed = layer.router(x, mask=mask, replay=forced)
    assert torch.equal(replayed.indices, forced.indices.masked_fill(~mask[:, None], -1))
    assert torch.equal(replayed.live.indices, free.indices)
    close(replayed.live.weights, free.weights)
    assert replayed.asked is None
    assert free.live is None
    one, two = load_balance(free), load_balance(replayed)
    close(one, two)
    for first, second in zip(*(gradients(loss, layer.router.parameters()) for loss in (one, two)), strict=True):
        close(first, second)


def test_the_monitor_counts_what_the_router_itself_decides():
    layer, x, seen = routed_layer(TopK(2)), torch.randn(N, D), []
    with record(layer) as tape:
        layer(x)
    with torch.no_grad():
        layer.router.scorer.weight.neg_()
    for replay in (None, tape):
        with Monitor(layer, every=1) as monitor:
            with feed(layer, replay=replay):
                layer(x)
            monitor.step()
        seen.append(monitor.last)
    assert seen[0] == seen[1]
    assert seen[0]["tokens"] == N


def test_tokens_of_a_replayed_forward_count_for_the_statistics_of_tokens():
    one = routed_layer(TopK(2), PrincipalScorer(D, E))
    two, x = copy.deepcopy(one), torch.randn(N, D)
    with record(one) as free:
        one(x)
    with feed(two, replay=free), record(two) as tape:
        two(x)
    for layer, records in ((one, free), (two, tape)):
        after_step(layer, records)
    same(one, two)
    assert int(one.router.scorer.updates) == 1


FROZEN = {
    "by its parameters": lambda layer: layer.router.requires_grad_(False),
    "in evaluation mode": lambda layer: layer.router.eval(),
}


@pytest.mark.parametrize("freeze", FROZEN.values(), ids=FROZEN.keys())
@pytest.mark.parametrize("scorer", [LinearScorer, PrincipalScorer, lambda d, e: EigenbasisScorer(d, e, rank=4)])
@pytest.mark.parametrize("selector", [SELECTORS["balanced"], SELECTORS["soft"]])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_frozen_router_stays_as_it_is(freeze, scorer, selector, hooked):
    layer, x = routed_layer(selector(), scorer(D, E)), torch.randn(3, N, D)
    freeze(layer)
    before = copy.deepcopy(layer.router)
    optimizer = torch.optim.SGD(layer.experts.parameters(), lr=0.1)
    layer.router.scorer.requires_grad_(freeze is FROZEN["in evaluation mode"] and not layer.router.scorer.manifold)
    if hooked:
        attach(optimizer, layer)
    for part in x:
        with record(layer) as tape:
            layer(part).square().sum().backward()
        optimizer.step()
        if not hooked:
            after_step(layer, tape)
    same(layer.router, before)


class Hashed(Scorer):
    """A scorer without parameters."""

    def forward(self, x, *, context=None):
        return x[:, : self.num_experts].sin()


def test_a_router_without_parameters_is_balanced_while_it_trains():
    layer = routed_layer(Balanced(2, rate=0.01), Hashed(D, E))
    x = torch.linspace(0, 1, E).repeat(N, 1)
    x = torch.cat([x, torch.zeros(N, D - E)], 1)  # all tokens want the last two experts
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach(optimizer, layer)
    for mode in (False, True):
        layer.router.train(mode)
        layer(x).sum().backward()
        optimizer.step()
        assert bool(layer.router.selector.bias.any()) == mode
    assert layer.router.selector.bias.tolist() == pytest.approx([0.01, 0.01, -0.01, -0.01])


# Several optimizers


def split_optimizers(net):
    """Muon for matrices, AdamW for the rest."""
    matrices = [p for p in net.parameters() if p.dim() == 2]
    rest = [p for p in net.parameters() if p.dim() != 2]
    return torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=1e-2)


def test_bases_lie_on_their_manifold_after_both_in_any_order():
    for order, at_once in itertools.product(((0, 1), (1, 0)), (True, False)):
        net, counted = Net(), []
        optimizers = split_optimizers(net)
        if at_once:
            attach(optimizers, net)
        else:
            for optimizer in optimizers:
                attach(optimizer, net)
        after = net.moes[0].router.scorer.update
        net.moes[0].router.selector.update = lambda counts, to=counted: to.append(int(counts.sum()))
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            net(torch.randn(N, D)).square().mean().backward()
            for i in order:
                optimizers[i].step()
                assert not off_manifold(net)
        assert after is not None
        assert counted == [2 * N] * 3, "once a step, after the last"


def test_a_basis_in_no_attached_optimizer_is_an_error(user_error):
    net = Net()
    muon, adam = split_optimizers(net)
    attach(adam, net)
    net(torch.randn(N, D)).square().mean().backward()
    with user_error("moes.0.router.scorer.basis", "attach([one, other], model)"):
        adam.step()
    attach(muon, net)
    for optimizer in (adam, muon):
        optimizer.step()
    assert not off_manifold(net)


def test_an_optimizer_that_leaves_out_its_step_is_not_waited_for():
    net, counted = Net(), []
    muon, adam = optimizers = split_optimizers(net)
    attach(optimizers, net)
    net.moes[0].router.selector.update = lambda counts: counted.append(int(counts.sum()))
    for step, who in enumerate(((muon,), (adam, muon), (muon,), (muon, adam))):
        net(torch.randn(N + step, D)).square().mean().backward()
        for optimizer in who:
            optimizer.step()
            assert not off_manifold(net)
    assert counted == [2 * (N + step) for step in range(4)]


def test_misuse_of_attach(user_error):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with user_error("takes torch optimizers", "Net"):
        attach(net, net)
    assert not any(moe.sinks for moe in net.moes)
    first = attach(optimizer, net)
    with user_error("SGD is attached to this model already"):
        attach(optimizer, net)
    with user_error("another model or group"):
        attach(torch.optim.SGD(net.parameters(), lr=0.1), net.moes[0])
    first.remove()
    attach(optimizer, net).remove()


def test_an_optimizer_that_is_gone_leaves_nothing_behind():
    net = Net()
    attachment = attach(torch.optim.SGD(net.parameters(), lr=0.1), net)
    gc.collect()
    assert not any(moe.sinks for moe in net.moes)
    muon, adam = optimizers = split_optimizers(net)
    attachment = attach(optimizers, net)
    del muon, optimizers
    gc.collect()
    with torch.no_grad():
        net.moes[0].router.scorer.basis.requires_grad_(False)
        net.moes[1].router.scorer.basis.requires_grad_(False)
    net(torch.randn(N, D)).square().mean().backward()
    adam.step()
    assert net.moes[0].router.selector.bias.any()
    attachment.remove()


def test_schedulers_and_scalers_that_leave_out_a_step():
    net, counted = Net(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attach(optimizer, net)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    net.moes[0].router.selector.update = lambda counts: counted.append(int(counts.sum()))
    for bad in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(net(torch.randn(N, D)).square().mean() * (torch.inf if bad else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        assert not off_manifold(net)
    assert counted == [2 * N, 4 * N], "the forward of a step that was left out counts with the next"


def test_lbfgs():
    net, x = Net(), torch.randn(N, D)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)
    attach(optimizer, net)

    def closure():
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert not off_manifold(net)
    assert net.moes[0].router.selector.bias.any()


# Averages of weights


def test_an_average_is_put_back_on_its_manifold(close):
    net = Net()
    average = AveragedModel(net, use_buffers=True)
    average.update_parameters(net)
    with torch.no_grad():
        for moe in net.moes:
            moe.router.scorer.basis.copy_(torch.linalg.qr(torch.randn(D, 4)).Q)
    average.update_parameters(net)
    average.requires_grad_(False)  # as timm's
    names = [f"moes.{i}.router.scorer.basis" for i in range(2)]
    errors = off_manifold(average)
    assert list(errors) == names
    for i, name in enumerate(names):
        u = average.module.moes[i].router.scorer.basis
        assert errors[name] == pytest.approx(float((u.T @ u - torch.eye(4)).abs().max()))
    mean = average.module.moes[0].router.scorer.basis.clone()
    retract(average)
    assert off_manifold(average) == {}
    u = average.module.moes[0].router.scorer.basis
    close((u.T @ mean).tril(-1), torch.zeros(4, 4))
    bits = u.clone()
    retract(average)
    assert torch.equal(u, bits)


def test_retract_needs_a_part(user_error):
    with user_error("retract", "Linear", "holds no router and no experts"):
        retract(nn.Linear(2, 2))


def test_saving_a_basis_off_its_manifold_warns(tmp_path):
    layer = routed_layer(TopK(2), EigenbasisScorer(D, E, rank=3))
    save(layer, tmp_path / "on")
    layer.router.scorer.basis.data *= 2
    with pytest.warns(UserWarning, match=r"router.scorer.basis is 3 off its manifold .*retract\(model\)"):
        save(layer, tmp_path / "off")
