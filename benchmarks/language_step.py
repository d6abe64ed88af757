"""A training step of LanguageMoE, against the same decoder with transformers' Mixtral block, and by router.

    python benchmarks/language_step.py --out benchmarks/results/DATE-language-step-cpu.json

4 blocks, D 128, H 128, E 8, top-2, windows of 256 bytes, batches of 16, AdamW, fp32, on all threads. All sides run in
one process in turns, in an order drawn anew; what is written are medians over the rounds of the ratio of two sides.

`over transformers`: our step over that with the fastest of transformers' ways to run the experts; the target is 0.95.
Before it is timed, a way must give the logits and the gradients of ours on one window. `over the linear gate`: a step
with a row's router, its terms and its work after the step over that of the row "linear"; the target is 1.05.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe import LinearScorer, Router, TopK, after_step, param_groups, penalty, record
from spectralmoe.bench.gate import difference
from spectralmoe.bench.idle import Idle
from spectralmoe.bench.timing import Times, ratio, take_times
from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine
from spectralmoe.models import LanguageMoE, language_moe
from spectralmoe.presets import find_preset
from spectralmoe.terms import Term

VOCAB, LENGTH, BATCH, BATCHES = 256, 256, 16, 8
SIZES = {"width": 128, "depth": 4, "heads": 4, "num_experts": 8, "hidden": 128}
WAYS = ("eager", "grouped_mm", "batched_mm")
ROWS = ("linear+load_balance", "linear+balanced", "cosine", "prototype", "sr-moe", "eigenbasis", "emoe")
OURS, LINEAR = "spectralmoe", "linear"
TARGETS = {"over transformers": 0.95, "over the linear gate": 1.05}


def main() -> None:
    """Check, time in turns, and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--small", action="store_true", help="two blocks and short windows, to try the script")
    parser.add_argument("--busy", action="store_true", help="measure even where others use the machine")
    options = parser.parse_args()
    sizes, length = ({**SIZES, "depth": 2}, 32) if options.small else (SIZES, LENGTH)
    load = None if options.busy else Idle().demand("at the start")
    ours = built(sizes, lambda dim, experts: Router(LinearScorer(dim, experts), TopK(2, normalize=True)))
    theirs, refused = {}, {}
    for way in WAYS:
        name, model = f"transformers Mixtral {way}", with_mixtral(ours, way)
        wrong = unlike(ours, model, length)
        if wrong is None:
            theirs[name] = model
        else:
            refused[name] = wrong
    if not theirs:
        raise SystemExit(f"no way of transformers gives what ours gives: {refused}")
    rows = {name: built(sizes, find_preset(name).routers(2)) for name in (LINEAR, *ROWS)}
    sides = {name: step_of(model, length) for name, model in {OURS: ours, **theirs}.items()}
    sides |= {name: step_of(model, length, find_preset(name).terms) for name, model in rows.items()}
    times = take_times(sides, options.rounds, fewer=tuple(theirs))
    fastest = min(theirs, key=lambda name: min(times[name].values()))
    result = {
        "machine": describe_machine(),
        "load_of_others": load,
        "sizes": {**sizes, "length": length, "batch": BATCH},
        "targets": TARGETS,
        "seconds": {name: min(values.values()) for name, values in times.items()},
        "refused": refused,
        "over transformers": {"fastest": fastest, **ratio(times[OURS], times[fastest]).as_json()},
        "over the linear gate": over_linear(times),
    }
    for name in TARGETS:
        print(f"{name}: {result[name]}")
    write_json(options.out, result)


def built(sizes: Mapping[str, int], router: Callable[[int, int], Router]) -> LanguageMoE:
    """The decoder; under one seed all have the same weights but for the routers."""
    torch.manual_seed(0)
    return language_moe(VOCAB, **sizes, router=router)


def with_mixtral(model: LanguageMoE, way: str) -> LanguageMoE:
    """A copy of the decoder with transformers' block in place of each MoE layer, with the same weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    twin = copy.deepcopy(model)
    for block in twin.blocks:
        bank = block.moe.experts
        config = MixtralConfig(
            hidden_size=bank.dim,
            intermediate_size=bank.width,
            num_local_experts=bank.num_experts,
            num_experts_per_tok=2,
        )
        config._experts_implementation = way
        layer = MixtralSparseMoeBlock(config)
        layer.gate.weight = block.moe.router.scorer.weight
        layer.experts.gate_up_proj, layer.experts.down_proj = bank.up, bank.down
        block.moe = Theirs(layer)
    return twin


class Theirs(nn.Module):
    """Transformers' block as a decoder block calls its MoE layer; it reads the tokens alone."""

    reads: tuple[str, ...] = ()

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, context: object = None) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def unlike(ours: LanguageMoE, theirs: LanguageMoE, length: int) -> str | None:
    """What differs in logits or in the embedding's gradient from ours in float64 on one window; None where nothing."""
    tokens = batches(length)[0][:1]
    found, truth = ({} for _ in range(2))
    for values, model in ((truth, copy.deepcopy(ours).double()), (found, copy.deepcopy(theirs))):
        logits = model(tokens[:, :-1])
        loss_of(logits, tokens).backward()
        values |= {"logits": logits.detach(), "embedding": model.embedding.weight.grad}
    return difference(found, truth, torch.float32)


def batches(length: int) -> list[Tensor]:
    """Windows (B, S + 1) of random bytes."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (BATCH, length + 1), generator=draw) for _ in range(BATCHES)]


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def step_of(model: nn.Module, length: int, terms: Mapping[str, Term] | None = None) -> Callable[[], object]:
    """A step of AdamW on the next batch; with ``terms``, be there some or none, all that belongs to a router."""
    rest, optimizer = cycle(batches(length)), torch.optim.AdamW(param_groups(model, 1e-2), lr=1e-4)

    def plain() -> None:
        tokens = next(rest)
        optimizer.zero_grad(set_to_none=True)
        loss_of(model(tokens[:, :-1]), tokens).backward()
        optimizer.step()

    def whole() -> None:
        tokens = next(rest)
        optimizer.zero_grad(set_to_none=True)
        with record(model, terms=terms) as tape:
            loss = loss_of(model(tokens[:, :-1]), tokens)
        (loss + penalty(tape, terms or {})[0]).backward()
        optimizer.step()
        after_step(model, tape)

    return plain if terms is None else whole


def over_linear(times: Mapping[str, Times]) -> dict[str, dict[str, float | int | None]]:
    """Row -> its step over that of the linear gate."""
    return {name: ratio(times[name], times[LINEAR]).as_json() for name in ROWS}


if __name__ == "__main__":
    main()
