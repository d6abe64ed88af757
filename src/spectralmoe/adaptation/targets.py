"""Which expert a sample uses, and the tensors that belong to it alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectralmoe.adaptation.memory import same_elements
from spectralmoe.digests import sha256_of_tensors
from spectralmoe.errors import UserError, one_of
from spectralmoe.experts import Experts
from spectralmoe.layers import moe_layers
from spectralmoe.moe import MoE
from spectralmoe.recorder import record
from spectralmoe.sharding import is_sharded
from spectralmoe.torch_private import gradient_of_view, whole_of

__all__ = [
    "Target",
    "Weights",
    "canonical",
    "choose_layers",
    "digest_of",
    "expert_target",
    "find_targets",
    "joined",
    "logits_of",
    "predicted",
    "refuse_inference",
    "right",
]


class Weights:
    """Some tensors of a model, or views into its stacked parameters, that an update may write.

    Attributes:
        views: name -> the tensor, changed in place.
    """

    def __init__(self, views: dict[str, Tensor]) -> None:
        self.views = views

    def copy(self) -> list[Tensor]:
        """Their values now."""
        return [view.detach().clone() for view in self.views.values()]

    @torch.no_grad()
    def write(self, values: Sequence[Tensor]) -> None:
        """Set them, bit by bit."""
        torch.clear_autocast_cache()  # it may hold copies of what was here
        for view, value in zip(self.views.values(), values, strict=True):
            view.copy_(value)

    def equal(self, values: Sequence[Tensor]) -> bool:
        """Whether they hold ``values``; 0 equals -0, and NaN equals NaN."""
        pairs = ((view.detach(), value.to(view)) for view, value in zip(self.views.values(), values, strict=True))
        return all(bool(((x == y) | (x.isnan() & y.isnan())).all()) for x, y in pairs)

    def finite(self) -> bool:
        """Whether no value is infinite or NaN."""
        return all(bool(view.detach().isfinite().all()) for view in self.views.values())

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """The gradient of ``loss`` for each view; zero where none flows.

        Of views that are the same memory of one parameter the first gets it all, so that a step moves it once.
        """
        stacks = [whole_of(view) for view in self.views.values()]
        of_stacks = torch.autograd.grad(loss, stacks, allow_unused=True)
        gradients, met = [], set[object]()
        for view, stack, gradient in zip(self.views.values(), stacks, of_stacks, strict=True):
            memory = (id(stack), same_elements(view))
            if gradient is None or memory in met:
                gradients.append(torch.zeros_like(view))
            else:
                met.add(memory)
                gradients.append(gradient_of_view(view, gradient))
        return gradients

    @contextmanager
    def trainable(self, model: nn.Module) -> Iterator[None]:
        """Gradients for these tensors alone inside the block."""
        trained = {id(whole_of(view)) for view in self.views.values()}
        before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in trained)
        try:
            with torch.enable_grad():
                yield
        finally:
            for parameter, flag in before:
                parameter.requires_grad_(flag)


class Target(Weights):
    """One expert of one layer: ``expert`` as the router knows it, in ``place`` of the bank."""

    def __init__(self, layer: str, expert: int, bank: Experts, place: int) -> None:
        super().__init__(bank.expert_parameters(place))
        self.layer, self.expert, self.bank, self.place = layer, expert, bank, place

    @torch.no_grad()
    def now(self) -> Target:
        """The same expert after its bank was moved or cast, which gives parameters other memory."""
        return Target(self.layer, self.expert, self.bank, self.place)

    def digest(self, values: Sequence[Tensor] | None = None) -> str:
        """SHA-256 over names, types, shapes and values of the expert's tensors, or of ``values`` in their place."""
        tensors = dict(zip(self.views, values or self.copy(), strict=True))
        return digest_of({name: canonical(value) for name, value in tensors.items()})


