"""Routers and terms of a finetuning, from its settings."""

from __future__ import annotations

from typing import Any

import torch

from spectralmoe.errors import UserError
from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.routers.rules import read_rule
from spectralmoe.hf.routers.swap import Init, Swapped, swap_routers
from spectralmoe.hf.training.text_windows import Windows
from spectralmoe.naming import Table, read_term, shown
from spectralmoe.presets import Preset, find_preset
from spectralmoe.terms import Term
from spectralmoe.training.settings import laid_over
from spectralmoe.training.settings.finetuning import FinetuneSettings

__all__ = ["router_of", "selector_of", "swap_to_row", "terms_of"]

CALIBRATION = 4096
"""Tokens, about, that a router is fitted on."""

_PLAIN = Preset("", {}).selector


def router_of(settings: FinetuneSettings) -> Preset | None:
    """The row of the routers that are put in; None: the model's own stay.

    Raises:
        UserError: an unknown router or part; a row with experts or an optimizer of its own, or with soft routing.
    """
    if settings.router is None:
        return None
    preset = find_preset(laid_over(settings.router, terms=settings.terms))
    if preset.dense:
        raise UserError(f"router {shown(settings.router)!r} is one network without a choice, and no router to put in")
    parts = {"experts": preset.experts, "optimizer": preset.optimizer}
    asked = [f"{kind} {part['type']!r}" for kind, part in parts.items() if part is not None]
    asked += ['k = "soft"'] if preset.k == "soft" else []
    if asked:
        kept = "finetune keeps the model's experts, their choice and the Trainer's optimizer"
        raise UserError(f"router {shown(settings.router)!r} asks for {asked[0]}; {kept}")
    return preset


def terms_of(settings: FinetuneSettings) -> dict[str, Term]:
    """The terms of the loss: those of the router, and beside them those of the settings.

    Raises:
        UserError: as ``router_of``; an unknown term or argument; a term on what experts make.
    """
    preset = router_of(settings)
    if preset is None:
        terms = {name: read_term(name, value) for name, value in settings.terms.items()}
    else:
        terms = dict(preset.terms)
    for name, term in terms.items():
        if reads := set(term.keeps) - {"tokens"}:
            raise UserError(f"term {name!r} reads {min(reads)!r}, which experts of transformers do not keep")
    return terms


def swap_to_row(model: Any, preset: Preset, windows: Windows, rows: int) -> Swapped:
    """Put the routers of ``preset`` into all MoE layers of ``model``.

    A linear scorer starts as the model's gate; any other one is fitted to it on some of the windows. Where the row
    names no selector the model's own rule stays; one that it names scores and normalises as the model's does.

    Args:
        rows: windows of a batch.

    Raises:
        UserError: as ``swap_routers``.
    """
    count = min(len(windows), -(-CALIBRATION // windows.labels.shape[1]))
    places = torch.linspace(0, len(windows) - 1, count).round().long()  # of every domain
    batches = [{windows.name: batch} for batch in windows.inputs[places].split(rows)]
    init: Init = "from_gate" if preset.scorer["type"] == "linear" else "fit"
    return swap_routers(model, preset.scorer, selector_of(model, preset), init=init, calibration=batches)


def selector_of(model: Any, preset: Preset) -> dict[str, Any] | None:
    """The selector of ``preset`` with the scores and weights of the model's own; None: that itself."""
    number = {} if preset.k is None else {"k": preset.k}
    own = read_rule(find_layers(model)[0])[1] or {}
    if preset.selector == _PLAIN:
        return {**own, **number} if number else None
    return _innermost(preset.selector, {key: own[key] for key in ("score", "normalize") if key in own} | number)


def _innermost(selector: Table, arguments: Table) -> dict[str, Any]:
    """The spec of a selector with ``arguments`` for the one that chooses, whatever wraps it."""
    if "selector" in selector:
        return {**selector, "selector": _innermost(selector["selector"], arguments)}
    return {**selector, **arguments}
