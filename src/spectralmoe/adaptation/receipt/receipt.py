"""The receipt of a one-expert update: what it wrote, what it corrected, and what else moved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from spectralmoe.adaptation.one_shot import Carried
from spectralmoe.diagnostics import Change

__all__ = ["Answer", "Flip", "Held", "Moved", "Receipt"]


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's prediction for the sample: its class, the probability of it, and that of the right class (0 to 1)."""

    prediction: int
    probability: float
    right: float


@dataclass(frozen=True, slots=True)
class Flip:
    """A sample whose prediction changed; ``after`` is None for an update that was refused."""

    index: int
    label: int
    before: int
    after: int | None


@dataclass(frozen=True, slots=True)
class Moved:
    """What the update did to the guard's reference samples; if it was refused, what its last attempt would have done.

    Attributes:
        samples: how many there are, without the corrected one.
        reachable: how many of them the touched experts could change at all.
        contains_sample: whether the corrected sample is one of the guard's (it is not counted then).
        budget, max_flips: what the guard allows on these data; on others the cost may be larger.
        interference: accuracy after minus before, in percentage points with its 95% interval.
        flipped: predictions that changed.  rerouted: samples whose route through the experts changed.
        protected_lost: earlier corrections that are wrong now.
    """

    samples: int
    reachable: int
    contains_sample: bool
    budget: float
    max_flips: int | None
    interference: Change
    flipped: tuple[Flip, ...]
    rerouted: tuple[int, ...]
    protected_lost: int


@dataclass(frozen=True, slots=True)
class Held:
    """What the update did on held-out data, without the corrected sample.

    Attributes:
        left_out: how many times the corrected sample is in these data; not counted.
        accuracy_before, accuracy_after: percent.
        over_budget: whether the update costs more on these data than the guard allows on the reference data, beyond
            chance: the whole interval of the interference lies below minus the budget. None without a guard.
    """

    left_out: int
    accuracy_before: float
    accuracy_after: float
    interference: Change
    flipped: tuple[Flip, ...]
    over_budget: bool | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """One update in plain values.

    Attributes:
        success: the sample is right, and the guard (if any) agreed.  tried: attempts not kept, and why.
        method, steps, seconds, change, touched: of the ``Update``.
        written, parameters: how many numbers of the model changed, of how many.
        label: the right class.  before, after: what the model said of the sample, and says now.
        carried_before, carried_after: share of the copies of each kind in ``COPIES`` that are right.
        reference: what changed on the guard's data; None without a guard, or where nothing was changed.
        test: what changed on held-out data; None where none were given, or nothing was changed.
        classes: names of the classes; may be empty.
        machine: versions and hardware.
    """

    success: bool
    tried: tuple[str, ...]
    method: str
    steps: int
    seconds: float
    change: float
    touched: dict[str, int]
    written: int
    parameters: int
    label: int
    before: Answer
    after: Answer
    carried_before: Carried
    carried_after: Carried
    reference: Moved | None
    test: Held | None
    classes: tuple[str, ...]
    machine: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """JSON values; tuples become lists when they are written."""
        return asdict(self)

    def name(self, label: int) -> str:
        """The name of a class, or its number; "none" for -1, the prediction from logits that are NaN."""
        if label < 0:
            return "none"
        return self.classes[label] if self.classes else str(label)

    @property
    def warning(self) -> str:
        """A warning about the test data; "" if there is none."""
        if self.reference is None or self.test is None or not self.test.over_budget:
            return ""
        budget, change = self.reference.budget, self.test.interference
        return (
            f"costs more than its budget on the test data: the whole interval, {change.low:+.2f} to {change.high:+.2f} "
            f"points, lies below -{budget:g}; the guard bounds the cost on the reference data alone"
        )
