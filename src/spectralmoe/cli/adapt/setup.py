"""What the jobs of ``adapt`` share: the model, the data, the guard, and how samples are corrected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from spectralmoe.adaptation import METHODS, Guard, Rule, neighbours
from spectralmoe.adaptation.methods import NEEDS_REFERENCE
from spectralmoe.adaptation.targets import choose_layers
from spectralmoe.cli.adapt.options import AdaptOptions, ModelOptions
from spectralmoe.cli.adapt.sample import find_label
from spectralmoe.cli.options import load_network, open_data, split_names
from spectralmoe.data.image_data import ImageData
from spectralmoe.diagnostics import holds_moe
from spectralmoe.errors import UserError, one_of
from spectralmoe.experts import FeedForward
from spectralmoe.files import make_folder
from spectralmoe.moe import MoE
from spectralmoe.saving import read_config, save
from spectralmoe.training.network import ModelMeta
from spectralmoe.training.settings import pick_device

__all__ = ["Prepared", "adaptable_network", "output_folder", "prepare", "save_like"]

DEFAULT_RULE = Rule()
GUARD_SIZE, BUDGET = 10_000, 0.1


@dataclass
class Prepared:
    """A model, and how its samples are corrected.

    Attributes:
        chosen: what was chosen where nothing was asked for, in a line for the user.
        settings: how samples are corrected, as JSON values for what is written.
    """

    options: AdaptOptions
    network: nn.Module
    meta: ModelMeta
    rule: Rule
    chosen: str
    settings: dict[str, Any]
    guard: Guard | None = None
    _opened: dict[str, ImageData] = field(default_factory=dict)

    def data(self, name: str | None = None) -> ImageData:
        """The data set called ``name``, by default that of --data or the model's own; opened once.

        Raises:
            UserError: it cannot be had, or does not fit the model.
        """
        key = name or self.options.data or self.meta.data
        if key not in self._opened:
            self._opened[key] = open_data(key, self.meta, self.options.data_dir, self.options.download)
        return self._opened[key]


def prepare(options: AdaptOptions, *, new_class: str | None = None) -> Prepared:
    """Load the model and the reference data; the images of ``new_class`` are left out of these.

    Raises:
        UserError: a model, data set, layer or method that there is not, or options that do not go together.
    """
    _check(options)
    network, meta = adaptable_network(options)
    layers = _layers(options)
    names = choose_layers(network, layers)
    method, chosen = _method(options, network, names)
    carry = options.guard is not None if options.carry is None else options.carry
    rule = Rule(
        layers,
        lr=DEFAULT_RULE.lr if options.lr is None else options.lr,
        max_steps=options.max_steps or DEFAULT_RULE.max_steps,
        method=method,
        augment=neighbours if carry else None,
    )
    settings = {"method": method, "layers": layers, "lr": rule.lr, "max_steps": rule.max_steps, "carry": carry}
    prepared = Prepared(options, network, meta, rule, chosen, settings)
    if options.guard is not None:
        _add_guard(prepared, options.guard, new_class)
    return prepared


def adaptable_network(options: ModelOptions) -> tuple[nn.Module, ModelMeta]:
    """The classifier in MODEL, and how it reads images.

    Raises:
        UserError: as ``load_network``; it has no MoE layers.
    """
    network, meta = load_network(options.model, pick_device(options.device), options.allow)
    if not holds_moe(network):
        raise UserError(f"{options.model} has no MoE layers, and a correction changes an expert; train one with [moe]")
    return network, meta


def save_like(model: Path, network: nn.Module, out: Path) -> None:
    """Save ``network`` to ``out`` with the meta of ``model``, which it comes from."""
    save(network, out, meta=read_config(model)["meta"])


def _add_guard(prepared: Prepared, name: str, new_class: str | None) -> None:
    options, data = prepared.options, prepared.data(name)
    if new_class is not None:
        data = data.without(data.classes[find_label(new_class, prepared.meta, "CLASS")])
    size = min(options.guard_size or GUARD_SIZE, len(data.train))
    budget = BUDGET if options.budget is None else options.budget
    samples = [(data.train.images[:size], data.train.labels[:size])]
    prepared.guard = Guard(samples, budget=budget, max_flips=options.max_flips)
    about = {"data": data.name, "samples": size, "budget": budget, "max_flips": options.max_flips}
    prepared.settings["guard"] = about


def _check(options: AdaptOptions) -> None:
    if options.method is not None and options.method not in METHODS:
        raise one_of("method", options.method, METHODS)
    if options.guard is None:
        for name in ("guard_size", "budget", "max_flips"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is about reference data: give --guard with it")
        if options.method in NEEDS_REFERENCE:
            raise UserError(f"--method {options.method} reads reference data: give --guard, or --method sgd or margin")


def _layers(options: AdaptOptions) -> str | tuple[str, ...]:
    if options.layers is None:
        return "all" if options.guard is None else "last"
    names = split_names(options.layers)
    if not names:
        raise UserError("--layers names nothing; give all, last or names of layers")
    return names[0] if names in (("all",), ("last",)) else names


def _method(options: AdaptOptions, network: nn.Module, layers: list[str]) -> tuple[str, str]:
    """The method, and why this one."""
    if options.method is not None:
        return options.method, f"method {options.method}"
    if options.guard is None:
        return "sgd", "method sgd, the default without --guard"
    layer = network.get_submodule(layers[-1])
    bank = layer.experts if isinstance(layer, MoE) else None
    if isinstance(bank, FeedForward) and bank.up_bias is not None and any(map(bank.free_units, range(len(bank.up)))):
        return "unit", f"method unit, the default with --guard: {layers[-1]} has spare units"
    return "low_rank", f"method low_rank, the default with --guard: {layers[-1]} has no spare units"


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
