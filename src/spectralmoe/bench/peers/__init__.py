"""Other libraries' MoE layers, each in a file of its own: imported when used, skipped with a note where absent.

Those whose routing is the problem's (softmax, the k largest, renormalised) get its weights and must pass the gate.
The others compute something else: equality cannot be checked, so they are shown and never counted as beaten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from spectralmoe.bench.peers import (
    dense,
    megablocks,
    mixture_of_experts,
    naive,
    scattermoe,
    soft_moe,
    st_moe,
    torchtitan,
    transformers,
)
from spectralmoe.bench.problem import Problem
from spectralmoe.bench.subject import Skipped, Subject
from spectralmoe.errors import first_line

__all__ = ["PEERS", "find_peers"]

PEERS: dict[str, Callable[[Problem], Iterator[Subject | Skipped]]] = {
    "naive": naive.subjects,
    "dense": dense.subjects,
    "transformers": transformers.subjects,
    "torchtitan": torchtitan.subjects,
    "st-moe-pytorch": st_moe.subjects,
    "mixture-of-experts": mixture_of_experts.subjects,
    "soft-moe": soft_moe.subjects,
    "megablocks": megablocks.subjects,
    "scattermoe": scattermoe.subjects,
}


def find_peers(problem: Problem, *names: str) -> tuple[list[Subject], list[Skipped]]:
    """The peers (of ``names``; by default all) that can take part in a problem, and those that cannot, with why."""
    subjects: list[Subject] = []
    skipped: list[Skipped] = []
    for name in names or PEERS:
        try:
            with torch.random.fork_rng(devices=[]):
                for outcome in PEERS[name](problem):
                    (subjects if isinstance(outcome, Subject) else skipped).append(outcome)  # type: ignore[arg-type]
        except ImportError as error:
            skipped.append(Skipped(name, f"not installed ({first_line(error)})"))
        except Exception as error:  # whatever another library does when it is built
            skipped.append(Skipped(name, f"could not be built ({type(error).__name__}: {first_line(error)})"))
    return subjects, skipped
