"""Tapes record each forward once, through checkpointing, compilation and wrappers; feeds reach inner layers."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from grids import first_of
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spectralmoe import (
    Balanced,
    Capacity,
    FeedForward,
    LinearScorer,
    ModuleExperts,
    MoE,
    Router,
    Scorer,
    Soft,
    Term,
    TopK,
    TopP,
    attach,
    feed,
    penalty,
    record,
    shard_routers,
)
from spectralmoe.experts import Answer, Experts
from spectralmoe.layers import moe_layers
from spectralmoe.regularizers import load_balance, output_overlap, router_z, spectral_norm

N, D, E, H = 24, 8, 4, 16
TERMS = {
    "balance": Term(load_balance, 0.3),
    "z": Term(router_z, 0.1),
    "sigma": Term(spectral_norm, 0.2, reduce="sum"),
}


def make_layer(selector=None, experts=None):
    return MoE(Router(LinearScorer(D, E), selector or TopK(2)), experts or FeedForward(E, D, H))


class Block(nn.Module):
    def __init__(self, selector=None):
        super().__init__()
        self.linear, self.moe = nn.Linear(D, D), make_layer(selector)

    def forward(self, x):
        return x + self.moe(self.linear(x).tanh())


class Net(nn.Module):
    """Blocks that may be checkpointed: ``reentrant`` is None (not at all), False or True. Passes nothing on."""

    def __init__(self, reentrant=None, depth=2, soft=False):
        super().__init__()
        self.blocks = nn.ModuleList(Block(Soft() if soft else None) for _ in range(depth))
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def checkpointed(net, reentrant=False):
    twin = copy.deepcopy(net)
    twin.reentrant = reentrant
    return twin


def grads(model):
    return [p.grad for p in model.parameters()]


def same(one, two):
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def step(net, x, call=None):
    """Task loss and penalty, backward after the block; returns the tape."""
    net.zero_grad()
    with record(net) as tape:
        y = net(x) if call is None else call(x)
    (y.square().mean() + penalty(tape, TERMS)[0]).backward()
    return tape


class CountingBackend:
    """Compiles with autograd but without code generation, and counts the graphs."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


@pytest.fixture
def backend():
    torch.compiler.reset()
    yield CountingBackend()
    torch.compiler.reset()


# What is recorded


def test_a_record_is_what_the_router_decided():
    net, x = Net(), torch.randn(2, 12, D)
    with record(net) as tape:
        net(x)
    assert [item.name for item in tape] == ["blocks.0.moe", "blocks.1.moe"]
    first = tape[0]
    routing = net.blocks[0].moe.router(net.blocks[0].linear(x).tanh())
    assert torch.equal(first.routing.logits, routing.logits)
    assert torch.equal(first.routing.indices, routing.indices)
    assert first.routing.shape == (2, 12)
    assert first.layer is net.blocks[0].moe
    assert first.router is net.blocks[0].moe.router
    assert first.matrix is first.scorer.weight


def test_a_penalty_is_the_weighted_sum_of_its_terms(close):
    net, x = Net(), torch.randn(N, D)
    with record(net) as tape:
        net(x)
    total, parts = penalty(tape, {**TERMS, "late": Term(router_z, lambda step: 0.5 * step)}, step=3)
    routings = [item.routing for item in tape]
    p = [r.logits.softmax(-1) for r in routings]
    f = [torch.bincount(r.indices.flatten(), minlength=E) / r.indices.numel() for r in routings]
    balance = torch.stack([E * (fi * pi.mean(0)).sum() for fi, pi in zip(f, p, strict=True)]).mean()
    z = torch.stack([r.logits.logsumexp(-1).square().mean() for r in routings]).mean()
    sigma = sum((torch.linalg.matrix_norm(b.moe.router.scorer.weight, 2) - 1).clamp_min(0).square() for b in net.blocks)
    for name, value in (("balance", balance), ("z", z), ("sigma", sigma), ("late", z)):
        close(parts[name], value.detach())
        assert not parts[name].requires_grad
    close(total, 0.3 * balance + 0.1 * z + 0.2 * sigma + 1.5 * z)


