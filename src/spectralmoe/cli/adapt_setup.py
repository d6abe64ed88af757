"""What every form of ``spectralmoe adapt`` needs: the model, the data, the guard, and how samples are corrected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectralmoe.adaptation import METHODS, Guard, Rule, neighbours
from spectralmoe.adaptation.methods import NEEDS_REFERENCE
from spectralmoe.adaptation.targets import choose_layers
from spectralmoe.cli.options import load_network, open_data, split_names
from spectralmoe.data.image_data import ImageData
from spectralmoe.errors import UserError, one_of
from spectralmoe.experts import FeedForward
from spectralmoe.files import make_folder
from spectralmoe.models import SRMoE
from spectralmoe.moe import MoE
from spectralmoe.saving import read_config, save
from spectralmoe.training.network import ModelMeta
from spectralmoe.training.settings import pick_device

__all__ = ["Task", "Wishes", "find_label", "output_folder", "prepare"]

DEFAULT_RULE = Rule()
GUARD_SIZE, BUDGET = 10_000, 0.1
_LISTED = 20


@dataclass(frozen=True, slots=True)
class Wishes:
    """The options that the forms of the command share, as they were given; None is not given."""

    model: Path
    guard: str | None
    guard_size: int | None
    budget: float | None
    max_flips: int | None
    method: str | None
    layers: str | None
    lr: float | None
    max_steps: int | None
    carry: bool | None
    data: str | None
    data_dir: Path | None
    download: bool
    seed: int
    allow: tuple[str, ...]
    device: str
    json: bool

    def given(self, *names: str) -> list[str]:
        """Which of these options were given, as they are written on the command line."""
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]


@dataclass
class Task:
    """A model, and what will be done to it.

    Attributes:
        said: what was chosen where nothing was asked for, in a line for the user.
        settings: how samples are corrected, as JSON values for what is written.
    """

    wishes: Wishes
    network: SRMoE
    meta: ModelMeta
    guard: Guard | None
    rule: Rule
    said: str
    settings: dict[str, Any]
    _opened: dict[str | None, ImageData] = field(default_factory=dict)

    def data(self, name: str | None) -> ImageData:
        """The data set called ``name``, or the model's own; opened once.

        Raises:
            UserError: it cannot be had, or does not fit the model.
        """
        key = name or self.meta.data
        if key not in self._opened:
            self._opened[key] = open_data(key, self.meta, self.wishes.data_dir, self.wishes.download)
        return self._opened[key]

    def save(self, out: Path) -> None:
        """The network as it is now, with the meta of the model that it comes from."""
        save(self.network, out, meta=read_config(self.wishes.model)["meta"])


def prepare(wishes: Wishes, *, new_class: str | None = None) -> Task:
    """Load the model and the reference data; the images of ``new_class`` are left out of these.

    Raises:
        UserError: a model, data set, layer or method that there is not, or options that do not go together.
    """
    _check(wishes)
    network, meta = load_network(wishes.model, pick_device(wishes.device), wishes.allow)
    if not isinstance(network, SRMoE):
        raise UserError(f"adapt corrects SR-MoE networks; {wishes.model} holds a timm model")
    layers = _layers(wishes, network)
    method, said = _method(wishes, network, choose_layers(network, layers))
    carry = wishes.guard is not None if wishes.carry is None else wishes.carry
    rule = Rule(
        layers,
        lr=DEFAULT_RULE.lr if wishes.lr is None else wishes.lr,
        max_steps=wishes.max_steps or DEFAULT_RULE.max_steps,
        method=method,
        augment=neighbours if carry else None,
    )
    settings: dict[str, Any] = {
        "method": method,
        "layers": layers,
        "lr": rule.lr,
        "max_steps": rule.max_steps,
        "carry": carry,
    }
    task = Task(wishes, network, meta, None, rule, said, settings)
    if wishes.guard is not None:
        label = None if new_class is None else find_label(new_class, meta, "--new-class")
        data = task.data(wishes.guard)
        train = (data if label is None else data.without(data.classes[label])).train
        size = min(wishes.guard_size or GUARD_SIZE, len(train))
        budget = BUDGET if wishes.budget is None else wishes.budget
        task.guard = Guard([(train.images[:size], train.labels[:size])], budget=budget, max_flips=wishes.max_flips)
        settings["guard"] = {"data": data.name, "samples": size, "budget": budget, "max_flips": wishes.max_flips}
    return task


def _check(wishes: Wishes) -> None:
    if wishes.method is not None and wishes.method not in METHODS:
        raise one_of("method", wishes.method, METHODS)
    if wishes.guard is None:
        alone = wishes.given("guard_size", "budget", "max_flips")
        if alone:
            raise UserError(f"{alone[0]} is about reference data: give --guard with it")
        if wishes.method in NEEDS_REFERENCE:
            raise UserError(f"--method {wishes.method} reads reference data: give --guard, or --method sgd or margin")


def _layers(wishes: Wishes, network: SRMoE) -> str | tuple[str, ...]:
    if wishes.layers is None:
        return "all" if wishes.guard is None else "last"
    names = split_names(wishes.layers)
    if not names:
        raise UserError("--layers names nothing; give all, last or names of layers")
    if names in (("all",), ("last",)):
        return names[0]
    choose_layers(network, names)
    return names


def _method(wishes: Wishes, network: SRMoE, layers: list[str]) -> tuple[str, str]:
    """The method, and why this one."""
    if wishes.method is not None:
        return wishes.method, f"method {wishes.method}"
    if wishes.guard is None:
        return "sgd", "method sgd, the default without --guard"
    layer = network.get_submodule(layers[-1])
    bank = layer.experts if isinstance(layer, MoE) else None
    if isinstance(bank, FeedForward) and bank.up_bias is not None and any(map(bank.free_units, range(len(bank.up)))):
        return "unit", f"method unit, the default with --guard: {layers[-1]} has spare units"
    return "low_rank", f"method low_rank, the default with --guard: {layers[-1]} has no spare units"


def find_label(text: str, meta: ModelMeta, option: str = "--label") -> int:
    """The number of a class given by its name or its number; a name goes first.

    Raises:
        UserError: neither.
    """
    if text in meta.classes:
        return meta.classes.index(text)
    if text.isdecimal() and int(text) < len(meta.classes):
        return int(text)
    names = ", ".join(meta.classes[:_LISTED]) + (", ..." if len(meta.classes) > _LISTED else "")
    last = len(meta.classes) - 1
    raise UserError(f"{option}: label {text} is neither a class ({names}) nor a class number from 0 to {last}")


@contextmanager
def output_folder(out: Path, model: Path) -> Iterator[None]:
    """``out``, ready to be written; if nothing was written in the end, a folder made here is removed again.

    Raises:
        UserError: it holds a model, lies in the folder of ``model``, or cannot be written.
    """
    if (out / "config.json").exists():
        raise UserError(f"--out {out} holds a model already; name another folder, so that it stays as it is")
    if model.resolve() in (out.resolve(), *out.resolve().parents):
        raise UserError(f"--out {out} lies in MODEL's own folder; name another, so that it stays as it is")
    fresh = not out.exists()
    make_folder(out)
    try:
        yield
    except BaseException:
        if fresh:
            with suppress(OSError):
                out.rmdir()  # only if it is empty
        raise
