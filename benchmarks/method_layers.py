"""A layer with each method, forward and backward, over the same layer with a linear gate, top-k and no loss.

    python benchmarks/method_layers.py --out benchmarks/results/DATE-method-layers-cpu.json

N 4096, D 768, E 64, H 512, top-2, GELU, fp32, in training, on all threads. All sides run in one process, in every round
once in an order drawn anew, each time on other tokens; what is written are medians over the rounds of the ratio of a
method to its plain side, with their 95% intervals.

- A scorer, a selector and a loss are over "linear"; a loss between neighbouring layers over two layers of "linear".
- `BasisScorer` reads a bank of its own, `EigenExperts` of rank D/E: it is over a linear gate before such a bank.
- `StatisticsMemory` in training follows the tokens after a step, so that its side ends with `after_step`; in
  evaluation, where it aligns them, both sides are a forward alone.
- `OrthogonalExperts` is a whole step of AdamW. Its phases have steps of three kinds, which are timed apart and averaged
  over two phases of the default length: one that gathers, one that projects, and once the projectors.

Where a method takes longer than its target, the largest operators of torch's profile stand beside it, with those of its
plain side.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from spectralmoe import EigenExperts, Experts, FeedForward, LinearScorer, MoE, Router, TopK, after_step, record
from spectralmoe import regularizers as losses
from spectralmoe.bench.idle import Idle
from spectralmoe.bench.timing import Times, median, take_times
from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine
from spectralmoe.optim import OrthogonalExperts
from spectralmoe.scorers import BasisScorer, SaturatedScorer, Scorer, StatisticsMemory
from spectralmoe.selectors import ClusterDropout, Selector, Threshold
from spectralmoe.terms import Term, penalty

K, GROUPS, WEIGHT, BATCHES, SHOWN, FOREVER = 2, 8, 1e-2, 8, 8, 10**9
LINEAR, TWO, EIGEN = "linear", "linear, two layers", "linear, EigenExperts"
FORWARD, STEP = "linear, evaluation", "linear, step of AdamW"
GATHERS, PROJECTS, TURNS = "gathers", "projects", "two steps with a turn"
ORTHOGONAL = "OrthogonalExperts"
SCORER, SELECTOR, ON_HIDDEN, ON_OUTPUT, OPTIMIZER = 1.10, 1.05, 1.15, 1.30, 1.10

Work = Callable[[], object]


class Sizes(NamedTuple):
    """N tokens of width D, E experts of width H."""

    n: int
    d: int
    e: int
    h: int


FULL, QUICK = Sizes(4096, 768, 64, 512), Sizes(64, 32, 16, 8)


class Method(NamedTuple):
    """One timed side, the plain side that it is over, and at most how long it may take in units of that."""

    work: Work
    over: str
    target: float


class Layers:
    """Makes the layers; all share one bank, so that they differ in what is measured and fit into memory together."""

    def __init__(self, sizes: Sizes) -> None:
        n, d, e, h = sizes
        self.sizes, self.bank = sizes, FeedForward(e, d, h)
        self.batches = [torch.randn(n, d) for _ in range(BATCHES)]
        self.probe = torch.randn(n, d)

    def layer(
        self,
        scorer: Scorer | None = None,
        selector: Selector | None = None,
        experts: Experts | None = None,
        **parts: Any,
    ) -> MoE:
        """A layer whose parts are those of the plain one where none is given."""
        router = Router(scorer or LinearScorer(self.sizes.d, self.sizes.e), selector or TopK(K))
        return MoE(router, experts or self.bank, **parts)

    def two(self) -> nn.Sequential:
        """Two plain layers, one behind the other."""
        _, d, e, h = self.sizes
        return nn.Sequential(self.layer(), self.layer(experts=FeedForward(e, d, h)))

    def train(self, model: nn.Module, term: Term | None = None, *, moves: bool = False) -> Work:
        """Forward and backward, with the term on what it reads; ``moves``: and what follows a step."""
        terms, rest = {} if term is None else {"it": term}, cycle(self.batches)

        def plain() -> None:
            model(next(rest).detach().requires_grad_()).backward(self.probe)
            model.zero_grad()

        def recorded() -> None:
            with record(model, terms=terms) as tape:
                y = model(next(rest).detach().requires_grad_())
            extra = [penalty(tape, terms)[0]] if terms else []
            torch.autograd.backward([y, *extra], [self.probe, *(None for _ in extra)])
            model.zero_grad()
            if moves:
                after_step(model, tape)

        return recorded if terms or moves else plain

    def evaluate(self, model: nn.Module) -> Work:
        """A forward without gradient."""
        rest = cycle(self.batches)
        model.eval()

        def work() -> None:
            with torch.no_grad():
                model(next(rest))

        return work

    def optimize(self, phase: int | None = None, *, steps: int = 1, projects: bool = False) -> Work:
        """Steps of AdamW, with ``OrthogonalExperts`` of this phase; ``projects``: all steps but the first project."""
        model, rest = self.layer(), cycle(self.batches)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        orthogonal = None if phase is None else OrthogonalExperts(optimizer, model, phase=phase)

        def work() -> None:
            for _ in range(steps):
                model(next(rest)).backward(self.probe)
                optimizer.step()
                optimizer.zero_grad()
                if projects and orthogonal is not None:
                    orthogonal.phase = FOREVER

        return work


def plain_sides(layers: Layers) -> dict[str, Work]:
    """What methods are measured over, by name."""
    return {
        LINEAR: layers.train(layers.layer()),
        TWO: layers.train(layers.two()),
        EIGEN: layers.train(layers.layer(experts=eigen_bank(layers.sizes))),
        FORWARD: layers.evaluate(layers.layer()),
        STEP: layers.optimize(),
    }


def methods(layers: Layers) -> dict[str, Method]:
    """Every method but the optimizer, by its public name."""
    _, d, e, _ = layers.sizes
    made, train = layers.layer, layers.train
    basis = made(BasisScorer(d, e, score="energy"), experts=eigen_bank(layers.sizes))
    clusters = partial(losses.cluster_variance, groups=GROUPS)
    found = {
        "SaturatedScorer": Method(train(made(SaturatedScorer(d, e))), LINEAR, SCORER),
        "SaturatedScorer, 4 anchors": Method(train(made(SaturatedScorer(d, e, anchors=4))), LINEAR, SCORER),
        "BasisScorer, energy": Method(train(basis), EIGEN, SCORER),
        "StatisticsMemory, training": Method(train(made(memory=StatisticsMemory(d)), moves=True), LINEAR, SCORER),
        "StatisticsMemory, evaluation": Method(layers.evaluate(followed(layers)), FORWARD, SCORER),
        "Threshold": Method(train(made(selector=Threshold(K, 1 / e, score="softmax"))), LINEAR, SELECTOR),
        "ClusterDropout": Method(train(made(selector=ClusterDropout(TopK(K), GROUPS))), LINEAR, SELECTOR),
        "path_coupling": Method(train(layers.two(), Term(losses.path_coupling, WEIGHT)), TWO, ON_HIDDEN),
    }
    terms = {
        "activation_overlap": (losses.activation_overlap, ON_HIDDEN),
        "output_overlap": (losses.output_overlap, ON_OUTPUT),
        "score_variance": (losses.score_variance, ON_HIDDEN),
        "cluster_variance": (clusters, ON_HIDDEN),
    }
    return found | {name: Method(train(made(), Term(fn, WEIGHT)), LINEAR, most) for name, (fn, most) in terms.items()}


def eigen_bank(sizes: Sizes) -> EigenExperts:
    """Experts with bases of D/E directions, which start orthogonal to each other."""
    return EigenExperts(sizes.e, sizes.d, max(1, sizes.d // sizes.e))


def followed(layers: Layers) -> MoE:
    """A layer whose memory has seen a step."""
    layer = layers.layer(memory=StatisticsMemory(layers.sizes.d))
    layers.train(layer, moves=True)()
    return layer


def orthogonal_steps(layers: Layers) -> dict[str, Work]:
    """The kinds of steps of ``OrthogonalExperts``: one that gathers, one that projects, and two around a turn."""
    projects = layers.optimize(1, projects=True)
    projects()
    return {GATHERS: layers.optimize(FOREVER), PROJECTS: projects, TURNS: layers.optimize(1, steps=2)}


def amortised(times: Mapping[str, Times], phase: int) -> Times:
    """Round -> seconds of a mean step over two phases, with the middle of what the projectors took once in them."""
    two = {number: seconds + times[PROJECTS][number] for number, seconds in times[GATHERS].items()}
    turn = median([seconds - two[number] for number, seconds in times[TURNS].items()]).middle
    return {number: (seconds + turn / phase) / 2 for number, seconds in two.items()}


def over(ours: Times, theirs: Times, target: float) -> dict[str, Any]:
    """The ratio of two sides by round, as JSON values."""
    found = median([seconds / theirs[number] for number, seconds in ours.items()])
    return {**found.as_json(), "target": target, "within": found.middle <= target}


def shares(work: Work) -> dict[str, float]:
    """Milliseconds of each operator's own time in one run, largest first."""
    work()
    with profile(activities=[ProfilerActivity.CPU]) as run:
        work()
    events = sorted(run.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return {event.key: round(event.self_cpu_time_total / 1e3, 2) for event in events[:SHOWN]}


def main() -> None:
    """Time all sides in turns, profile what is too slow, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="tiny layers, to try the script")
    parser.add_argument("--busy", action="store_true", help="measure even where others use the machine")
    options = parser.parse_args()
    load = None if options.busy else Idle().demand("at the start")
    torch.manual_seed(0)
    layers = Layers(QUICK if options.quick else FULL)
    plain, measured, steps = plain_sides(layers), methods(layers), orthogonal_steps(layers)
    phase = signature(OrthogonalExperts).parameters["phase"].default
    sides = {**plain, **{name: method.work for name, method in measured.items()}, **steps}
    times = take_times(sides, options.rounds, fewer=(TURNS,))
    ratios = {name: over(times[name], times[method.over], method.target) for name, method in measured.items()}
    ratios[ORTHOGONAL] = over(amortised(times, phase), times[STEP], OPTIMIZER)
    for name, found in ratios.items():
        print(f"{name}: {found['median']:.2f} of at most {found['target']:.2f}, {found['low']} to {found['high']}")
    slow = {name: method for name, method in measured.items() if not ratios[name]["within"]}
    profiles = {
        name: {name: shares(method.work), method.over: shares(plain[method.over])} for name, method in slow.items()
    }
    if not ratios[ORTHOGONAL]["within"]:
        profiles[ORTHOGONAL] = {name: shares(work) for name, work in {STEP: plain[STEP], **steps}.items()}
    result = {
        "machine": describe_machine(),
        "load_of_others": load,
        "sizes": {**layers.sizes._asdict(), "k": K, "phase": phase},
        "ratios": ratios,
        "over": {**{name: method.over for name, method in measured.items()}, ORTHOGONAL: STEP},
        "seconds": {name: median(list(values.values())).middle for name, values in times.items()},
        "profiles_ms": profiles,
    }
    write_json(options.out, result)


if __name__ == "__main__":
    main()
