"""Where the numbers of the pages stand: sentences of pages and cards, and tables.

Sentences are those whose numbers no rule of ``test_numbers.py`` finds. Where a page is written anew
they have to follow it.
"""

from __future__ import annotations

from typing import Any

import torch
from card_places import FEWER, MPO, SENTENCES, SRC
from lookups import Place, Sentences, at

from spectralmoe.diagnostics.change import accuracy_change

__all__ = ["BENCHMARKS", "PLACES", "SIZES_OF_BANKS", "TABLES", "Place"]

RUNS = "benchmarks/results"
LAYER, KEPT = f"{RUNS}/2026-11-23-bench-layer-cpu.json", f"{RUNS}/2026-11-22-bench-layer-kept-cpu.json"
ROUTERS, SCALING = f"{RUNS}/2026-11-23-bench-router-decode-cpu.json", f"{RUNS}/2026-11-23-bench-scaling-cpu.json"
MEMORY, STEP = f"{RUNS}/2026-11-22-bench-memory-cpu.json", f"{RUNS}/2026-11-22-bench-step-cpu.json"
LOADS, PROFILE = f"{RUNS}/2026-11-23-new-loads-cpu.json", f"{RUNS}/2026-11-23-layer-profile-cpu.json"
COMPARE, PENALTY = f"{RUNS}/2026-11-23-compare-speed-cpu.json", f"{RUNS}/2026-11-22-bench-penalty-cpu.json"
METHODS, BANKS = f"{RUNS}/2026-11-28-method-layers-cpu.json", f"{RUNS}/2026-11-29-bank-speed-cpu.json"
BRANCH, TERMS = f"{RUNS}/2026-11-22-branch-cost-cpu.json", f"{RUNS}/2026-11-22-spectral-cost-cpu.json"
MONITOR, ADAPT = f"{RUNS}/2026-11-22-monitor-cost-cpu.json", f"{RUNS}/2026-11-22-adapt-speed-cpu.json"
FLIPS, CERTIFICATE = f"{RUNS}/2026-11-22-flip-threshold.json", f"{RUNS}/2026-11-29-certificate-cpu.json"
RESTORED, DEGRADED = f"{RUNS}/2026-11-29-restore-photos.json", f"{RUNS}/2026-11-29-restore-degraded.json"
TEXTS = f"{RUNS}/2026-11-29-text-sizes.json"
FIRST = f"{RUNS}/2026-11-29-first-picture.json"
ROUTER_ONLY = f"{RUNS}/2026-11-29-router-only-memory.json"

BENCHMARKS, SIZES_OF_BANKS = "benchmarks/README.md", f"{RUNS}/2026-11-29-bank-sizes.md"
TABLES: dict[tuple[str, str], tuple[str, ...]] = {
    ("`spectralmoe bench`", "fwd + bwd / limit"): (f"{LAYER} > gelu", f"{LAYER} > / limit", f"{KEPT} > gelu"),
    ("`spectralmoe bench`", "fp32"): (f"{LAYER} > swiglu", LOADS),
    ("`spectralmoe bench`", "limit"): (PROFILE,),
    ("An EMoE branch at ViT-B size", "against the compute of"): (BRANCH,),
    ("Spectral terms", "alone"): (TERMS,),
    ("A layer with each method", "ratio"): (METHODS,),
    ("Banks of experts", "forward"): (BANKS,),
    ("A monitor", "step"): (MONITOR,),
    ("One guarded correction", "median"): (ADAPT,),
    ("The routing certificate", "median"): (CERTIFICATE,),
    ("Sizes of the banks of experts", "form"): (SIZES_OF_BANKS.replace(".md", ".json"),),
    ("Compare", "mean"): (f"{RESTORED} > summary", f"{DEGRADED} > before"),
}
"""Tables: the section's heading up to a comma, second column -> where the numbers stand."""

_SHAPE = "N4096 D256 H1024 E8 k2"
_SHAPES = (_SHAPE, "N2048 D512 H1024 E32 k4", "N4096 D256 H1024 E64 k2", "N8192 D128 H256 E128 k4")


def _over_eager(form: str, *ways: str) -> list[float]:
    """A form of the layer over its limit, over the plain form over its limit."""
    found = [at(LAYER, "cases", f"{shape} gelu float32 {way}", "ratios") for shape in _SHAPES for way in ways]
    return [_first(ratios, form) / _first(ratios, "spectralmoe") for ratios in found]


def _first(ratios: list[dict[str, Any]], of: str) -> float:
    return next(ratio["median"] for ratio in ratios if ratio["of"] == of and ratio["over"] == "limit")