def test_terms_pick_layers_and_see_them_all_at_once(close):
    net = Net(depth=3)
    with record(net) as tape:
        net(torch.randn(N, D))
    z = [router_z(item) for item in tape]
    across = Term(lambda records: sum(router_z(r) * i for i, r in enumerate(records)), 1.0, scope="model")
    terms = {"one": Term(router_z, 1.0, layers="blocks.1.*"), "across": across}
    total, parts = penalty(tape, terms)
    close(parts["one"], z[1].detach())
    close(total, z[1] + z[1] + 2 * z[2])


def test_a_layer_called_twice_gives_two_records():
    layer, x, y = make_layer(), torch.randn(5, D), torch.randn(7, D)
    with record(layer) as tape:
        layer(x)
        layer(y)
    assert [item.routing.logits.shape[0] for item in tape] == [5, 7]
    assert [item.name for item in tape] == ["", ""]
    assert len(tape.layer("")) == 2


def test_a_tape_is_sealed_at_its_first_read():
    layer = make_layer()
    with record(layer) as tape:
        layer(torch.randn(5, D))
        assert len(tape) == 1
        layer(torch.randn(5, D))
    layer(torch.randn(5, D))
    assert len(tape) == 1


def test_a_layer_feeds_all_open_tapes():
    layer = make_layer()
    with record(layer) as outer:
        layer(torch.randn(1, D))
        with record(layer) as inner:
            layer(torch.randn(2, D))
        layer(torch.randn(3, D))
    assert [item.routing.logits.shape[0] for item in outer] == [1, 2, 3]
    assert [item.routing.logits.shape[0] for item in inner] == [2]


def test_an_error_in_the_block_closes_the_tape():
    layer = make_layer()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), record(layer):
        F.linear(layer(torch.randn(1, D)), torch.ones(2, D + 1))
    assert not layer.sinks


def test_two_models_at_once():
    one, two, x = Net(), Net(depth=1), torch.randn(N, D)
    with record(one) as first, record(two) as second:
        y = two(one(x))
    assert (len(first), len(second)) == (2, 1)
    (y.square().mean() + penalty(first, TERMS)[0] + penalty(second, TERMS)[0]).backward()
    with record(one) as alone:
        one(x)
    assert torch.equal(first[0].routing.logits, alone[0].routing.logits)
    assert all(g is not None for g in (*grads(one), *grads(two)))


def test_a_copy_has_no_part_in_the_tapes_of_its_original():
    layer = make_layer()
    with record(layer) as tape, feed(layer, mask=torch.zeros(5, dtype=torch.bool)):
        layer(torch.randn(5, D))
        twin = copy.deepcopy(layer)
        assert twin(torch.randn(5, D)).any()
    assert len(tape) == 1


# Activation checkpointing


@pytest.mark.parametrize("soft", [False, True], ids=["sparse", "soft"])
@pytest.mark.parametrize("inside", [False, True], ids=["after the block", "inside the block"])
def test_gradients_are_the_same_under_checkpointing(inside, soft):
    net, x = Net(soft=soft), torch.randn(N, D)
    step(net, x)
    twin = checkpointed(net)
    with record(twin) as tape:
        y = twin(x)
        if inside:
            (y.square().mean() + penalty(tape, TERMS)[0]).backward()
    if not inside:
        (y.square().mean() + penalty(tape, TERMS)[0]).backward()
    assert len(tape) == 2
    same(grads(twin), grads(net))


def test_a_recomputation_is_not_recorded():
    net = Net(reentrant=False)
    with record(net) as tape:
        net(torch.randn(N, D)).sum().backward()
        net(torch.randn(N, D)).sum().backward()
    assert [item.name for item in tape] == ["blocks.0.moe"] * 2 + ["blocks.1.moe"] * 2


def test_reentrant_checkpointing_is_refused_when_a_gradient_would_be_lost(user_error):
    net = Net(reentrant=True)
    with record(net) as tape:
        net(torch.randn(N, D, requires_grad=True))
    assert len(tape) == 2
    with user_error("'balance'", "use_reentrant=False"):
        penalty(tape, TERMS)
    penalty(tape, {"sigma": TERMS["sigma"]})[0].backward()  # needs no recorded gradient


