"""Regenerate the card: ``python papers/sr-moe/card.py [--quick] [--check] [--out DIR] [--jobs N]``.

Each finished cell is appended to results.json at once; a rerun skips what is there. Trained networks are kept in
``--work`` until the card is complete.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from figures import write_figures
from measure import run_network
from plan import CHECKED, FULL, QUICK, Network, Part, Plan, networks
from tune import tune_row

from spectralmoe.experiments.evidence import check_lines
from spectralmoe.experiments.workers import Job, run_jobs
from spectralmoe.files import make_folder, read_json, write_json
from spectralmoe.machine import cpu_model, describe_machine

HERE = Path(__file__).parent
Cells = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small form on mnist5k, under 3 minutes")
    parser.add_argument(
        "--check", action="store_true", help="run a few cells again and say whether their means lie as stored; no file"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of the results (default: this one; runs/sr-moe-quick if quick)"
    )
    parser.add_argument("--work", type=Path, help="folder of the trained networks (default: runs/sr-moe)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    out = options.out or (Path("runs/sr-moe-quick") if options.quick else HERE)
    work = options.work or (out / "models" if options.quick else Path("runs/sr-moe"))
    if options.check:
        with TemporaryDirectory() as folder:
            print("\n".join(check(CHECKED, plan, out, Path(folder), options.jobs)))
    else:
        run(plan, out, work, options.jobs)


def run(plan: Plan, out: Path, work: Path, processes: int) -> int:
    """Part by part, tune and run what is not there yet, then draw; how many networks were run."""
    for folder in (out, work):
        make_folder(folder)
    write_json(out / "machine.json", describe_machine())
    count = 0
    for part in plan.parts:
        tuned = tune(part, plan, out, processes)
        cells, curves, streams = (_read(out / f"{name}.json", []) for name in ("results", "curves", "streams"))
        jobs = [
            Job(network, network.name, run_network, (network, missing, plan, tuned, work))
            for network in networks(part)
            if (missing := _missing(network, part.ways, [*cells, *streams]))
        ]
        for network, (new_cells, curve, new_streams) in run_jobs(jobs, processes, _quiet):
            cells += new_cells
            streams += new_streams
            curves = [known for known in curves if any(known[key] != getattr(network, key) for key in network._fields)]
            curves.append({**network._asdict(), "curve": curve})
            for name, values in (("results", cells), ("curves", curves), ("streams", streams)):
                write_json(out / f"{name}.json", values)
            count += 1
            print(f"{network.name} {' '.join(part.ways)}", flush=True)
    write_figures(out, *(_read(out / f"{name}.json", []) for name in ("results", "curves", "streams")))
    return count


def check(part: Part, plan: Plan, out: Path, work: Path, processes: int) -> list[str]:
    """Run the networks of ``part`` again, trained anew in ``work``; one line for each mean.

    Raises:
        UserError: there are no stored results.
    """
    stored, tuned = read_json(out / "results.json"), read_json(out / "tuning.json")
    jobs = [
        Job(network, network.name, run_network, (network, part.ways, plan, tuned, work)) for network in networks(part)
    ]
    again = [cell for _, (cells, _, _) in run_jobs(jobs, processes, _quiet) for cell in cells]
    keys = ("accuracy", "interference_mean", "min_load_share", "noisy_after", "rotated_after")
    return [f"on {cpu_model()}:", *check_lines(stored, again, ("row", "dataset", "depth"), keys)]


def tune(part: Part, plan: Plan, out: Path, processes: int) -> dict[str, Any]:
    """The settings of all rows so far: those in ``tuning.json``, and what this part needs beside, written there."""
    path = out / "tuning.json"
    tuned: dict[str, Any] = _read(path, {})
    jobs = [Job(row, row, tune_row, (row, plan)) for row in part.rows if row not in tuned]
    for row, settings in run_jobs(jobs, processes, _quiet):
        tuned |= settings
        write_json(path, tuned)
        print(f"tuned {row}", flush=True)
    return tuned


def _missing(network: Network, ways: tuple[str, ...], done: Cells) -> list[str]:
    """The ways of a network that have no cell yet."""
    same = ("dataset", "depth", "seed")
    rows = {cell["row"] for cell in done if all(cell[key] == getattr(network, key) for key in same)}
    return [way for way in ways if network.row + way not in rows]


def _quiet(text: str, done: float) -> None:
    """Nothing is shown between two finished jobs."""


def _read(path: Path, default: Any) -> Any:
    return read_json(path) if path.exists() else default


if __name__ == "__main__":
    main()
