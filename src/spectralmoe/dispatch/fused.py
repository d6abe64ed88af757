"""One operator that gathers rows, runs the experts and adds up: ``Grouped`` uses it for feed-forward banks on a CPU.

The composed form (``spread`` -> experts -> ``combine``) allocates a tensor of all rows at every step, and on a CPU that
costs about as much time as the arithmetic. Here a block of rows goes through all steps in buffers that the next block
uses again. For the backward pass the hidden layer before its activation and the output rows are kept; it applies the
activation again and writes the experts' gradients in place. Or nothing is kept, and the first layer runs again.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.dispatch.blocks import Layout, lay_out, rows_at_most, sort_by_expert
from spectralmoe.dispatch.fused_passes import Bank
from spectralmoe.experts import Experts, FeedForward
from spectralmoe.experts.feed_forward import Activation, activate
from spectralmoe.routing import Routing
from spectralmoe.torch_private import has_hooks

__all__ = ["can_fuse", "fused"]

_BLOCK = 2**22  # bytes of hidden activations in a block: few enough for the cache, enough rows for a GEMM


def can_fuse(experts: Experts, x: Tensor) -> TypeGuard[FeedForward]:
    """Return whether the operator computes what this bank does: a ``FeedForward`` forward, on a CPU, without hooks."""
    kind, plain = type(experts), FeedForward
    return (
        isinstance(experts, plain)
        and (kind.forward, kind.hidden, kind.project) == (plain.forward, plain.hidden, plain.project)
        and x.device.type == "cpu"
        and not has_hooks(experts)
    )


def fused(x: Tensor, routing: Routing, bank: FeedForward, *, recompute: bool = False) -> Tensor:
    """Run a layer's experts on tokens x (N, D): (N, D), equal to the composed form up to rounding."""
    parts = [None if part is None else part.to(x.dtype) for part in (bank.up, bank.down, bank.up_bias, bank.down_bias)]
    inputs = (x, routing.weights, *parts)
    trains = torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in inputs)
    keep = trains and not recompute
    return _forward(x, routing.weights, routing.indices, *parts, bank.activation, keep)[0]  # type: ignore[no-any-return]


