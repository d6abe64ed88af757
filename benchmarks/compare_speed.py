"""Time of the whole command `compare` against the same command of an older source tree, in alternating processes.

    git worktree add ../before COMMIT
    python benchmarks/compare_speed.py --before ../before --out benchmarks/results/DATE-compare-speed-cpu.json

Demo size: mnist5k, depth 2, 3 seeds, 8 epochs. Target: at most 0.6 of the time. Start-up is part of the time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from spectralmoe.bench.idle import Idle
from spectralmoe.bench.timing import ratio, take_times
from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine

TARGET = 0.6
COMMAND = ("compare", "--data", "mnist5k", "--depths", "2", "--seeds", "3", "--epochs", "8")


def main() -> None:
    """Time both and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="root of the older source tree")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    idle = Idle(used=lambda: sum(os.times()[:4]))  # with the processes started here
    load = idle.demand("at the start")
    trees = {"before": options.before.resolve(), "after": Path(__file__).resolve().parents[1]}
    times = take_times({name: partial(command, tree) for name, tree in trees.items()}, options.rounds)
    found = ratio(times["after"], times["before"])
    print(f"after / before: {found.middle:.2f} ({found.low} to {found.high}; target {TARGET})")
    result = {"machine": describe_machine(), "load_of_others": {"before": load, "after": idle.others()}}
    result |= {"target": TARGET, "ratio": found.as_json(), "seconds": {k: list(v.values()) for k, v in times.items()}}
    write_json(options.out, result)


def command(tree: Path) -> None:
    """One run from the sources in ``tree``."""
    with tempfile.TemporaryDirectory() as out:
        line = [sys.executable, "-m", "spectralmoe", *COMMAND, "--out", out]
        subprocess.run(line, env={**os.environ, "PYTHONPATH": str(tree / "src")}, check=True, capture_output=True)


if __name__ == "__main__":
    main()
