"""From ``git clone`` to the first picture: what README says is typed in a folder where nothing is, and timed.

    python benchmarks/first_picture.py --out benchmarks/results/DATE-first-picture.json

The clone is made from this checkout, committed state alone; the environment is new, and pip has no cache.
``make demo`` makes the environment, installs and compares; its stages are timed by the files that each leaves.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine

ROOT = Path(__file__).parents[1]
README_COMMANDS = ("make demo",)
"""What README gives up to its first picture (tests/test_first_picture.py holds the two together)."""
PICTURE = "runs/demo/comparison.svg"
STAGES = {"virtual environment": ".venv/pyvenv.cfg", "install": ".venv/demo.stamp", "compare": PICTURE}
"""What ``make demo`` does, and the file that ends it."""


def main() -> None:
    """Clone, type, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--note", default="", help="what else the machine did, and where packages came from")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        result = first_picture(Path(folder) / "spectralmoe")
    result |= {"load_of_others_at_start": load, "note": options.note, "machine": describe_machine()}
    write_json(options.out, result)
    for name in ("commands", "stages"):
        print(*(f"{key}: {seconds:.1f} s" for key, seconds in result[name].items()), sep="\n")


def first_picture(where: Path) -> dict[str, Any]:
    """Seconds of each command and of each stage of ``make demo``, and the size of what it fetched and installed."""
    seconds, said = {}, ""
    seconds["git clone"], _ = type_command(["git", "clone", "--quiet", ROOT.as_uri(), str(where)], where.parent)
    if (where / ".venv").exists():
        raise SystemExit("the checkout has .venv among its files: nothing would be installed; take it out of git")
    started = time.time()
    for command in README_COMMANDS:
        seconds[command], more = type_command(shlex.split(command), where)
        said += more
    ends = [started, *((where / name).stat().st_mtime for name in STAGES.values())]
    return {
        "number_of_commands": len(seconds),
        "commands": seconds,
        "seconds": sum(seconds.values()),
        "stages": dict(zip(STAGES, (after - before for before, after in pairwise(ends)), strict=True)),
        "downloaded_mb": downloaded(said),
        "installed_mb": sum(path.lstat().st_size for path in (where / ".venv").rglob("*") if path.is_file()) / 1e6,
        "picture": PICTURE,
        "picture_bytes": (where / PICTURE).stat().st_size,
    }


def downloaded(said: str) -> float:
    """MB that pip says it downloaded; packages that lie in a folder of the machine are not among them.

    >>> downloaded("Downloading a-1.whl.metadata (5 kB)\\n  Downloading a-1.whl (1.5 MB)\\n  Processing b-1.whl")
    1.505
    """
    unit = {"bytes": 1e-6, "kB": 1e-3, "MB": 1.0, "GB": 1e3}
    return sum(float(size) * unit[of] for size, of in re.findall(r"Downloading \S+ \(([\d.]+) (\w+)\)", said))


def type_command(words: list[str], where: Path) -> tuple[float, str]:
    """Run it as in a new shell, without pip's cache and without what this process was started with: seconds, output."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS")
    fresh = {name: value for name, value in os.environ.items() if name not in ours}
    start = time.perf_counter()
    done = subprocess.run(
        words, cwd=where, env={**fresh, "PIP_NO_CACHE_DIR": "1"}, stdout=subprocess.PIPE, text=True, check=True
    )
    return time.perf_counter() - start, done.stdout


if __name__ == "__main__":
    main()
