"""Finds the modules that read the same memory: tied weights are found by their addresses, not by their names."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectralmoe.layers import moe_layers, unwrapped
from spectralmoe.moe import MoE
from spectralmoe.sharding import is_sharded
from spectralmoe.torch_private import whole_of

__all__ = ["same_elements", "share_memory", "shared_banks"]


class _Span(NamedTuple):
    """The bytes from ``start`` up to ``end`` of one storage, and who reads them."""

    storage: tuple[str, int]
    start: int
    end: int
    reader: Hashable


def share_memory(first: nn.Module, second: nn.Module) -> bool:
    """Whether any tensor of ``first`` lies in the same memory as a tensor of ``second``.

    >>> one, two, three = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 3)
    >>> two.weight = nn.Parameter(one.weight.T)
    >>> share_memory(one, two), share_memory(one, three)
    (True, False)
    """
    parts = (("first", first), ("second", second))
    spans = [span for part, module in parts for _, tensor in _tensors(module) for span in _spans(tensor, part)]
    return bool(list(_read_together(spans)))


@torch.no_grad()
def shared_banks(model: nn.Module) -> frozenset[str]:
    """The names of the MoE layers with an expert whose memory something else reads, too.

    That is another expert of the bank, another layer that holds the bank or a module of it, a tied matrix anywhere in
    the model (also transposed, or a view of a part), or the same layer under a second name.

    >>> from spectralmoe import FeedForward, LinearScorer, Router, TopK
    >>> bank = FeedForward(4, 8, 16)
    >>> layers = [MoE(Router(LinearScorer(8, 4), TopK(1)), b) for b in (bank, bank, FeedForward(4, 8, 16))]
    >>> sorted(shared_banks(nn.Sequential(*layers)))
    ['0', '1']
    """
    model = unwrapped(model)
    layers = {name: layer for name, layer in moe_layers(model).items() if isinstance(layer, MoE)}
    spans, owners = list[_Span](), set[int]()
    for name, layer in layers.items():
        for expert in range(layer.experts.num_experts):
            for view in layer.experts.expert_parameters(expert).values():
                owners.add(id(whole_of(view)))
                spans += _spans(view, (name, expert))
    banks = dict.fromkeys(id(layer.experts) for layer in layers.values())
    for path, tensor in _tensors(model, skip=set(banks)):
        spans += _spans(tensor, path)
    for name, layer in layers.items():
        rest = ((path, tensor) for path, tensor in _tensors(layer.experts) if id(tensor) not in owners)
        spans += [span for path, tensor in rest for span in _spans(tensor, f"{name}.experts.{path}")]
    together = chain.from_iterable(_read_together(spans))
    return frozenset(reader[0] for reader in together if isinstance(reader, tuple))


def same_elements(x: Tensor) -> Hashable:
    """Equal for two tensors that hold the same elements of memory, in any order of their dimensions."""
    layout = sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    return (str(x.device), x.data_ptr(), x.dtype, tuple(layout))


def _tensors(module: nn.Module, skip: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a module inside holds, once for each path to it: parameters, buffers and plain attributes.

    Modules in ``skip`` (by id) are left out where they are met first; what is met again is not.
    """
    skip, left_out = set() if skip is None else skip, tuple[str, ...]()
    for path, inner in module.named_modules(remove_duplicate=False):
        if id(inner) in skip:
            skip.remove(id(inner))
            left_out = (*left_out, f"{path}.")
        if f"{path}.".startswith(left_out):
            continue
        attributes = {**vars(inner), **inner._parameters, **inner._buffers}
        yield from ((f"{path}.{name}", value) for name, value in attributes.items() if isinstance(value, Tensor))


def _spans(x: Tensor, reader: Hashable) -> Iterator[_Span]:
    """The memory of ``x``; nothing for a tensor without memory of its own."""
    x = x.to_local() if is_sharded(x) else x
    if x.layout != torch.strided or not x.numel():
        return
    try:
        storage = x.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper around other tensors
        return
    if storage:
        size, start = x.element_size(), int(x.storage_offset())
        last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        yield _Span((str(x.device), storage), start * size, (start + last + 1) * size, reader)


def _read_together(spans: Iterable[_Span]) -> Iterator[set[Hashable]]:
    """Sets of two or more readers whose bytes overlap, directly or by way of others."""
    storage, end, readers = None, 0, set[Hashable]()
    for span in sorted(spans, key=lambda span: span[:3]):
        if span.storage != storage or span.start >= end:
            if len(readers) > 1:
                yield readers
            storage, end, readers = span.storage, span.end, set()
        end = max(end, span.end)
        readers.add(span.reader)
    if len(readers) > 1:
        yield readers
