"""The work around an optimizer step: the same by hand and by hooks, whole and in micro-batches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spectralmoe import (
    Balanced,
    EigenbasisScorer,
    FeedForward,
    LinearScorer,
    MoE,
    Router,
    Scorer,
    TopK,
    UserError,
    after_step,
    attach,
    before_step,
    param_groups,
    record,
)
from spectralmoe.models import sr_moe

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
        if not hooked:
            before_step(net, *tapes)
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


class Watched(LinearScorer):
    """Notes what it is called with."""

    def __init__(self, dim, num_experts):
        super().__init__(dim, num_experts)
        self.calls = []

    def before_step(self, records):
        self.calls.append(("before", len(records), self.weight.grad is not None))

    def after_step(self, records):
        super().after_step(records)
        self.calls.append(("after", len(records), torch.is_grad_enabled()))


@pytest.mark.parametrize("hooked", [False, True])
def test_scorers_are_called_around_the_step_with_their_own_records(hooked):
    net = nn.Sequential(*(MoE(Router(Watched(D, E), TopK(2)), FeedForward(E, D, 16)) for _ in range(2)))
    train(net, torch.randn(2, N, D), hooked=hooked, micro=3)
    for moe in net:
        assert moe.router.scorer.calls == [("before", 3, True), ("after", 3, False)] * 2


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


@pytest.mark.parametrize("step", [before_step, after_step])
def test_tape_of_another_model_is_refused(step):
    first, second = (MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16)) for _ in range(2))
    with record(first) as tape:
        first(torch.randn(5, 8))
    with pytest.raises(UserError, match="another model"):
        step(second, tape)


def test_attached_twice_is_refused():
    net = Net()
    first = attach(torch.optim.SGD(net.parameters(), lr=0.1), net)
    with pytest.raises(UserError, match="attached to an optimizer already"):
        attach(torch.optim.SGD(net.parameters(), lr=0.1), net)
    first.remove()
    attach(torch.optim.SGD(net.parameters(), lr=0.1), net).remove()
