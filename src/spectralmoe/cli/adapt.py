"""``spectralmoe adapt``: correct samples by one expert a layer, and show what else that moves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectralmoe.cli.options import Allow, DataDir, DeviceName, Download, Json, Model, Seed, split_names
from spectralmoe.errors import UserError

__all__ = ["adapt"]

TRIALS = 50
DEFAULT_SHOTS = "1,5,10"
HOW = "How to correct"
GUARDED = "Guard"


def adapt(
    model: Model,
    sample: Annotated[
        str | None,
        typer.Option(metavar="PART:N", help="Correct this sample of the data, such as test:43; with --out."),
    ] = None,
    image: Annotated[Path | None, typer.Option(metavar="F", help="Correct this image; with --label and --out.")] = None,
    label: Annotated[
        str | None,
        typer.Option(metavar="CLASS", help="The right class, by name or number; of --sample by default the data's."),
    ] = None,
    apply: Annotated[Path | None, typer.Option(metavar="FILE", help="Apply a saved update; with --out.")] = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Measure N corrections, one at a time; without any of these forms: 50."),
    ] = None,
    stream: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Make N corrections in a row; with --out.")
    ] = None,
    new_class: Annotated[
        str | None, typer.Option(metavar="CLASS", help="Measure how a class is learned from a few samples.")
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(metavar="K,K,...", help=f"With --new-class: how many samples (default: {DEFAULT_SHOTS})."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for everything that is written.")] = None,
    guard: Annotated[
        str | None,
        typer.Option(metavar="NAME|folder:PATH", help="Reference data (their training part).", rich_help_panel=GUARDED),
    ] = None,
    guard_size: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="How many of them, the first N (default: 10000).", rich_help_panel=GUARDED
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Points of accuracy an update may cost on them (default: 0.1).", rich_help_panel=GUARDED
        ),
    ] = None,
    max_flips: Annotated[
        int | None,
        typer.Option(min=0, help="Predictions that may change on them (default: any number).", rich_help_panel=GUARDED),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="sgd, margin, null_space, low_rank or unit. By default sgd; with a guard unit, or low_rank where the "
            "model has no spare units.",
            rich_help_panel=HOW,
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="all|last|NAME,...",
            help="In which layers the used expert learns (default: all; with a guard last).",
            rich_help_panel=HOW,
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(min=0.0, help="Step size of sgd (default: 0.002).", rich_help_panel=HOW)
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Give up after so many steps (default: 200).", rich_help_panel=HOW)
    ] = None,
    carry: Annotated[
        bool | None,
        typer.Option(
            "--carry/--no-carry",
            help="Correct noisy copies and copies shifted by one pixel with the sample; by default with a guard.",
            rich_help_panel=HOW,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|folder:PATH", help="Data of --sample and to measure on; by default the model's own."
        ),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    seed: Seed = 0,
    allow: Allow = None,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """Correct one image by one expert and show what else moved; or measure such corrections.

    Examples: spectralmoe adapt MODEL --sample test:43 --guard mnist5k --out runs/corrected

    spectralmoe adapt MODEL --image seven.png --label 7 --guard mnist5k --out runs/corrected

    spectralmoe adapt MODEL --apply runs/corrected/update.safetensors --out runs/applied

    spectralmoe adapt MODEL --trials 50 --guard mnist5k

    spectralmoe adapt MODEL --stream 100 --guard mnist5k --out runs/stream

    spectralmoe adapt MODEL --new-class 7 --shots 1,5,10 --guard mnist5k

    'spectralmoe evaluate MODEL --wrong DIR' shows which samples are wrong. A correction that is refused ends with exit
    code 1. MODEL's own folder is never written to.
    """
    from spectralmoe.cli.adapt_correct import apply_patch, correct
    from spectralmoe.cli.adapt_measure import measure_new_class, measure_trials
    from spectralmoe.cli.adapt_setup import Wishes
    from spectralmoe.cli.adapt_stream import run_stream

    modes = {
        "--sample": sample,
        "--image": image,
        "--apply": apply,
        "--trials": trials,
        "--stream": stream,
        "--new-class": new_class,
    }
    _check_form([name for name, value in modes.items() if value is not None], label, out, shots)
    wishes = Wishes(
        model=model,
        guard=guard,
        guard_size=guard_size,
        budget=budget,
        max_flips=max_flips,
        method=method,
        layers=layers,
        lr=lr,
        max_steps=max_steps,
        carry=carry,
        data=data,
        data_dir=data_dir,
        download=download,
        seed=seed,
        allow=tuple(allow or ()),
        device=device,
        json=json,
    )
    if (image or sample) is not None and out is not None:
        if not correct(wishes, sample if image is None else image, label, out):
            raise typer.Exit(1)
    elif apply is not None and out is not None:
        apply_patch(wishes, apply, out)
    elif stream is not None and out is not None:
        run_stream(wishes, stream, out)
    elif new_class is not None:
        measure_new_class(wishes, new_class, _numbers(shots or DEFAULT_SHOTS))
    else:
        measure_trials(wishes, trials or TRIALS)


def _check_form(modes: list[str], label: str | None, out: Path | None, shots: str | None) -> None:
    """One form of the command, with what belongs to it and nothing else."""
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} exclude each other; give one of them")
    mode = modes[0] if modes else "--trials"
    if mode == "--image" and (label is None or out is None):
        raise UserError("to correct one image give --image, --label and --out together")
    if mode == "--sample" and out is None:
        raise UserError("--sample needs --out, the folder for the corrected model and the receipt")
    if mode in ("--apply", "--stream") and out is None:
        raise UserError(f"{mode} needs --out, the folder for the changed model")
    if mode in ("--trials", "--new-class") and out is not None:
        raise UserError(
            f"{mode} only measures and writes nothing: --out goes with --sample, --image, --apply or --stream"
        )
    if label is not None and mode not in ("--image", "--sample"):
        raise UserError("--label is the right class of an image: give --image and --out with it")
    if shots is not None and mode != "--new-class":
        raise UserError("--shots says how many samples of a new class are shown: give --new-class with it")


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in split_names(text)]
    except ValueError as error:
        raise UserError(f"--shots {text!r} is not a list of numbers such as {DEFAULT_SHOTS}") from error
    if not numbers or min(numbers) < 1:
        raise UserError(f"--shots {text!r} is not a list of positive numbers such as {DEFAULT_SHOTS}")
    return numbers
