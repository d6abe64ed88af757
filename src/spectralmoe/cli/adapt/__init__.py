"""``spectralmoe adapt``: correct samples by one expert a layer, and show what else that moves; one file a job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from spectralmoe.cli.adapt.apply import apply
from spectralmoe.cli.adapt.correct import correct
from spectralmoe.cli.adapt.new_class import new_class
from spectralmoe.cli.adapt.options import as_command
from spectralmoe.cli.adapt.stream import stream
from spectralmoe.cli.adapt.trials import trials
from spectralmoe.errors import UserError, one_of

__all__ = ["adapt"]

JOBS: dict[str, tuple[Callable[..., None], str]] = {
    "correct": (correct, "Correct one image, with a receipt."),
    "trials": (trials, "What corrections cost, one at a time."),
    "stream": (stream, "Corrections in a row on one model."),
    "new-class": (new_class, "A class learned from a few images."),
    "apply": (apply, "A saved correction, on its model."),
}
_TOLD_BY = {"--sample": "correct", "--image": "correct", "--label": "correct", "--shots": "new-class"}
"""An option that only one job has -> the job."""


class Jobs(TyperGroup):
    """The jobs by name; the error for a missing name gives the job that the options belong to, or all jobs."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The job that the first word names, and the words after it.

        Raises:
            UserError: the first word is no job.
        """
        if args[0] in self.commands:
            return super().resolve_command(ctx, args)
        if len(args) == 1 and not args[0].startswith("-") and "/" not in args[0]:
            raise one_of("job of adapt", args[0], self.commands)
        words = [word.partition("=")[0] for word in args]
        job = next((job for option, job in _TOLD_BY.items() if option in words), None)
        jobs = "" if job else f", JOB one of {', '.join(self.commands)}"
        raise UserError(f"adapt wants the name of a job in front: spectralmoe adapt {job or 'JOB'} MODEL ...{jobs}")


adapt = typer.Typer(
    cls=Jobs,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"ignore_unknown_options": True},  # so that a call without a job reaches ``resolve_command``
)
"""The jobs of the verb."""

for _name, (_job, _summary) in JOBS.items():
    adapt.command(_name, short_help=_summary)(as_command(_job))


@adapt.callback()
def _about() -> None:
    """Correct samples by one expert a layer and show what else moved; or measure such corrections.

    Example: spectralmoe adapt correct MODEL --sample test:43 --guard mnist5k --out runs/corrected

    'spectralmoe evaluate MODEL --wrong DIR' shows which samples are wrong. MODEL is any saved classifier with MoE
    layers; its own folder is never written to.
    """
