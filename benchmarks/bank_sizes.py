"""Parameters and bytes of each bank of experts, over those of `FeedForward` with the same D, H and E.

    python benchmarks/bank_sizes.py --out benchmarks/results/DATE-bank-sizes.json

Every entry of the table `EXPERTS` has a row, in some forms several; a new entry that is not described here is an error.
Banks without a hidden width H have what the row says instead. "Own" is what belongs to the first expert alone, which is
what a further one costs; "shared" is there once. Beside the JSON the table lies in a Markdown file of the same name.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from spectralmoe.bench.memory_peak import held_bytes
from spectralmoe.errors import UserError
from spectralmoe.experts import EXPERTS, Experts, FeedForward
from spectralmoe.files import write_text
from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine
from spectralmoe.spec import parameters_of

BASELINE = "feed_forward"


class Sizes(NamedTuple):
    """E experts of width H on rows of width D."""

    d: int
    h: int
    e: int


FULL, QUICK = Sizes(512, 1024, 16), Sizes(16, 32, 4)

Arguments = Callable[[Sizes], dict[str, Any]]


def networks(sizes: Sizes, shares: Sequence[int] = (1,)) -> list[nn.Module]:
    """E networks D -> H / share -> D without biases, the shares in turn."""
    widths = [max(1, sizes.h // shares[e % len(shares)]) for e in range(sizes.e)]
    return [
        nn.Sequential(nn.Linear(sizes.d, width, bias=False), nn.GELU(), nn.Linear(width, sizes.d, bias=False))
        for width in widths
    ]


def feed_forward(sizes: Sizes) -> FeedForward:
    """The bank that wrappers go around."""
    return FeedForward(sizes.e, sizes.d, sizes.h)


FORMS: Mapping[str, Mapping[str, Arguments]] = {
    "feed_forward": {"": lambda s: {}, "swiglu": lambda s: {"activation": "swiglu"}},
    "adapter": {"bottleneck H/8": lambda s: {"bottleneck": max(1, s.h // 8)}},
    "eigen": {"rank D/E": lambda s: {"rank": max(1, s.d // s.e)}, "rank D": lambda s: {"rank": s.d}},
    "modules": {"networks of width H": lambda s: {"modules": networks(s)}},
    "heterogeneous": {"networks of width H, H/2, H/4, H/8": lambda s: {"modules": networks(s, (1, 2, 4, 8))}},
    "conv": {"D channels, kernel 3": lambda s: {}},
    "confident": {"around feed_forward": lambda s: {"experts": feed_forward(s)}},
    "multilinear": {
        "cp, rank 3D/4": lambda s: {"rank": 3 * s.d // 4},
        "tr, ranks 4, 4, D/8": lambda s: {"rank": max(1, s.d // 8), "form": "tr"},
    },
    "modulated": {"linear": lambda s: {}, "vector": lambda s: {"form": "vector"}},
    "mpo": {
        "full bonds": lambda s: {},
        "bond 32": lambda s: {"bond": 32},
        "bond 8": lambda s: {"bond": 8},
    },
}
"""Entry -> form -> arguments that are none of the sizes."""


def build(name: str, sizes: Sizes, given: Mapping[str, Any]) -> Experts:
    """The bank called ``name``, with the sizes that its constructor asks for and what is ``given`` besides.

    Raises:
        UserError: an argument that nobody gives.
    """
    known = {"num_experts": sizes.e, "dim": sizes.d, "channels": sizes.d, "hidden": sizes.h, **given}
    parameters = parameters_of(EXPERTS[name])
    missing = [
        key for key, parameter in parameters.items() if parameter.default is parameter.empty and key not in known
    ]
    if missing:
        raise UserError(f"bank {name!r} needs {missing[0]!r}; say it in FORMS of benchmarks/bank_sizes.py")
    return EXPERTS[name](**{key: value for key, value in known.items() if key in parameters})


def measured(bank: Experts) -> dict[str, int]:
    """Numbers in the parameters of a bank, those of its first expert alone, those that experts share, and bytes."""
    tensors = [*bank.parameters(), *bank.buffers()]
    count = sum(parameter.numel() for parameter in bank.parameters())
    own = [sum(part.numel() for part in bank.expert_parameters(e).values()) for e in range(bank.num_experts)]
    return {"parameters": count, "own": own[0], "shared": count - sum(own), "bytes": held_bytes(*tensors)}


def rows(sizes: Sizes, names: Sequence[str] = tuple(EXPERTS)) -> list[dict[str, Any]]:
    """One row a form of each bank, with its shares of the baseline.

    Raises:
        UserError: a bank that is not described here.
    """
    found = []
    for name in names:
        if name not in FORMS:
            raise UserError(f"bank {name!r} has no entry in FORMS of benchmarks/bank_sizes.py; add its arguments")
        for form, arguments in FORMS[name].items():
            torch.manual_seed(0)
            found.append({"bank": name, "form": form, **measured(build(name, sizes, arguments(sizes)))})
    base = measured(feed_forward(sizes))
    return [{**row, **{f"{key}_share": row[key] / base[key] for key in ("parameters", "bytes")}} for row in found]


def table(found: Sequence[Mapping[str, Any]], sizes: Sizes) -> str:
    """The rows as Markdown."""
    lines = [
        "# Sizes of the banks of experts",
        "",
        f"Banks of E = {sizes.e} experts on rows of width D = {sizes.d}; H = {sizes.h}; fp32.",
        "",
        "| bank | form | parameters | own | shared | MB | / feed_forward |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        counts = " | ".join(f"{row[key]:,}" for key in ("parameters", "own", "shared"))
        lines.append(
            f"| {row['bank']} | {row['form']} | {counts} | {row['bytes'] / 1e6:.2f} | {row['bytes_share']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="tiny banks, to try the script")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    found = rows(sizes)
    print(table(found, sizes), end="")
    write_json(options.out, {"machine": describe_machine(), "sizes": sizes._asdict(), "banks": found})
    write_text(options.out.with_suffix(".md"), table(found, sizes))


if __name__ == "__main__":
    main()
