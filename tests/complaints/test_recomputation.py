"""Hidden state, and what happens to it when activations are computed a second time.

Threads: Megatron-LM #1330; torchtitan #4772; megablocks #82, #85, #113, #119; NeMo Automodel #2635, #3156;
Liger-Kernel #1255.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
from seeds import shifted
from torch import nn

from spectralmoe import Balanced, Capacity, NoisyTopK, Term, after_step, attach, feed, penalty, record
from spectralmoe.regularizers import load_balance

BALANCE = {"balance": Term(load_balance, 0.5)}
SUM = {"balance": Term(load_balance, 0.5, reduce="sum")}
both_kinds = pytest.mark.parametrize("reentrant", [False, True], ids=["non-re-entrant", "re-entrant"])


def counter_of(net):
    """``counter()``: how many routings of ``net`` are alive, of all that its routers make from now on."""
    seen = []
    for block in net.blocks:
        block.moe.router.register_forward_hook(lambda *call: seen.append(weakref.ref(call[2].logits)))
    return lambda: sum(logits() is not None for logits in seen)


@pytest.mark.parametrize("inside", [False, True], ids=["backward after the block", "backward inside the block"])
def test_megatron_1330_the_loss_is_counted_once(make_net, inside):
    """Megatron-LM #1330: With activation checkpointing the reported balance loss doubled (1.09 became 2.20): forward
    ran twice.

    Here value, counts, number of records and all gradients are those without checkpointing.
    """
    x, found = torch.randn(40, 16), []
    for net in (make_net(), make_net(use_reentrant=False)):
        with record(net) as tape:
            y = net(x)
            total, parts = penalty(tape, BALANCE)
            if inside:
                (y.square().mean() + total).backward()
        if not inside:
            (y.square().mean() + total).backward()
        found.append([parts["balance"], *(item.routing.counts() for item in tape), *(p.grad for p in net.parameters())])
        assert len(tape) == 2
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_megatron_1330_a_lost_gradient_is_an_error(make_net, user_error):
    """Megatron-LM #1330: The other kind of checkpoint runs its first forward without gradient: a loss taken there would
    train nothing.

    Here the value is still right, and asking for its gradient names the cause and the cure.
    """
    x, plain, net = torch.randn(40, 16, requires_grad=True), make_net(), make_net(use_reentrant=True)
    with record(plain) as wanted, record(net) as tape:
        plain(x)
        net(x).sum().backward()
    assert len(tape) == 2
    assert all(torch.equal(load_balance(a), load_balance(b)) for a, b in zip(tape, wanted, strict=True))
    with user_error("'balance' has no gradient", "use_reentrant=False"):
        penalty(tape, BALANCE)


@both_kinds
@pytest.mark.parametrize("by_hooks", [False, True], ids=["by hand", "by hooks"])
def test_torchtitan_4772_counters_of_several_micro_batches(make_net, reentrant, by_hooks):
    """torchtitan #4772: A loss over the global batch had to forbid checkpointing with several micro-batches:
    recomputation moved its counters.

    Here the selection biases after three micro-batches and a step are those of a run without checkpointing.
    """
    x, biases = torch.randn(3, 40, 16, requires_grad=True), []
    for options in ({}, {"use_reentrant": reentrant}):
        net, tapes = make_net(lambda: Balanced(2, rate=0.1), **options), []
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        if by_hooks:
            attach(optimizer, net)
        for part in x:
            with record(net) as tape:
                net(part).sum().backward()
            tapes.append(tape)
        optimizer.step()
        if not by_hooks:
            after_step(net, *tapes)
        biases.append([block.moe.router.selector.bias for block in net.blocks])
    assert all(bias.any() for bias in biases[0])
    assert all(torch.equal(one, two) for one, two in zip(*biases, strict=True))


@pytest.mark.parametrize("setting", ["train", "eval", "no_grad", "checkpointed"])
def test_megablocks_113_no_record_goes_missing(make_net, setting, user_error):
    """megablocks #113: The global list of losses was sometimes empty, or held 7 entries where 14 layers were expected.

    Here each call of each layer leaves one record in every mode, and a tape that saw nothing is an error to read.
    """
    net = make_net(depth=4, **({"use_reentrant": False} if setting == "checkpointed" else {}))
    net.train(setting != "eval")
    with torch.set_grad_enabled(setting != "no_grad"), record(net) as tape:
        net(torch.randn(10, 16))
        net(torch.randn(20, 16))
    assert [item.name for item in tape] == [f"blocks.{i}.moe" for i in range(4) for _ in range(2)]
    assert [len(item.routing.logits) for item in tape.layer("blocks.3.moe")] == [10, 20]
    with user_error("the tape is empty"), record(net) as tape:
        len(tape)


def test_megablocks_119_nothing_is_kept_that_nobody_asked_for(make_net):
    """megablocks #119: Every forward added tensors to a global list that the user had to clear, or GPU memory ran out.

    Here a forward without a tape keeps nothing, a tape frees its records with itself, and hooks on the optimizer hold
    the training forwards of one step alone.
    """
    net, x = make_net(), torch.randn(10, 16)
    alive = counter_of(net)
    for _ in range(3):
        net(x)
    assert alive() == 0
    with record(net) as tape:
        net(x)
    assert alive() == len(tape) == 2
    del tape
    assert alive() == 0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attach(optimizer, net)
    for _ in range(3):
        net.eval()(x)
        net.train()(x).sum().backward()
        assert alive() == 2
        optimizer.step()
        assert alive() == 0


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_megablocks_85_the_loss_does_not_depend_on_the_number_of_stages(make_net, close, stages):
    """megablocks #85: The same model reported another balance loss for every number of pipeline stages.

    Here a layer's value depends on that layer alone: the sums over the stages add up to the sum over the model.
    """
    net, x = make_net(depth=4), torch.randn(40, 16)
    with record(net) as tape:
        net(x)
    whole, total = penalty(tape, SUM)[0], 0.0
    for start in range(0, 4, 4 // stages):
        stage = nn.Sequential(*net.blocks[start : start + 4 // stages])
        with record(stage) as tape:
            x = stage(x)
        total = total + penalty(tape, SUM)[0]
    close(total, whole.detach())


def test_megablocks_82_a_record_says_what_it_holds(make_net, close):
    """megablocks #82: Was it the loss that is saved, or what it takes to compute it? Neither name nor type said so.

    Here a record names its layer and holds the routing itself, from which every value can be had again.
    """
    net, x = make_net(), torch.randn(40, 16)
    with record(net) as tape:
        net(x)
    _, parts = penalty(tape, BALANCE)
    values = []
    for item in tape:
        assert item.layer is net.get_submodule(item.name)
        logits, weights, indices = item.routing
        close(weights, logits.softmax(-1).gather(1, indices))
        fraction = torch.bincount(indices.flatten(), minlength=4) / indices.numel()
        values.append(4 * (fraction * logits.softmax(-1).mean(0)).sum())
    close(parts["balance"], torch.stack(values).mean().detach())


@both_kinds
def test_liger_1255_recomputation_draws_the_same_noise(make_net, reentrant):
    """Liger-Kernel #1255: The sizes of the routed blocks differed between forward and recomputation, and training died
    at step one.

    Here a router with noise routes the recomputation as the forward: the gradients are those without checkpointing.
    """
    x, found = torch.randn(40, 16, requires_grad=True), []
    for options in ({}, {"use_reentrant": reentrant}):
        net = make_net(lambda: NoisyTopK(2, noise_std=1.0), **options).train()
        torch.manual_seed(shifted(3))
        net(x).square().mean().backward()
        found.append([p.grad for p in net.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("bounded", [False, True], ids=["dropless", "capacity"])
def test_automodel_2635_and_3156_a_replay_pins_the_choice_of_the_recomputation(make_net, bounded):
    """NeMo Automodel #2635, NeMo Automodel #3156: Where arithmetic does not repeat bit by bit, tokens near a tie go
    elsewhere in the recomputation, and the sizes of all that follows do not fit.

    Here ``feed(replay=tape)`` around backward keeps the choice that the forward recorded. The unsteady arithmetic is
    noise that the checkpoint is told not to repeat. Sizes always fit; without the replay the gradients are those of
    another choice.
    """

    def selector():
        noisy = NoisyTopK(2, noise_std=1.0)
        return Capacity(noisy, 0.8) if bounded else noisy

    def gradients(pinned, **options):
        net = make_net(selector, **options)
        torch.manual_seed(shifted(3))
        with record(net) as tape:
            loss = net(x).square().mean()
        with feed(net, replay=tape) if pinned else nullcontext():
            loss.backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    x, unsteady = torch.randn(41, 16), {"use_reentrant": False, "preserve_rng_state": False}
    wanted = gradients(False)
    assert torch.equal(gradients(True, **unsteady), wanted)
    assert not torch.allclose(gradients(False, **unsteady), wanted, rtol=0.1)