def test_one_reentrant_layer_among_others_is_refused(user_error):
    net = Net()
    with record(net) as tape:
        x = checkpoint(net.blocks[0], torch.randn(N, D, requires_grad=True), use_reentrant=True)
        net.blocks[1](x)
    with user_error("'z'", "use_reentrant=False"):
        penalty(tape, {"z": TERMS["z"]})


# Errors


def test_a_model_without_moe_layers(user_error):
    with user_error("Linear", "no MoE layer"), record(nn.Linear(2, 2)):
        pass


def test_an_empty_tape(user_error):
    with record(Net()) as tape:
        pass
    with user_error("empty", "inside the 'with record(model)' block"):
        penalty(tape, TERMS)


def test_unknown_layers(user_error):
    net = Net()
    with record(net) as tape:
        net(torch.randn(N, D))
    with user_error("block.*", "blocks.0.moe, blocks.1.moe"):
        penalty(tape, {"z": Term(router_z, 1.0, layers="block.*")})
    with user_error("'blocks'", "blocks.0.moe, blocks.1.moe"):
        tape.layer("blocks")


def test_a_term_without_gradient(user_error):
    net, x = Net(), torch.randn(N, D)
    with torch.no_grad(), record(net) as tape:
        net(x)
    with user_error("'balance'", "torch.no_grad"):
        penalty(tape, TERMS)
    with record(net) as tape:
        net(x)
    with user_error("'dead'"):
        penalty(tape, {"dead": Term(lambda r: r.routing.counts().float().mean(), 1.0)})
    with user_error("'dead'"):
        penalty(tape, {"dead": Term(lambda rs: rs[0].routing.load().sum(), 1.0, scope="model")})


def test_no_gradient_is_asked_for_where_none_can_be():
    net, x = Net(), torch.randn(N, D)
    with torch.no_grad(), record(net) as tape:
        net(x)
        penalty(tape, TERMS)
    penalty(tape, {"off": Term(load_balance, 0.0)})
    net.eval()
    penalty(tape, TERMS)
    net.train().requires_grad_(False)
    net.blocks[0].moe.experts.requires_grad_(True)
    with record(net) as tape:
        net(x)
    penalty(tape, {"z": Term(router_z, 1.0)})


# Names


class Namesake(nn.Module):
    """A user's module with attributes called as wrappers call theirs."""

    def __init__(self):
        super().__init__()
        self.module = make_layer()

    def forward(self, x):
        return self.module(x)


