"""``spectralmoe report``: writes measurements as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectralmoe.cli.console import count, print_json
from spectralmoe.cli.options import Json
from spectralmoe.errors import UserError
from spectralmoe.files import write_text

__all__ = ["report"]


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="inspection.json, history.json or a monitor's .jsonl of train, results.json of compare, fewshot.json, "
            "receipt.json, or folders that hold them.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page to write.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option("--title", metavar="TEXT", help="Title of the page.")] = None,
    json: Json = False,
) -> None:
    """Write one HTML page about inspections, training runs, comparisons and one-expert updates.

    Several of a kind stand side by side. The page needs no network: it can be mailed, or opened from disk.

    Example: spectralmoe report runs/inspected runs/corrected --out report.html
    """
    from spectralmoe.report import read_documents, render_report

    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name a file, for example {out / 'report.html'}")
    documents = read_documents(paths)
    page = render_report(documents, title or _title([document.body.title for document in documents]))
    write_text(out, page)
    read = [{"kind": document.kind, "source": document.source, "title": document.body.title} for document in documents]
    size = out.stat().st_size
    if json:
        print_json({"out": str(out), "bytes": size, "documents": read})
        return
    typer.echo(f"{count(len(read), 'document')}, {size / 1000:,.0f} kB: {out}")


def _title(titles: list[str]) -> str:
    """That of the first document, and how many more there are."""
    return titles[0] if len(titles) == 1 else f"{titles[0]} and {len(titles) - 1} more"
