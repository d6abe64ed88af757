"""Documents with plausible values, of any size, for the tests of the page."""

from __future__ import annotations

from typing import Any

import numpy as np
from seeds import shifted

WORDS = ["the", "of", "expert", "token", "routing", "energy", "river", "night", "paper", "seven", "def", "return"]


def measure(value: float | None, data: int, unit: str = "tokens", needs: int = 64) -> dict[str, Any]:
    """A measure as JSON; no value without data."""
    if value is None or data < needs:
        return {"value": None, "data": data, "unit": unit, "needs": needs}
    return {"value": round(float(value), 6), "data": data, "unit": unit}


def similar(rng: np.random.Generator, experts: int, level: float) -> list[list[float]]:
    """A symmetric matrix with ones on the diagonal."""
    noise = rng.normal(0, 0.05, (experts, experts))
    matrix = np.clip(level + (noise + noise.T) / 2, 0, 1)
    np.fill_diagonal(matrix, 1.0)
    return matrix.round(4).tolist()


def example(rng: np.random.Generator) -> dict[str, Any]:
    words = rng.choice(WORDS, 13)
    weight = round(float(rng.uniform(0.2, 0.9)), 4)
    return {"text": words[6], "before": " ".join(words[:6]) + " ", "after": " " + " ".join(words[7:]), "weight": weight}


