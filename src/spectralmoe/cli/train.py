"""``spectralmoe train``: one network from a TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from spectralmoe.cli.console import print_json, watching
from spectralmoe.cli.options import (
    DataDir,
    DeviceName,
    Download,
    Json,
    Out,
    refuse_image_size,
    say_notes,
    see_own_modules,
)
from spectralmoe.diagnostics import Evaluation, evaluate
from spectralmoe.errors import UserError
from spectralmoe.files import write_json
from spectralmoe.instruments.monitor import Monitor
from spectralmoe.models import SRMoE
from spectralmoe.saving import save
from spectralmoe.surgery.timm import VisionMoE
from spectralmoe.terms import Term
from spectralmoe.training.data import ImageData, load_data
from spectralmoe.training.loop import train as run_training
from spectralmoe.training.network import CHECKPOINT, build_network, model_meta
from spectralmoe.training.parallel import joined
from spectralmoe.training.routers import find_preset
from spectralmoe.training.run_folder import run_folder
from spectralmoe.training.settings import TrainSettings, parse, pick_device, read_toml
from spectralmoe.training.vision import build_vision, router_name, router_terms, vision_meta
from spectralmoe.training.vision_settings import VisionSettings

__all__ = ["train"]

MONITOR = "monitor.jsonl"


def train(
    config: Annotated[Path, typer.Option(metavar="F.toml", help="Settings of the run.")],
    out: Out,
    seed: Annotated[int | None, typer.Option(min=0, help="Random seed; the file's by default.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start a timm model from timm's weights.")] = False,
    parallel: Annotated[
        str | None, typer.Option(metavar="ddp|fsdp2", help="Share every batch among the processes of torchrun.")
    ] = None,
    monitor: Annotated[
        bool, typer.Option("--monitor", help=f"Write what the routers do to {MONITOR} in --out.")
    ] = False,
    every: Annotated[int | None, typer.Option(min=1, help="Steps between two reports of --monitor; 50.")] = None,
    data_dir: DataDir = None,
    download: Download = False,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """Train one network and save it to --out: an SR-MoE network, or with a section [backbone] a timm model.

    Example: spectralmoe train --config examples/train.toml --out runs/sr-moe

    Example: spectralmoe train --config examples/emoe-vit.toml --out runs/emoe-vit

    --monitor writes loads, entropies and findings (dead experts, collapse, ...) while it trains, for the report.

    A run that was stopped goes on when it is started again with the same file and --out. On several processes:
    torchrun --nproc-per-node 2 -m spectralmoe train --config F.toml --out DIR --parallel ddp
    """
    settings = _settings(config, seed, pretrained)
    if parallel is not None and not isinstance(settings, VisionSettings):
        raise UserError("--parallel trains timm models; the settings file has no section [backbone]")
    if every is not None and not monitor:
        raise UserError("--every is how often --monitor reports; add --monitor")
    data = _images(settings, data_dir, download)
    with joined(parallel, pick_device(device)) as (ranks, where):
        if ranks.first:
            say_notes(data.notes)
        plan = _plan(settings, data)
        network = plan.network.to(where)
        trained = ranks.spread(network) if isinstance(network, VisionMoE) else network
        claim = {**settings.model_dump(mode="json"), "images": data.fingerprint}
        files = (CHECKPOINT, "model.safetensors", "config.json", "history.json", *([MONITOR] if monitor else []))
        with run_folder(out, claim, files) if ranks.first else nullcontext():
            ranks.wait()  # for the folder
            watched = (
                Monitor(trained, out / MONITOR, every=every or 50, layers=True, title=plan.label) if monitor else None
            )
            with watching(quiet=json or not ranks.first) as watch, watched or nullcontext():
                history = run_training(
                    trained,
                    data,
                    settings.optimization,
                    terms=plan.terms,
                    checkpoint=out / CHECKPOINT,
                    progress=lambda share: watch(f"training {plan.label}", share),
                    monitor=watched,
                    ranks=ranks,
                )
            if isinstance(network, VisionMoE):
                ranks.collect(trained, network)
            if not ranks.first:
                return
            found = evaluate(network, data.test.images, data.test.labels)
            save(network, out, meta=_meta(settings, data, found))
            write_json(out / "history.json", {"epochs": history.epochs, "test_accuracy": found.accuracy})
    accuracy = found.accuracy
    if json:
        print_json({"model": str(out), "validation_accuracy": history.validation_accuracy, "test_accuracy": accuracy})
    else:
        for finding in watched.findings if watched else ():
            typer.echo(f"{finding.severity}: {finding.message}; {finding.cure}", err=True)
        typer.echo(f"validation {history.validation_accuracy:.2f}%, test {accuracy:.2f}%; model saved to {out}")


class _Plan(NamedTuple):
    """What to train, with which penalty terms, and its name for people."""

    network: SRMoE | VisionMoE
    terms: Mapping[str, Term]
    label: str


def _settings(config: Path, seed: int | None, pretrained: bool) -> TrainSettings | VisionSettings:
    values = read_toml(config)
    settings: TrainSettings | VisionSettings
    if "backbone" in values:
        settings = parse(VisionSettings, values, str(config))
    else:
        settings = parse(TrainSettings, values, str(config))
    if seed is not None:
        settings = settings.model_copy(update={"optimization": settings.optimization.model_copy(update={"seed": seed})})
    if pretrained:
        if not isinstance(settings, VisionSettings):
            raise UserError(f"--pretrained starts a timm model, but {config} has no section [backbone]")
        settings = settings.model_copy(update={"backbone": settings.backbone.model_copy(update={"pretrained": True})})
    return settings


def _images(settings: TrainSettings | VisionSettings, data_dir: Path | None, download: bool) -> ImageData:
    if not isinstance(settings, VisionSettings):  # a timm model resizes the images of other data sets itself
        refuse_image_size(settings.data, settings.image_size)
    data = load_data(settings.data, data_dir=data_dir, download=download, side=settings.image_size)
    if settings.hold_out is not None:
        data = data.without(settings.hold_out)
    return data if settings.train_size is None else data.subset(settings.train_size)


def _plan(settings: TrainSettings | VisionSettings, data: ImageData) -> _Plan:
    if isinstance(settings, VisionSettings):
        router = router_name(settings)
        see_own_modules([router])
        label = settings.backbone.name if router == "none" else f"{settings.backbone.name}, {router}"
        return _Plan(build_vision(data, settings), router_terms(router), label)
    see_own_modules([settings.router])
    terms = find_preset(settings.router).terms
    network = build_network(data, settings.network, settings.router, settings.depth, settings.optimization.seed)
    return _Plan(network, terms, settings.router)


def _meta(settings: TrainSettings | VisionSettings, data: ImageData, found: Evaluation) -> dict[str, Any]:
    if isinstance(settings, VisionSettings):
        return vision_meta(data, settings, found)
    return model_meta(data, settings.router, settings.hold_out)
