"""``spectralmoe train``: one network from a TOML file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from spectralmoe.cli.completion import LOG_NAMES, listed, one_among
from spectralmoe.cli.console import print_finding, print_json, watching
from spectralmoe.cli.options import (
    Allow,
    Assign,
    DataDir,
    DeviceName,
    Download,
    Json,
    refuse_image_size,
    say_notes,
    see_own_modules,
    split_names,
)
from spectralmoe.cli.train_settings import check, print_settings, read_settings
from spectralmoe.errors import UserError
from spectralmoe.files import write_json
from spectralmoe.training.names import ROUTER_NAMES

if TYPE_CHECKING:
    from spectralmoe.data.image_data import ImageData
    from spectralmoe.diagnostics import Evaluation
    from spectralmoe.models import SRMoE
    from spectralmoe.terms import Term
    from spectralmoe.training.loop import Standing, Watcher
    from spectralmoe.training.settings import TrainSettings
    from spectralmoe.training.vision_settings import VisionSettings
    from spectralmoe.vision.model import VisionMoE

__all__ = ["train"]

MONITOR = "monitor.jsonl"


def train(
    config: Annotated[Path, typer.Option(metavar="F.toml", help="Settings of the run.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for everything that is written.")] = None,
    assign: Assign = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print all settings of the run as TOML, and train nothing.")
    ] = False,
    router: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|TABLE|PKG:OBJECT",
            help="Router, in place of the file's (see 'spectralmoe list').",
            autocompletion=one_among(*ROUTER_NAMES),
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Random seed; the file's by default.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start a timm model from timm's weights.")] = False,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="ddp|fsdp2",
            help="Share every batch among the processes of torchrun.",
            autocompletion=one_among("ddp", "fsdp2"),
        ),
    ] = None,
    monitor: Annotated[
        bool, typer.Option("--monitor", help=f"Write what the routers do to {MONITOR} in --out.")
    ] = False,
    every: Annotated[int | None, typer.Option(min=1, help="Steps between two reports of --monitor; 50.")] = None,
    log: Annotated[
        str | None,
        typer.Option(
            metavar="csv|tensorboard|wandb",
            help="Write each epoch's loss and validation accuracy there, too; several with commas.",
            autocompletion=lambda incomplete: listed(incomplete, LOG_NAMES),
        ),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    allow: Allow = None,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """Train one network and save it to --out: an SR-MoE network, or with a section [backbone] a timm model.

    Example: spectralmoe train --config examples/train.toml --out runs/sr-moe

    Example: spectralmoe train --config examples/emoe-vit.toml --set optimization.epochs=2 --out runs/emoe-vit

    --monitor writes loads, entropies and findings (dead experts, collapse, ...) while it trains, for the report.

    A run that was stopped goes on when it is started again with the same settings and --out. On several processes:
    torchrun --nproc-per-node 2 -m spectralmoe train --config F.toml --out DIR --parallel ddp
    """
    from spectralmoe.diagnostics import evaluate
    from spectralmoe.experiments.run_folder import run_folder
    from spectralmoe.instruments.monitor import Monitor
    from spectralmoe.saving import save
    from spectralmoe.training.logs import check_logs, open_logs
    from spectralmoe.training.loop import train as run_training
    from spectralmoe.training.network import CHECKPOINT
    from spectralmoe.training.parallel import joined
    from spectralmoe.training.settings import pick_device
    from spectralmoe.vision.model import VisionMoE

    settings = read_settings(config, assign or (), seed, pretrained, router)
    if print_config:
        print_settings(settings, json)
        return
    if out is None:
        raise UserError("--out is missing: name the folder for everything that is written")
    if every is not None and not monitor:
        raise UserError("--every is how often --monitor reports; add --monitor")
    check(settings, parallel, allow or (), router)
    wanted = split_names(log or "")
    check_logs(wanted)
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
            with (
                open_logs(wanted if ranks.first else (), out, plan.label) as logs,
                watching(quiet=json or not ranks.first) as watch,
                watched or nullcontext(),
            ):
                history = run_training(
                    trained,
                    data,
                    settings.optimization,
                    terms=plan.terms,
                    checkpoint=out / CHECKPOINT,
                    follow=_shown(watch, plan.label, settings.optimization.epochs),
                    logs=logs,
                    monitor=watched,
                    ranks=ranks,
                )
            if isinstance(network, VisionMoE):
                ranks.collect(trained, network)
            if not ranks.first:
                return
            found = evaluate(network, data.test.images, data.test.labels)
            save(network, out, meta=_meta(settings, data, found))
            title = f"{plan.label} on {settings.data}"
            write_json(
                out / "history.json", {"title": title, "epochs": history.epochs, "test_accuracy": found.accuracy}
            )
    accuracy = found.accuracy
    if json:
        print_json({"model": str(out), "validation_accuracy": history.validation_accuracy, "test_accuracy": accuracy})
    else:
        for finding in watched.findings if watched else ():
            print_finding(finding.severity, finding.kind, [finding.message], finding.cure, err=True)
        held_out = history.validation_accuracy
        validation = "" if math.isnan(held_out) else f"validation {held_out:.2f}%, "
        typer.echo(f"{validation}test {accuracy:.2f}%; model saved to {out}")


def _shown(watch: Watcher, label: str, epochs: int) -> Callable[[Standing], None]:
    """Tells ``watch`` the loss and the validation accuracy of the last epoch, and the running loss."""

    def follow(standing: Standing) -> None:
        text, finished = f"training {label}", len(standing.epochs)
        if finished:
            last = standing.epochs[-1]
            text += f", epoch {finished}/{epochs}: loss {last['loss']:.3g}"
            if not math.isnan(last["validation_accuracy"]):
                text += f", validation {last['validation_accuracy']:.1f}%"
        watch(text, standing.done, "" if math.isnan(standing.loss) else f"loss {standing.loss:.3g}")

    return follow


class _Plan(NamedTuple):
    """What to train, with which penalty terms, and its name for people."""

    network: SRMoE | VisionMoE
    terms: Mapping[str, Term]
    label: str


def _images(settings: TrainSettings | VisionSettings, data_dir: Path | None, download: bool) -> ImageData:
    from spectralmoe.data.image_data import load_data
    from spectralmoe.training.vision_settings import VisionSettings

    if not isinstance(settings, VisionSettings):  # a timm model resizes the images of other data sets itself
        refuse_image_size(settings.data, settings.image_size)
    data = load_data(settings.data, data_dir=data_dir, download=download, side=settings.image_size)
    if settings.hold_out is not None:
        data = data.without(settings.hold_out)
    return data if settings.train_size is None else data.subset(settings.train_size)


def _plan(settings: TrainSettings | VisionSettings, data: ImageData) -> _Plan:
    from spectralmoe.naming import own_names, shown
    from spectralmoe.presets import find_preset
    from spectralmoe.training.network import build_network
    from spectralmoe.training.settings import TrainSettings
    from spectralmoe.training.vision import build_vision, router_terms

    row = settings.row
    see_own_modules(own_names(row))
    if isinstance(settings, TrainSettings):
        terms = find_preset(row).terms
        network = build_network(data, settings.network, row, settings.depth, settings.optimization.seed)
        return _Plan(network, terms, shown(row))
    label = settings.backbone.name if row == "none" else f"{settings.backbone.name}, {shown(row)}"
    return _Plan(build_vision(data, settings), router_terms(row), label)


def _meta(settings: TrainSettings | VisionSettings, data: ImageData, found: Evaluation) -> dict[str, Any]:
    from spectralmoe.naming import shown
    from spectralmoe.training.network import model_meta
    from spectralmoe.training.settings import TrainSettings
    from spectralmoe.training.vision import vision_meta

    if isinstance(settings, TrainSettings):
        return model_meta(data, shown(settings.row), settings.hold_out)
    return vision_meta(data, settings, found)
