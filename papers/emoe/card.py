"""Regenerate the card: ``python papers/emoe/card.py [--quick] [--check] [--out DIR] [--jobs N]``.

Each finished cell is appended to its JSON at once; a rerun skips what is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from few import FEW_ROWS, backbone, run_few, tune_few
from figures import write_figures
from holdings import draw_holdings
from measure import run_cell, step_times, tune_row
from plan import CHECKED, FULL, QUICK, Plan
from rows import ROWS, Setting
from variants import VARIANTS, run_variant

from spectralmoe.experiments.evidence import Cells, check_lines
from spectralmoe.experiments.workers import Job, run_jobs
from spectralmoe.files import make_folder, read_json, write_json
from spectralmoe.machine import cpu_model, describe_machine

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small form on mnist5k, under 3 minutes")
    parser.add_argument(
        "--check", action="store_true", help="run a few cells again and say whether their means lie as stored; no file"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: this one; runs/emoe-quick if quick)")
    parser.add_argument("--work", type=Path, help="folder of the trained backbone (default: runs/emoe)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    out = options.out or (Path("runs/emoe-quick") if options.quick else HERE)
    work = options.work or (out / "work" if options.quick else Path("runs/emoe"))
    if options.check:
        print("\n".join(check(CHECKED, plan, out, options.jobs)))
    else:
        run(plan, out, work, options.jobs)


def run(plan: Plan, out: Path, work: Path, processes: int) -> int:
    """Time, tune and run what is not there yet, part by part, then draw; how many cells were run."""
    for folder in (out, work):
        make_folder(folder)
    write_json(out / "machine.json", describe_machine())
    times = out / "times.json"
    if not times.exists():
        write_json(times, step_times(plan))
    step_ms = read_json(times)
    tuned = _tuned(out / "tuning.json", ROWS, lambda row: (tune_row, row, plan), processes)
    wanted = [{"row": row, "seed": seed} for seed in range(plan.seeds) for row in ROWS]
    count = _cells(
        out / "results.json", wanted, lambda row, seed: (run_cell, row, seed, plan, tuned, step_ms[row]), processes
    )
    own = Setting(*tuned["EMoE"]["setting"])
    wanted = [{"variant": name, "seed": seed} for seed in range(plan.ablation_seeds) for name in VARIANTS]
    count += _cells(
        out / "ablations.json", wanted, lambda variant, seed: (run_variant, variant, seed, plan, own), processes
    )
    backbone(plan, work)
    rates = _tuned(out / "fewshot_tuning.json", FEW_ROWS, lambda row: (tune_few, row, plan, work), processes)
    wanted = [
        {"row": row, "task": task, "shots": shots, "seed": seed}
        for seed in range(plan.draws)
        for task in plan.tasks
        for shots in plan.shots
        for row in FEW_ROWS
    ]
    count += _cells(
        out / "fewshot.json",
        wanted,
        lambda row, task, shots, seed: (run_few, row, task, shots, seed, plan, work, rates[row]["lr"]),
        processes,
    )
    write_figures(out, *(read_json(out / f"{name}.json") for name in ("results", "ablations", "fewshot")))
    draw_holdings(out / "experts.svg", plan, own)
    return count


def check(rows: Iterable[str], plan: Plan, out: Path, processes: int) -> list[str]:
    """Run these rows of part (a) again under all seeds; one line for each mean.

    Raises:
        UserError: there are no stored results.
    """
    stored, tuned = read_json(out / "results.json"), read_json(out / "tuning.json")
    jobs = [
        Job((row, seed), row, _without_progress, (run_cell, row, seed, plan, tuned, 0.0))
        for row in rows
        for seed in range(plan.seeds)
    ]
    again = [cell for _, cell in run_jobs(jobs, processes, _quiet)]
    keys = ("accuracy", "maxvio", "min_load_share", "output_cos2", "changed_by_noise")
    return [f"on {cpu_model()}:", *check_lines(stored, again, ("row",), keys)]


def _cells(path: Path, wanted: list[dict[str, Any]], call: Callable[..., tuple[Any, ...]], processes: int) -> int:
    """Append the wanted cells that the file lacks, as they finish; how many.

    Args:
        call: the keys of a cell -> the function that measures it, and its arguments.
    """
    cells: Cells = read_json(path) if path.exists() else []
    missing = [key for key in wanted if not any(key.items() <= cell.items() for cell in cells)]
    jobs = [Job(str(key), str(key), _without_progress, call(**key)) for key in missing]
    for count, (_, cell) in enumerate(run_jobs(jobs, processes, _quiet), 1):
        cells = [*cells, cell]
        write_json(path, cells)
        print(f"{path.name} {count}/{len(jobs)}", flush=True)
    return len(jobs)


def _tuned(path: Path, rows: Iterable[str], call: Callable[[str], tuple[Any, ...]], processes: int) -> dict[str, Any]:
    tuned: dict[str, Any] = read_json(path) if path.exists() else {}
    jobs = [Job(row, row, _without_progress, call(row)) for row in rows if row not in tuned]
    for _, settings in run_jobs(jobs, processes, _quiet):
        tuned |= settings
        write_json(path, tuned)
    return tuned


def _without_progress(function: Callable[..., Any], *arguments: Any) -> Any:
    """A job that cannot tell how far it has come: its last argument, who would be told, is left out."""
    return function(*arguments[:-1])


def _quiet(text: str, done: float) -> None:
    """Nothing is shown between two finished jobs."""


if __name__ == "__main__":
    main()
