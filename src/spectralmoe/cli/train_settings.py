"""The settings of ``spectralmoe train``: read, changed, checked, printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from spectralmoe.cli.console import print_json
from spectralmoe.errors import UserError

if TYPE_CHECKING:
    from spectralmoe.training.settings import TrainSettings
    from spectralmoe.training.vision_settings import VisionSettings

__all__ = ["check", "print_settings", "read_settings"]


def read_settings(
    config: Path, assign: Sequence[str], seed: int | None, pretrained: bool, router: str | None = None
) -> TrainSettings | VisionSettings:
    """What the file says, changed by --set, --seed, --router and --pretrained.

    Raises:
        UserError: as ``read_toml``, ``change`` and ``parse``; --pretrained without a timm model.
    """
    from spectralmoe.training.settings import TrainSettings, parse, read_toml
    from spectralmoe.training.toml_text import change, put
    from spectralmoe.training.vision_settings import VisionSettings

    values, source = read_toml(config), f"{config} with --set" if assign else str(config)
    change(values, assign)
    if seed is not None:
        put(values, "optimization.seed", seed)
    if router is not None:
        put(values, "moe.router" if "backbone" in values else "router", router)
    if "backbone" not in values:
        if pretrained:
            raise UserError(f"--pretrained starts a timm model, but {config} has no section [backbone]")
        return parse(TrainSettings, values, source)
    if pretrained:
        put(values, "backbone.pretrained", True)
    return parse(VisionSettings, values, source)


def print_settings(settings: TrainSettings | VisionSettings, json: bool) -> None:
    """All settings as TOML that reads back as the same, or as JSON."""
    from spectralmoe.training.toml_text import to_toml

    if json:
        print_json(settings.model_dump(mode="json"))
    else:
        typer.echo(to_toml(settings), nl=False)


def check(
    settings: TrainSettings | VisionSettings, parallel: str | None, allow: Sequence[str], router: str | None = None
) -> None:
    """What does not go together is refused before data are read, and no module is imported because a file names it;
    what ``router``, from the command line, names may be.
    """
    from spectralmoe.naming import own_names
    from spectralmoe.training.settings import TrainSettings

    if parallel is not None and isinstance(settings, TrainSettings):
        raise UserError("--parallel trains timm models; the settings file has no section [backbone]")
    for name in own_names(settings.row):
        if name not in (*allow, *own_names(router)):
            raise UserError(f"router {name!r} is a class of your own; if you trust it, add --allow {name}")
