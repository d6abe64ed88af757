"""``spectralmoe bench``: how fast the layers are, against their limit and against other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectralmoe.cli.completion import SUITES, one_among
from spectralmoe.cli.console import print_json, print_table, show_progress
from spectralmoe.cli.options import DeviceName, Json, say_notes, split_names
from spectralmoe.errors import one_of

__all__ = ["bench"]

DTYPES = ("float32", "bfloat16", "float16")


def bench(
    suites: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SUITE]...", help="Suites to run; all by default.", autocompletion=one_among(*SUITES)),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for JSON, table and picture.")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Runs of each candidate, in turns; by default 25 (quick: 7); an interval needs 6."),
    ] = None,
    device: DeviceName = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Types of the numbers; by default float32,bfloat16 on a CPU, bfloat16 on a GPU."
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of torch.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: for a look, not for a record.")] = False,
    allow_busy: Annotated[
        bool, typer.Option("--allow-busy", help="Measure although the machine is not idle; the result says so.")
    ] = False,
    keep_memory: Annotated[
        bool, typer.Option("--keep-memory", help="Let glibc keep freed memory: no candidate maps fresh pages.")
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option("--check", metavar="FILE", help="Repeat the quick run in FILE, warn of slower ratios."),
    ] = None,
    json: Json = False,
) -> None:
    """Time layers, routers, penalties and training steps, and compare them with their bare arithmetic and with layers
    of other libraries.

    Suites: layer, router, penalty, branch, step, scaling, decode, memory. Every candidate must give what
    dispatch="loop" gives before it is timed. Other libraries that are not installed (extra: bench) are left out with
    a note.

    Each case is written to --out as it ends; a run that was stopped goes on with the same command.

    Example: spectralmoe bench layer decode --out runs/bench
    """
    import torch

    from spectralmoe.bench import Settings, run
    from spectralmoe.bench.allocator import keep_freed_memory
    from spectralmoe.bench.show import as_markdown, ratio_panels, target_cells
    from spectralmoe.draw.figure import write_figures
    from spectralmoe.training.settings import pick_device

    if check is not None:
        _check(check, json)
        return
    if keep_memory:
        keep_freed_memory()
    where = pick_device(device)
    names = split_names(dtype or ("bfloat16" if where.type == "cuda" else "float32,bfloat16"))
    for name in names:
        if name not in DTYPES:
            raise one_of("dtype", name, DTYPES)
    settings = Settings(
        where,
        tuple(getattr(torch, name) for name in names),
        quick,
        threads,
        rounds or (7 if quick else 25),
        keep_memory,
    )
    with show_progress(quiet=json) as progress:
        result = run(suites or list(SUITES), settings, out=out, allow_busy=allow_busy, progress=progress)
    pictures: list[Path] = []
    if out is not None:
        pictures, notes = write_figures(out, {"bench": ratio_panels(result)}, per_line=1)
        say_notes(notes)
    if json:
        print_json(result)
    elif out is None:
        typer.echo(as_markdown(result))
    else:
        rows = [target_cells(row) for row in result["targets"] if row["met"] is not None]
        if rows:
            print_table("targets", ["what", "at most", "measured", "met"], rows)
        typer.echo(f"everything: {out / 'bench.md'}, {out / 'bench.json'}")
        for picture in pictures:
            typer.echo(f"picture: {picture}")


def _check(path: Path, json: bool) -> None:
    """Slower ratios are warnings: another machine, or a neighbour, may be the reason."""
    from spectralmoe.bench import run
    from spectralmoe.bench.allocator import keep_freed_memory
    from spectralmoe.bench.check import read_stored, warnings

    stored, suites, settings = read_stored(path)
    if settings.keep_memory:
        keep_freed_memory()
    with show_progress(quiet=json) as progress:
        result = run(suites, settings, allow_busy=True, progress=progress)
    lines = warnings(stored, result)
    if json:
        print_json({"warnings": lines, "result": result})
        return
    for line in lines:
        typer.echo(f"warning: {line}")
    typer.echo(f"{len(lines)} of the stored ratios have grown" if lines else "no stored ratio has grown")
