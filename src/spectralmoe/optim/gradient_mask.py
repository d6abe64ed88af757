"""Random masks on the gradients of parameters that all experts share.

Gao et al., "Parameter-Efficient Mixture-of-Experts Architecture for Pre-trained Language Models" (MPOE), arXiv
2203.01104 (COLING 2022), abstract: the central core gets a gradient from every token, an expert's own cores from its
tokens alone, so the gradient of the central core is masked. Authors' code: github.com/RUCAIBox/MPOE (Apache-2.0),
without such a mask.
Differs: the abstract does not say what a mask covers and with which probability. Here one draw a step decides for a
whole core, which keeps its gradient with the probability 1/E. The gradient is not divided by that probability, because
the core should move less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spectralmoe.errors import UserError
from spectralmoe.experts import MPOExperts
from spectralmoe.optim.own_state import moved_home, states_of, travel_with
from spectralmoe.sharding import full

__all__ = ["mask_central", "mask_gradient"]

STATE = "mask_gradient"
"""Where an optimizer keeps the state of the draws: ``optimizer.state[STATE]``."""


def mask_gradient(parameter: Tensor, keep: float, *, generator: torch.Generator | None = None) -> RemovableHandle:
    r"""Multiply the gradient of a parameter by :math:`b \sim \mathrm{Bernoulli}(\mathrm{keep})`, drawn once a step.

    This is a hook on the accumulated gradient; ``remove()`` of the returned handle takes it off. All backward passes
    between two changes of the parameter, and so all micro-batches of a step, share a draw. An optimizer with
    ``fused=True`` does not mark its changes: use ``mask_central`` with it. Several processes must draw alike: give them
    generators of the same seed. An optimizer with momentum goes on moving if the gradient is 0: AdamW moves about
    :math:`\sqrt{\mathrm{keep}}` times as far, plain SGD ``keep`` times.

    Args:
        parameter: a trained leaf tensor, such as one of ``MPOExperts.central``.
        keep: the probability that the gradient stays.
        generator: the generator of the draws, on the CPU; None is torch's own.

    Raises:
        UserError: ``keep`` is not in [0, 1], or the tensor collects no gradient.

    >>> core = nn.Parameter(torch.ones(3))
    >>> handle = mask_gradient(core, 0.0)
    >>> core.sum().backward()
    >>> core.grad
    tensor([0., 0., 0.])
    """
    return _masked(parameter, keep, generator, lambda: parameter._version)


def _masked(
    parameter: Tensor, keep: float, generator: torch.Generator | None, turn: Callable[[], int]
) -> RemovableHandle:
    """The mask, with a new draw whenever ``turn`` gives another number."""
    if not 0 <= keep <= 1:
        raise UserError(f"mask_gradient: keep is a probability between 0 and 1, got {keep}")
    if not (parameter.is_leaf and parameter.requires_grad):
        raise UserError("mask_gradient: this tensor collects no gradient; pass a parameter with requires_grad=True")
    drawn = {"at": -1, "kept": True}

    def mask(core: Tensor) -> None:
        if core.grad is None:
            return
        if drawn["at"] != turn():
            drawn.update(at=turn(), kept=bool(torch.rand((), generator=generator) < keep))
        if not drawn["kept"]:
            core.grad.zero_()

    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(mask)
    return handle


def mask_central(optimizer: Optimizer, model: nn.Module, *, keep: float | None = None, seed: int = 0) -> None:
    """Mask the gradient of each trained central core of the ``MPOExperts`` in ``model``, as ``mask_gradient`` does.

    The preset "mpoe" uses it. The state of the draws is in ``optimizer.state``, so a run that resumes from a checkpoint
    goes on with the same draws (torch's ``get_optimizer_state_dict`` keeps them, too). All processes draw alike.

    Args:
        optimizer: the optimizer that trains the cores.
        keep: the probability that a gradient stays; None is 1/E.
        seed: the seed of the draws.

    Raises:
        UserError: ``model`` has no trained central core, or ``keep`` is not in [0, 1].

    >>> bank = MPOExperts(4, 8, 8)
    >>> optimizer = torch.optim.SGD(bank.parameters(), lr=0.1)
    >>> mask_central(optimizer, bank, keep=0.0)
    >>> before = bank.up.central.detach().clone()
    >>> bank(torch.randn(5, 8), torch.tensor([2, 0, 3, 0])).sum().backward()
    >>> optimizer.step()
    >>> torch.equal(bank.up.central, before)
    True
    """
    banks = [module for module in model.modules() if isinstance(module, MPOExperts)]
    cores = [(core, bank.num_experts) for bank in banks for core in bank.central if core.requires_grad]
    if not cores:
        raise UserError('mask_central: no central core is trained here; take experts = "mpo", or no mask_central')
    generators = [torch.Generator().manual_seed(seed * len(cores) + number) for number in range(len(cores))]
    done = 0
    for (core, num_experts), generator in zip(cores, generators, strict=True):
        _masked(core, 1 / num_experts if keep is None else keep, generator, lambda: done)

    def remember(optimizer: Optimizer, *_: Any) -> None:
        nonlocal done
        done += 1
        states_of(optimizer)[STATE] = {str(number): each.get_state() for number, each in enumerate(generators)}

    def go_on(optimizer: Optimizer) -> None:
        for number, state in states_of(optimizer).get(STATE, {}).items():
            generators[int(number)].set_state(full(state).to("cpu", torch.uint8))

    travel_with(optimizer, STATE, cores[0][0])
    optimizer.register_step_post_hook(remember)
    optimizer.register_load_state_dict_post_hook(go_on)
    if STATE in (state := moved_home(own := states_of(optimizer), STATE)):
        own.clear()
        own.update(state)
    go_on(optimizer)  # where a checkpoint was loaded before
