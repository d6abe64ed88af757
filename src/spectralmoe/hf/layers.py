"""The MoE layers of a Hugging Face model, found by structure: no family is named and transformers is not imported."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from spectralmoe.checkpoints.config import experts_of_config
from spectralmoe.errors import UserError
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.structure import count_experts, router_name
from spectralmoe.recording import Recordable

__all__ = ["find_layers", "refuse_shared"]


def find_layers(model: nn.Module) -> list[HFLayer]:
    """The MoE layers of ``model`` in the order of its modules; dense layers in between do not matter.

    Raises:
        UserError: there is none; experts without a router that can be told.
    """
    lists = [getattr(module, "_keep_in_fp32_modules_strict", None) or () for module in model.modules()]
    keep, layers = frozenset(part for names in lists for part in names), []
    for path, module in model.named_modules():
        experts = dict(module.named_children()).get("experts")
        count = None if experts is None else count_experts(experts)
        if count is None or "original_module" in path.split("."):  # PEFT's dead copy
            continue
        router = router_name(module, count)
        if router is None:
            kind = type(module).__name__
            raise UserError(f"{path} ({kind}) is of a model family it cannot read: no router for {count} experts")
        gate = module.get_submodule(router)
        swapped = gate.watched(model, f"{path}.{router}".removeprefix(".")) if isinstance(gate, Recordable) else None
        layers.append(swapped or HFLayer(path, module, router, keep))
    if not layers:
        raise UserError(f"{type(model).__name__} holds no mixture-of-experts layer{_why_none(model)}")
    return layers


def refuse_shared(layers: Sequence[HFLayer]) -> None:
    """Refuse layers whose calls cannot be told apart.

    Raises:
        UserError: two of them share a router.
    """
    owners: dict[nn.Module, HFLayer] = {}
    for layer in layers:
        if (other := owners.setdefault(layer.router, layer)) is not layer:
            raise UserError(f"{other.name} and {layer.name} share one router: their calls cannot be told apart")


def _why_none(model: nn.Module) -> str:
    """The reason why no layers were found: a dense model, or experts in an unknown form."""
    config = getattr(model, "config", None)
    counts = {} if config is None else experts_of_config(config.to_dict())
    if counts:
        count = next(iter(counts.values()))
        return f" that it can read, though its config names {count} experts: it cannot read this model family"
    return ": a dense model has no router to see"
