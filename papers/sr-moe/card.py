"""Regenerate the card: ``python papers/sr-moe/card.py [--quick] [--out DIR] [--jobs N]``.

Each finished cell is appended to results.json at once; a rerun skips what is there. Trained networks are kept in
``--work`` until the card is complete.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from figures import write_figures
from measure import run_network
from plan import FULL, QUICK, Network, Plan, networks, ways
from rows import ROWS
from tune import tune_row

from spectralmoe.files import make_folder, read_json, write_json
from spectralmoe.machine import describe_machine

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small form on mnist5k, under 3 minutes")
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: this one; runs/sr-moe-quick if quick)"
    )
    parser.add_argument("--work", type=Path, help="folder of the trained networks (default: runs/sr-moe)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    out = options.out or (Path("runs/sr-moe-quick") if options.quick else HERE)
    work = options.work or (out / "models" if options.quick else Path("runs/sr-moe"))
    for folder in (out, work):
        make_folder(folder)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        run(plan, out, work, pool)


def run(plan: Plan, out: Path, work: Path, pool: Executor) -> None:
    """Tune what is not tuned, run what has not run, draw."""
    write_json(out / "machine.json", describe_machine())
    tuned = _read(out / "tuning.json", {})
    for found in _finished(pool.submit(tune_row, row, plan) for row in ROWS if row not in tuned):
        tuned |= found
        write_json(out / "tuning.json", tuned)
    cells, curves, streams = (_read(out / f"{name}.json", []) for name in ("results", "curves", "streams"))
    jobs = []
    for network in networks(plan):
        done = [cell["row"] for cell in cells if _same(cell, network)]
        if any(network.row + way not in done for way in ways(network, plan)):
            jobs.append(pool.submit(_job, network, plan, tuned, work, done))
    started = time.monotonic()
    for count, (network, (found, curve, stream)) in enumerate(_finished(jobs), 1):
        cells += found
        write_json(out / "results.json", cells)
        curves = [known for known in curves if not _same_network(known, network)]
        curves.append({**network._asdict(), "curve": curve})
        write_json(out / "curves.json", curves)
        if stream is not None:
            streams.append(stream)
            write_json(out / "streams.json", streams)
        left = (time.monotonic() - started) / count * (len(jobs) - count)
        print(f"{count}/{len(jobs)}  {network.name}  {left / 60:.0f} min left", flush=True)
    write_figures(out, cells, curves, streams)


def _job(network: Network, plan: Plan, tuned: dict[str, Any], work: Path, done: list[str]) -> Any:
    return network, run_network(network, plan, tuned, work, done)


def _finished(jobs: Iterable[Future[Any]]) -> Iterator[Any]:
    for job in as_completed(list(jobs)):
        yield job.result()


def _same(cell: dict[str, Any], network: Network) -> bool:
    return all(cell[key] == getattr(network, key) for key in ("dataset", "depth", "seed"))


def _same_network(curve: dict[str, Any], network: Network) -> bool:
    return curve["row"] == network.row and _same(curve, network)


def _read(path: Path, default: Any) -> Any:
    return read_json(path) if path.exists() else default


if __name__ == "__main__":
    main()
