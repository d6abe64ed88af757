"""``spectralmoe train``: one network, from a TOML file or from the name of its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralmoe.cli.completion import LOG_NAMES, complete_data, listed, one_among
from spectralmoe.cli.console import print_finding, print_json, print_settings, show_progress
from spectralmoe.cli.options import (
    ANY_DATA,
    Allow,
    Assign,
    DataDir,
    DeviceName,
    Download,
    Json,
    PrintConfig,
    say_notes,
    split_names,
    trust_own,
)
from spectralmoe.errors import UserError
from spectralmoe.json_files import write_json
from spectralmoe.training.names import ROUTER_NAMES

if TYPE_CHECKING:
    from spectralmoe.training.loop import Progress, Standing
    from spectralmoe.training.settings.run import TrainSettings
    from spectralmoe.training.tasks import Metric

__all__ = ["train"]

MONITOR = "monitor.jsonl"


def train(
    config: Annotated[
        Path | None, typer.Option(metavar="F.toml", help="Settings of the run; without it those of --data and --set.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar=ANY_DATA,
            help="Data set, text, signals, photos or views, in place of the file's.",
            autocompletion=complete_data,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for everything that is written.")] = None,
    assign: Assign = None,
    print_config: PrintConfig = False,
    router: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|TABLE|PKG:OBJECT",
            help="Router, in place of the file's (see 'spectralmoe list').",
            autocompletion=one_among(*ROUTER_NAMES),
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(metavar="sr-moe|timm:NAME", help="Network, in place of the file's: SR-MoE, or a timm model."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Random seed; the file's by default.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start a timm model from timm's weights.")] = False,
    parallel: Annotated[
        str | None,
        typer.Option(
            metavar="ddp|fsdp2[,ep=K]",
            help="Share every batch among the processes of torchrun; ep=K: each K of them share the experts.",
            autocompletion=one_among("ddp", "fsdp2"),
        ),
    ] = None,
    monitor: Annotated[
        bool, typer.Option("--monitor", help=f"Write what the routers do to {MONITOR} in --out.")
    ] = False,
    every: Annotated[
        int | None, typer.Option(min=1, help="Steps between two reports of --monitor.", show_default="50")
    ] = None,
    log: Annotated[
        str | None,
        typer.Option(
            metavar="csv|tensorboard|wandb",
            help="Write each epoch's loss and validation score there, too; several with commas.",
            autocompletion=lambda incomplete: listed(incomplete, LOG_NAMES),
        ),
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    allow: Allow = None,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """Train one network and save it to --out: an SR-MoE network, with a section [backbone] a timm model, on text a
    language model, on restore:photos a network that restores them.

    Example: spectralmoe train --config examples/train.toml --out runs/sr-moe

    Example: spectralmoe train --data text:pydoc --router sr-moe --out runs/language

    Example: spectralmoe train --config examples/emoe-vit.toml --set optimization.epochs=2 --out runs/emoe-vit

    --monitor writes loads, entropies and findings (dead experts, collapse, ...) while it trains, for the report.

    A run that was stopped goes on when it is started again with the same settings and --out. On several processes:
    torchrun --nproc-per-node 2 -m spectralmoe train --config F.toml --out DIR --parallel ddp
    """
    from spectralmoe.diagnostics.evaluation import Counted
    from spectralmoe.experiments.run_folder import run_folder
    from spectralmoe.instruments.monitor import Monitor
    from spectralmoe.saving import save
    from spectralmoe.training.distributed.ranks import joined
    from spectralmoe.training.logs import check_logs, open_logs
    from spectralmoe.training.loop import train as run_training
    from spectralmoe.training.network import CHECKPOINT
    from spectralmoe.training.settings import pick_device
    from spectralmoe.training.tasks import open_task

    settings = _read(config, data, assign or (), network, router, seed, pretrained)
    if print_config:
        print_settings(settings, json)
        return
    if out is None:
        raise UserError("--out is missing: name the folder for everything that is written")
    if every is not None and not monitor:
        raise UserError("--every is how often --monitor reports; add --monitor")
    trust_own(settings.row, allow, router)
    log_names = split_names(log or "")
    check_logs(log_names)
    with joined(parallel, pick_device(device), settings.num_experts) as (ranks, where):
        task = open_task(settings, data_dir, download)
        if ranks.first:
            say_notes(task.notes)
        built, preset = task.build(settings).to(where), settings.preset
        trained = ranks.wrap(built)
        claim = {**settings.model_dump(mode="json"), "images": task.fingerprint}
        files = (CHECKPOINT, "model.safetensors", "config.json", "history.json", *([MONITOR] if monitor else []))
        with run_folder(out, claim, files) if ranks.first else nullcontext():
            ranks.barrier()  # for the folder
            title = settings.label
            watched = Monitor(trained, out / MONITOR, every=every or 50, layers=True, title=title) if monitor else None
            with (
                open_logs(log_names if ranks.first else (), out, title) as logs,
                show_progress(quiet=json or not ranks.first) as progress,
                watched or nullcontext(),
            ):
                history = run_training(
                    trained,
                    task,
                    settings.optimization,
                    terms=preset.terms,
                    optimizer=preset.optimizer,
                    checkpoint=out / CHECKPOINT,
                    follow=_shown(progress, title, settings.optimization.epochs, task.metric),
                    logs=logs,
                    monitor=watched,
                    ranks=ranks,
                )
            ranks.collect(trained, built)
            if not ranks.first:
                return
            counted = Counted(built)
            scores = {f"test_{key}": value for key, value in task.score(counted, "test").items()}
            save(built, out, meta=task.meta(settings, scores, counted.loads))
            about = {"title": f"{title} on {settings.data}", "metric": asdict(task.metric)}
            write_json(out / "history.json", {**about, "epochs": history.epochs, **scores})
    if json:
        print_json({"model": str(out), task.metric.key_of("validation"): history.validation, **scores})
        return
    for finding in watched.findings if watched else ():
        print_finding(finding.severity, finding.kind, [finding.message], finding.cure, err=True)
    validation = "" if math.isnan(history.validation) else f"validation {task.metric.named(history.validation)}, "
    typer.echo(f"{validation}test {task.metric.named(scores[task.metric.key_of('test')])}; model saved to {out}")


def _read(
    config: Path | None,
    data: str | None,
    assign: Sequence[str],
    network: str | None,
    router: str | None,
    seed: int | None,
    pretrained: bool,
) -> TrainSettings:
    """The settings of the file, changed by the options that were given, then by --set.

    Raises:
        UserError: as ``read_toml``, ``change`` and ``parse``; --pretrained without a timm model.
    """
    from spectralmoe.training.settings import parse
    from spectralmoe.training.settings.run import TrainSettings
    from spectralmoe.training.settings.toml_text import change, choose_network, put, read_toml

    if config is None and data is None:
        raise UserError("nothing says what to train on: give a settings file with --config, or the data with --data")
    values: dict[str, Any] = {} if config is None else read_toml(config)
    source = "the settings" if config is None else str(config)
    if data is not None:
        put(values, "data", data)
    if network is not None:
        choose_network(values, network)
    backbone = "backbone" in values or any(each.startswith("backbone.") for each in assign)
    if seed is not None:
        put(values, "optimization.seed", seed)
    if router is not None:
        put(values, "moe.router" if backbone else "router", router)
    if pretrained and not backbone:
        raise UserError("--pretrained starts a timm model, but the settings have no section [backbone]")
    if pretrained:
        put(values, "backbone.pretrained", True)
    change(values, assign)
    return parse(TrainSettings, values, f"{source} with --set" if assign else source)


def _shown(progress: Progress, title: str, epochs: int, metric: Metric) -> Callable[[Standing], None]:
    """Tells ``progress`` the loss and the validation score of the last epoch, and the running loss."""

    def follow(standing: Standing) -> None:
        text, finished = f"training {title}", len(standing.epochs)
        if finished:
            last = standing.epochs[-1]
            text += f", epoch {finished}/{epochs}: loss {last['loss']:.3g}"
            if not math.isnan(value := last[metric.key_of("validation")]):
                text += f", validation {metric.named(value)}"
        progress(text, standing.done, "" if math.isnan(standing.loss) else f"loss {standing.loss:.3g}")

    return follow