def canonical(x: Tensor) -> Tensor:
    """The same values in one form: -0 becomes 0, every NaN the same one.

    >>> canonical(torch.tensor([-0.0, 1.0]))
    tensor([0., 1.])
    """
    x = x.detach()
    return torch.where(x.isnan(), torch.full_like(x, torch.nan), x + 0) if x.is_floating_point() else x


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes."""
    return sha256_of_tensors((f"{name} {value.dtype} {tuple(value.shape)};", value) for name, value in tensors.items())


def joined(targets: Sequence[Target]) -> Weights:
    """The tensors of all targets as one, named layer/tensor."""
    return Weights({f"{target.layer}/{name}": view for target in targets for name, view in target.views.items()})


@dataclass(frozen=True, slots=True)
class _Use:
    layer: MoE
    weight: Tensor


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    """The class logits (B, C) in fp32 or better, of a model that returns them or an object with ``.logits``.

    Raises:
        UserError: the model returns anything else.
    """
    result = model(x)
    logits = getattr(result, "logits", result)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"adapt_one needs class logits (B, C) for {len(x)} samples, but the model returned {shape}")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def predicted(logits: Tensor) -> Tensor:
    """The class of the largest logit (B,); -1, which no class is, where a logit is NaN.

    >>> predicted(torch.tensor([[0.1, 0.7], [0.2, torch.nan]]))
    tensor([ 1, -1])
    """
    return logits.argmax(-1).where(~logits.isnan().any(-1), -1)


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which samples (B,) get their label."""
    return predicted(logits) == labels


def refuse_inference(tensors: Iterable[Tensor], what: str) -> None:
    """Raise for weights that cannot be written.

    Raises:
        UserError: one of ``tensors`` was made under ``torch.inference_mode``.
    """
    if any(tensor.is_inference() for tensor in tensors):
        raise UserError(f"{what} has weights made under torch.inference_mode, which cannot change; load it outside")


def choose_layers(model: nn.Module, layers: str | Sequence[str]) -> list[str]:
    """The names of the chosen MoE layers, in the model's order.

    Raises:
        UserError: an unknown layer, or no MoE layer at all; a layer with a memory.
    """
    known = {name: layer for name, layer in moe_layers(model).items() if isinstance(layer, MoE)}
    for name, layer in known.items():
        if layer.memory is not None:
            raise UserError(
                f"layer {name!r} aligns tokens with its memory, so samples may move each other; adapt the model with "
                "layer.memory = None"
            )
    if layers == "all":
        return list(known)
    if layers == "last":
        return list(known)[-1:]
    wanted = [layers] if isinstance(layers, str) else list(layers)
    if not wanted:
        raise UserError(f"no layer was named; known: all, last, {', '.join(known)}")
    for name in wanted:
        if name not in known:
            raise one_of("layer", name, ["all", "last", *known])
    return [name for name in known if name in wanted]


@torch.no_grad()
def find_targets(model: nn.Module, x: Tensor, layers: Sequence[str]) -> list[Target]:
    """In each of ``layers`` the expert with the largest weight, summed over all tokens of the samples x (k, ...).

    Layers in which the samples use no expert of the bank are left out.

    Raises:
        UserError: a bank whose experts cannot be adapted alone.
    """
    with record(model) as tape:
        logits_of(model, x)
    uses: dict[str, _Use] = {}
    for item in tape:
        if item.name in layers and isinstance(item.layer, MoE):
            weight = item.routing.weights.new_zeros(item.routing.num_experts + 1)
            slots = torch.where(item.routing.indices < 0, item.routing.num_experts, item.routing.indices)
            weight.scatter_add_(0, slots.flatten(), item.routing.weights.flatten())
            earlier = uses[item.name].weight if item.name in uses else 0
            networks = [bool(item.layer.places(e)) for e in range(item.routing.num_experts)]  # zero experts have none
            uses[item.name] = _Use(item.layer, weight[:-1] * weight.new_tensor(networks) + earlier)
    return [
        expert_target(name, use.layer, int(use.weight.argmax())) for name, use in uses.items() if bool(use.weight.any())
    ]


def expert_target(name: str, layer: MoE, expert: int) -> Target:
    """Expert ``expert`` of the layer called ``name``.

    Raises:
        UserError: its bank cannot adapt one expert alone; the expert is replicated, or merged with others.
    """
    places = layer.places(expert)
    others = {place for e in range(layer.router.num_experts) if e != expert for place in layer.places(e)}
    if len(places) != 1 or places[0] in others:
        raise UserError(
            f"layer {name!r}: expert {expert} is replicated or merged with others, so it cannot be adapted alone; "
            "adapt the model before that"
        )
    if any(is_sharded(parameter) for parameter in layer.experts.parameters()):
        raise UserError(f"layer {name!r} is sharded; adapt the whole model and shard it afterwards")
    refuse_inference(layer.experts.parameters(), f"layer {name!r}")
    with torch.no_grad():
        target = Target(name, expert, layer.experts, places[0])
    if not target.views:
        raise UserError(
            f"layer {name!r}: the experts of a {type(layer.experts).__name__} cannot be adapted alone; they "
            "share their parameters"
        )
    return target
