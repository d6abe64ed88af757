"""A bank holds the E experts of a layer, and runs them on rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spectralmoe.context import Rows
from spectralmoe.errors import UserError
from spectralmoe.experts.answer import Answer, joined, per_row
from spectralmoe.parts import Part
from spectralmoe.stacks import chosen_experts, copy_with, means, shares_of

__all__ = ["Experts", "answer_of"]


class Experts(Part):
    """The base class of all banks of experts.

    A subclass must define ``expert`` or ``answer``; all else has defaults that are correct and slow. A row is a token
    (D,), or of shape (*S) in a layer that routes pixels or samples (``spectralmoe.units``). If the experts have a
    hidden layer, ``hidden`` and ``project`` make its activations recordable. If a subclass names side information in
    ``reads``, its rows are (D + P,): the P numbers stand behind the token, in the order of ``reads``.

    Args:
        num_experts: E.

    >>> class Scale(Experts):  # expert e multiplies by e + 1
    ...     def expert(self, x, e):
    ...         return (e + 1) * x
    >>> Scale(2)(torch.ones(3, 1), counts=torch.tensor([1, 2])).flatten().tolist()
    [1.0, 2.0, 2.0]
    """

    row_dims: int | None = None
    """How many dimensions a row must have: 1 for (D,), 3 for (C, H, W); None takes any."""

    says: tuple[str, ...] = ()
    """The names in ``Answer.said``, which ``record(model, keep=...)`` can keep."""

    @property
    def reshapes(self) -> bool:
        """Whether outputs have another shape than rows; by default, whether side information makes rows wider."""
        return bool(self.reads)

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise UserError(f"{type(self).__name__}: num_experts must be at least 1, got {num_experts}")
        self.num_experts = num_experts

    def beside(self, x: Tensor, context: Rows | None) -> Tensor:
        """Append the side information that the bank ``reads`` to the rows x (N, D, *S): (N, D + P, *S)."""
        read = [self.read(context, name, len(x)).to(x.dtype) for name in self.reads]
        wide = [values[(..., *[None] * (x.dim() - 2))].expand(-1, -1, *x.shape[2:]) for values in read]
        return torch.cat([x, *wide], 1) if wide else x

    def expert(self, x: Tensor, e: int) -> Tensor:
        """Apply expert ``e`` to x (M, *S) -> (M, *S), gain included. This defines what the bank computes."""
        if type(self).answer is Experts.answer:
            raise NotImplementedError
        return self.answer(x, e).gained

    def answer(self, x: Tensor, e: int) -> Answer:
        """Apply expert ``e`` to x (M, *S) and return its gain and further values apart from its output."""
        return Answer(self.expert(x, e))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor | Answer:
        """Run all experts on rows sorted by expert: x (M, *S) -> (M, *S), or an ``Answer``.

        With gradients enabled, an expert without rows runs on an empty batch, so that its gradient is zero and not
        missing; DDP would take a missing one for an unused parameter.

        Args:
            counts: (E,) int64, the rows of each expert; on the device of x, or on the CPU if ``reads_loads(x)``.
        """
        sizes = counts.tolist()
        *blocks, rest = x.split([*sizes, x.shape[0] - sum(sizes)])
        all_run = torch.is_grad_enabled() or torch.compiler.is_compiling()
        busy = [(block, e) for e, block in enumerate(blocks) if all_run or len(block)]
        answers = [self.answer(block, e) for block, e in busy or [(x[:0], 0)]]
        return joined(answers, len(rest))

    def reads_loads(self, x: Tensor) -> bool:
        """Return whether ``forward`` wants its counts on the CPU, for rows like x.

        The layer then waits for the GPU once a forward. By default this is so if the experts run one after the other.
        """
        return type(self).forward is Experts.forward

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        """Run all experts on all rows and add them up: sum_e weights[:, e] * expert_e(x), x (N, *S), weights (N, E)."""
        outputs = [per_row(weights[:, e], x) * self.expert(x, e).to(weights.dtype) for e in range(self.num_experts)]
        return torch.stack(outputs).sum(0)

    def hidden(self, x: Tensor, counts: Tensor) -> Tensor | None:
        """Return the hidden activations (M, H) of rows sorted by expert; None if the experts have no hidden layer.

        If they do, ``forward(x, counts)`` must equal ``project(hidden(x, counts), counts)``, gain included.
        """
        return None

    def project(self, hidden: Tensor, counts: Tensor) -> Tensor | Answer:
        """Return what ``forward`` returns, given what ``hidden`` returned."""
        raise NotImplementedError

    def on_stacks(
        self,
        x: Tensor,
        counts: Tensor,
        stacks: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
        *,
        hidden: bool = False,
    ) -> tuple[Answer, Tensor | None]:
        """Run other experts E' in place of this bank's: ``answer_of`` with the tensors that ``stacks`` makes.

        Under FSDP2, register this method with ``torch.distributed.fsdp.register_fsdp_forward_method``, so that the
        bank's parameters are gathered for it.

        Args:
            stacks: a function from the bank's tensors, name -> (E, ...), to those of the other experts, (E', ...).
            hidden: whether the hidden activations are returned as well.

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
        """Return views of the parameters that belong to expert ``e`` alone; if empty, it cannot be changed alone."""
        return {}

    @property
    def first_weight(self) -> nn.Parameter | None:
        """The stacked first matrices (E, H, D) of the experts; None if there is no such stack."""
        return None

    def costs(self, shape: Sequence[int] = ()) -> Tensor:
        """Return the floating-point operations of each expert on one row, (E,) float64; multiply and add are two.

        By default these are two for each number in the expert's own matrices.

        Args:
            shape: the shape (*S) of a row, for banks whose work depends on it.

        Raises:
            UserError: the bank has no ``expert_parameters``; it must override this.
        """
        owned = [self.expert_parameters(e).values() for e in range(self.num_experts)]
        if not all(owned):
            raise UserError(f"{type(self).__name__} does not say what its experts cost; define its method costs()")
        numbers = [sum(part.numel() for part in parts if part.dim() > 1) for parts in owned]
        return 2 * torch.tensor(numbers, dtype=torch.float64)

    def mix_cost(self, shape: Sequence[int] = ()) -> float:
        """Return the floating-point operations of ``mix`` on one row; by default the sum of ``costs``."""
        return float(self.costs(shape).sum())

    def select(self, indices: Sequence[int] | Tensor) -> Experts:
        """Return a new bank of copies of the experts ``indices``, in this order; an expert may be named several times.

        This method and ``averaged`` assume that every parameter and buffer has one entry an expert along its first
        dimension. A bank with other tensors overrides both.

        Raises:
            UserError: ``indices`` is empty or names an expert that does not exist, or a tensor has another form.

        >>> from spectralmoe import FeedForward
        >>> bank = FeedForward(4, dim=8, hidden=16)
        >>> torch.equal(bank.select([2, 0]).up[0], bank.up[2])
        True
        """
        chosen = chosen_experts(f"{type(self).__name__}.select", indices, self.num_experts)
        return self._restacked(lambda stack: stack[chosen], len(chosen))

    def averaged(self, groups: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None) -> Experts:
        r"""Return a new bank with one expert for each group, whose tensors are weighted means of the members'.

        .. math:: \theta_g = \sum_{i \in g} w_{gi} \theta_i \Big/ \sum_{i \in g} w_{gi}

        The means are computed in float64. An expert may be in several groups or in none; a group of one keeps its
        values.

        Args:
            groups: the members of each group.
            weights: one number >= 0 for each member; None weighs all alike.

        Raises:
            UserError: as ``select``; a group is empty, or the weights do not fit the groups or are all 0 in one.
        """
        owner = f"{type(self).__name__}.averaged"
        members, shares = shares_of(owner, groups, weights, self.num_experts)

        def mean(stack: Tensor) -> Tensor:
            if not stack.is_floating_point():
                raise UserError(f"{owner}: a buffer of {stack.dtype} has no mean")
            return means(stack, members, shares)

        return self._restacked(mean, len(members))

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
    """Run a bank on rows x (M, *S) sorted by expert: its ``Answer``, and the hidden activations or None.

    Args:
        hidden: whether the hidden activations are returned as well.
        forward: what to call; None calls the bank with its hooks.

    Raises:
        UserError: ``hidden`` is wanted and the experts have no hidden layer.
    """
    inside = experts.hidden(x, counts) if hidden else None
    if hidden and inside is None:
        raise UserError(
            f"record(keep=...): {type(experts).__name__} has no 'hidden' to keep, as its experts have no hidden layer; "
            "keep 'output'"
        )
    result = (forward or experts)(x, counts) if inside is None else experts.project(inside, counts)
    return result if isinstance(result, Answer) else Answer(result), inside
