"""``spectralmoe inspect``: what the routers of a model do, as JSON and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from spectralmoe.cli.completion import complete_data
from spectralmoe.cli.console import count, print_finding, print_json, print_table, say
from spectralmoe.cli.options import (
    ANY_DATA,
    Allow,
    DataDir,
    DeviceName,
    Download,
    Json,
    Seed,
    TextFiles,
    is_own,
    refuse_outputs,
)
from spectralmoe.errors import UserError, one_of
from spectralmoe.files import make_folder, write_text
from spectralmoe.json_files import write_json

__all__ = ["inspect"]


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A saved model, a Hugging Face folder or hub name, or .safetensors.")
    ],
    text: TextFiles = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar=ANY_DATA,
            help="Data for a network of spectralmoe; its own by default.",
            autocompletion=complete_data,
        ),
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option(
            "--attribute", metavar="TEXT", help="Say what each expert adds to the last token of TEXT; repeats."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="How many tokens to run.")] = 4096,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for inspection.json and report.html.")
    ] = None,
    router_only: Annotated[
        bool, typer.Option("--router-only", help="Read gates and experts from the files; run and load nothing.")
    ] = False,
    gates_only: Annotated[
        bool, typer.Option("--gates-only", help="The same with the gates alone, which is quick.")
    ] = False,
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="auto|float32|bfloat16|float16", help="Precision to load the model in.")
    ] = "auto",
    data_dir: DataDir = None,
    download: Download = False,
    allow: Allow = None,
    device: DeviceName = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Look at every router and expert of MODEL: load, entropy, ties, precision, how alike the experts are; what is
    wrong comes first, each with its cure.

    Examples: spectralmoe inspect runs/sr-moe --out runs/look

    spectralmoe inspect ./OLMoE-1B-7B --text book.txt --tokens 8192 --out runs/olmoe

    spectralmoe inspect ./Mixtral-8x7B --router-only --out runs/mixtral
    """
    from spectralmoe.checkpoints.inspection import inspect_checkpoint
    from spectralmoe.cli.inspect_own import inspect_own
    from spectralmoe.cli.inspect_text import DTYPES, inspect_text
    from spectralmoe.hf.routers.files import ROUTERS
    from spectralmoe.report import render_report
    from spectralmoe.training.settings import pick_device

    if not model.strip():
        raise UserError("MODEL is empty; name a saved model, a Hugging Face folder or hub name, or .safetensors")
    if dtype not in DTYPES:
        raise one_of("--dtype", dtype, DTYPES)
    refuse_outputs(Path(model))
    _make_out(out)  # before a long run, not after it
    where, folder = pick_device(device), Path(model)
    if router_only or gates_only:
        if text or data or attribute:
            raise UserError("--router-only and --gates-only run nothing: leave out --text, --data and --attribute")
        document = inspect_checkpoint(folder, experts=not gates_only)
        if (folder / ROUTERS).is_file():
            document["data"]["notes"].append(
                f"these are the gates from before: run the model to see those of {ROUTERS}"
            )
    elif is_own(folder):
        if text:
            raise UserError(
                f"{folder} holds a network of spectralmoe; leave out --text, and name its data with --data: images, or "
                "text:FILE for a language model"
            )
        document = inspect_own(
            folder,
            where,
            data=data,
            data_dir=data_dir,
            download=download,
            tokens=tokens,
            allow=allow,
            seed=seed,
            attribute=attribute or (),
        )
    else:
        if data is not None:
            raise UserError("--data is for networks of spectralmoe; give a Hugging Face model text with --text FILE")
        document = inspect_text(
            model, where, texts=text or (), tokens=tokens, dtype=dtype, seed=seed, attribute=attribute or ()
        )
    if out is not None:
        page = render_report([document], document["title"])
        write_json(out / "inspection.json", document)
        write_text(out / "report.html", page)
    if json:
        print_json(document)
    else:
        show(document, out)


def _make_out(out: Path | None) -> None:
    """Make the folder for what is written, which must not hold the report of something else."""
    if out is None:
        return
    if (out / "history.json").exists():
        raise UserError(f"--out {out} holds a training and its report.html; name another folder for the inspection")
    make_folder(out)


def show(document: dict[str, Any], out: Path | None) -> None:
    """Findings first, then a table of the layers."""
    from spectralmoe.diagnostics.table import VALUES

    model, data = document["model"], document["data"]
    layers = count(len(document["layers"]), "MoE layer")
    say(f"{model['name']} ({model['class']}, {layers}): {data['source']}", indent="  ")
    for note in data["notes"]:
        say(f"note: {note}", indent="  ")
    groups: dict[tuple[str, str, str], list[str]] = {}
    for finding in document["findings"]:
        groups.setdefault((finding["severity"], finding["kind"], finding["cure"]), []).append(finding["message"])
    for (severity, kind, cure), messages in groups.items():
        print_finding(severity, kind, messages, cure)
    if not document["findings"]:
        typer.echo("nothing found by the checks that have data")
    values = [value for value in VALUES.values() if value.column]
    rows = [
        [layer["name"], str(layer["experts"]), *(cell(layer, value.group, value.key) for value in values)]
        for layer in document["layers"]
    ]
    print_table("layers", ["layer", "experts", *(value.column for value in values)], rows)
    for held in document.get("holders", ()):
        show_holders(held, [layer["name"] for layer in document["layers"]])
    if out is not None:
        typer.echo(f"written: {out / 'inspection.json'}, {out / 'report.html'}")


def show_holders(held: dict[str, Any], names: Sequence[str], most: int = 8) -> None:
    """The experts with the largest gains for the last token of a text."""
    before, last = "".join(held["pieces"][:-1])[-40:].lstrip(), held["pieces"][-1]
    rows = [
        [
            names[row["layer"]],
            "shared" if row["expert"] is None else str(row["expert"]),
            *(f"{row[key]:.3g}" for key in ("weight", "gain")),
        ]
        for row in held["experts"][:most]
    ]
    title = f"what experts add to {last!r} after {before!r} (log p {held['log_prob']:.3g})"
    print_table(title, ["layer", "expert", "weight", "gain"], rows)


def cell(layer: dict[str, Any], block: str, key: str) -> str:
    """One value of the table."""
    value = ((layer.get(block) or {}).get(key) or {}).get("value")
    return "no data" if value is None else f"{value:.3g}"
