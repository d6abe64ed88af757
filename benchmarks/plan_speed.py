"""How long a plan takes: milliseconds of one core, best of some rounds.

    python benchmarks/plan_speed.py --out benchmarks/results/DATE-plan-speed.json

Every rank makes the plan of every layer in every step, so it must cost nothing beside the layer: the limit is 1 ms at
256 experts on 64 devices.
"""

from __future__ import annotations

import argparse
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path

from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine
from spectralmoe.parallel import Plan, plan_least_loaded, plan_native, plan_replicas

SIZES = ((32, 8), (128, 8), (256, 64))
TOKENS = 32_768  # on each device
PLANNERS: dict[str, Callable[[list[int], int], Plan]] = {
    "native": plan_native,
    "replicas": plan_replicas,
    "least_loaded": plan_least_loaded,
}
ROUNDS, CALLS, LIMIT = 20, 20, 1.0


def main() -> None:
    """Time the planners on even and skewed loads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    rows = [timed(*size, share) for size in SIZES for share in (0.0, 0.3, 0.8, 0.95)]
    for row in rows:
        print(row)
    print(f"limit of least_loaded: {LIMIT} ms; worst: {max(row['least_loaded'] for row in rows)} ms")
    if out is not None:
        write_json(out, {"machine": describe_machine(), "limit": LIMIT, "rows": rows})


def timed(experts: int, devices: int, share: float) -> dict[str, float]:
    """One load: ``share`` of all tokens in one expert, the rest even."""
    even = round(TOKENS * devices * (1 - share)) // experts
    load = [TOKENS * devices - even * (experts - 1), *[even] * (experts - 1)]
    row: dict[str, float] = {"experts": experts, "devices": devices, "share": share}
    for name, planner in PLANNERS.items():
        rounds = timeit.repeat(partial(planner, load, devices), number=CALLS, repeat=ROUNDS)
        row[name] = round(1e3 * min(rounds) / CALLS, 3)
    return row


if __name__ == "__main__":
    main()
