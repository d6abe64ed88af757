"""One-expert updates: correct a sample by the one expert that it uses, and measure what else changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectralmoe.adaptation.copies import Augment
from spectralmoe.adaptation.correction import Correction
from spectralmoe.adaptation.guard import Guard, Head, Verdict
from spectralmoe.adaptation.memory import share_memory
from spectralmoe.adaptation.methods import METHODS, NEEDS_REFERENCE
from spectralmoe.adaptation.methods.hidden_unit import NoFreeUnit
from spectralmoe.adaptation.reference import Reference
from spectralmoe.adaptation.samples import class_numbers
from spectralmoe.adaptation.steady import first_logits, steady
from spectralmoe.adaptation.targets import Target, choose_layers, find_targets, joined, logits_of, right
from spectralmoe.adaptation.update import Update, Written
from spectralmoe.errors import UserError, one_of

__all__ = ["adapt_one", "split"]

SCALES = (0.85, 0.7, 0.55, 0.4)
FALLBACKS = ("unit", "low_rank", "null_space", "margin")


class _Attempt(NamedTuple):
    method: str
    layers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.method} in {', '.join(self.layers)}"


def adapt_one(
    model: nn.Module,
    x: Tensor,
    y: Tensor | int,
    *,
    layers: str | Sequence[str] = "last",
    method: str = "sgd",
    max_steps: int = 100,
    lr: float = 1e-2,
    guard: Guard | None = None,
    augment: Augment | None = None,
    carry: float = 0.75,
    strength: float = 1.0,
) -> Update:
    """Make samples right by writing into one expert a layer, the one that they use; nothing else changes.

    Delibasoglu, SR-MoE, arXiv 2601.03889, one-shot adaptation; the guard and the methods beyond "sgd" are additions.

    Args:
        model: gives class logits (B, C) (or an object with ``.logits``) for a batch, and holds MoE layers. One that
            can resume from a layer offers ``split(layer)``, a pair (head, tail) of modules, and is faster. It runs in
            evaluation mode, where it must always answer alike.
        x: (k, ...) samples.  y: their class numbers, (k,) or one int.
        layers: "last", "all" or names. In each the expert with the largest weight, summed over the samples' tokens.
        method: see ``METHODS``: "sgd", "margin", "null_space", "low_rank", "unit". The last three need a guard.
        max_steps, lr: bounds of the iteration.
        guard: judges the update on reference data. An update that costs too much is scaled back, tried in the last
            layer alone, tried by other methods, and refused in the end.
        augment: x -> copies (k * m, ...), those of one sample together, that are to become right too.
        carry: the share of the copies that must be right for the iteration to stop.
        strength: weight of the reference data against samples and copies in "unit": a larger one costs less accuracy
            on other data, and fewer copies become right.

    Returns:
        An ``Update``. If it has no success, and if anything is raised, the model is as it was.

    Raises:
        UserError: a label that is no class number or out of range, an unknown method or layer, a bank that cannot be
            adapted, a method that needs what is not there; a model that is random or changes itself in evaluation
            mode, or whose weights were made under ``torch.inference_mode``.

    >>> from spectralmoe.models import sr_moe
    >>> model = sr_moe(3, width=8, depth=2, num_experts=2, hidden=4).eval()
    >>> image = torch.rand(1, 1, 8, 8)
    >>> wrong = int(model(image).argmin())
    >>> update = adapt_one(model, image, wrong, lr=0.1)
    >>> update.success, int(model(image).argmax()) == wrong, list(update.touched)
    (True, True, ['stages.1.moe'])
    >>> update.revert()
    """
    if method not in METHODS:
        raise one_of("method", method, METHODS)
    if not 0 < lr < float("inf"):
        raise UserError(f"the step size must be positive and finite, got {lr}")
    if max_steps < 0:
        raise UserError(f"max_steps must not be negative, got {max_steps}")
    if guard is None and method in NEEDS_REFERENCE:
        raise UserError(f"method={method!r} reads reference data; give guard=Guard(loader), or use 'sgd' or 'margin'")
    started = time.monotonic()
    with steady(model):
        names = choose_layers(model, layers)
        head, tail = split(model, names[0])
        device = next(model.parameters()).device
        labels, inputs = _labels(y, len(x), device), x.to(device).clone()
        if _check_labels(model, inputs, labels):
            return Update(True, 0, method, seconds=time.monotonic() - started)
        samples = head(inputs)
        copies = head(augment(inputs)) if augment else samples[:0]
        _check_copies(copies, samples)
        correction = Correction(
            tail, samples, labels, copies, joined(()), max_steps, lr, carry=carry, strength=strength
        )
        check = _Check(model, inputs, labels, guard, guard.others(inputs) if guard else None)
        measure = partial(guard.reference, model, head, tail, names[0]) if guard else None
        update = _try_all(correction, _plan(method, names, guard), check, measure)
    return replace(update, seconds=time.monotonic() - started)


def split(model: nn.Module, layer: str) -> tuple[Head, nn.Module]:
    """The part of the model that runs before ``layer``, and the rest, by the model's own ``split``.

    Without a ``split`` the first part is empty and the rest is the whole model; so it is where both parts read the same
    memory (tied weights), since writing into the rest would change what comes before it.
    """
    model_split = getattr(model, "split", None)
    if callable(model_split):
        head, tail = model_split(layer)
        if not share_memory(head, tail):
            return head, tail
    return (lambda x: x), model


@dataclass(frozen=True, slots=True)
class _Check:
    """The checks that a finished update must pass, on the whole model."""

    model: nn.Module
    samples: Tensor
    labels: Tensor
    guard: Guard | None
    others: Tensor | None

    def right(self) -> bool:
        """Whether the samples are right."""
        return bool(right(logits_of(self.model, self.samples), self.labels).all())

    def verdict(self, correction: Correction, touched: dict[str, int]) -> Verdict | None:
        """The guard's verdict; None without a guard."""
        if self.guard is None or self.others is None:
            return None
        assert correction.reference is not None
        return self.guard.judge(correction.model, correction.reference, touched, model=self.model, others=self.others)


