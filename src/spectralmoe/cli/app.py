"""The application: all verbs, and what happens to errors."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

import spectralmoe
from spectralmoe.cli.adapt import adapt
from spectralmoe.cli.bench import bench
from spectralmoe.cli.compare import compare
from spectralmoe.cli.evaluate import evaluate
from spectralmoe.cli.fewshot import fewshot
from spectralmoe.cli.inspect import inspect
from spectralmoe.cli.list import list_everything
from spectralmoe.cli.predict import predict
from spectralmoe.cli.report import report
from spectralmoe.cli.train import train
from spectralmoe.errors import UserError

__all__ = ["app", "run"]

NO_MEMORY = "out of memory: use fewer images (--train-size) or a smaller network"
INTERRUPTED = "interrupted; what was finished is kept"

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
app.command()(compare)
app.command()(train)
app.command()(evaluate)
app.command()(predict)
app.command()(adapt)
app.command()(fewshot)
app.command()(report)
app.command()(inspect)
app.command()(bench)
app.command("list")(list_everything)


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
    """Run one command; returns the exit code. A user's mistake is one line on stderr, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show is no error
    try:
        result = app(list(arguments), prog_name="spectralmoe", standalone_mode=False)
        return _fail(INTERRUPTED, code=130) if result == 130 else int(result or 0)
    except UserError as error:
        return _fail(str(error))
    except torch.OutOfMemoryError:
        return _fail("out of GPU memory: use --device cpu, a smaller batch or a smaller network")
    except MemoryError:
        return _fail(NO_MEMORY)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail(INTERRUPTED, code=130)
    except OSError as error:
        return _fail(f"{error.filename or 'file system'}: {error.strerror or error}")
    except Exception as error:
        if "can't allocate memory" in str(error):
            return _fail(NO_MEMORY)
        if hasattr(error, "format_message"):  # a usage error of the option parser
            return _fail(error.format_message() or "no verb was given; see spectralmoe --help")
        raise


def _fail(message: str, code: int = 2) -> int:
    line = " ".join(message.split())
    print(f"error: {line}", file=sys.stderr)
    return code
