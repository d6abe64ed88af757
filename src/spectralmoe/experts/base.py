"""Experts: a bank of E networks D -> D that sees rows sorted by expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spectralmoe.context import Rows
from spectralmoe.errors import UserError
from spectralmoe.parts import Part
from spectralmoe.stacks import chosen_experts, copy_with, means

__all__ = ["Answer", "Experts", "answer_of", "per_row"]


class Answer(NamedTuple):
    """What experts make of rows (M, *S), where it is more than rows of the same shape.

    Attributes:
        y: (M, *S).
        gain: (M,), multiplies the combine weight of each row; None: 1.
        said: what they say of themselves, name -> (M, ...); ``record(model, keep=name)`` keeps it.
    """

    y: Tensor
    gain: Tensor | None = None
    said: dict[str, Tensor] | None = None

    @property
    def gained(self) -> Tensor:
        """The rows times their gain (M, *S)."""
        return self.y if self.gain is None else self.y * per_row(self.gain.to(self.y.dtype), self.y)


class Experts(Part):
    """Base of all expert banks. A subclass must define ``expert`` or ``answer``; the rest has slow, correct defaults.

    Rows are (M, D), or (M, *S) where the layer routes wider units (``spectralmoe.units``). A bank whose experts have a
    hidden layer defines ``hidden`` and ``project`` as well, so that the hidden activations can be recorded. The rows of
    a bank that names side information in ``reads`` are D + P wide: what it reads stands behind the token, as ``reads``
    has it.
    """

    row_dims: int | None = None
    """How many dimensions a row has: 1 for (D,), 3 for (C, H, W); None: any."""

    says: tuple[str, ...] = ()
    """The names of what its answers say of themselves."""

    @property
    def reshapes(self) -> bool:
        """Whether outputs are of another shape than rows: by default where side information makes rows wider."""
        return bool(self.reads)

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise UserError(f"{type(self).__name__}: num_experts must be at least 1, got {num_experts}")
        self.num_experts = num_experts

    def beside(self, x: Tensor, context: Rows | None) -> Tensor:
        """Rows x (N, D, *S) with what the bank ``reads`` of the context behind the D: (N, D + P, *S)."""
        read = [self.read(context, name, len(x)).to(x.dtype) for name in self.reads]
        wide = [values[(..., *[None] * (x.dim() - 2))].expand(-1, -1, *x.shape[2:]) for values in read]
        return torch.cat([x, *wide], 1) if wide else x

    def expert(self, x: Tensor, e: int) -> Tensor:
        """The definition: expert ``e`` applied to x (M, *S) -> (M, *S), gain included."""
        if type(self).answer is Experts.answer:
            raise NotImplementedError
        return self.answer(x, e).gained

    def answer(self, x: Tensor, e: int) -> Answer:
        """The same with its gain apart, and with what the expert says of itself; for banks that have either."""
        return Answer(self.expert(x, e))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor | Answer:
        """All experts on rows sorted by expert: x (M, *S), counts (E,) int64 -> (M, *S), or an ``Answer``.

        ``counts`` are on the device of x, or on the host where the bank ``reads_loads``.

        Where gradients are wanted an expert without rows gets an empty batch: its gradient is zero then and not
        missing, which DDP would take for an unused parameter. Else it does not run.
        """
        sizes = counts.tolist()
        *blocks, rest = x.split([*sizes, x.shape[0] - sum(sizes)])
        all_run = torch.is_grad_enabled() or torch.compiler.is_compiling()
        busy = [(block, e) for e, block in enumerate(blocks) if all_run or len(block)]
        answers = [self.answer(block, e) for block, e in busy or [(x[:0], 0)]]
        y = _joined([answer.y for answer in answers], len(rest))
        gains = [answer.gain for answer in answers if answer.gain is not None]
        said = {name: [(answer.said or {})[name] for answer in answers] for name in answers[0].said or {}}
        if not gains and not said:
            return y
        told = {name: _joined(values, len(rest)) for name, values in said.items()}
        return Answer(y, _joined(gains, len(rest)) if gains else None, told)

    def reads_loads(self, x: Tensor) -> bool:
        """Whether ``forward`` of rows like x reads the counts on the host: then it gets them there.

        For that the host waits for a device, once a layer. By default where the experts run one after the other.
        """
        return type(self).forward is Experts.forward

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        """The dense form: sum_e weights[:, e] * expert_e(x), for x (N, *S) and weights (N, E)."""
        outputs = [per_row(weights[:, e], x) * self.expert(x, e) for e in range(self.num_experts)]
        return torch.stack(outputs).sum(0)

    def hidden(self, x: Tensor, counts: Tensor) -> Tensor | None:
        """Hidden activations (M, H) of rows sorted by expert; None if the bank has none to show.

        Where there are any, ``forward(x)`` must be ``project(hidden(x))``, gain included.
        """
        return None

    def project(self, hidden: Tensor, counts: Tensor) -> Tensor | Answer:
        """What ``forward`` returns, from what ``hidden`` returned."""
        raise NotImplementedError

    def on_stacks(
        self,
        x: Tensor,
        counts: Tensor,
        stacks: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
        *,
        hidden: bool = False,
    ) -> tuple[Answer, Tensor | None]:
        """``answer_of`` with other experts: ``stacks`` makes theirs, name -> (E', ...), from those of the bank.

        A bank under FSDP2 gathers its parameters for it where the method is registered
        (``torch.distributed.fsdp.register_fsdp_forward_method``).

        >>> from spectralmoe import FeedForward
        >>> bank, x = FeedForward(4, dim=8, hidden=16), torch.ones(3, 8)
        >>> two = lambda own: {name: stack[1:3] for name, stack in own.items()}
        >>> answer, _ = bank.on_stacks(x, torch.tensor([3, 0]), two)
        >>> torch.allclose(answer.y, bank.expert(x, 1))
        True
        """
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        named = {f"bank.{name}": stack for name, stack in stacks(own).items()}
        made: tuple[Answer, Tensor | None] = functional_call(_Bank(self), named, (x, counts, hidden))
        return made

    def expert_parameters(self, e: int) -> dict[str, Tensor]:
        """Views of the parameters that belong to expert ``e`` alone; empty: it cannot be adapted alone."""
        return {}

    @property
    def first_weight(self) -> nn.Parameter | None:
        """The matrices (E, H, D), stacked, that rows (M, D) meet first; None: there is no such stack."""
        return None

    def costs(self, shape: Sequence[int] = ()) -> Tensor:
        """Floating-point operations of each expert on one row, (E,) float64; multiply and add are two.

        By default two for each number of the expert's own matrices, which every row meets once.

        Args:
            shape: of a row (*S), for banks whose work depends on it.

        Raises:
            UserError: a bank without ``expert_parameters``, which has to say it itself.
        """
        owned = [self.expert_parameters(e).values() for e in range(self.num_experts)]
        if not all(owned):
            raise UserError(f"{type(self).__name__} does not say what its experts cost; define costs()")
        numbers = [sum(part.numel() for part in parts if part.dim() > 1) for parts in owned]
        return 2 * torch.tensor(numbers, dtype=torch.float64)

    def mix_cost(self, shape: Sequence[int] = ()) -> float:
        """Floating-point operations of ``mix`` on one row: by default every expert's, as ``costs`` has them."""
        return float(self.costs(shape).sum())

    def select(self, indices: Sequence[int] | Tensor) -> Experts:
        """A bank of the experts ``indices``, in this order, in memory of its own and with the same bits.

        An expert may stand several times. As ``averaged``, this takes every parameter and buffer for a stack of one
        entry an expert; a bank that holds others overrides both.

        Raises:
            UserError: no index, or one out of range; a tensor that is no such stack.

        >>> from spectralmoe import FeedForward
        >>> bank = FeedForward(4, dim=8, hidden=16)
        >>> torch.equal(bank.select([2, 0]).up[0], bank.up[2])
        True
        """
        chosen = chosen_experts(f"{type(self).__name__}.select", indices, self.num_experts)
        return self._restacked(lambda stack: stack[chosen], len(chosen))

    def averaged(self, groups: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None) -> Experts:
        r"""A bank of one expert a group, with the weighted means of the members' tensors.

        .. math:: \theta_g = \sum_{i \in g} w_{gi} \theta_i \Big/ \sum_{i \in g} w_{gi}

        Computed in float64. An expert may be in several groups, or in none; a group of one keeps its values.

        Args:
            groups: the members of each group.
            weights: one number for each member, not negative; None: all alike.

        Raises:
            UserError: as ``select``; an empty group; weights that do not go with the groups, or are all 0 in one.
        """
        members, shares = self._shares(groups, weights)

        def mean(stack: Tensor) -> Tensor:
            if not stack.is_floating_point():
                raise UserError(f"{type(self).__name__}.averaged: a buffer of {stack.dtype} has no mean")
            return means(stack, members, shares)

        return self._restacked(mean, len(members))

    def _shares(
        self, groups: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None
    ) -> tuple[list[list[int]], list[Tensor]]:
        """The members of each group, and their weights (n,) with sum 1."""
        owner = f"{type(self).__name__}.averaged"
        members = [chosen_experts(owner, group, self.num_experts) for group in groups]
        given = [[1.0] * len(group) for group in members] if weights is None else weights
        if not members or [len(row) for row in given] != [len(group) for group in members]:
            raise UserError(f"{owner}: needs at least one group, and a weight for each of its members")
        shares = [torch.tensor(row, dtype=torch.float64) for row in given]
        for group, share in zip(members, shares, strict=True):
            if not (share.isfinite().all() and (share >= 0).all() and share.sum() > 0):
                raise UserError(
                    f"{owner}: weights must be finite, not negative and not all 0; {group} has {share.tolist()}"
                )
        return members, [share / share.sum() for share in shares]

    def _restacked(self, change: Callable[[Tensor], Tensor], num_experts: int) -> Experts:
        """A copy of ``num_experts`` experts, with ``change`` done to every stack."""
        stacks = [*self.named_parameters(), *self.named_buffers()]
        for name, stack in stacks:
            if not stack.dim() or len(stack) != self.num_experts:
                raise UserError(
                    f"{type(self).__name__} cannot be taken apart: {name!r} of shape {tuple(stack.shape)} is no stack "
                    f"of E={self.num_experts} experts"
                )
        bank = copy_with(self, {stack: change(stack.detach()) for _, stack in stacks})
        bank.num_experts = num_experts
        return bank


class _Bank(nn.Module):
    """A bank whose stacks ``functional_call`` replaces, without the hooks that look after its own."""

    def __init__(self, bank: Experts) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, x: Tensor, counts: Tensor, hidden: bool) -> tuple[Answer, Tensor | None]:
        return answer_of(self.bank, x, counts, hidden=hidden, forward=self.bank.forward)