def _labels(y: Tensor | int, samples: int, device: torch.device) -> Tensor:
    labels = class_numbers("adapt_one", y).to(device).reshape(-1).clone()
    if len(labels) != samples or not samples:
        raise UserError(f"adapt_one: {samples} samples need as many labels, got {len(labels)}; x must be a batch")
    return labels


def _check_copies(copies: Tensor, samples: Tensor) -> None:
    if len(copies) % len(samples):
        raise UserError(f"augment gave {len(copies)} copies of {len(samples)} samples; return the same number of each")


def _check_labels(model: nn.Module, x: Tensor, labels: Tensor) -> bool:
    """Whether the samples are right already; raises for a label that the model does not know."""
    logits = first_logits(model, x)
    wrong = [label for label in labels.tolist() if not 0 <= label < logits.shape[1]]
    if wrong:
        raise UserError(f"label {wrong[0]} is out of range; the model knows 0 to {logits.shape[1] - 1}")
    return bool(right(logits, labels).all())


def _plan(method: str, names: Sequence[str], guard: Guard | None) -> list[_Attempt]:
    """The attempts: the requested one; with a guard also the last layer alone, and there the fallback methods."""
    plan = [_Attempt(method, tuple(names))]
    if guard is not None:
        last = tuple(names[-1:])
        plan += [_Attempt(method, last)] if len(names) > 1 else []
        plan += [_Attempt(other, last) for other in FALLBACKS if other != method]
    return plan


def _try_all(
    correction: Correction,
    plan: Sequence[_Attempt],
    check: _Check,
    measure: Callable[[Sequence[str]], Reference] | None,
) -> Update:
    """The first attempt that succeeds; else the last one, with the reasons why none was kept."""
    tried, references = list[str](), dict[tuple[str, ...], Reference]()
    update = Update(False, 0, plan[0].method)
    for attempt in plan:
        targets = find_targets(correction.model, correction.samples, attempt.layers)
        if not targets:
            raise UserError(f"the samples use no expert of {', '.join(attempt.layers)}; choose other layers")
        seen = tuple(target.layer for target in targets if attempt.method in NEEDS_REFERENCE)
        if measure is not None and seen not in references:
            references[seen] = measure(seen)
        aimed = replace(correction, weights=joined(targets), experts=targets, reference=references.get(seen))
        try:
            update = _try(aimed, attempt.method, check)
        except UserError as error:
            if attempt is plan[0] and not isinstance(error, NoFreeUnit):
                raise
            tried.append(f"{attempt}: {error}")
            continue
        if update.success:
            return replace(update, tried=tuple(tried))
        tried.append(f"{attempt}: {update.tried[0]}")
    return replace(update, tried=tuple(tried))


def _try(correction: Correction, method: str, check: _Check) -> Update:
    """One method once; the weights are put back unless it succeeds."""
    old, kept = correction.weights.copy(), False
    try:
        with correction.weights.trainable(correction.model):
            steps = METHODS[method](correction)
        if not (correction.weights.finite() and check.right()):
            return Update(False, steps, method, ("the samples did not become right",))
        verdict = _fit(correction, check, old)
        if verdict is not None and not verdict.holds:
            cost = f"it costs {-verdict.change.mean:.2f} points and flips {len(verdict.flipped)} reference samples"
            return Update(False, steps, method, (cost,), verdict)
        kept = True
    finally:
        if not kept:
            correction.weights.write(old)
    return Update(True, steps, method, (), verdict, written=_written(correction.experts, old))


def _fit(correction: Correction, check: _Check, old: Sequence[Tensor]) -> Verdict | None:
    """The guard's verdict on the update, scaled back as far as the samples stay right if need be."""
    touched = {item.target.layer: item.target.expert for item in _written(correction.experts, old)}
    verdict = check.verdict(correction, touched)
    new = correction.weights.copy()
    for scale in SCALES:
        if verdict is None or verdict.holds:
            break
        correction.weights.write([o.lerp(n, scale) for o, n in zip(old, new, strict=True)])
        if not check.right():
            break
        verdict = check.verdict(correction, touched)
    return verdict


def _written(experts: Sequence[Target], old: Sequence[Tensor]) -> tuple[Written, ...]:
    """The experts that did change, with their tensors before and after; the others get their bits back."""
    written, rest = [], list(old)
    for target in experts:
        mine, rest = rest[: len(target.views)], rest[len(target.views) :]
        if target.equal(mine):
            target.write(mine)  # the same values, perhaps with another sign of zero
        else:
            written.append(Written(target, mine, target.copy()))
    return tuple(written)