def wrap_ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def wrap_checkpoint(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(model)


def wrap_fsdp(model):
    from torch.distributed.fsdp import fully_shard

    shard_routers(model)
    return fully_shard(model)


def wrap_inside(model):
    """A compiled checkpoint around each child."""
    for name, child in list(model.named_children()):
        setattr(model, name, torch.compile(wrap_checkpoint(child), backend="eager"))
    return model


def wrap_compile(model):
    return torch.compile(model, backend="eager")


WRAPS = {
    "ddp": (wrap_ddp,),
    "compile": (wrap_compile,),
    "checkpoint": (wrap_checkpoint,),
    "fsdp": (wrap_fsdp,),
    "compile of ddp": (wrap_ddp, wrap_compile),
    "ddp of compile": (wrap_compile, wrap_ddp),
    "inside": (wrap_inside,),
    "inside, ddp, compile": (wrap_inside, wrap_ddp, wrap_compile),
}


@pytest.mark.parametrize("wraps", WRAPS.values(), ids=WRAPS.keys())
def test_names_are_free_of_wrapper_prefixes(one_process, wraps):
    torch.compiler.reset()
    model = nn.Sequential(Namesake(), Namesake())
    x = torch.randn(N, D)
    with record(model) as plain:
        model(x)
    for wrap in wraps:
        model = wrap(model)
    with record(model) as tape:
        model(x)
    assert [item.name for item in tape] == [item.name for item in plain] == ["0.module", "1.module"]
    assert torch.equal(tape[1].routing.logits, plain[1].routing.logits)
    torch.compiler.reset()


# torch.compile


@pytest.mark.parametrize("compiled_first", [False, True])
def test_ten_steps_with_fresh_tapes_need_one_more_graph(backend, compiled_first):
    net, x = Net(), torch.randn(N, D)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    if compiled_first:
        compiled(x).sum().backward()
    reference = copy.deepcopy(net)
    for _ in range(10):
        tape = step(net, x, compiled)
        assert len(tape) == 2
        step(reference, x)
        same(grads(net), grads(reference))
    assert backend.graphs == 1 + compiled_first


def test_many_calls_in_one_tape_need_one_graph(backend):
    layer = make_layer()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    batches = torch.randn(6, N, D)
    with record(layer) as tape:
        for x in batches:
            compiled(x)
    assert backend.graphs == 1
    for item, x in zip(tape, batches, strict=True):
        assert torch.equal(item.routing.indices, layer.router(x).indices)


@pytest.mark.full
@pytest.mark.inductor
def test_inductor(backend, close):
    net, x = Net(depth=1), torch.randn(N, D)
    reference = copy.deepcopy(net)
    for _ in range(2):
        step(net, x, torch.compile(net, fullgraph=True))
    step(reference, x)
    for one, two in zip(grads(net), grads(reference), strict=True):
        close(one, two)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_tape_may_live_inside_a_compiled_function(backend):
    net, x = Net(), torch.randn(N, D)
    reference = copy.deepcopy(net)

    def loss(x):
        with record(net) as tape:
            y = net(x)
        return y.square().mean() + penalty(tape, TERMS)[0], tape

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for _ in range(3):
        net.zero_grad()
        value, tape = compiled(x)
        value.backward()
        assert len(tape) == 2
        step(reference, x)
        same(grads(net), grads(reference))
        assert not net.blocks[0].moe.sinks
    assert backend.graphs == 1


@pytest.mark.parametrize("told", [False, True], ids=["by default", "with the dynamo option"])
@pytest.mark.parametrize("inside", [False, True], ids=["after the block", "inside the block"])
def test_compiled_checkpoints(backend, inside, told):
    """Right in both cases; compiled only when dynamo was told that recomputation need not repeat side effects."""
    net, x = Net(), torch.randn(N, D)
    step(net, x)
    twin = checkpointed(net)
    compiled = torch.compile(twin, backend=backend, fullgraph=told)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=told):
        for _ in range(2):
            twin.zero_grad()
            with record(twin) as tape:
                y = compiled(x)
                if inside:
                    (y.square().mean() + penalty(tape, TERMS)[0]).backward()
            if not inside:
                (y.square().mean() + penalty(tape, TERMS)[0]).backward()
            assert len(tape) == 2
            same(grads(twin), grads(net))
    assert backend.graphs == int(told)


# Kept tensors

KEEP = ("input", "hidden", "output")


class Gained(ModuleExperts):
    """A bank that hands out each row's gain."""

    expert = Experts.expert

    def answer(self, x, e):
        return Answer(ModuleExperts.expert(self, x, e), x.sum(-1))


def banks():
    modules = [nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)) for _ in range(E)]
    return {
        "feed_forward": FeedForward(E, D, H, activation="swiglu", bias=True),
        "modules": ModuleExperts(modules),
        "gained": Gained(modules),
    }


def slot_tensors(layer, x, routing):
    """(expert, slot, input, hidden, output) of each filled slot, one at a time, in expert order."""
    bank, rows = layer.experts, []
    for token, chosen in enumerate(routing.indices.tolist()):
        for j, e in enumerate(chosen):
            if e >= 0:
                v = x[token]
                hidden = v[:0]
                if isinstance(bank, FeedForward):
                    gate, up = F.linear(v, bank.up[e], bank.up_bias[e]).chunk(2)
                    hidden = F.silu(gate) * up
                    out = F.linear(hidden, bank.down[e], bank.down_bias[e])
                else:
                    out = bank.experts[e](v) * (v.sum() if isinstance(bank, Gained) else 1)
                rows.append((e, token * len(chosen) + j, v, hidden, out))
    return sorted(rows, key=lambda row: row[:2])


