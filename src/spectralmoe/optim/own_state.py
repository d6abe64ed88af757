"""Puts the state of a wrapper around an optimizer, ``optimizer.state[KEY]``, into the optimizer's state dicts.

There it is a part of the state of a parameter, because ``torch.distributed.checkpoint`` saves nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["moved_home", "states_of", "travel_with"]

State = Mapping[Any, Any]


def states_of(optimizer: Optimizer) -> dict[Any, Any]:
    """Return ``optimizer.state``, whose keys may be names here."""
    return optimizer.state


def travel_with(
    optimizer: Optimizer, key: str, parameter: nn.Parameter, fill: Callable[[State], State] = dict
) -> tuple[RemovableHandle, RemovableHandle]:
    """Write the mapping ``optimizer.state[key]`` into state dicts, as entries ``KEY.NAME`` of a parameter's state.

    Args:
        parameter: that parameter, one of the optimizer; if it is another's, the state dict stays as it is.
        fill: adds the entries that the state has at other times, since a checkpoint is read into a state dict of the
            same names.

    >>> import torch
    >>> weight = nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1)
    >>> _ = travel_with(optimizer, "phase", weight)
    >>> optimizer.state["phase"] = {"steps": 3}
    >>> optimizer.state_dict()["state"]
    {0: {'phase.steps': 3}}
    >>> optimizer.load_state_dict(optimizer.state_dict())
    >>> optimizer.state["phase"]
    {'steps': 3}
    """

    def pack(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        order = [id(each) for group in optimizer.param_groups for each in group["params"]]
        if not state_dict["state"].get(key) or id(parameter) not in order:
            return state_dict
        place, state = order.index(id(parameter)), dict(state_dict["state"])
        own = {f"{key}.{name}": value for name, value in fill(state.pop(key)).items()}
        return {**state_dict, "state": {**state, place: {**state.get(place, {}), **own}}}

    def unpack(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "state": moved_home(state_dict["state"], key)}

    return optimizer.register_state_dict_post_hook(pack), optimizer.register_load_state_dict_pre_hook(unpack)


def moved_home(state: State, key: str) -> dict[Any, Any]:
    """Undo ``travel_with`` in ``state``: the entries ``KEY.NAME`` become the mapping ``state[key]`` again.

    >>> moved_home({0: {"step": 1, "phase.steps": 3}, 1: {"step": 1}}, "phase")
    {0: {'step': 1}, 1: {'step': 1}, 'phase': {'steps': 3}}
    """
    home: dict[Any, Any] = {}
    own = dict[str, Any]()
    for owner, entries in state.items():
        names = entries if isinstance(entries, Mapping) else ()
        mine = {name for name in names if isinstance(name, str) and name.startswith(f"{key}.")}
        if not mine:
            home[owner] = entries
            continue
        own |= {name.removeprefix(f"{key}."): entries[name] for name in mine}
        if left := {name: value for name, value in entries.items() if name not in mine}:
            home[owner] = left
    return {**home, key: own} if own else home