@torch.library.custom_op("spectralmoe::fused_experts", mutates_args=())
def _forward(  # noqa: PLR0917 (the schema of the operator)
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output (N, D); order (N * K,); counts (E,); and what is kept of the rows as they are laid out: ``_kept``."""
    order, counts = sort_by_expert(indices, up.shape[0])
    bank, layout = Bank(up, down, up_bias, down_bias, activation), _layout(order, counts, down)
    tokens, scale, most = layout.slots // max(indices.shape[1], 1), layout.scale(weights).to(x.dtype), layout.most
    y = torch.zeros_like(x, dtype=weights.dtype)  # bf16 rows add up in fp32
    rows, act = x.new_empty(most, x.shape[1]), x.new_empty(most, down.shape[2])
    hidden, outputs = (x.new_empty(shape) for shape in _kept(len(order), up, down, keep))
    hidden[layout.end :], outputs[layout.end :] = 0, 0
    before = x.new_empty(0 if keep else most, up.shape[1])
    for block in layout.blocks:
        here, front = slice(block.start, block.start + block.size), slice(block.size)
        row, z = torch.index_select(x, 0, tokens[here], out=rows[front]), hidden[here] if keep else before[front]
        out = outputs[here] if len(outputs) else row
        bank.lift(block, row, hidden=z, act=act[front])
        bank.lower(block, act[front], outputs=out)
        y.index_add_(0, tokens[here], torch.mul(out, scale[here], out=row).to(y.dtype))
    return y.to(x.dtype), order, counts, hidden, outputs


@torch.library.custom_op("spectralmoe::fused_experts_backward", mutates_args=())
def _backward(  # noqa: PLR0917 (the schema of the operator)
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    order: Tensor,
    counts: Tensor,
    hidden: Tensor,
    outputs: Tensor,
    activation: str,
    wants_x: bool,
    wants_bank: bool,
) -> list[Tensor]:
    """The gradients of x, weights, up, down and biases; an empty tensor for each gradient that was not asked for."""
    bank, layout = Bank(up, down, up_bias, down_bias, activation), _layout(order, counts, down)
    tokens, scale, most = layout.slots // max(weights.shape[1], 1), layout.scale(weights).to(x.dtype), layout.most
    kept = len(hidden) > 0
    d_x = x.new_zeros(x.shape if wants_x else 0, dtype=weights.dtype)
    d_up, d_down = (torch.empty_like(part) if wants_bank else part.new_empty(0) for part in (up, down))
    ups, downs, d_ups, d_downs = (stack.unbind() for stack in (up, down, d_up, d_down))
    if wants_bank and len(idle := (counts == 0).nonzero()[:, 0]):
        d_up[idle], d_down[idle] = 0, 0
    d_scale = weights.new_zeros(len(layout.slots))
    d_up_bias, d_down_bias = (
        None if b is None else torch.zeros_like(b, dtype=weights.dtype) for b in (up_bias, down_bias)
    )
    (rows, grads), (act, d_act, spare) = x.new_empty(2, most, x.shape[1]), x.new_empty(3, most, down.shape[2])
    before = x.new_empty(0 if kept else most, up.shape[1])
    d_before = d_act if up.shape[1] == down.shape[2] else x.new_empty(most, up.shape[1])
    for block in layout.blocks:
        here, front = slice(block.start, block.start + block.size), slice(block.size)
        z, h, d_h = hidden[here] if kept else before[front], act[front], d_act[front]
        row = torch.index_select(x, 0, tokens[here], out=rows[front])
        if kept:
            bank.activate(z, spare[front], out=h)
        else:
            bank.lift(block, row, hidden=z, act=h, silu=spare[front])
        g = torch.index_select(grad, 0, tokens[here], out=grads[front])
        if len(outputs):
            d_scale[here] = outputs[here].mul(g).sum(1)
            block.multiply(g.mul_(scale[here]), downs, out=d_h)
        else:
            block.multiply(g, downs, out=d_h)
            d_scale[here] = torch.mul(h, d_h).sum(1)
            if down_bias is not None:
                d_scale[here] += torch.linalg.vecdot(g, block.each(down_bias))
            g.mul_(scale[here])
            d_h.mul_(scale[here])
        if wants_bank:
            block.outer(g, h, out=d_downs)
        bank.activate_backward(d_h, z, spare[front], scratch=h, out=(d_z := d_before[front]))
        if wants_bank:
            block.outer(d_z, row, out=d_ups)
            if d_up_bias is not None and d_down_bias is not None:
                block.add(d_z, out=d_up_bias)
                block.add(g, out=d_down_bias)
        if wants_x:
            block.multiply(d_z, ups, out=row)
            d_x.index_add_(0, tokens[here], row.to(d_x.dtype))
    d_weights = weights.new_zeros(weights.numel())
    d_weights[layout.slots[layout.real]] = d_scale[layout.real]
    d_biases = [bias.to(x.dtype) for bias in (d_up_bias, d_down_bias) if bias is not None]
    return [d_x.to(x.dtype), d_weights.view_as(weights), d_up, d_down, *d_biases]


def _layout(order: Tensor, counts: Tensor, down: Tensor) -> Layout:
    """Blocks whose hidden activations have about ``_BLOCK`` bytes."""
    return lay_out(order, counts, max(_BLOCK // (max(down.shape[1:]) * down.element_size()), 1), down.dtype)


def _kept(slots: int, up: Tensor, down: Tensor, keep: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of what is kept: the hidden layer before its activation, and the outputs if they are narrower.

    The gradient of the weights is a product of outputs with their gradient, or of activations with theirs.
    """
    experts, width, hidden = down.shape
    rows = rows_at_most(slots, experts, down.dtype) if keep else 0
    return (rows, up.shape[1]), (rows if width <= hidden else 0, width)


@_forward.register_fake
def _(x: Tensor, weights: Tensor, indices: Tensor, up: Tensor, down: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    slots, keep = indices.numel(), rest[-1]
    kept = (x.new_empty(shape) for shape in _kept(slots, up, down, keep))
    return torch.empty_like(x), indices.new_empty(slots), indices.new_empty(up.shape[0]), *kept


@_backward.register_fake
def _(grad: Tensor, x: Tensor, weights: Tensor, *rest: Any) -> list[Tensor]:
    *_, wants_x, wants_bank = rest
    bank = [part for part in rest[:4] if part is not None]
    d_bank = [torch.empty_like(part) if wants_bank else part.new_empty(0) for part in bank]
    return [torch.empty_like(x) if wants_x else x.new_empty(0), torch.empty_like(weights), *d_bank]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weights, _, *parts, ctx.activation, _ = inputs
    _, *kept = output
    ctx.set_materialize_grads(False)  # no zeros for the gradient of what is kept
    ctx.mark_non_differentiable(*kept)
    ctx.save_for_backward(x, weights, *parts, *kept)


def _gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    wants_x, _, _, *wants_bank = ctx.needs_input_grad
    saved = ctx.saved_tensors
    d_x, d_weights, *d_bank = _backward(grad.contiguous(), *saved, ctx.activation, wants_x, any(wants_bank))
    d_parts = d_bank if any(wants_bank) else []
    return d_x if wants_x else None, d_weights, None, *d_parts, *[None] * (6 - len(d_parts))


_forward.register_autograd(_gradients, setup_context=_save)


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *tensors, ctx.activation, _, _ = inputs
    ctx.save_for_backward(*tensors)


def _second_gradients(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of gradients, which are rare: those of the definition, expert by expert."""
    *inputs, order, counts, _, _ = ctx.saved_tensors
    again = torch.is_grad_enabled()  # somebody asks for third derivatives: the second stay tied to the inputs
    with torch.enable_grad():
        given: list[Any] = [None if part is None else _tracked(part) for part in inputs]
        grad, *parts = given
        leaves = [part for part in parts if part is not None]
        first = torch.autograd.grad(_definition(parts, order, counts, ctx.activation), leaves, grad, create_graph=True)
        wanted = [i for i, d in enumerate(first) if grads[i] is not None and grads[i].shape == d.shape]
        second = torch.autograd.grad(
            [first[i] for i in wanted],
            [grad, *leaves],
            [grads[i] for i in wanted],
            allow_unused=True,
            create_graph=again,
        )
    gradients = iter(second)
    return *(None if part is None else next(gradients) for part in given), *[None] * 7


def _tracked(part: Tensor) -> Tensor:
    """``part`` under a name of its own, to be differentiated for."""
    return part.view_as(part) if part.requires_grad else part.detach().requires_grad_()


_backward.register_autograd(_second_gradients, setup_context=_save_backward)


def _definition(parts: list[Any], order: Tensor, counts: Tensor, activation: Activation) -> Tensor:
    """What ``_forward`` computes, in operations that autograd knows."""
    x, weights, up, down, up_bias, down_bias = parts
    y = torch.zeros_like(x)
    for e, slots in enumerate(order[: int(counts.sum())].split(counts.tolist())):
        tokens, scale = slots // weights.shape[1], weights.flatten()[slots, None]
        hidden = activate(activation, F.linear(x[tokens], up[e], None if up_bias is None else up_bias[e]))
        rows = F.linear(hidden, down[e], None if down_bias is None else down_bias[e])
        y = y.index_add(0, tokens, (scale * rows).to(x.dtype))
    return y