SELECTORS = {
    "topk": lambda: TopK(2),
    "topp": lambda: TopP(0.5),
    "capacity": lambda: Capacity(TopK(2), 0.6),
    "soft": Soft,
}


CASES = [(name, False, selector) for name in banks() for selector in SELECTORS]
CASES += [("feed_forward", True, selector) for selector in SELECTORS]  # a bank of modules splits rows on the host


@pytest.mark.parametrize(
    "case", first_of(len(CASES) - len(SELECTORS) + 1, CASES), ids=lambda case: "-".join(map(str, case))
)
def test_kept_tensors_are_those_of_a_loop_over_slots(case, close, backend):
    bank, compiled, selector = case
    layer = make_layer(SELECTORS[selector](), banks()[bank])
    x, mask = torch.randn(N, D), torch.rand(N) < 0.8
    names = KEEP if bank == "feed_forward" else ("input", "output")
    call = torch.compile(layer, backend=backend, fullgraph=True) if compiled else layer
    with record(layer, keep=names) as tape:
        y = call(x, mask=mask)
    close(y, layer(x, mask=mask))
    item = tape[0]
    rows = slot_tensors(layer, x, item.routing)
    assert item.order.tolist() == [slot for _, slot, *_ in rows]
    for name in names:
        want = torch.stack([row[2 + KEEP.index(name)] for row in rows])
        close(item.tensor(name), want)
        if name != "input":
            direction = torch.randn_like(want)
            parameters = list(layer.experts.parameters())
            pairs = [
                torch.autograd.grad((v * direction).sum(), parameters, allow_unused=True, retain_graph=True)
                for v in (item.tensor(name), want)
            ]
            for one, two in zip(*pairs, strict=True):
                close(*(torch.zeros(()) if g is None or not g.any() else g for g in (one, two)))


def test_each_tape_keeps_what_it_asked_for(user_error):
    layer = make_layer()
    with record(layer) as plain, record(layer, keep=("input",)) as one, record(layer, keep=("hidden",)) as two:
        layer(torch.randn(N, D))
    assert one[0].tensor("input").shape == (2 * N, D)
    assert two[0].tensor("hidden").shape == (2 * N, H)
    for tape, name in ((plain, "input"), (one, "hidden"), (two, "input")):
        with user_error(f"did not keep '{name}'", f"keep=('{name}',)"):
            tape[0].tensor(name)
    with user_error("kept no tensors"):
        _ = plain[0].order


def test_terms_say_what_is_kept_of_the_layers_that_they_are_about(user_error):
    net, x = Net(), torch.randn(N, D)
    names = list(moe_layers(net))
    terms = {"one": Term(output_overlap, 1.0, layers=names[0]), "two": Term(router_z, 1.0)}
    with record(net, terms=terms) as tape:
        net(x)
    total, _ = penalty(tape, terms)
    total.backward()
    assert tape.layer(names[0])[0].output.shape == (2 * N, D)
    with user_error("did not keep 'output'"):
        tape.layer(names[1])[0].tensor("output")
    own = Term(lambda item: item.hidden.square().mean(), 1.0, keeps=("hidden",))
    with record(net, terms={"own": own}) as tape:
        net(x)
    penalty(tape, {"own": own})
    with (
        user_error("term 'own' reads 'logits'", "tokens, input"),
        record(net, terms={"own": Term(router_z, 1.0, keeps=("logits",))}),
    ):
        pass


