"""A Hugging Face model with fewer experts in its layers, still of its own class.

The class builds a model from a config with the smaller number of experts. Its shapes say how many entries each tensor
has, and the result is compared with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError, refuse_differences
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.structure import count_settings, experts_of
from spectralmoe.stacks import copy_with, means

__all__ = ["Cluster", "with_clusters"]

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Cluster:
    """What becomes one expert.

    Attributes:
        head: the expert whose part of the router stays.
        members: the experts whose weighted mean it is, the head among them.
        shares: the weight of each member, with sum 1.
    """

    head: int
    members: tuple[int, ...]
    shares: tuple[float, ...]

    @classmethod
    def alone(cls, e: int) -> Cluster:
        """Expert ``e`` as it is."""
        return cls(e, (e,), (1.0,))

    def mean(self, values: Sequence[Tensor]) -> Tensor:
        """The mean of one value a member, in their dtype."""
        shares = torch.tensor(self.shares, dtype=torch.float64)
        return means(torch.stack(list(values)), [range(len(values))], [shares])[0].to(values[0].dtype)


def with_clusters(
    owner: str, model: Model, layers: Sequence[HFLayer], clusters: Mapping[str, Sequence[Cluster]]
) -> Model:
    """A copy of ``model`` whose layers have one expert a cluster; the model stays as it is.

    It takes the memory of what is left, beside the model: entries of stacks that go are never copied.

    Args:
        owner: who asks, for errors.
        layers: all MoE layers of the model, of E experts each.
        clusters: layer's name -> its new experts in their order, equally many in every layer.

    Raises:
        UserError: the config names no number of experts; the model's class builds something else from the smaller
            config.
    """
    before, after = layers[0].num_experts, len(clusters[layers[0].name])
    if before == after:
        return copy.deepcopy(model)
    stock = _stock(owner, model, before, after)
    tensors: dict[Tensor, Tensor] = {}
    for layer in layers:
        for value, new in _replaced(layer, stock.get_submodule(layer.path), clusters[layer.name]):
            if value in tensors:
                raise UserError(f"{owner}: {layer.name} shares tensors with another layer")
            tensors[value] = new
    small = copy_with(model, tensors)
    for layer in layers:
        _drop_modules(small.get_submodule(layer.path), stock.get_submodule(layer.path))
    _set_counts(small, stock, before, after)
    start = f"{owner}: {type(model).__name__} is of a model family that it cannot make smaller"
    refuse_differences(start, _shapes(stock), _shapes(small))
    return small


def _stock(owner: str, model: nn.Module, before: int, after: int) -> nn.Module:
    """What the model's class builds from its config with ``after`` experts, without memory."""
    config = copy.deepcopy(model.config)
    _set_config(owner, config, before, after)
    with torch.device("meta"):
        stock: nn.Module = type(model)(config)
    return stock


def _set_config(owner: str, config: Any, before: int, after: int) -> None:
    settings = count_settings(config, before)
    if not settings:
        raise UserError(f"{owner}: the config ({type(config).__name__}) names no number of {before} experts to change")
    for part, name in settings:
        setattr(part, name, after)


def _replaced(layer: HFLayer, stock: nn.Module, clusters: Sequence[Cluster]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each tensor of the layer that has other values in the smaller one, and these."""
    if isinstance(layer.experts, nn.ModuleList | nn.ModuleDict):
        parts = [dict(part.named_parameters()) for part in experts_of(layer.experts)]
        for part, cluster in zip(parts, clusters, strict=False):
            for name, old in part.items():
                yield old, cluster.mean([parts[e][name].detach() for e in cluster.members])
    wanted = dict(_tensors(stock))
    for name, value in _tensors(layer.layer):
        if name in wanted and wanted[name].shape != value.shape:
            axis = _axis(value.shape, wanted[name].shape)
            stack = value.detach().movedim(axis, 0)
            heads = [cluster.head for cluster in clusters]
            if name.startswith("experts.") and any(len(cluster.members) > 1 for cluster in clusters):
                new = torch.stack([cluster.mean([stack[e] for e in cluster.members]) for cluster in clusters])
            else:
                new = stack[heads]
            yield value, new.movedim(0, axis).contiguous()


def _axis(shape: Sequence[int], wanted: Sequence[int]) -> int:
    """The one axis in which two shapes differ; the first where they cannot be compared, which is refused later."""
    return next((axis for axis, (old, new) in enumerate(zip(shape, wanted, strict=False)) if old != new), 0)


def _tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _drop_modules(layer: nn.Module, stock: nn.Module) -> None:
    """Take modules of experts away that the stock layer has not."""
    experts, wanted = layer.get_submodule("experts"), dict(stock.get_submodule("experts").named_children())
    for name in [name for name, _ in experts.named_children() if name not in wanted]:
        delattr(experts, name)


def _set_counts(model: nn.Module, stock: nn.Module, before: int, after: int) -> None:
    """Set the number of experts wherever the stock model has it: config, layers, routers, experts."""
    _set_config("", model.config, before, after)
    for path, module in stock.named_modules():
        here = model.get_submodule(path)
        for name, value in vars(module).items():
            if type(value) is int and value == after and getattr(here, name, None) == before:
                setattr(here, name, after)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
