"""Makes a receipt by running the model with its update and without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spectralmoe.adaptation.guard import Guard
from spectralmoe.adaptation.one_shot import carried
from spectralmoe.adaptation.receipt.receipt import Answer, Flip, Held, Moved, Receipt
from spectralmoe.adaptation.samples import same_sample
from spectralmoe.adaptation.steady import steady
from spectralmoe.adaptation.targets import logits_of, predicted
from spectralmoe.adaptation.update import Update
from spectralmoe.diagnostics import accuracy_change
from spectralmoe.errors import UserError
from spectralmoe.machine import describe_machine

__all__ = ["make_receipt"]

BATCH = 1000


def make_receipt(
    model: nn.Module,
    x: Tensor,
    y: int,
    update: Update,
    *,
    guard: Guard | None = None,
    test: tuple[Tensor, Tensor] | None = None,
    classes: Sequence[str] = (),
) -> Receipt:
    """The receipt of ``update``, the last that ``model`` got: the model is measured with and without it.

    Args:
        x: (1, ...) the sample.  y: its class number.
        guard: the one that judged the update.
        test: held-out inputs (N, ...) and labels (N,).
        classes: names of all classes.

    Raises:
        UserError: more than one sample; the touched experts have changed since the update.

    >>> from spectralmoe.adaptation import adapt_one
    >>> from spectralmoe.models import sr_moe
    >>> model, image = sr_moe(3, width=8, num_experts=2, hidden=4).eval(), torch.rand(1, 1, 8, 8)
    >>> wrong = int(model(image).argmin())
    >>> receipt = make_receipt(model, image, wrong, adapt_one(model, image, wrong, lr=0.1))
    >>> receipt.success, receipt.after.prediction == wrong, receipt.before.prediction == wrong
    (True, True, False)
    """
    if len(x) != 1:
        raise UserError(f"a receipt is about one sample, x (1, ...), not {len(x)}; make one for each")
    device = next(model.parameters()).device
    x, label = x.to(device), torch.tensor([y], device=device)
    seen = _seen(guard, update)
    with steady(model):
        after, carried_after = _answer(model, x, y), carried(model, x, label)
        flips_after = None if seen is None or not update.success else _predict(model, seen)
        test_after = _predict(model, test[0]) if test and update.written else None
        with _without(update):
            before, carried_before = _answer(model, x, y), carried(model, x, label)
            flips_before = None if seen is None else _predict(model, seen)
            test_before = _predict(model, test[0]) if test and update.written else None
    return Receipt(
        success=update.success,
        tried=update.tried,
        method=update.method,
        steps=update.steps,
        seconds=update.seconds,
        change=update.change,
        touched=update.touched,
        written=_written(update),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        label=y,
        before=before,
        after=after,
        carried_before=carried_before,
        carried_after=carried_after,
        reference=None if guard is None else _moved(guard, update, x, flips_before, flips_after),
        test=None if test is None else _held(test, x, test_before, test_after, guard),
        classes=tuple(classes),
        machine=describe_machine(),
    )


@contextmanager
def _without(update: Update) -> Iterator[None]:
    """The model as it was before ``update`` inside the block."""
    update.revert()
    try:
        yield
    finally:
        for item in update.written:
            item.target.write(item.new)


def _answer(model: nn.Module, x: Tensor, y: int) -> Answer:
    share = logits_of(model, x)[0].softmax(-1)
    return Answer(int(share.argmax()), float(share.max()), float(share[y]))


def _predict(model: nn.Module, x: Tensor) -> Tensor:
    """Predicted classes (N,) of samples (N, ...), on the CPU."""
    device = next(model.parameters()).device
    parts = [predicted(logits_of(model, part.to(device))).cpu() for part in x.split(BATCH)]
    return torch.cat(parts) if len(x) else torch.zeros(0, dtype=torch.int64)


def _written(update: Update) -> int:
    return sum(int(difference.ne(0).sum()) for difference in update.differences)


def _seen(guard: Guard | None, update: Update) -> Tensor | None:
    """The reference samples whose prediction changed."""
    return None if guard is None or update.verdict is None else guard.samples[update.verdict.flipped]


def _flips(indices: Tensor, labels: Tensor, before: Tensor, after: Tensor | None) -> tuple[Flip, ...]:
    now = after.tolist() if after is not None else [None] * len(indices)
    rows = zip(indices.tolist(), labels.tolist(), before.tolist(), now, strict=True)
    return tuple(Flip(*row) for row in rows)


def _moved(guard: Guard, update: Update, x: Tensor, before: Tensor | None, after: Tensor | None) -> Moved | None:
    verdict = update.verdict
    if verdict is None or before is None:
        return None
    return Moved(
        samples=verdict.samples,
        reachable=verdict.reachable,
        contains_sample=bool(same_sample(guard.samples, x[0]).any()),
        budget=guard.budget,
        max_flips=guard.max_flips,
        interference=verdict.change,
        flipped=_flips(verdict.flipped, guard.labels[verdict.flipped], before, after),
        rerouted=tuple(verdict.rerouted.tolist()),
        protected_lost=verdict.lost,
    )


def _held(
    test: tuple[Tensor, Tensor], x: Tensor, before: Tensor | None, after: Tensor | None, guard: Guard | None
) -> Held | None:
    if before is None or after is None:
        return None
    same, labels = same_sample(test[0], x[0]), test[1].cpu()
    others = same.logical_not()
    step = (after == labels).int() - (before == labels).int()
    moved = (others & (before != after)).nonzero().flatten()
    was, now = ((predicted == labels)[others].double().mean() for predicted in (before, after))
    change = accuracy_change(step[others], int(others.sum()))
    return Held(
        left_out=int(same.sum()),
        accuracy_before=100 * float(was),
        accuracy_after=100 * float(now),
        interference=change,
        flipped=_flips(moved, labels[moved], before[moved], after[moved]),
        over_budget=None if guard is None else change.high < -guard.budget,
    )