def test_kept_tokens_are_what_the_router_read():
    layer, x = make_layer(), torch.randn(2, N // 2, D, requires_grad=True)
    with record(layer, keep="tokens") as tape, record(layer) as plain:
        layer(x)
    item = tape[0]
    assert torch.equal(item.tensor("tokens"), x.flatten(0, 1))
    assert torch.equal(
        *(torch.autograd.grad(v.sin().sum(), x)[0].flatten(0, 1) for v in (item.tokens, x.flatten(0, 1)))
    )
    assert item.kept is None
    with torch.no_grad(), record(layer, keep="tokens") as tape:
        given = x.clone()
        given += layer(given)
    assert torch.equal(tape[0].tokens, x.flatten(0, 1))
    assert len(plain) == 1


def test_a_plain_function_keeps_nothing(user_error):
    layer = make_layer()
    layer.dispatch = lambda x, routing, experts: torch.zeros_like(x)
    layer(torch.randn(N, D))
    with user_error("plain function", "Dispatch"), record(layer, keep="output"):
        layer(torch.randn(N, D))


def test_unknown_names_to_keep(user_error):
    with user_error("'outputs'", "tokens, input, hidden, output"), record(make_layer(), keep=("outputs",)):
        pass
    layer = make_layer(experts=banks()["modules"])
    with user_error("ModuleExperts", "'hidden'"), record(layer, keep=("hidden",)):
        layer(torch.randn(N, D))


def test_kept_tensors_and_checkpointing():
    net, x = Net(), torch.randn(N, D)
    results = []
    for reentrant in (None, False):
        twin = checkpointed(net, reentrant)
        with record(twin, keep=("hidden",)) as tape:
            y = twin(x)
        (y.square().mean() + sum(item.tensor("hidden").abs().mean() for item in tape)).backward()
        results.append(grads(twin))
    same(*results)


# feed


class Tagged(Scorer):
    """Adds ``context["tag"]`` (E,) to linear logits."""

    def __init__(self, dim, num_experts):
        super().__init__(dim, num_experts)
        self.linear = nn.Linear(dim, num_experts)

    def forward(self, x, *, context=None):
        return self.linear(x) + (0 if context is None else context["tag"])


def test_mask_and_context_reach_inner_layers():
    net, x, mask = Net(), torch.randn(2, 12, D), torch.rand(2, 12) < 0.6
    for block in net.blocks:
        block.moe = MoE(Router(Tagged(D, E), TopK(1)), FeedForward(E, D, H))
    tag = torch.tensor([0.0, 0.0, 1e3, 0.0])
    with feed(net, mask=mask, context={"tag": tag}), record(net) as tape:
        y = net(x)
    for item in tape:
        assert item.routing.counts().tolist() == [0, 0, int(mask.sum()), 0]
        assert torch.equal(item.routing.mask, mask.flatten())
    assert torch.equal(y[~mask], x[~mask])
    with record(net) as tape:
        net(x)
    assert tape[0].routing.mask is None
    assert int(tape[0].routing.counts().sum()) == 24


def test_what_the_caller_passes_goes_before_the_feed():
    layer, x = make_layer(), torch.randn(N, D)
    own = torch.arange(N) < 3
    with feed(layer, mask=torch.arange(N) >= 3), record(layer) as tape:
        layer(x, mask=own)
    assert torch.equal(tape[0].routing.mask, own)


def test_nested_feeds_restore_the_outer_one():
    layer, x = make_layer(), torch.randn(4, D)
    masks = torch.eye(4).bool()
    with record(layer) as tape:
        with feed(layer, mask=masks[0]):
            layer(x)
            with feed(layer, mask=masks[1]):
                layer(x)
            layer(x)
        layer(x)
    seen = [item.routing.mask for item in tape]
    assert [torch.equal(a, b) for a, b in zip(seen[:3], masks[[0, 1, 0]], strict=True)] == [True] * 3
    assert seen[3] is None


def perturbed(net):
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(torch.randn_like(p))
    return twin


def test_replay_keeps_the_choice_and_recomputes_the_weights(close):
    net, x = Net(), torch.randn(N, D)
    with record(net) as old:
        net(x)
    live = perturbed(net)
    with record(live) as free:
        live(x)
    with feed(live, replay=old), record(live) as new:
        live(x).sum().backward()
    assert not torch.equal(free[0].routing.indices, old[0].routing.indices)
    for before, after in zip(old, new, strict=True):
        assert torch.equal(after.routing.indices, before.routing.indices)
        close(after.routing.weights, after.routing.logits.softmax(-1).gather(1, after.routing.indices))
        assert after.routing.weights.requires_grad
    assert torch.equal(new[0].routing.logits, free[0].routing.logits)


def test_replay_with_checkpointing_inside_the_block():
    net, x = Net(), torch.randn(N, D)
    with record(net) as old:
        net(x)
    live, mask = perturbed(net), torch.rand(N) < 0.7
    results = []
    for reentrant in (None, False):
        twin = checkpointed(live, reentrant)
        with feed(twin, replay=old, mask=mask):
            twin(x).square().mean().backward()
        results.append(grads(twin))
    same(*results)


def test_recomputation_after_the_block_is_an_error(user_error):
    net, x = Net(reentrant=False), torch.randn(N, D)
    with feed(net, mask=torch.rand(N) < 0.5):
        y = net(x)
    with user_error("recomputed after its block closed", "backward inside"):
        y.sum().backward()
    net(x).sum().backward()  # the next forward is free of it


def test_replay_needs_as_many_records_as_calls(user_error):
    layer, x = make_layer(), torch.randn(N, D)
    with record(layer) as tape:
        layer(x)
        layer(x + 1)
    with feed(layer, replay=tape), record(layer) as again:
        layer(x)
        layer(x + 1)
        with user_error("more often than the 2 times"):
            layer(x)
    assert torch.equal(again[1].routing.indices, tape[1].routing.indices)
    with user_error("N=24", "N=5"), feed(layer, replay=tape):
        layer(torch.randn(5, D))


def test_replay_of_several_calls_cannot_be_recomputed(user_error):
    layer, x = make_layer(), torch.randn(N, D)
    with record(layer) as tape:
        layer(layer(x))
    with feed(layer, replay=tape):
        y = checkpoint(layer, layer(x), use_reentrant=False)
        with user_error("several times"):
            y.sum().backward()


def test_replay_of_another_model(user_error):
    layer = make_layer()
    with record(layer) as tape:
        layer(torch.randn(N, D))
    with user_error("no layer 'blocks.0.moe'"), feed(Net(), replay=tape):
        pass
    with user_error("no MoE layer"), feed(nn.Linear(2, 2)):
        pass


def test_feed_reaches_a_compiled_model(backend):
    net, x = Net(), torch.randn(N, D)
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    with record(net) as old:
        net(x)
    live = [torch.rand(N) < 0.5 for _ in range(4)]
    for mask in live:
        with feed(net, mask=mask, replay=old), record(net) as tape:
            y = compiled(x)
        want = old[0].routing.indices.masked_fill(~mask[:, None], -1)
        assert torch.equal(tape[0].routing.indices, want)
        assert torch.equal(y[~mask], x[~mask])
    assert torch.equal(compiled(x), net(x))
    assert backend.graphs <= 3


# Threads


def in_a_thread(work):
    """Run ``work()`` in a thread of its own, to its end; gives what it returned."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=60)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_tape_and_a_feed_belong_to_their_thread(backend, compiled):
    layer, x, mask = make_layer(), torch.randn(N, D), torch.arange(N) < 3
    call = torch.compile(layer, backend=backend, fullgraph=True) if compiled else layer

    def other():
        with record(layer) as tape:
            call(x + 1)
            call(x + 2)
        return [item.routing for item in tape]

    call(x)
    with record(layer) as own:
        call(x)
        with feed(layer, mask=mask):
            theirs = in_a_thread(other)
            call(x)
    assert [item.routing.mask is None for item in own] == [True, False]
    assert torch.equal(own[0].routing.logits, layer.router(x).logits)
    assert [routing.mask for routing in theirs] == [None, None]
    for routing, shift in zip(theirs, (1, 2), strict=True):
        torch.testing.assert_close(routing.logits, layer.router(x + shift).logits)
    assert not layer.sinks
    assert not compiled or backend.graphs <= 3


def test_attach_sees_the_training_of_every_thread():
    layer = make_layer(Balanced(2, rate=0.01))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach(optimizer, layer)

    def train():
        layer(torch.randn(1, D)).sum().backward()
        optimizer.step()

    in_a_thread(train)
    assert layer.router.selector.bias.any()
