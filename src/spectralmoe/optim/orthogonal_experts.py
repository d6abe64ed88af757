"""OMoE: every expert takes steps that are orthogonal to the inputs of the other experts.

Liu et al., "Diversifying the Mixture-of-Experts Representation for Language Models with Orthogonal Optimizer", arXiv
2310.09762 (another OMoE, arXiv 2501.10062, makes the outputs of LoRA experts orthogonal). Authors' code: not found.
Differs: projectors come in closed form, from means of x x' over tokens, micro-batches and ranks, instead of their
recursion over tokens. x is centred, because the direction that all tokens share takes up most of a projector. The norm
of a step is kept, so that an effect is not that of smaller steps. The defaults of phase and alpha and the choice of
matrices are ours.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from spectralmoe.errors import UserError, one_of
from spectralmoe.layers import moe_layers
from spectralmoe.movement import parallel_of, refuse_join
from spectralmoe.optim.own_state import moved_home, states_of, travel_with
from spectralmoe.optim.projectors import add_inputs, others, projected, projectors
from spectralmoe.recording import Recordable
from spectralmoe.sharding import full
from spectralmoe.tape import Tape
from spectralmoe.torch_private import hooks_before_step

__all__ = ["OrthogonalExperts"]

STATE = "orthogonal_experts"
"""Where an optimizer keeps it: ``optimizer.state[STATE]``."""

_START = {"steps": 0, "gathers": True}
_SUMS = ("outer", "sum", "count")


class OrthogonalExperts:
    r"""Projects each expert's steps so that they are orthogonal to the inputs of the other experts.

    It works by hooks on ``optimizer``, which ``remove()`` takes off. For ``phase`` steps the optimizer works as usual,
    and the inputs x of each expert are added up. For the next ``phase`` steps the first matrix (H, D) of each expert e
    moves along

    .. math::
        \Delta W_e \leftarrow \Delta W_e \,\frac{1}{E - 1} \sum_{j \ne e} P_j, \qquad
        P_j = \Big(I + \frac{C_j}{\alpha \,\mathrm{tr}(C_j) / D}\Big)^{-1}, \qquad
        C_j = \mathrm{mean}_{x \to j}\,(x - m)(x - m)^\top;

    and then the sums start anew. The mean over :math:`x \to j` is over the inputs of expert j, and m is the mean input
    of all experts. The projector of an expert without inputs is the identity. A mean of projectors is no projector:
    with many experts it shrinks all used directions alike, which is why the norm of the step is restored.

    **With AdamW** a projected gradient is not a projected step: the momentum holds older gradients, and the division by
    root mean squares partly undoes the projection. ``on="update"`` projects the change of the weights itself, weight
    decay included.

    It works with accumulation, gradient scalers, closures (``on="update"``), checkpoints, DDP and FSDP2. The state is
    in ``optimizer.state`` and so in its state dicts (torch's ``get_optimizer_state_dict``, too). The sums are added up
    over the ranks at the end of a phase; a checkpoint from before that holds those of the rank that wrote it, which
    then count for all ranks. The cost of a layer is E matrices (D, D) on every rank, their eigenvectors once in two
    phases, and the tokens of its forwards until the next step.

    Args:
        optimizer: the optimizer that trains the experts of ``model``; if there are several, that one, or ``Together``.
        phase: the number of steps in each of the two phases.
        alpha: > 0, in units of the mean eigenvalue of C_j; the smaller, the more a used direction is blocked.
        center: whether x is centred by m; if False, m is 0.
        rank: None takes the inverse above; a number R takes P_j = I - V V' with the R leading eigenvectors of C_j.
        on: "gradient" projects the gradient before a step, "update" the change of the weights after it.
        match_norm: whether each expert's projected step is scaled to the norm that it had.
        group: the process group over which sums are taken, as for ``attach``.

    Attributes:
        layers: the MoE layers whose experts' first matrices are trained, by name.

    Raises:
        UserError: a value is out of range; the optimizer trains no experts of the model, or has projectors already; a
            layer has one expert alone, a placement, or experts without ``first_weight``. At a step: a closure computes
            the gradient with ``on="gradient"``, or torch's ``Join`` is used. On loading: the state is of other layers.

    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
    >>> layer = MoE(Router(LinearScorer(8, 2), TopK(1)), FeedForward(2, 8, 4))
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> projected = OrthogonalExperts(optimizer, layer, phase=1, alpha=1e-6, center=False, match_norm=False)
    >>> x = torch.randn(5, 8)  # 5 tokens leave 3 directions of 8 free
    >>> for _ in range(2):  # one step of each phase
    ...     start = layer.experts.up.detach().clone()
    ...     layer(x).sum().backward()
    ...     optimizer.step()
    >>> expert = layer.router(x).indices[0, 0]  # the token lies in what this expert has seen
    >>> moved = (layer.experts.up.detach() - start)[1 - expert]
    >>> bool((moved @ x[0]).abs().max() < 1e-4)
    True
    >>> projected.remove()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        phase: int = 100,
        alpha: float = 0.1,
        center: bool = True,
        rank: int | None = None,
        on: Literal["gradient", "update"] = "gradient",
        match_norm: bool = True,
        group: Any = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise UserError(
                f"OrthogonalExperts: takes a torch optimizer, then the model; got a {type(optimizer).__name__}"
            )
        whole = all(isinstance(each, int) and each >= 1 for each in (phase, 1 if rank is None else rank))
        if not whole or not 0 < alpha < math.inf:
            wrong = f"phase={phase}, alpha={alpha}, rank={rank}"
            raise UserError(f"OrthogonalExperts: phase and rank must be at least 1, alpha positive; got {wrong}")
        if on not in ("gradient", "update"):
            raise one_of("on", on, ["gradient", "update"])
        hooked = any(isinstance(getattr(h, "__self__", None), OrthogonalExperts) for h in hooks_before_step(optimizer))
        if hooked or STATE in moved_home(states_of(optimizer), STATE):
            raise UserError(
                f"OrthogonalExperts: this {type(optimizer).__name__} has projectors already; remove() the first, and "
                "load a state after this is made"
            )
        self.phase, self.alpha, self.center, self.rank = phase, alpha, center, rank
        self.on, self.match_norm, self.group = on, match_norm, group
        self.layers = _trained_layers(optimizer, model, rank)
        self._parallel = parallel_of(model)
        self._before: dict[str, Tensor] = {}
        self._tape = Tape(self.layers, keep=("tokens",), training_only=True)
        self._tape.open()
        self._optimizer = weakref.ref(optimizer)
        self._gone = weakref.finalize(optimizer, self._tape.seal)
        self._gone.atexit = False
        self._handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(self._loaded),
            *travel_with(optimizer, STATE, next(iter(self._weights().values())), self._whole),
        )

    def remove(self) -> None:
        """Take the hooks and the state off the optimizer, and stop recording."""
        self._tape.seal()
        self._gone.detach()
        for handle in self._handles:
            handle.remove()
        if (optimizer := self._optimizer()) is not None:
            states_of(optimizer).pop(STATE, None)

    def protect(self, outer: Tensor, total: Tensor, count: Tensor) -> Tensor:
        """Return the projectors P_j (E, D, D) by the sums of x x' (E, D, D) and of x (E, D), and the counts (E,)."""
        return projectors(outer, total, count, alpha=self.alpha, center=self.center, rank=self.rank)

    def project(self, step: Tensor, free: Tensor) -> Tensor:
        """Project the step (E, H, D) of each expert by ``free`` (E, D, D), the mean projector of the others."""
        return projected(step, free, match_norm=self.match_norm)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        refuse_join(self._parallel, "without Join, with as many batches on every rank")
        if self.on == "gradient" and kwargs.get("closure", args[1] if len(args) > 1 else None) is not None:
            raise UserError('OrthogonalExperts: this closure computes the gradient within the step; use on="update"')
        own = states_of(optimizer)[STATE] = states_of(optimizer).get(STATE) or dict(_START)
        if own["gathers"]:
            self._gather(own)
        elif self.on == "update":
            self._before = {name: weight.detach().clone() for name, weight in self._weights().items()}
        else:
            for name, weight in self._weights().items():
                if weight.grad is not None:
                    weight.grad.copy_(self.project(weight.grad, own[f"{name}.others"]))

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        own = states_of(optimizer)[STATE]
        if own["gathers"]:
            self._gather(own)  # forwards of a closure
        for name, before in self._before.items():
            weight = self._weights()[name]
            weight.copy_(before + self.project(weight - before, own[f"{name}.others"]))
        self._before = {}
        own["steps"] += 1
        if own["steps"] >= self.phase:
            self._turn(own)

    def _loaded(self, optimizer: Optimizer) -> None:
        """The state is the loaded one, in memory of its own; recording follows its phase."""
        loaded: dict[str, Any] = states_of(optimizer).get(STATE) or _START
        other = ("others",) if loaded["gathers"] else _SUMS  # zeros of the other phase, see ``_whole``
        loaded = {key: value for key, value in loaded.items() if key.rpartition(".")[2] not in other}
        devices = {name: weight.device for name, weight in self._weights().items()}
        owner = {key: key.rpartition(".")[0] for key, value in loaded.items() if isinstance(value, Tensor)}
        names = {*owner.values()}
        if names - devices.keys() or (not loaded["gathers"] and names != devices.keys()):
            theirs, ours = (", ".join(map(repr, sorted(each))) for each in (names, devices))
            raise UserError(f"OrthogonalExperts: the loaded state is of layers {theirs}, the trained ones are {ours}")
        own = states_of(optimizer)[STATE] = {
            key: full(value).to(devices[owner[key]], copy=True) if key in owner else value
            for key, value in loaded.items()
        }
        self._record(own["gathers"])

    def _record(self, gathers: bool) -> None:
        """Record from here on, or no more."""
        self._tape.seal()
        self._tape.drain()
        if gathers:
            self._tape.open()

    def _weights(self) -> dict[str, nn.Parameter]:
        return {name: _bank(layer).first_weight for name, layer in self.layers.items()}

    def _gather(self, own: dict[str, Any]) -> None:
        """Add the inputs of the forwards since the last step to the sums."""
        for record in self._tape.drain():
            add_inputs(self._sums(own, record.name), record)

    def _sums(self, own: dict[str, Any], name: str) -> list[Tensor]:
        """The sums of x x' (E, D, D) and of x (E, D), and the counts (E,), of a layer; zeros before its first token."""
        if f"{name}.outer" not in own:
            weight = self._weights()[name]
            experts, _, dim = weight.shape
            dtype = torch.promote_types(weight.dtype, torch.float32)
            own[f"{name}.outer"] = torch.zeros(experts, dim, dim, dtype=dtype, device=weight.device)
            own[f"{name}.sum"] = torch.zeros(experts, dim, dtype=dtype, device=weight.device)
            own[f"{name}.count"] = torch.zeros(experts, dtype=torch.int64, device=weight.device)
        return [own[f"{name}.{key}"] for key in _SUMS]

    def _whole(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The state with the tensors of both phases, zeros where there are none."""
        whole = dict(own)
        for name in self.layers:
            outer, *_ = self._sums(whole, name)
            whole.setdefault(f"{name}.others", torch.zeros_like(outer))
        return whole

    def _turn(self, own: dict[str, Any]) -> None:
        """Go over to the other phase: make projectors of the sums, or begin to gather."""
        for name in self.layers:
            if own["gathers"]:
                own[f"{name}.others"] = others(self.protect(*self._summed(self._sums(own, name))))
            for key in _SUMS if own["gathers"] else ("others",):
                del own[f"{name}.{key}"]
        own["steps"], own["gathers"] = 0, not own["gathers"]
        self._record(own["gathers"])

    def _summed(self, sums: Sequence[Tensor]) -> Sequence[Tensor]:
        """The sums over all ranks."""
        if dist.is_available() and dist.is_initialized():
            for total in sums:
                dist.all_reduce(total, group=self.group)
        return sums


def _bank(layer: Recordable) -> Any:
    return getattr(layer, "experts", None)


def _trained_layers(optimizer: Optimizer, model: nn.Module, rank: int | None) -> dict[str, Recordable]:
    """The layers whose experts are trained, if they are such that their steps can be projected."""
    here = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    found = {}
    for name, layer in moe_layers(model).items():
        bank = _bank(layer)
        weight = getattr(bank, "first_weight", None)
        moving = () if bank is None else bank.parameters() if weight is None else (weight,)
        if not any(parameter.requires_grad for parameter in moving):
            continue
        who = f"OrthogonalExperts: layer {name!r}"
        if bank.num_experts == 1:
            raise UserError(f"{who} has one expert, and so no others to be orthogonal to; give it more, or freeze it")
        if weight is None or getattr(layer, "placement", None) is not None:
            what = f"has {type(bank).__name__} without a stack (E, H, D)" if weight is None else "has a placement"
            raise UserError(f"{who} {what}; take experts such as FeedForward, one place each, or freeze it")
        if id(weight) not in here:
            raise UserError(f"{who} is not trained by this {type(optimizer).__name__}; name the optimizer that does")
        if rank is not None and rank >= weight.shape[-1]:
            raise UserError(f"{who} has D={weight.shape[-1]}, and rank={rank} leaves no direction; make it smaller")
        found[name] = layer
    if not found:
        raise UserError(
            "OrthogonalExperts: no bank of experts is trained here; unfreeze one (those of other libraries stay)"
        )
    return found
