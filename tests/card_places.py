"""Where the numbers in sentences of the cards stand, but for intervals, which stand in their RESULTS.md."""

from __future__ import annotations

from statistics import fmean

from lookups import Sentences, at, in_results, of_row

SRC = "src/spectralmoe"

FEWER = [
    100 - 100 * of_row("mofme", f"modulated, {e}", "numbers") / of_row("mofme", f"networks, {e}", "numbers")
    for e in (4, 16)
]
"""Numbers of modulations less than of networks, in percent, at E = 4 and 16."""
MPO = [49152 / 262144]
"""Numbers in experts in RESULTS.md, mpoe / switch."""

_SAVED = [100 - 100 * (2 * e + 10) / (8 * e) for e in (4, 16, 1e9)]
_ZERO = [*(4 / (4 + 32 * severity) for severity in (1, 0.5, 0.1)), 0.5, 0.1]
_MFLOP = [of_row("phyg-moe", f"chance {share}%", "expert_mflop") for share in (0, 100)]
_LEAST = [100 * min(cell["min_load_share"] for cell in at("papers/emoe/results.json") if cell["row"] == "EMoE")]


def _searched(name: str, key: str = "validation_accuracy") -> float:
    return fmean(one[key] for one in at("papers/sr-moe/search.json") if one["name"] == name)


_CARDS: dict[str, Sentences] = {
    "bound": [("points at N = #", "papers/bound/settings.json")],
    "confsmoe": [(text, "papers/confsmoe/settings.json > rates") for text in ("at #% missing", "at #%).")],
    "emoe": [
        *in_results(
            "emoe",
            ("(part c: entropy #", "One change at a time (validation data) > | faithful |"),
            ("(MaxVio # against", "From scratch > | EMoE |"),
            ("against # and #, separated", "From scratch > | linear+"),
            ("EMoE (#%) is", "Few-shot: new classes > | EMoE |"),
            ("On mnist5k (#%) it", "Few-shot: mnist5k > | EMoE |"),
            ("| # of 16 dead, smallest share", "From scratch > | EMoE |"),
        ),
        ("at least #% of the load", _LEAST),
        ("where #% is even", [100 / 8]),
        ("paper's step from # to # on", "papers/emoe/README.md > CIFAR-100, 10 shots"),
    ],
    "ermoe": [("from # on |", f"{SRC}/selectors/threshold.py > threshold"), ("R/D = #)", [8 / 64])],
    "l2r": [
        *in_results("l2r", ("with #% of their tokens", "l2r, 4 anchors")),
        ("x -> # x", "papers/l2r/plan.py > SCALE"),
        ("noise of #%", f"{SRC}/diagnostics/stability.py > noise"),
    ],
    "llep": [(text, "papers/llep/loads.py > SKEWS") for text in ("ith #% of", "with #% in one", "(with #%: by")],
    "methods": in_results("methods", ("`moec` is # points behind", "Images > | moec | linear")),
    "moce-ir": [
        *in_results("moce-ir", ("of # million operations", "Experts > equal")),
        ("that is # / # / # / #.", [8 / 15, 4 / 15, 2 / 15, 1 / 15]),
    ],
    "moec": [("temperature #)", f"{SRC}/scorers/cosine.py > temperature")],
    "mofme": [
        ("with #% and #% fewer numbers", FEWER),
        ("#% fewer at E = 4, #% at E = 16, and never over #%", _SAVED),
        ("(its #% are", "papers/mofme/README.md > less time"),
    ],
    "mor": [
        ("the zero ones get #, # and # at a severity of 1, # and #.", _ZERO),
        ("counts as # at least", f"{SRC}/regularizers/severity.py > floor"),
    ],
    "mpoe": [("# of the numbers", MPO), ("are #% of a network", [100 * 2 * (256 + 256) / (2 * 64 * 128)])],
    "phyg-moe": [
        ("single prices 0 and # it is above", "papers/phyg-moe/rows.py"),
        ("at # and # not separated", "papers/phyg-moe/rows.py"),
        ("does # times the work", [_MFLOP[1] / _MFLOP[0]]),
    ],
    "replicate-quantize": [
        ("t # bits", "papers/replicate-quantize/rows.py > BITS"),
        ("within # points. Its", "papers/replicate-quantize/README.md > within"),
    ],
    "specialization": in_results(
        "specialization",
        ("experts falls from # to #", "Losses > | aux"),
        ("from a norm of # to #", "Losses > | aux"),
    ),
    "sr-moe": [
        ("worst # |", "papers/sr-moe/results.json > linear"),
        ("# is even", [1 / 8]),
        ("stable rank is # of 8 instead of #", "papers/sr-moe/RESULTS.md > mnist5k"),
        ("(the paper: up to #)", "papers/sr-moe/README.md > costs up to"),
        ("within the paper's #,", "papers/sr-moe/README.md > mean interference is"),
        ("(tau # instead of 1)", "papers/sr-moe/search.py > tau"),
        ("cost # points of accuracy (`search", [_searched("top-2, tau 1") - _searched("top-2, tau 0.5")]),
        ("costs most (#; soft", [_searched("linear top-2", "interference_mean")]),
        ("soft #, top-1 #)", "papers/sr-moe/search.json > reference"),
    ],
    "synergy": [
        ("are # and # times those", [0.1 / 2e-3, 1e-2 / 1e-3]),  # plan.py over its comment
        ("balance (MaxVio #)", "LOG.md > gives up the balance"),
    ],
}

SENTENCES = {f"papers/{name}/README.md": sentences for name, sentences in _CARDS.items()}
"""A card's page -> its sentences and their places."""
