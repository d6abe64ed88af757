"""How often the finding ``precision_flip`` is made of a sound router, and what bf16 does to one.

    python benchmarks/flip_threshold.py --out benchmarks/results/DATE-flip-threshold.json

Linear routers with rows N(0, I/D) on tokens N(0, I), D 512, each with other rows and tokens than the reference that an
inspection holds it against. `fixed` is how many a plain threshold of 5% would flag.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from spectralmoe.diagnostics.stability import sound_flips
from spectralmoe.instruments.rules import layer_findings
from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine

CASES = ((8, 2, 200), (64, 8, 200), (128, 8, 200), (256, 8, 100), (512, 10, 60))
TOKENS, WIDTH = (64, 256, 512, 2048), 512


def main() -> None:
    """Draw the routers, judge them and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = [judged(*case, tokens) for case in CASES for tokens in TOKENS]
    for row in rows:
        print(row)
    write_json(out, {"machine": describe_machine(), "width": WIDTH, "rows": rows})


def judged(experts: int, top_k: int, routers: int, tokens: int) -> dict[str, Any]:
    """The mean share of tokens that bf16 moves, and how many of the routers are flagged."""
    reference = sound_flips(experts, top_k, WIDTH, tokens).as_json()
    found = [sound_flips(experts, top_k, WIDTH, tokens, seed=seed).as_json() for seed in range(1, routers + 1)]
    layer = {"layer": 0, "name": "", "experts": experts, "top_k": top_k}
    flagged = [layer_findings({**layer, "stability": {"bf16": one, "bf16_sound": reference}}) for one in found]
    return {
        "experts": experts,
        "top_k": top_k,
        "tokens": tokens,
        "routers": routers,
        "mean": sum(one["value"] for one in found) / routers,
        "fixed": sum(one["value"] >= 0.05 for one in found),
        "flagged": sum(map(bool, flagged)),
    }


if __name__ == "__main__":
    main()