_COMPILED = _over_eager("spectralmoe, compiled", "forward and backward", "forward")
_RECOMPUTING = _over_eager("spectralmoe, recomputing", "forward and backward")
_MANY = {one["name"]: one["value"]["median"] for one in at(SCALING, "cases", 0, "candidates")}
_OVER_BMM = at(SCALING, "cases", 0, "ratios", 18, "median")  # E = 1024 / balanced bmm, E = 1024
_THEIRS = [at(LOADS, "rounds", turn, "transformers Qwen3-MoE grouped_mm", _SHAPE) for turn in (0, 1)]
_PARTS = [layer["parts_ms"] for layer in at(PROFILE, "layers")]
_OTHER = [parts["autograd engine, router backward"] + parts["other operations"] for parts in _PARTS]
_WHOLE = {turn: sum(at(COMPARE, "seconds", turn)) / 2 for turn in ("before", "after")}

_MEMORY = at(METHODS, "profiles_ms", "StatisticsMemory, evaluation", "StatisticsMemory, evaluation")
_FLIPPED = [100 * row["mean"] for row in at(FLIPS, "rows") if row["tokens"] == 2048]

_BENCHMARKS: Sentences = [
    ("beyond # MiB (mallopt", "cites: mallopt(3)"),
    ("the layer takes # to # times", f"{KEPT} > gelu float32 > limit"),
    ("little (# to # of the eager ratio)", [min(_COMPILED), max(_COMPILED)]),
    ("recomputing costs up to #%", [100 * max(_RECOMPUTING) - 100]),
    ("Target: at most # on all, # on half", f"{LAYER} > best peer > at_most"),
    ("**# on three of eight**", f"{LAYER} > best peer > at_most"),
    ("bf16 are below #,", f"{LAYER} > best peer > at_most"),
    ("0.47 (93 / # ms)", [1e3 * sum(_THEIRS) / 2]),
    ("| 0.3 | # | 4.4 |", _OTHER),
    ("| 0.4 | # | 7.4 |", _OTHER),
    ("| 0.4 | # | 5.7 |", _OTHER),
    ("| 0.5 | # | 6.8 |", _OTHER),
    ("E 64: fwd + bwd, fwd | #, # | # |", f"{ROUTERS} > eigenbasis router / linear router"),
    ("| prototype router / linear router: fwd + bwd, fwd | #, # | # |", f"{ROUTERS} > prototype router"),
    ("D 768, E 64 | #;", f"{PENALTY} > step with all spectral terms"),
    ("alone take #% of the step |", f"{PENALTY} > all spectral terms, alone"),
    ("of the step | # |", f"{PENALTY} > step with all spectral terms"),
    ("transformers' blocks | #; recorded", f"{STEP} > best peer > spectralmoe"),
    ("with spectral terms # |", f"{STEP} > best peer > spectralmoe, recorded"),
    ("time per token, E = 1024 / E = 8 | **# | # |", f"{SCALING} > dispatch and experts, E = 1024 / E = 8"),
    ("| whole layer at E = 1024 / its limit | **# | # |", f"{SCALING} > whole layer at E = 1024 / its limit"),
    ("fastest peer | **# | # |", f"{ROUTERS} > decode of one token"),
    ("first shape; the others | #;", f"{MEMORY} > gelu > limit > {_SHAPE}"),
    ("others | 0.62; #, #, # |", f"{MEMORY} > gelu > limit"),
    ("0.73 | # |", f"{MEMORY} > peak memory"),
    ("| the same, recomputing | #;", f"{MEMORY} > spectralmoe, recomputing > gelu > limit > {_SHAPE}"),
    ("| the same, recomputing | 0.43; #, #, # |", f"{MEMORY} > spectralmoe, recomputing > gelu > limit"),
    ("operator and stem | # (", COMPARE),
    ("(# and # s, medians of 2 in turns)", list(_WHOLE.values())),
    ("in turns) | # |", COMPARE),
    ("takes #% to #% longer than one", "LOG.md > faster than a loop of mm"),
    ("deviate by #%, #%, #% and #% of their mean", "LOG.md > faster than a loop of mm"),
    ("top-k takes # ms at 128 experts", f"{PROFILE} > N8192 D128 H256 E128 k4 > top-k and softmax"),
    ("E = 1024: # MB of weights", [1024 * 2 * 256 * 128 * 4 / 1e6]),
    ("itself takes # times", [_MANY["balanced bmm, E = 1024"] / _MANY["balanced bmm, E = 8"]]),
    ("real loads # times as long", [_OVER_BMM]),
    ("Decoding reads # MB", [2 * 3 * 1024 * 2048 * 4 / 1e6]),
    ("Target: at most # of equal", f"{BRANCH} > target"),
    ("Target: at most #% of a step. `alone`: forward", f"{TERMS} > target"),
    ("without terms: #%, so", f"{TERMS} > control"),
    ("(matrix products # ms against # ms", f"{METHODS} > BasisScorer, energy > aten::mm"),
    ("own operators take # ms of 100", [_MEMORY["aten::where"] + _MEMORY["aten::sub"]]),
    ("(# ms of products", f"{METHODS} > projects > aten::bmm"),
    ("in a step of # ms)", f"{METHODS} > linear, step of AdamW"),
    ("has # MB of parameters where `FeedForward` has # MB,", f"{BANKS} > parameters"),
    ("needs # MB more where that needs # MB:", f"{BANKS} > peak"),
    ("Target: at most #% of a step. `alone`: all", f"{MONITOR} > target"),
    ("Target: less than # s.", f"{ADAPT} > limit_seconds"),
    ("take # s: # s install", [at(FIRST, "seconds"), at(FIRST, "stages", "install")]),
    ("install # MB of packages", [at(FIRST, "downloaded_mb")]),
    ("and # s compare five", [at(FIRST, "stages", "compare")]),
]  # fmt: skip

