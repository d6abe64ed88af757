"""Where experts and router are in a MoE layer of a Hugging Face model, by the shapes of their parameters."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from spectralmoe.recording import Recordable

__all__ = [
    "correction_bias",
    "count_attributes",
    "count_experts",
    "count_settings",
    "experts_of",
    "matrix_name",
    "number_of",
    "required",
    "router_name",
    "stack_of",
]


_BIASES = ("correction_bias", "expert_bias")
_COUNT = re.compile(r"(?:^|_)(?:num|n)_(?:local_|routed_)?experts$")


def count_experts(experts: nn.Module) -> int | None:
    """E of an ``experts`` module, from its stacked parameters or its children; None where it is none.

    >>> count_experts(nn.ModuleList(nn.Linear(8, 8) for _ in range(4))), count_experts(nn.Linear(8, 8))
    (4, None)
    """
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        count = len(experts_of(experts))
        return count if count > 1 else None
    stacked = {value.shape[0] for value in experts.parameters() if value.dim() == 3}
    return stacked.pop() if len(stacked) == 1 else None


def experts_of(experts: nn.Module) -> list[nn.Module]:
    """The experts of a list or dict of modules, which may hold a dropout beside them."""
    return [child for child in experts.children() if next(child.parameters(), None) is not None]


def router_name(layer: nn.Module, num_experts: int) -> str | None:
    """The child of ``layer`` with a matrix (E, D); None without.

    Of several: one without further matrices, then one that is more than a Linear, then one called gate or router. A
    shared expert whose hidden width happens to be E has further matrices.
    """
    ranked = []
    for name, child in layer.named_children():
        path, child = _in_use(name, child)
        if isinstance(child, Recordable):
            return path
        matrices = [value.shape[0] for _, value in _matrices(child)]
        unnamed = "gate" not in name and "router" not in name
        if name != "experts" and num_experts in matrices and not (unnamed and len(matrices) > 1):
            ranked.append((len(matrices) > 1, type(child) is nn.Linear, unnamed, path))
    return min(ranked)[-1] if ranked else None


def _in_use(name: str, child: nn.Module) -> tuple[str, nn.Module]:
    """The name and the module that run where PEFT trains a copy of a module: its wrapper holds both."""
    copies = getattr(child, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict) or not copies:
        return name, child
    active = next((each for each in getattr(child, "active_adapters", ()) if each in copies), next(iter(copies)))
    return f"{name}.modules_to_save.{active}", copies[active]


def _matrices(router: nn.Module) -> list[tuple[str, Tensor]]:
    """Its parameters of two dimensions, but for a selection bias that is kept as a row (1, E)."""
    return [(n, v) for n, v in router.named_parameters() if v.dim() == 2 and not n.endswith(_BIASES)]


def matrix_name(router: nn.Module, num_experts: int) -> str | None:
    """The name of the router's matrix (E, D); None where it has several layers."""
    matrices = _matrices(router)
    return matrices[0][0] if len(matrices) == 1 and len(matrices[0][1]) == num_experts else None


def correction_bias(parts: Sequence[nn.Module], num_experts: int) -> Tensor | None:
    """The bias of the scores for the choice alone (E,), by its usual names; None without."""
    for module in parts:
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith(_BIASES) and value.numel() == num_experts:
                return value
    return None


def number_of(parts: Sequence[object], *names: str) -> int | None:
    """The first whole number under one of ``names`` in ``parts``."""
    values = [getattr(part, name, None) for part in parts for name in names]
    return next((value for value in values if isinstance(value, int)), None)


def count_settings(config: Any, count: int) -> list[tuple[Any, str]]:
    """Where a config of transformers says ``count`` experts: (the config, or that of its text model; the name)."""
    parts = {id(part): part for part in (config, config.get_text_config())}.values()
    return [
        (part, name) for part in parts for name, value in vars(part).items() if _COUNT.search(name) and value == count
    ]


def count_attributes(module: nn.Module, count: int) -> list[str]:
    """The names of the attributes by which ``module`` itself knows that it has ``count`` experts."""
    return [name for name, value in vars(module).items() if _COUNT.search(name) and value == count]


def required(function: Callable[..., Any]) -> list[str]:
    """The names of the arguments that a call must give."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind in kinds]


def stack_of(path: str) -> str:
    """ "encoder" or "decoder" where a path goes through one, else ""."""
    return next((part for part in path.split(".") if part in ("encoder", "decoder")), "")