def layer(rng: np.random.Generator, number: int, experts: int, labels: int, sick: bool, tokens: int) -> dict[str, Any]:
    """One layer; a sick one has collapsed."""
    share = rng.dirichlet(np.full(experts, 0.15 if sick else 20.0))
    counts = rng.multinomial(2 * tokens, share)
    even = counts / counts.sum() * experts
    dead, vio = int((even < 0.1).sum()), float(even.max() - 1)
    spectrum = (1.4 * np.exp(-np.arange(min(experts, 64)) * rng.uniform(0.02, 0.06))).round(5)
    table = rng.multinomial(tokens // 8, rng.dirichlet(np.ones(experts) * 0.8), size=labels)
    slots = 2 * tokens
    return {
        "name": f"model.layers.{number}.mlp",
        "layer": number,
        "stack": "",
        "experts": experts,
        "top_k": 2,
        "width": 64,
        "load": {
            "counts": counts.tolist(),
            "share": (counts / counts.sum()).tolist(),
            "max_vio": measure(vio, slots, "slots"),
            "gini": measure(float(np.abs(even[:, None] - even).mean() / 2), slots, "slots"),
            "min_share": measure(even.min() / experts, slots, "slots"),
            "max_share": measure(even.max() / experts, slots, "slots"),
            "dead": measure(dead, slots, "slots"),
            "concentration": measure(0.8 if sick else 0.05, slots, "slots"),
            "max_vio_batch": measure(vio + 0.2, 16, "batches", 1),
            "max_vio_sequence": measure(vio + 0.9, 64, "sequences", 1),
            "dropped": measure(None, 0, "slots"),
        },
        "weights": {"share": rng.dirichlet(np.full(experts, 15.0)).tolist(), "constant": False},
        "entropy": {"tokens": measure(0.3 if sick else 0.82, tokens), "mean": measure(0.5 if sick else 0.99, tokens)},
        "geometry": {
            "sigma_1": measure(spectrum[0], experts * 64, "weights"),
            "stable_rank": measure((spectrum**2).sum() / spectrum[0] ** 2, experts * 64, "weights"),
            "effective_rank": measure(rng.uniform(5, 30), experts * 64, "weights"),
            "row_cosine": measure(rng.uniform(-0.05, 0.2), experts * 64, "weights"),
            "jacobian": measure(rng.uniform(0.4, 2), 32, needs=8),
            "spectrum": spectrum.tolist(),
        },
        "similarity": {
            "output_cos2": measure(0.2, 256),
            "cka": measure(rng.uniform(0.2, 0.5), 256),
            "subspace": measure(rng.uniform(0.1, 0.4), 256),
            "weight_cosine": measure(rng.uniform(-0.01, 0.05), 65536, "coordinates"),
            "matrices": {
                "output": similar(rng, experts, 0.2),
                "weights": similar(rng, experts, 0.05),
                "rows": similar(rng, experts, 0.15),
            },
        },
        "stability": {
            "noise": measure(rng.uniform(0.01, 0.08), 256),
            "bf16": measure(rng.uniform(0, 0.02), 256),
            "near_tie": measure(rng.uniform(0.05, 0.3), tokens),
            "margin": measure(None, 12),
        },
        "association": {
            "labels": [f"class {i}" for i in range(labels)],
            "table": table.tolist(),
            "mutual_information": measure(0.12, tokens),
        }
        if labels
        else None,
        "examples": [[example(rng) for _ in range(6)] for _ in range(experts)],
    }


def passage(rng: np.random.Generator, layers: list[dict[str, Any]], title: str, tokens: int = 60) -> dict[str, Any]:
    """Running text; one token has no expert."""
    pieces = [f"{word} " if i % 17 else f"{word}.\n" for i, word in enumerate(rng.choice(WORDS, tokens), 1)]
    leaning = []
    for made in layers:
        chosen = rng.choice(made["experts"], tokens - 1, p=rng.dirichlet(np.ones(made["experts"])))
        weights = rng.uniform(0.3, 1, tokens - 1).round(3)
        leaning.append({"experts": [None, *chosen.tolist()], "weights": [None, *weights.tolist()]})
    return {"title": title, "pieces": pieces, "layers": leaning}


def holders(rng: np.random.Generator, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """What holds the last token of a text: at most two experts of each layer and its shared part, one without data."""
    gains = rng.normal(0, 1, (len(layers), 3))
    rows = [
        {"layer": place, "expert": expert, "weight": 0.5, "gain": float(gain)}
        for place, own in enumerate(gains)
        for expert, gain in zip((0, 1, None), own, strict=True)
        if expert is None or expert < layers[place]["experts"]
    ]
    rows[0]["gain"] = None
    whole = [{"layer": place, "gain": float(own.sum())} for place, own in enumerate(gains)]
    return {"pieces": ["The ", "capital ", "is ", "Paris"], "log_prob": -0.7, "experts": rows, "layers": whole}


def inspection(
    layers: int = 4,
    experts: int = 8,
    *,
    labels: int = 5,
    sick: tuple[int, ...] = (),
    seed: int = 0,
    title: str = "tiny",
) -> dict[str, Any]:
    """An inspection document; the layers of ``sick`` have collapsed, with findings."""
    rng, tokens = np.random.default_rng(shifted(seed)), 4096 * max(experts // 8, 1)
    made = [layer(rng, number, experts, labels, number in sick, tokens) for number in range(layers)]
    findings = [
        {
            "kind": kind,
            "layer": number,
            "name": made[number]["name"],
            "severity": severity,
            "message": f"layer {number}: {text}",
            "cure": "balance the load: Balanced(k) (a loss-free bias), or Term(load_balance, 1e-2)",
            "measure": made[number]["load"][key],
            "threshold": threshold,
        }
        for number in sick
        for kind, severity, key, threshold, text in (
            (
                "dead_experts",
                "severe",
                "dead",
                1.0,
                f"{made[number]['load']['dead']['value']:.0f} of {experts} experts dead",
            ),
            ("imbalance", "warning", "max_vio", 2.0, "the busiest expert carries several times an even load"),
        )
    ]
    flows = rng.multinomial(tokens, rng.dirichlet(np.full(experts**2, 0.3)), size=layers - 1).reshape(
        -1, experts, experts
    )
    return {
        "kind": "inspection",
        "format": 1,
        "spectralmoe": "0.1.0",
        "title": title,
        "model": {
            "name": title,
            "class": "MixtralForCausalLM",
            "mode": "run",
            "dtype": "bfloat16",
            "parameters": 46_700_000,
        },
        "data": {
            "source": "book.txt",
            "tokens": tokens,
            "sequences": 64,
            "tokenizer": "own",
            "notes": ["a note on the data"],
        },
        "layers": made,
        "paths": [
            {
                "from": place,
                "to": place + 1,
                "flows": [[i, j, int(flow[i, j])] for i in range(experts) for j in range(experts) if flow[i, j]],
                "out": flow.sum(1).tolist(),
                "into": flow.sum(0).tolist(),
                "mutual_information": measure(0.2, tokens),
            }
            for place, flow in enumerate(flows)
        ],
        "text": [passage(rng, made, title) for title in ("prose", "code")],
        "holders": [holders(rng, made)],
        "findings": findings,
    }


def monitor(
    layers: int = 4, experts: int = 8, steps: int = 30, seed: int = 0, title: str = "run"
) -> list[dict[str, Any]]:
    """The lines of a monitor: experts drift apart, one dies; one value has no data."""
    rng = np.random.default_rng(shifted(seed))
    names = [f"model.layers.{i}.mlp" for i in range(layers)]
    about = [{"name": name, "layer": i, "stack": "", "experts": experts, "top_k": 2} for i, name in enumerate(names)]
    lines: list[dict[str, Any]] = [{"kind": "start", "format": 1, "title": title, "layers": about, "every": 50}]
    logits = rng.normal(0, 0.1, (layers, experts))
    for i in range(steps):
        logits += rng.normal(0, 0.12, logits.shape)
        logits[0, 0] -= 0.2
        share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        even, step = share * experts, 50 * (i + 1)
        found = {"max_vio": even.max(1).mean() - 1, "max_vio_worst": even.max() - 1, "entropy": 0.95 - 0.004 * i}
        rest = {
            "dead_experts": int((even < 0.1).sum()),
            "dropped": None,
            "near_tie": None if 4 < i < 8 else 0.1 + 0.01 * i,
        }
        numbers = {key: round(float(value), 5) for key, value in found.items()}
        lines.append({"kind": "step", "step": step, "tokens": 8192, **numbers, **rest})
        lines.append({"kind": "load", "step": step, "shares": dict(zip(names, share.round(6).tolist(), strict=True))})
    finding = {
        "kind": "dead_experts",
        "layer": 0,
        "name": names[0],
        "severity": "severe",
        "message": f"layer 0: 1 of {experts} experts dead",
        "cure": "balance the load: Balanced(k)",
        "measure": measure(1, 16384, "slots"),
        "threshold": 1.0,
    }
    return [*lines, {"kind": "finding", "step": 50 * steps, "finding": finding}]
