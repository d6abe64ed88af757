"""The options that the jobs of ``adapt`` share, stated once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer

from spectralmoe.cli.completion import complete_images
from spectralmoe.cli.options import Allow, DataDir, DeviceName, Download, Json, Model, Seed

__all__ = ["AdaptOptions", "ModelOptions", "as_command"]

HOW = "How to correct"
GUARDED = "Guard"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What every job is given."""

    model: Model
    allow: Allow = None
    device: DeviceName = "auto"
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class AdaptOptions(ModelOptions):
    """The options that say how samples are corrected; None: the option was not given."""

    guard: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|folder:PATH|hf:NAME",
            help="Reference data: what a correction may cost on their training part is bounded.",
            rich_help_panel=GUARDED,
            autocompletion=complete_images,
        ),
    ] = None
    guard_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Take the first N of the reference data.",
            show_default="10000",
            rich_help_panel=GUARDED,
        ),
    ] = None
    budget: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Percentage points of accuracy that an update may cost on the reference data.",
            show_default="0.1",
            rich_help_panel=GUARDED,
        ),
    ] = None
    max_flips: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Predictions that may change on the reference data.",
            show_default="any number",
            rich_help_panel=GUARDED,
        ),
    ] = None
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="sgd, margin, null_space, low_rank or unit.",
            show_default="sgd; with a guard unit, or low_rank where the model has no spare units",
            rich_help_panel=HOW,
        ),
    ] = None
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="all|last|NAME,...",
            help="Layers in which the expert that the sample uses is changed.",
            show_default="all; with a guard last",
            rich_help_panel=HOW,
        ),
    ] = None
    lr: Annotated[
        float | None, typer.Option(min=0.0, help="Step size of sgd.", show_default="0.002", rich_help_panel=HOW)
    ] = None
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Give up after so many steps.", show_default="200", rich_help_panel=HOW),
    ] = None
    carry: Annotated[
        bool | None,
        typer.Option(
            "--carry/--no-carry",
            help="Ask that noisy copies and copies shifted by one pixel become right, too; the default with a guard.",
            rich_help_panel=HOW,
        ),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|folder:PATH|hf:NAME",
            help="Data of samples and measurements; by default the model's own.",
            autocompletion=complete_images,
        ),
    ] = None
    data_dir: DataDir = None
    download: Download = False
    seed: Seed = 0


_OF_EVERY_JOB = tuple(field.name for field in fields(ModelOptions))


def as_command(job: Callable[..., None]) -> Callable[..., None]:
    """``job(options, ...)`` as a function of single parameters, which typer reads a command off: the model, those
    of the job, and the other fields of its options.
    """
    hints = get_type_hints(job, include_extras=True)
    kind = hints["options"]
    shared = get_type_hints(kind, include_extras=True)
    defaults = {field.name: field.default for field in fields(kind)}
    model, *common = (_parameter(name, shared[name], defaults[name]) for name in shared if name in _OF_EVERY_JOB)
    how = [_parameter(name, shared[name], defaults[name]) for name in shared if name not in _OF_EVERY_JOB]
    _, *rest = inspect.signature(job).parameters.values()
    of_job = [_parameter(parameter.name, hints[parameter.name], parameter.default) for parameter in rest]
    parameters = [model, *of_job, *how, *common]

    def command(**values: Any) -> None:
        job(kind(**{name: values.pop(name) for name in shared}), **values)

    command.__name__, command.__doc__ = job.__name__, job.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
    empty = inspect.Parameter.empty
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=empty if default is MISSING else default
    )
