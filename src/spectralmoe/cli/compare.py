"""``spectralmoe compare``: train several routers under one budget and compare them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralmoe.cli.completion import complete_data, complete_routers
from spectralmoe.cli.console import count, over_seeds, print_json, print_table, show_progress
from spectralmoe.cli.elsewhere import Cluster, Collect, Submit, SubmitWith, Take, elsewhere, one_at_most, say_taken
from spectralmoe.cli.options import (
    ANY_DATA,
    Allow,
    Assign,
    DataDir,
    DeviceName,
    Download,
    Json,
    Out,
    read_k,
    say_notes,
    split_names,
    split_numbers,
    trust_own,
)
from spectralmoe.training.names import DEFAULT_ROUTERS

if TYPE_CHECKING:
    from spectralmoe.experiments.compare import CompareSettings
    from spectralmoe.experiments.compare.grid import Compared

__all__ = ["compare"]


def compare(
    out: Out,
    data: Annotated[
        str | None,
        typer.Option(
            metavar=ANY_DATA,
            help="Data set (see 'spectralmoe list'), image folder, text, signals, photos, or views of images.",
            show_default="mnist5k",
            autocompletion=complete_data,
        ),
    ] = None,
    routers: Annotated[
        str | None,
        typer.Option(
            "--routers",
            "--router",
            metavar="A,B,...",
            help="Presets or tables of parts (see 'spectralmoe list'), or PKG:OBJECT of your own.",
            show_default=",".join(DEFAULT_ROUTERS),
            autocompletion=complete_routers,
        ),
    ] = None,
    depths: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="How many MoE stages or blocks the networks have.", show_default="2,4"),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            metavar="sr-moe|timm:NAME",
            help="Network of every row: SR-MoE, or a timm model with experts in the MLPs of its last blocks.",
            show_default="sr-moe",
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="How many seeds; intervals are over them.", show_default="5")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**31 - 1, help="The first seed.", show_default="0")] = None,
    k: Annotated[
        str | None, typer.Option(metavar="K|soft", help="Experts a token, or soft mixing of all.", show_default="2")
    ] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Experts a layer.", show_default="8")] = None,
    train_size: Annotated[
        int | None, typer.Option(min=1, help="Training images, or windows of text; all by default.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side that images of folder:PATH and hf:NAME are resized to.")
    ] = None,
    vocab: Annotated[
        str | None,
        typer.Option(
            metavar="bytes|N", help="Vocabulary of text: N tokens by byte-pair encoding.", show_default="bytes"
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of training for each network.", show_default="8")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="One-shot corrections for each network.", show_default="50")
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option(min=0, help="Settings tried for each row on validation data; 0: none.", show_default="0"),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="F.toml", help="The same settings from a file; options change them.")
    ] = None,
    assign: Assign = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="ROUTER", help="Router that the others are compared with, seed by seed; by default the first."
        ),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Measures in tables and pictures; all by default.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Networks at a time, one thread each; by default as many as cores.")
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    cluster: Cluster = None,
    submit: Submit = None,
    submit_with: SubmitWith = None,
    take: Take = None,
    collect: Collect = False,
    allow: Allow = None,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """Train several routers under one budget, adapt each to single samples, show side by side what happened.

    Example: spectralmoe compare --data mnist5k --routers linear,sr-moe --depths 2 --seeds 3 --out runs/first

    A run that was stopped goes on when it is started again with the same --out. More routers, depths and seeds go into
    the same --out, too; what is there is not run again. Several machines share the work with --cluster, --submit or
    --take, and an --out that all of them see.
    """
    from spectralmoe.experiments.compare import run
    from spectralmoe.experiments.compare import take as take_slice
    from spectralmoe.experiments.grid import Slice
    from spectralmoe.training.settings import pick_device
    from spectralmoe.training.tasks import open_task

    remote = elsewhere(processes, cluster, submit, submit_with)
    one_at_most({"--cluster": cluster is not None, "--submit": submit is not None, "--take": take is not None,
                 "--collect": collect})  # fmt: skip
    part = None if take is None else Slice.parse(take)
    names = None if routers is None else split_names(routers)
    given = {
        "data": data,
        "routers": names,
        "depths": None if depths is None else split_numbers("--depths", depths),
        "seeds": seeds,
        "seed": seed,
        "trials": trials,
        "image_size": image_size,
        "train_size": train_size,
        "tune": tune,
        "text.vocab": None if vocab is None else int(vocab) if vocab.isdecimal() else vocab,
        "optimization.epochs": epochs,
        "network.k": None if k is None else read_k(k),
        "network.num_experts": experts,
    }
    settings = _settings(config, network, given, assign or ())
    trust_own(settings.routers, allow, names)
    settings.check()
    where = pick_device(device)
    task = open_task(settings.run_of(settings.cells()[0]), data_dir, download)
    say_notes(task.notes)
    with show_progress(quiet=json) as progress:
        at_a_time = processes or (os.cpu_count() or 1 if where.type == "cpu" else 1)
        if part is not None:
            taken = take_slice(settings, task, out, where, progress, part=part, processes=at_a_time)
        else:
            compared = run(settings, task, out, where, progress, processes=remote or at_a_time, baseline=baseline,
                           columns=split_names(columns or ""), collect=collect)  # fmt: skip
    if part is not None:
        say_taken(part, taken, json)
        return
    say_notes(compared.notes)
    _tell(compared, settings, out, json)
    if any(row.diverged for row in compared.rows):
        raise typer.Exit(1)


def _settings(
    config: Path | None, network: str | None, given: dict[str, Any], assign: list[str] | tuple[()]
) -> CompareSettings:
    """The settings of the file, changed by the given options, then by --set.

    Raises:
        UserError: as ``read_toml``, ``change`` and ``parse``.
    """
    from spectralmoe.experiments.compare import CompareSettings
    from spectralmoe.training.settings import parse
    from spectralmoe.training.settings.toml_text import change, choose_network, put, read_toml

    values = {} if config is None else read_toml(config)
    if network is not None:
        choose_network(values, network)
    for path, value in given.items():
        if value is not None:
            put(values, path, value)
    change(values, assign)
    source = "compare" if config is None else str(config)
    return parse(CompareSettings, values, f"{source} with --set" if assign else source)


def _tell(compared: Compared, settings: CompareSettings, out: Path, json: bool) -> None:
    from spectralmoe.experiments.compare.columns import summary_json
    from spectralmoe.experiments.compare.outputs import difference_fields, value_fields

    if json:
        print_json(summary_json(compared.rows, compared.shown.baseline))
        return
    seeds = max(len(row.seeds) for row in compared.rows)
    values, differences = (make(compared.rows, compared.shown) for make in (value_fields, difference_fields))
    title = f"{settings.data}, {count(seeds, 'seed')}, k = {settings.network.k}: {over_seeds(seeds)}"
    print_table(title, *values, key=3)
    if differences.rows:
        title = f"minus {compared.shown.baseline}, paired by seed; separated: the 95% interval leaves out 0"
        print_table(title, *differences, key=3)
    names = ("results.json", "results.csv", "summary.csv", "table.md", "table.tex")
    typer.echo(f"tables: {', '.join(str(out / name) for name in names)}")
    for picture in compared.pictures:
        typer.echo(f"picture: {picture}")
    typer.echo(f"models: {out / 'models'}")
