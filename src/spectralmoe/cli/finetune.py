"""``spectralmoe finetune``: train a Hugging Face MoE on text, with other routers, terms or adapters."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralmoe.cli.completion import complete_finetune_router
from spectralmoe.cli.console import count, print_finding, print_json, print_settings, print_table, show_progress
from spectralmoe.cli.options import (
    Allow,
    Assign,
    DeviceName,
    Json,
    PrintConfig,
    TextFiles,
    refuse_outputs,
    say_notes,
    split_names,
    trust_own,
)
from spectralmoe.errors import UserError
from spectralmoe.files import write_text
from spectralmoe.json_files import read_json, to_json, write_json

if TYPE_CHECKING:
    import torch

    from spectralmoe.hf import TransformersModel
    from spectralmoe.training.settings.finetuning import FinetuneSettings

__all__ = ["finetune"]

HISTORY = "history.json"


def finetune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face MoE: folder or hub name.")],
    text: TextFiles = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for everything that is written.")
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|TABLE|PKG:OBJECT",
            help="Put these routers in the place of the model's own (see 'spectralmoe list').",
            autocompletion=complete_finetune_router,
        ),
    ] = None,
    terms: Annotated[
        str | None, typer.Option(metavar="NAME=WEIGHT,...", help="Terms added to the loss, such as load_balance=1e-2.")
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(metavar="routers,experts|all", help="What is trained; all by default, with --lora routers."),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="all|lastN", help="MoE layers that are trained; all by default.")
    ] = None,
    lora: Annotated[int | None, typer.Option(min=1, metavar="R", help="Adapters of rank R on the experts.")] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window; 256 by default, if the model reads as many.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Random seed.", show_default="0")] = None,
    config: Annotated[Path | None, typer.Option(metavar="F.toml", help="Settings of the run.")] = None,
    assign: Assign = None,
    print_config: PrintConfig = False,
    allow: Allow = None,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """Train a mixture-of-experts language model on text, and print bits per byte on a held-out part, before and after.

    Example: spectralmoe finetune ./Mixtral-8x7B --text books --terms load_balance=1e-2 --lora 16 --out runs/books

    Example: spectralmoe finetune ./moe --text code --text prose --router sr-moe --layers last2 --out runs/sr-moe

    The Trainer of transformers does the work. --out holds the model, which transformers loads; history.json,
    monitor.jsonl and report.html say how it went. A run that was stopped goes on when it is started again.
    """
    from spectralmoe.cli.inspect_text import DTYPES
    from spectralmoe.cli.texts import read_domains
    from spectralmoe.experiments.run_folder import run_folder
    from spectralmoe.hf.training.lora import import_peft
    from spectralmoe.report import as_document, read_documents, render_report
    from spectralmoe.training.finetuning.finetune import CHECKPOINTS, MONITOR
    from spectralmoe.training.finetuning.finetune import finetune as run_finetuning
    from spectralmoe.training.finetuning.routers import terms_of
    from spectralmoe.training.settings import pick_device

    options = {"router": router, "layers": layers, "lora": lora, "length": length, "seed": seed}
    settings = _read(config, assign or (), options, terms, train)
    if print_config:
        print_settings(settings, json)
        return
    if out is None:
        raise UserError("--out is missing: name the folder for everything that is written")
    trust_own({"router": settings.router, "terms": settings.terms}, allow, router)
    terms_of(settings)  # what cannot be is refused before a model is loaded
    if settings.lora is not None:
        import_peft()
    refuse_outputs(Path(model))
    texts, notes = read_domains(text or ())
    say_notes(notes)
    claim = {**settings.model_dump(mode="json"), "model": model, "text": _digest(texts)}
    with run_folder(out, claim, (HISTORY, MONITOR, CHECKPOINTS, "config.json", "model.safetensors")):
        if (out / HISTORY).exists():  # finished before
            history = read_json(out / HISTORY)
        else:
            loaded = _load(model, DTYPES[settings.dtype], pick_device(device))
            say_notes(loaded.notes)
            with show_progress(quiet=json) as progress:
                history = run_finetuning(loaded, texts, settings, out, progress)
            documents = [as_document(history, HISTORY), *read_documents([out / MONITOR])]
            write_text(out / "report.html", render_report(documents, history["title"]))
            write_json(out / HISTORY, history)  # now it is finished, so the checkpoints may go
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    if json:
        print_json({"model": str(out), **history})
    else:
        _tell(history, out)


def _read(
    config: Path | None, assign: Sequence[str], options: dict[str, Any], terms: str | None, train: str | None
) -> FinetuneSettings:
    """The settings of the file, changed by the options that were given, then by --set.

    Raises:
        UserError: as ``read_toml``, ``change`` and ``parse``; --terms that are no assignments.
    """
    from spectralmoe.training.settings import parse
    from spectralmoe.training.settings.finetuning import FinetuneSettings
    from spectralmoe.training.settings.toml_text import change, put, read_toml

    values = {} if config is None else read_toml(config)
    for key, value in options.items():
        if value is not None:
            put(values, key, value)
    if train is not None:
        put(values, "train", list(split_names(train)))
    for term in split_names(terms or ""):
        if "=" not in term:
            raise UserError(f"--terms {term!r} has no weight; say {term}=0.01")
        change(values, [f"terms.{term}"])
    change(values, assign)
    return parse(FinetuneSettings, values, str(config) if config else "finetune")


def _load(source: str, dtype: torch.dtype | None, device: torch.device) -> TransformersModel:
    """The model; a dense one is refused with the way to make a MoE of it."""
    from spectralmoe.hf import load_transformers

    try:
        return load_transformers(source, dtype=dtype, device=device)
    except UserError as error:
        if "a dense model" not in str(error):
            raise
        cure = f"make a mixture of experts of it with 'spectralmoe upcycle {source} --out DIR'"
        raise UserError(f"{source} is a dense model: it has no routers and experts to train; {cure}") from error


def _digest(texts: dict[str, list[str]]) -> str:
    """A SHA-256 of the text, to notice when a run is resumed on other text."""
    return hashlib.sha256(to_json(texts).encode()).hexdigest()


def _tell(history: dict[str, Any], out: Path) -> None:
    """Print the findings, a table of bits per byte, and the paths of the files."""
    for finding in history["findings"]:
        print_finding(finding["severity"], finding["kind"], [finding["message"]], finding["cure"], err=True)
    before, after = history["before"], history["after"]
    rows = [[name, f"{before[name]:.3f}", f"{after[name]:.3f}"] for name in after]
    print_table("bits per byte", ["held-out text", "before", "after"], rows)
    typer.echo(f"{count(history['steps'], 'step')}; model saved to {out}; report: {out / 'report.html'}")
