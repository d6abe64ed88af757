"""A receipt as lines for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from spectralmoe.adaptation.copies import COPIES
from spectralmoe.adaptation.one_shot import Carried
from spectralmoe.adaptation.receipt.receipt import Flip, Held, Moved, Receipt
from spectralmoe.diagnostics import Change

__all__ = ["carried_lines", "receipt_lines", "reference_line", "sample_line", "written_line"]


def receipt_lines(receipt: Receipt) -> list[str]:
    """What happened, in order of interest: the sample, what was written, what else moved, what was tried before."""
    lines = [sample_line(receipt)]
    if receipt.written:
        lines.append(written_line(receipt))
    if receipt.reference is not None:
        lines.append(reference_line(receipt.reference, receipt.success))
    if receipt.test is not None:
        lines.append(_test_line(receipt.test))
    if receipt.warning:
        lines.append(f"WARNING: the correction {receipt.warning}")
    if receipt.written:
        lines += carried_lines(receipt.carried_before, receipt.carried_after)
    word = "tried before" if receipt.success else "tried"
    return [*lines, *(f"{word}: {attempt}" for attempt in receipt.tried)]


def sample_line(receipt: Receipt) -> str:
    """Prediction and probability before and after."""
    before, after, right = receipt.before, receipt.after, receipt.name(receipt.label)
    if receipt.success and not receipt.written:
        return f"already right: the model says {right} ({before.probability:.1%}); nothing was changed"
    was = f"{receipt.name(before.prediction)} ({before.probability:.1%})"
    if not receipt.success:
        return f"NOT corrected: the model says {was}, {right} has {before.right:.1%}; it was left as it was"
    return f"corrected: {was} -> {right} ({after.probability:.1%}; before: {before.right:.1%})"


def written_line(receipt: Receipt) -> str:
    """Which experts got how much, by which method."""
    experts = ", ".join(f"expert {expert} of {layer}" for layer, expert in receipt.touched.items())
    return (
        f"written: {experts}; {receipt.written:,} of {receipt.parameters:,} parameters changed, "
        f"by {receipt.change:.3g} (Euclidean norm); "
        f"method {receipt.method}, {_count(receipt.steps, 'step')}, {receipt.seconds:.1f} s"
    )


def reference_line(moved: Moved, kept: bool) -> str:
    """The results on the guard's reference data."""
    could = f"{moved.reachable:,} could change" if moved.reachable < moved.samples else "all could change"
    without = " without this one" if moved.contains_sample else ""
    routes = f", {_count(len(moved.rerouted), 'route')} changed" if moved.rerouted else ", no route changed"
    lost = f"; {_count(moved.protected_lost, 'earlier correction')} lost" if moved.protected_lost else ""
    flips = "" if moved.max_flips is None else f", {moved.max_flips} flips"
    limit = f"budget {moved.budget:g} points{flips} on the reference data"
    verb = "changed" if kept else "would have changed"
    return (
        f"reference: {_count(moved.samples, 'sample')}{without}, {could}; "
        f"{_flips(moved.flipped, moved.interference, verb)}{routes}{lost}; "
        f"interference {_points(moved.interference)} ({limit})"
    )


def _test_line(test: Held) -> str:
    without = " without this one" if test.left_out else ""
    return (
        f"test: {_count(test.interference.samples, 'sample')}{without}; "
        f"{_flips(test.flipped, test.interference)}; "
        f"accuracy {test.accuracy_before:.2f}% -> {test.accuracy_after:.2f}%, interference {_points(test.interference)}"
    )


def carried_lines(before: Carried | None, after: Carried, heading: str = "copies right") -> list[str]:
    """Which share of the copies of each kind is right; those that ``neighbours`` makes on a line of their own."""

    def shares(*, built_from: bool) -> str:
        return ", ".join(
            f"{COPIES[kind].text} {f'{before[kind]:.0%} -> ' if before else ''}{share:.0%}"
            for kind, share in after.items()
            if COPIES[kind].built_from == built_from
        )

    lines = [f"{heading}: {shares(built_from=False)}"]
    if seen := shares(built_from=True):
        lines.append(f"copies of the kind that carried corrections are built from: {seen}")
    return lines


def _flips(flips: Sequence[Flip], change: Change, verb: str = "changed") -> str:
    if not flips:
        return f"no prediction {verb}"
    other = len(flips) - change.gained - change.lost
    kinds = [f"{change.gained} better", f"{change.lost} worse", *([f"{other} wrong either way"] if other else [])]
    return f"{_count(len(flips), 'prediction')} {verb} ({', '.join(kinds)})"


def _points(change: Change) -> str:
    return f"{change.mean:+.2f} points [{change.low:+.2f}, {change.high:+.2f}]"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
