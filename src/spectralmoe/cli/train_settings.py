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

__all__ = ["check", "print_settings", "read_settings", "router_of"]


def read_settings(
    config: Path, assign: Sequence[str], seed: int | None, pretrained: bool
) -> TrainSettings | VisionSettings:
    """What the file says, changed by --set, --seed and --pretrained.

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


def check(settings: TrainSettings | VisionSettings, parallel: str | None, allow: Sequence[str]) -> None:
    """What does not go together is refused before data are read, and no module is imported because a file names it."""
    from spectralmoe.training.settings import TrainSettings

    if parallel is not None and isinstance(settings, TrainSettings):
        raise UserError("--parallel trains timm models; the settings file has no section [backbone]")
    router = router_of(settings)
    if ":" in router and router not in allow:
        raise UserError(f"router {router!r} is a class of your own; if you trust it, add --allow {router}")


def router_of(settings: TrainSettings | VisionSettings) -> str:
    """The router's name, or "none" for a dense backbone."""
    from spectralmoe.training.settings import TrainSettings
    from spectralmoe.training.vision import router_name

    return settings.router if isinstance(settings, TrainSettings) else router_name(settings)
