"""The application: all verbs, and what happens to errors."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

import spectralmoe
from spectralmoe.cli.adapt import adapt
from spectralmoe.cli.bench import bench
from spectralmoe.cli.card import card
from spectralmoe.cli.compare import compare
from spectralmoe.cli.evaluate import evaluate
from spectralmoe.cli.fewshot import fewshot
from spectralmoe.cli.finetune import finetune
from spectralmoe.cli.inspect import inspect
from spectralmoe.cli.list import list_everything
from spectralmoe.cli.plan import plan
from spectralmoe.cli.predict import predict
from spectralmoe.cli.prune import prune
from spectralmoe.cli.replicate import replicate
from spectralmoe.cli.report import report
from spectralmoe.cli.train import train
from spectralmoe.cli.upcycle import upcycle
from spectralmoe.errors import UserError

__all__ = ["app", "run"]

NO_MEMORY = "out of memory: use fewer images (--train-size) or a smaller network"
NO_GPU_MEMORY = "out of GPU memory: use --device cpu, a smaller batch or a smaller network"
INTERRUPTED = "interrupted; what was finished is kept"

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)  # [x] is no markup
app.command(short_help="Train routers side by side under one budget.")(compare)
app.command(short_help="Train one network from a settings file.")(train)
app.command(short_help="Test accuracy of a model, load of its experts.")(evaluate)
app.command(short_help="Classes of image files.")(predict)
app.add_typer(adapt, name="adapt", short_help="Correct samples by one expert; what else moves.")
app.command(short_help="Learn a new task from a few images a class.")(fewshot)
app.command(short_help="Make a Hugging Face MoE of a dense model.")(upcycle)
app.command(short_help="Train a Hugging Face MoE on text.")(finetune)
app.command(short_help="A Hugging Face MoE with fewer experts.")(prune)
app.command(short_help="A saved model whose busy experts have copies.")(replicate)
app.command(short_help="One HTML page about what was measured.")(report)
app.command(short_help="What the routers and experts of a model do.")(inspect)
app.command(short_help="What a recorded load would do on several devices.")(plan)
app.command(short_help="How fast the layers are.")(bench)
app.command(short_help="Run a reproduction card's plan.")(card)
app.command("list", short_help="Everything that can be named.")(list_everything)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spectralmoe {spectralmoe.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Mixture-of-Experts whose routing is shaped by geometry. Start with: spectralmoe compare --out runs/first"""


def run(arguments: Sequence[str]) -> int:
    """Run one command; returns the exit code. A user's mistake is one line on stderr, never a traceback.

    With ``--json`` stdout then holds one JSON value all the same: ``{"error": the line, "exit_code": its code}``.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no error
    try:
        result = app(list(arguments), prog_name="spectralmoe", standalone_mode=False)
        if result != 130:
            return int(result or 0)
        message, code = INTERRUPTED, 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, typer.Abort):
        message, code = INTERRUPTED, 130
    except Exception as error:
        known = _explain(error)
        if known is None:
            raise
        message, code = known
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    if "--json" in arguments:
        print(json.dumps({"error": line, "exit_code": code}))
    return code


def _explain(error: Exception) -> tuple[str, int] | None:
    """The message for the user, and the exit code; None for a bug of the program."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return NO_GPU_MEMORY, 2
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return NO_MEMORY, 2
    if isinstance(error, OSError):
        return f"{error.filename or 'file system'}: {error.strerror or error}", 2
    if hasattr(error, "format_message"):  # a usage error of the option parser
        return error.format_message() or "no verb was given; see spectralmoe --help", 2
    return None
