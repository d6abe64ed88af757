"""Options of the verbs whose cells may run on other machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralmoe.cli.console import count, print_json
from spectralmoe.cli.options import say_notes
from spectralmoe.errors import UserError, one_of

if TYPE_CHECKING:
    from spectralmoe.experiments.grid import Slice, Taken
    from spectralmoe.experiments.remote import Remote

__all__ = ["Cluster", "Collect", "Submit", "SubmitWith", "Take", "elsewhere", "one_at_most", "say_taken"]

QUEUES = ("slurm", "local")
"""What submitit submits to; ``local`` are processes here."""

Cluster = Annotated[
    str | None,
    typer.Option("--cluster", metavar="tcp://HOST:8786", help="Run the cells on the workers of a Dask scheduler."),
]
Submit = Annotated[
    str | None, typer.Option("--submit", metavar="slurm", help="Run each cell as a job of SLURM, by submitit.")
]
SubmitWith = Annotated[
    list[str] | None,
    typer.Option("--submit-with", metavar="KEY=VALUE", help="Setting of these jobs, such as timeout_min=60; repeats."),
]
Take = Annotated[
    str | None,
    typer.Option("--take", metavar="I/N", help="Run the I-th of N slices of the cells alone, such as 3/16."),
]
Collect = Annotated[bool, typer.Option("--collect", help="Run nothing; write the tables of what the slices have run.")]


def elsewhere(
    processes: int | None, cluster: str | None, submit: str | None, submit_with: list[str] | None
) -> Remote | None:
    """The engine that runs cells on other machines; None: they run here.

    Raises:
        UserError: options that do not go together.
    """
    from spectralmoe.experiments.remote import Dask, Submitit
    from spectralmoe.training.settings.toml_text import change

    given = {"--processes": processes, "--cluster": cluster, "--submit": submit}
    one_at_most({option: value is not None for option, value in given.items()})
    if submit_with and submit is None:
        raise UserError("--submit-with says how --submit runs jobs; give --submit slurm, too")
    if cluster is not None:
        return Dask(cluster)
    if submit is None:
        return None
    if submit not in QUEUES:
        raise one_of("queue", submit, QUEUES)
    for assignment in submit_with or ():
        if "=" not in assignment:
            raise UserError(f"--submit-with {assignment} is no assignment such as timeout_min=60")
    options: dict[str, Any] = {}
    change(options, submit_with or ())
    return Submitit(submit, options)


def say_taken(part: Slice, taken: Taken, json: bool) -> None:
    """Print the result of a slice."""
    if json:
        print_json({"take": str(part), **taken._asdict()})
        return
    typer.echo(f"slice {part}: {count(taken.cells, 'cell')} run")
    if taken.missing:
        say_notes([f"{taken.missing}; the cells after them wait: run the slices that lack, then this one again"])


def one_at_most(given: Mapping[str, bool]) -> None:
    """Refuse two options that exclude each other.

    Raises:
        UserError: two of them were given.
    """
    names = [option for option, value in given.items() if value]
    if len(names) > 1:
        raise UserError(f"{names[0]} and {names[1]} do not go together; give one of them")
