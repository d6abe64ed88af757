"""Regenerate the card: ``python papers/emoe/card.py [--quick] [--out DIR] [--jobs N]``.

Each finished cell is appended to its JSON at once; a rerun skips what is there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from few import FEW_ROWS, backbone, run_few, tune_few
from figures import write_figures
from holdings import draw_holdings
from measure import run_cell, step_times, tune_row
from plan import FULL, QUICK, Plan
from rows import ROWS, Setting
from variants import VARIANTS, run_variant

from spectralmoe.files import make_folder, read_json, write_json
from spectralmoe.machine import describe_machine

HERE = Path(__file__).parent
Cells = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small form on mnist5k, under 3 minutes")
    parser.add_argument("--out", type=Path, help="folder of the results (default: this one; runs/emoe-quick if quick)")
    parser.add_argument("--work", type=Path, help="folder of the trained backbone (default: runs/emoe)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    out = options.out or (Path("runs/emoe-quick") if options.quick else HERE)
    work = options.work or (out / "work" if options.quick else Path("runs/emoe"))
    for folder in (out, work):
        make_folder(folder)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        run(plan, out, work, pool)


def run(plan: Plan, out: Path, work: Path, pool: Executor) -> None:
    """Time, tune and run what is not there yet, part by part; then draw."""
    write_json(out / "machine.json", describe_machine())
    times = out / "times.json"
    if not times.exists():
        write_json(times, step_times(plan))
    step_ms = read_json(times)
    tuned = _tuned(out / "tuning.json", ROWS, lambda row: pool.submit(tune_row, row, plan))

    def cell(row: str, seed: int) -> Future[Any]:
        return pool.submit(run_cell, row, seed, plan, tuned)

    wanted = [{"row": row, "seed": seed} for seed in range(plan.seeds) for row in ROWS]
    results = _cells(out / "results.json", wanted, cell, step_ms)

    def variant(variant: str, seed: int) -> Future[Any]:
        return pool.submit(run_variant, variant, seed, plan, Setting(*tuned["EMoE"]["setting"]))

    wanted = [{"variant": name, "seed": seed} for seed in range(plan.ablation_seeds) for name in VARIANTS]
    ablations = _cells(out / "ablations.json", wanted, variant)
    backbone(plan, work)
    rates = _tuned(out / "fewshot_tuning.json", FEW_ROWS, lambda row: pool.submit(tune_few, row, plan, work))

    def few(row: str, task: str, shots: int, seed: int) -> Future[Any]:
        return pool.submit(run_few, row, task, shots, seed, plan, work, rates[row]["lr"])

    wanted = [
        {"row": row, "task": task, "shots": shots, "seed": seed}
        for seed in range(plan.draws)
        for task in plan.tasks
        for shots in plan.shots
        for row in FEW_ROWS
    ]
    shots = _cells(out / "fewshot.json", wanted, few)
    write_figures(out, results, ablations, shots)
    draw_holdings(out / "experts.svg", plan, Setting(*tuned["EMoE"]["setting"]))


def _cells(
    path: Path,
    wanted: list[dict[str, Any]],
    start: Callable[..., Future[Any]],
    step_ms: dict[str, float] | None = None,
) -> Cells:
    """All wanted cells: those in the file, and the others, appended as they finish."""
    cells: Cells = read_json(path) if path.exists() else []
    missing = [key for key in wanted if not any(key.items() <= cell.items() for cell in cells)]
    for count, found in enumerate(_finished([start(**key) for key in missing]), 1):
        cells.append(found if step_ms is None else {**found, "step_ms": step_ms[found["row"]]})
        write_json(path, cells)
        print(f"{path.name} {count}/{len(missing)}", flush=True)
    return cells


def _tuned(path: Path, rows: Iterable[str], start: Callable[[str], Future[Any]]) -> dict[str, Any]:
    tuned = read_json(path) if path.exists() else {}
    for found in _finished([start(row) for row in rows if row not in tuned]):
        tuned |= found
        write_json(path, tuned)
    return tuned


def _finished(jobs: list[Future[Any]]) -> Iterable[Any]:
    for job in as_completed(jobs):
        yield job.result()


if __name__ == "__main__":
    main()
