"""Settings of a training run, as the command line and TOML files give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from spectralmoe.errors import UserError, one_of
from spectralmoe.optim import OPTIMIZERS, SCHEDULES
from spectralmoe.training.precision import Precision

__all__ = ["Network", "Optimization", "Row", "Several", "laid_over", "parse", "pick_device"]

T = TypeVar("T")
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(ge=1, le=1_000_000)]
Several = Annotated[tuple[T, ...], Field(strict=False)]
"""A tuple, which may come as the list that TOML and JSON have in its place."""
Row = str | dict[str, Any]
"""A router by name, or a table: what ``spectralmoe.presets.find_preset`` reads."""


def _named(kind: str, table: Mapping[str, Any], form: str) -> Callable[[str], str]:
    """A check that a name stands in ``table``, or has the form of a name of the user's own."""

    def check(name: str) -> str:
        if name not in table and ":" not in name:
            raise one_of(kind, name, [*table, form])
        return name

    return check


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values do not change, and none is taken for one of another type
    (true is not 1, "8" is not 8).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class Network(Settings):
    """What all routers of a comparison share: sizes of stem, stages and experts, and experts a token.

    Attributes:
        spare: zero hidden units an expert, for one-expert corrections later.
    """

    width: Positive = 64
    num_experts: Positive = 8
    hidden: Positive = 32
    spare: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    k: Positive | Literal["soft"] = 2


class Optimization(Settings):
    """How a network is trained.

    Attributes:
        optimizer: name in ``spectralmoe.optim.OPTIMIZERS``, or a factory of your own, ``pkg:factory``.
        schedule: name in ``spectralmoe.optim.SCHEDULES``, or a function of your own, ``pkg:function``; it follows a
            linear warm-up over the share ``warmup`` of all steps.
        label_smoothing, mixup: of tasks that classify images, see ``ImageTask``.
        precision: "fp32"; "bf16" or "fp16" (CUDA only, with a scaled loss) by autocast.
    """

    optimizer: Annotated[str, AfterValidator(_named("optimizer", OPTIMIZERS, "pkg:factory"))] = "adamw"
    schedule: Annotated[str, AfterValidator(_named("schedule", SCHEDULES, "pkg:function"))] = "cosine"
    epochs: Positive = 8
    batch_size: Positive = 128
    lr: Annotated[float, Field(gt=0)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    seed: Seed = 0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: Annotated[float, Field(ge=0)] = 0.0
    precision: Precision = "fp32"


def laid_over(router: Row, **sections: Any) -> Row:
    """The row that starts from ``router`` and has the sections of a settings file that are not empty.

    >>> laid_over("linear", terms={"load_balance": 0.01})
    {'preset': 'linear', 'terms': {'load_balance': 0.01}}
    """
    written = {name: section for name, section in sections.items() if section}
    return {"preset": router, **written} if written else router


S = TypeVar("S", bound=Settings)
_SHOWN = 80


def parse(kind: type[S], values: dict[str, Any], source: str) -> S:
    """``kind`` from plain values.

    Raises:
        UserError: an unknown key, a value of the wrong type or out of range; one line that names it and ``source``.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first, *others = error.errors()
        if not first["loc"]:  # the settings do not go together
            raise UserError(f"{source}: {_wanted(first)}") from error
        *parents, key = map(str, first["loc"])
        if first["type"] == "extra_forbidden":
            section = _section_at(kind, parents)
            raise UserError(f"{source}: {one_of('key', key, section.model_fields)}") from error
        where = _place(kind, first["loc"])
        if first["type"] == "missing":
            raise UserError(f"{source}: {where} is missing") from error
        if isinstance(cause := first.get("ctx", {}).get("error"), UserError):
            raise UserError(f"{source}: {where}: {cause}") from error
        same = [first, *(other for other in others if _place(kind, other["loc"]) == where)]
        wanted = " or ".join(dict.fromkeys(map(_wanted, same)))
        cure = "; write it in quotes" if any(part["type"] == "string_type" for part in same) else ""
        raise UserError(f"{source}: {where} should be {wanted}, got {_short(first['input'])}{cure}") from error
    except RecursionError as error:
        raise UserError(f"{source}: nested too deeply") from error


def _wanted(problem: Mapping[str, Any]) -> str:
    """What pydantic asks for, to follow "should be"."""
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "a section"
    return str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        return "something nested too deeply"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _place(kind: Any, path: Sequence[int | str]) -> str:
    """``network.k`` or ``depths.1``, without what pydantic adds for a value that may be of several types."""
    parts = []
    for part in path:
        fields = getattr(kind, "model_fields", {})
        if part in fields:
            kind = _section(fields[part].annotation)
        elif fields or isinstance(part, str):
            break
        parts.append(str(part))
    return ".".join(parts)


def _section_at(kind: Any, parents: Sequence[str]) -> Any:
    for parent in parents:
        kind = _section(kind.model_fields[parent].annotation)
    return kind


def _section(kind: Any) -> Any:
    """The settings in ``X`` or ``X | None``."""
    return next((part for part in get_args(kind) if hasattr(part, "model_fields")), kind)


def pick_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" stands for.

    Raises:
        UserError: another name; "cuda" where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise one_of("device", name, ["auto", "cpu", "cuda"])
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for, but torch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