_DOCS: dict[str, Sentences] = {
    "CONTRIBUTING.md": [("no test over # s", "conftest.py > SLOW_SECONDS")],
    "CHANGELOG.md": [("off by # to #%", "LOG.md > under autocast"), ("`text:stdlib`: # MB", f"{TEXTS} > stdlib")],
    "docs/adapt.md": [
        ("(sigma #)", f"{SRC}/adaptation/copies.py > SIGMA"),
        ("sigma # |", f"{SRC}/adaptation/copies.py > SIGMA"),
        ("reference data (#)", f"{SRC}/cli/adapt/setup.py > BUDGET"),
        ("times # and #", f"{SRC}/adaptation/copies.py > factors"),
        ("reaches # points to", [accuracy_change(torch.zeros(2500), 2500).high]),
    ],
    "docs/architecture.md": [("(about # MiB of", [2**22 / 2**20]), ("(# is 11/10)", [11 / 10])],
    "docs/certificate.md": [
        ("about # of the true", f"{CERTIFICATE} > selection bias > median_ratio"),
        ("LayerNorm #% of it", f"{CERTIFICATE} > prototype behind > median_fp32_share"),
    ],
    "docs/compare.md": [
        ("warm-up of # %", f"{SRC}/training/settings/base.py > warmup"),
        ("folder #/#/# %", f"{SRC}/data/image_data.py > cut"),
        ("Python, # MB", f"{TEXTS} > pydoc"),
        ("tests, # MB", f"{TEXTS} > stdlib"),
        ("`fortunes`, # MB", f"{TEXTS} > fortunes"),
        ("documents of # KiB", [2048 / 1024]),
        ("about # % are for training, # % for validation, # % for testing", [80, 10, 10]),
        ("one view is there | #", f"{SRC}/training/settings/views.py > missing"),
        ("0, #, #, # |", f"{SRC}/training/settings/views.py > rates"),
        ("with it at weight #;", [0.01]),
        ("noise of # % of their", f"{SRC}/diagnostics/stability.py > noise"),
        ("# to # dB", f"{SRC}/data/interference.py > jnr"),
    ],
    "docs/inspect.md": [
        ("Mixtral 8x7B, # GB each", [at(ROUTER_ONLY, "rows", 0, "file_bytes") / 1e9]),
        ("held # GB of its own", [at(ROUTER_ONLY, "rows", 0, "own_bytes") / 1e9]),
        ("noise of #% of their", f"{SRC}/diagnostics/stability.py > noise"),
        ("within #% of the last", f"{SRC}/diagnostics/stability.py > NEAR = "),
        ("less than # MB", "tests/report/test_report.py > len(page"),
        ("concentration of at least #", f"{SRC}/instruments/cures.py > collapse"),
        ("empties #% of", f"{SRC}/instruments/cures.py > dropped_slots"),
        ("the experts of #% of", f"{SRC}/instruments/cures.py > precision_flip"),
        ("of at least #, or", f"{SRC}/instruments/cures.py > homogeneous"),
        ("a pair at #", f"{SRC}/instruments/cures.py > duplicates"),
        ("same up to #%", f"{SRC}/instruments/cures.py > no_router"),
        ("there are: #% of the tokens at E = 8, K = 2, #% at 64, 8, #% at 128, 8, #% at 256, 8 and #% at", _FLIPPED),
        ("at #, # and 7.9%", FLIPS),
        ("max(#%, 2", f"{SRC}/instruments/cures.py > precision_flip"),
        ("; #% alone flags", f"{SRC}/instruments/cures.py > precision_flip"),
        ("flags 0, #, # and # of them", f"{FLIPS} > fixed"),
    ],
    "docs/llm.md": [
        ("of # million parameters", "cites: arXiv 2502.02737"),
        ("balance loss of weight #.", [1e-2]),
        ("ERNIE #-MoE", [4.5]),
        ("of # GB of which 6 of 8 experts stay takes about # GB", [90, 90 + 90 * 6 / 8]),
    ],
    "docs/methods.md": [
        ("x -> # x", "papers/l2r/plan.py > SCALE"),
        ("still (# points fewer", "papers/l2r/RESULTS.md > | l2r | linear"),
        ("(centred cos² # and # lower, sep", "papers/methods/RESULTS.md > | ermoe | linear"),
        ("accuracy is # points higher, not", "papers/methods/RESULTS.md > | ermoe | linear"),
        ("bias needs # bits a byte", "papers/methods/RESULTS.md > Text > | linear+balanced | linear"),
        ("text it needs # bits a byte", "papers/methods/RESULTS.md > Text > | sr-moe | linear"),
        ("by # bits a byte (separated)", "papers/methods/RESULTS.md > | moec | linear"),
        ("about # points of accuracy", "papers/methods/RESULTS.md > Images > | moec | linear"),
        ("(centred cos² # and # lower)", "papers/methods/RESULTS.md > | specialization | linear"),
        ("rises by # points", "papers/specialization/RESULTS.md > | aux + o + v | aux |"),
        ("random bases by # points", "papers/ermoe/RESULTS.md > | energy | energy, random"),
        ("is behind `linear` by # points", "papers/ermoe/RESULTS.md > | context | linear |"),
        ("not separated from `linear` (#)", "papers/ermoe/RESULTS.md > | energy | linear |"),
        ("by # points at 32 experts, and", "papers/moec/RESULTS.md > | MoEC | balance | 32"),
        ("both together (# bits a", "papers/synergy/RESULTS.md > | lb + sp + cp | lb |"),
        ("# of the parameters of `Feed", MPO),
        ("by # bits a byte with", "papers/mpoe/RESULTS.md > | mpoe | switch |"),
        ("with # of their parameters", MPO),
        ("of as few by #;", "papers/mpoe/RESULTS.md > | mpoe | switch, cut |"),
        ("mask costs # bits (five", "papers/mpoe/RESULTS.md > | mpoe + mask | mpoe |"),
        ("without a draw gain #.", "papers/mpoe/RESULTS.md > | mpoe + slow | mpoe |"),
        ("#% fewer at E = 4, #% at E = 16", [100 * (1 - (2 * e + 10) / (8 * e)) for e in (4, 16)]),
        ("have # to #% fewer", FEWER),
        ("LoRA by # to # dB", "papers/mor/RESULTS.md > | mor | lora, rank"),
        ("bring # dB", "papers/mor/RESULTS.md > | mor, known | mor |"),
        ("(correlation #,", "papers/confsmoe/README.md > being right"),
        ("bound (rank correlation #)", "papers/bound/RESULTS.md > | learned | 5 | A | 0.69"),
        ("would gain # dB", "papers/moce-ir/RESULTS.md > told"),
        ("pooled features (# dB)", "papers/fmsr/RESULTS.md > | spectrum | average"),
        ("gate is about # points more accurate", "papers/phyg-moe/RESULTS.md > means over prices > spectrum"),
        ("is about # points ahead of a gate", "papers/phyg-moe/RESULTS.md > means over prices > spectrum | content"),
        ("shift (# points", "papers/memory/RESULTS.md > stream"),
        ("accuracy is lower by # points (five", "papers/omoe/RESULTS.md > | omoe | adamw |"),
        (
            "the layer gains # points of accuracy, # more",
            "papers/memory/RESULTS.md > without a LayerNorm > layer, stream",
        ),
        ("down to # bits", "papers/replicate-quantize/rows.py > BITS"),
    ],
    "docs/parallel.md": [
        ("after # seconds without one", f"{SRC}/training/distributed/heartbeat.py > _SILENCE"),
        ("every # seconds.", f"{SRC}/training/loop.py > _CHECKPOINT_SECONDS"),
    ],
    "docs/router.md": [("them # % of each class are for training, # % for validation and # % for", [70, 10, 20])],
    "docs/restoration.md": [
        ("up to #) are", f"{SRC}/data/photos.py > _PLAIN = "),
        ("t x + # (1 - t), t", f"{SRC}/data/degradations.py > AIR"),
        ("1 - (# + # v) r", f"{SRC}/data/degradations.py > ramp"),
        ("| # added on", f"{SRC}/data/degradations.py > BRIGHTNESS"),
        ("share of # + # v", f"{SRC}/data/degradations.py > begins"),
        ("deviation # + # v", f"{SRC}/data/degradations.py > drawn"),
    ],
}

PLACES: dict[str, Sentences] = {BENCHMARKS: _BENCHMARKS, **_DOCS, **SENTENCES}
"""Page -> its sentences and their places."""