def answer_of(
    experts: Experts,
    x: Tensor,
    counts: Tensor,
    *,
    hidden: bool,
    forward: Callable[[Tensor, Tensor], Tensor | Answer] | None = None,
) -> tuple[Answer, Tensor | None]:
    """What a bank makes of rows x (M, *S) sorted by expert, and with ``hidden`` its hidden activations.

    Args:
        forward: of the bank; None: with its hooks.

    Raises:
        UserError: the bank has no hidden activations.
    """
    inside = experts.hidden(x, counts) if hidden else None
    if hidden and inside is None:
        raise UserError(f"record(keep=...): {type(experts).__name__} has no 'hidden' to keep")
    result = (forward or experts)(x, counts) if inside is None else experts.project(inside, counts)
    return result if isinstance(result, Answer) else Answer(result), inside


def per_row(values: Tensor, rows: Tensor) -> Tensor:
    """``values`` (M,) with as many dimensions as ``rows`` (M, *S), to be multiplied with them."""
    return values.reshape(-1, *[1] * (rows.dim() - 1))


def _joined(parts: list[Tensor], rest: int) -> Tensor:
    """The rows of all experts, and zeros for ``rest`` rows of nobody."""
    return torch.cat([*parts, parts[0].new_zeros(rest, *parts[0].shape[1:])])
