"""A layer as its equations say, in float64: one token, one expert, one sum at a time; no code of the library."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Chosen = list[list[int]]
"""The experts of each token, in the order of its slots; -1 is an empty slot."""


def logits_of(name: str, scorer: torch.nn.Module, x: Tensor) -> Tensor:
    """(N, E) logits of the real tokens ``x`` (N, D)."""
    return torch.stack([_LOGITS[name](scorer, token) for token in x]) if len(x) else x.new_zeros(0, scorer.num_experts)


def _linear(scorer, token):
    return torch.stack([row.double() @ token + b.double() for row, b in zip(scorer.weight, scorer.bias, strict=True)])


def _cosine(scorer, token):
    query = scorer.projection.double() @ token
    keys = [key.double() for key in scorer.keys]
    return torch.stack([key @ query / (key @ key).sqrt() / (query @ query).sqrt() for key in keys]) / scorer.temperature


def _prototype(scorer, token):
    far = [scorer.scale * token - mu.double() for mu in scorer.prototypes]
    return torch.stack([-(d @ d) / scorer.temperature for d in far])


def _eigenbasis(scorer, token):
    z = [column.double() @ token for column in scorer.basis.T]
    total = sum(value**2 for value in z) + scorer.eps
    masks = [row.double().exp() / row.double().exp().sum() for row in scorer.mask_logits]
    energy = [gain.double() * value**2 / total * mask for gain, value, mask in zip(scorer.gain, z, masks, strict=True)]
    return (sum(energy) + scorer.bias.double()) / scorer.temperature


def _principal(scorer, token):
    z = [column.double() @ (token - scorer.mean.double()) for column in scorer.basis.T]
    sides = [side for value in z for side in (value.clamp_min(0), (-value).clamp_min(0))]
    q = [(side / usual.double()) ** 2 for side, usual in zip(sides, scorer.spread, strict=True)]
    shares = [value / (sum(q) + 1e-6) for value in q]
    return torch.stack([sum(shares[e :: scorer.num_experts]) for e in range(scorer.num_experts)]) / scorer.temperature


def _saturated(scorer, token):
    query = scorer.projection.double() @ token
    norm, gain = (query @ query).sqrt(), scorer.log_gain.double().exp()
    phi = gain * norm.tanh() if scorer.log_beta is None else gain * (1 + scorer.log_beta.double().exp() * norm.tanh())
    logits = []
    for anchors in scorer.keys.double():
        sizes = [(key @ key).sqrt() for key in anchors]
        terms = [
            phi * (1 + (size - 1) / 4) * (key @ query) / size / norm for key, size in zip(anchors, sizes, strict=True)
        ]
        logits.append(terms[0] if len(terms) == 1 else sum(term.exp() for term in terms).log())
    return torch.cat(logits)


def _monte_carlo(scorer, token):
    return _linear(scorer.scorer, token)  # in evaluation


_LOGITS = {
    "linear": _linear,
    "cosine": _cosine,
    "prototype": _prototype,
    "eigenbasis": _eigenbasis,
    "principal": _principal,
    "saturated": _saturated,
    "monte_carlo": _monte_carlo,
}


def scores_of(selector: torch.nn.Module, logits: Tensor) -> Tensor:
    """What weights are taken from: softmax, sigmoid or entmax; ``SoftBalanced`` adds its bias first."""
    if type(selector).__name__ == "Entmax":
        return torch.stack([_entmax(row) for row in logits]) if len(logits) else logits
    if type(selector).__name__ == "SoftBalanced":
        logits = logits + selector.bias.double()
    if selector.score == "sigmoid":
        return 1 / (1 + (-logits).exp())
    shifted = (logits - logits.detach().amax(-1, keepdim=True)).exp() if len(logits) else logits
    return shifted / shifted.sum(-1, keepdim=True)


def _entmax(row: Tensor) -> Tensor:
    """alpha = 1.5: (s/2 - tau)^2 on the k largest, tau from their mean and spread; the largest k that fits."""
    halves = row / 2
    taus = []
    for k in range(1, len(row) + 1):
        best = halves[halves.argsort(descending=True)[:k]]
        mean = best.sum() / k
        room = (1 - ((best - mean) ** 2).sum()) / k
        if room <= 0 or mean - room.sqrt() > best[-1]:
            break
        taus.append(mean - room.sqrt())
    excess = halves - taus[-1]
    return torch.where(excess > 0, excess, 0) ** 2


def weights_of(selector: torch.nn.Module, scores: Tensor, chosen: Chosen) -> list[list[Tensor | None]]:
    """The weight of each slot; None in an empty one."""
    weights = []
    for row, experts in zip(scores, chosen, strict=True):
        total = sum(row[e] for e in experts if e >= 0) if selector.normalize else 1.0
        weights.append([None if e < 0 else row[e] / total for e in experts])
    return weights


def ones(selector: torch.nn.Module, logits: Tensor, chosen: Chosen) -> list[list[Tensor | float | None]]:
    """The weights of ``Unweighted``: 1, and with "confidence" a gradient that goes straight through to the logit."""
    straight = logits - logits.detach() if selector.router_grad == "confidence" else 0 * logits.detach()
    return [[None if e < 0 else 1 + row[e] for e in experts] for row, experts in zip(straight, chosen, strict=True)]


def check_choice(name: str, selector: torch.nn.Module, scores: Tensor, chosen: Chosen, tolerance: float) -> None:
    """The choice is one that the equation allows: ties, up to rounding, may go either way."""
    n, num_experts = scores.shape
    if name in ("soft", "soft_balanced", "entmax"):
        assert all(sorted(row) == list(range(num_experts)) for row in chosen)
    elif name == "expert_choice":
        places = min(math.ceil(n * selector.capacity / num_experts - 1e-9), n)
        for e in range(num_experts):
            taken = [t for t in range(n) if e in chosen[t]]
            assert len(taken) == places
            best_outside = max((float(scores[t, e]) for t in range(n) if t not in taken), default=-math.inf)
            assert all(scores[t, e] >= best_outside - tolerance for t in taken)
    else:
        ranked = scores + selector.bias.double() if name == "balanced" else scores
        for row, experts in zip(ranked, chosen, strict=True):
            filled = [e for e in experts if e >= 0]
            assert len(set(filled)) == len(filled)
            best_outside = max((float(row[e]) for e in range(num_experts) if e not in filled), default=-math.inf)
            assert all(row[e] >= best_outside - tolerance for e in filled)
            if name == "topp":
                _check_mass(selector, (row / row.sum())[filled], tolerance)
            elif name == "threshold":
                assert 1 <= len(filled) <= selector.k
                assert all(row[e] >= selector.threshold - tolerance for e in filled[1:])
                assert len(filled) == selector.k or best_outside < selector.threshold + tolerance
            else:
                assert len(filled) == selector.k


def _check_mass(selector, shares, tolerance):
    """The smallest set with the mass p, or as many experts as there may be."""
    assert len(shares) >= 1
    assert shares[:-1].sum() < selector.p + tolerance or len(shares) == 1
    most = selector.max_k if selector.max_k is not None else math.inf
    assert shares.sum() >= selector.p - tolerance or len(shares) == most


def bounded(wanted: Chosen, factor: float, num_experts: int) -> Chosen:
    """Capacity: first choices of all tokens take their places first, earlier tokens before later ones."""
    filled = sum(e >= 0 for row in wanted for e in row)
    places, taken = math.ceil(filled * factor / num_experts - 1e-9), [0] * num_experts
    kept = [list(row) for row in wanted]
    for slot in range(max(map(len, wanted), default=0)):
        for row in kept:
            if row[slot] >= 0:
                taken[row[slot]] += 1
                if taken[row[slot]] > places:
                    row[slot] = -1
    return kept


def expert_of(name: str, bank: torch.nn.Module, token: Tensor, e: int, kinks: list[float]) -> Tensor:
    """E_e(x) of one token; ``kinks`` collects how near a ReLU is to its kink."""
    if name == "confident":
        y = expert_of("gelu", bank.experts, token, e, kinks)
        centred = y - y.sum() / len(y)
        normal = centred / ((centred @ centred) / len(y) + 1e-5).sqrt()
        return y / (1 + (-(bank.direction[e].double() @ normal) - bank.bias[e].double()).exp())
    if name == "multilinear":
        met = bank.input_factor.double() @ token + bank.input_bias.double()
        return bank.output_factor.double() @ (bank.expert_factor[e].double() * met)
    if name == "modulated":
        matrix, both = bank.weight, bank.bias[e].double()
        scale, shift = (both if matrix is None else matrix[e].double() @ token + both).chunk(2)
        return scale * token + shift
    if name == "modules":
        return bank.experts[e].weight.double() @ token + bank.experts[e].bias.double()
    up, down = bank.up[e].double(), bank.down[e].double()
    hidden = up @ token + (0 if bank.up_bias is None else bank.up_bias[e].double())
    if bank.activation == "swiglu":
        gate, value = hidden[: len(hidden) // 2], hidden[len(hidden) // 2 :]
        hidden = gate / (1 + (-gate).exp()) * value
    elif bank.activation == "relu":
        kinks.extend(hidden.detach().abs().tolist())
        hidden = torch.stack([h if h > 0 else 0 * h for h in hidden])
    else:
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return down @ hidden + (0 if bank.down_bias is None else bank.down_bias[e].double())
