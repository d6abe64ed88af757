"""A one-expert update: take it back, keep it in a small file, apply it to another copy of the model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spectralmoe.adaptation.guard import Verdict
from spectralmoe.adaptation.memory import same_elements
from spectralmoe.adaptation.targets import Target, expert_target
from spectralmoe.errors import UserError
from spectralmoe.files import write_whole
from spectralmoe.layers import moe_layers
from spectralmoe.moe import MoE

__all__ = ["Update", "apply_update"]

FORMAT = "spectralmoe-update-1"


@dataclass(frozen=True, slots=True)
class Written:
    """One expert that was changed, before and after."""

    target: Target
    old: Sequence[Tensor]
    new: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Update:
    """What ``adapt_one`` did.

    Attributes:
        success: the samples are right, and the guard (if any) agreed. Otherwise the model is as it was.
        steps: steps taken by the method that succeeded, or by all.
        touched: layer -> the one expert that changed.
        change: Euclidean norm of the change of their tensors.
        method: the method of the last attempt, which is the one that was kept, if any was.
        tried: every attempt, and why it was not kept.
        verdict: the guard's, on the update that was kept or refused last.
        seconds: time taken, the guard's checks included.
    """

    success: bool
    steps: int
    method: str
    tried: tuple[str, ...] = ()
    verdict: Verdict | None = None
    seconds: float = 0.0
    written: tuple[Written, ...] = field(default=(), repr=False)

    @property
    def touched(self) -> dict[str, int]:
        """Layer name -> the one expert that changed there."""
        return {item.target.layer: item.target.expert for item in self.written}

    @property
    def differences(self) -> list[Tensor]:
        """New minus old of the touched tensors, in double precision; tied ones, which share memory, come once."""
        changes: dict[object, Tensor] = {}
        for item in self.written:
            for view, old, new in zip(item.target.views.values(), item.old, item.new, strict=True):
                changes.setdefault(same_elements(view), new.double() - old.double())
        return list(changes.values())

    @property
    def change(self) -> float:
        """Euclidean norm of the change of all touched tensors."""
        return math.sqrt(sum(float(difference.square().sum()) for difference in self.differences))

    def revert(self) -> None:
        """Put the touched experts back, bit by bit.

        Raises:
            UserError: a touched expert has changed since; nothing is put back then.
        """
        targets = [item.target.now() for item in self.written]
        for target, item in zip(targets, self.written, strict=True):
            if not target.equal(item.new):
                raise UserError(
                    f"expert {item.target.expert} of layer {item.target.layer!r} has changed since this update; "
                    "revert the later update first"
                )
        for target, item in zip(targets, self.written, strict=True):
            target.write(item.old)

    def save(self, path: Path | str) -> None:
        """Write the new tensors of the touched experts, and the SHA-256 of the old ones, to one safetensors file.

        Raises:
            UserError: there is nothing to keep; numbers that are not finite; the file cannot be written (what stood
                there stays).
        """
        if not self.written:
            raise UserError("this update changed nothing, so there is nothing to save")
        if not all(bool(value.isfinite().all()) for item in self.written for value in item.new):
            raise UserError("this update holds numbers that are not finite; it cannot be saved")
        experts, tensors = [], {}
        for index, item in enumerate(self.written):
            target = item.target
            old, new = target.digest(item.old), target.digest(item.new)
            experts.append({"layer": target.layer, "expert": target.expert, "old_sha256": old, "new_sha256": new})
            for name, value in zip(target.views, item.new, strict=True):
                tensors[f"{index}/{name}"] = value.detach().cpu().contiguous().clone()
        about = {"format": FORMAT, "method": self.method, "experts": json.dumps(experts)}
        write_whole(Path(path), lambda temporary: save_file(tensors, temporary, about))


@torch.inference_mode(False)
def apply_update(model: nn.Module, path: Path | str) -> Update:
    """Apply a saved update to a model that holds the experts it was made from; the result can be reverted.

    Weights are compared by value: 0 equals -0.

    Raises:
        UserError: not such a file, or one with repeated, contradicting or not finite entries; a model without these
            layers or with other weights in these experts. The model is untouched then.
    """
    about, tensors = _read(Path(path))
    layers, written, announced = moe_layers(model), [], set[str]()
    for index, entry in enumerate(about):
        layer = layers.get(entry["layer"])
        where = f"expert {entry['expert']} of layer {entry['layer']!r}"
        if not isinstance(layer, MoE) or not layer.places(entry["expert"]):
            raise UserError(f"{path} is for another model: this one has no {where}")
        target = expert_target(entry["layer"], layer, entry["expert"])
        names = [f"{index}/{name}" for name in target.views]
        announced.update(names)
        new = [tensors.get(name) for name in names]
        _check(str(path), where, target, new, entry)
        old = target.copy()
        values = [value.to(view) for value, view in zip(new, target.views.values(), strict=True) if value is not None]
        written.append(Written(target, old, values))
    if extra := sorted(tensors.keys() - announced):
        raise UserError(f"{path} is damaged: it holds {extra[0]!r}, which belongs to none of its experts")
    for item in written:
        item.target.write(item.new)
    if not all(item.target.equal(item.new) for item in written):
        for item in written:
            item.target.write(item.old)
        raise UserError(f"{path} does not fit this model: it writes different numbers into weights that are tied here")
    return Update(True, 0, "applied", written=tuple(written))


def _check(path: str, where: str, target: Target, new: Sequence[Tensor | None], entry: dict[str, Any]) -> None:
    if target.digest() == entry["new_sha256"]:
        raise UserError(f"{path} was applied to this model already: {where} holds its tensors")
    if target.digest() != entry["old_sha256"]:
        raise UserError(f"{path} is for another model: {where} has other weights than the ones it was made from")
    for value, view in zip(new, target.views.values(), strict=True):
        if value is None or value.shape != view.shape or value.dtype != view.dtype:
            raise UserError(
                f"{path} is damaged: the tensors of {where} are not those that it announces; save or fetch it again"
            )
    values = [value for value in new if value is not None]
    if target.digest(values) != entry["new_sha256"]:
        raise UserError(f"{path} is damaged: the tensors of {where} do not match their SHA-256; save or fetch it again")
    if not all(bool(value.isfinite().all()) for value in values):
        raise UserError(f"{path} is damaged: the tensors of {where} hold numbers that are not finite; save it again")


def _read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        experts = json.loads(about.get("experts", "null"))
        kinds = {"layer": str, "expert": int, "old_sha256": str, "new_sha256": str}
        if about.get("format") != FORMAT or not experts:
            raise UserError(f"{path} is not a saved update of this version")
        if not all(type(entry[key]) is kind for entry in experts for key, kind in kinds.items()):
            raise UserError(f"{path} is damaged: its header is not that of a saved update; save or fetch it again")
        places = [(entry["layer"], entry["expert"]) for entry in experts]
        if repeated := [place for index, place in enumerate(places) if place in places[:index]]:
            layer, expert = repeated[0]
            raise UserError(f"{path} is damaged: expert {expert} of layer {layer!r} is in it twice; save it again")
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(
            f"{path} is not a saved update ({str(reason).splitlines()[0]}); give what Update.save wrote"
        ) from error
    return experts, tensors
