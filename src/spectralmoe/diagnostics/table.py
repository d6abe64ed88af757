"""The table of measured values, which ``spectralmoe inspect``, its report and ``spectralmoe list`` are made from.

A value is a function of the ``Evidence`` about one layer. To add one, add a line here and a row in docs/inspect.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from spectralmoe.diagnostics import geometry, load, similarity, stability
from spectralmoe.diagnostics.association import association
from spectralmoe.diagnostics.evidence import Evidence
from spectralmoe.diagnostics.measure import Measure

__all__ = ["FEWEST", "GROUPS", "NEEDS", "VALUES", "Group", "Need", "Value", "measured"]

FEWEST = 8
"""The least number of tokens on which outputs of experts are compared."""

_JACOBIANS, _RANK = 32, 4

Group = Literal["load", "entropy", "geometry", "similarity", "stability", "association"]
Need = Literal["weights", "counts", "routing", "tokens", "outputs", "gradients", "labels"]
GROUPS: tuple[Group, ...] = get_args(Group)
NEEDS: tuple[Need, ...] = get_args(Need)


@dataclass(frozen=True, slots=True)
class Value:
    """One measured value of a layer.

    Attributes:
        group: the block of the inspection document that holds it.
        key: its name in that block.
        title: its heading in the report.
        meaning: one phrase that says what it is.
        needs: what it is computed from: the layer's "weights", the "counts" of slots, "routing" of a run, "tokens" to
            route again, "outputs" of all experts, "gradients" of the router, or "labels" of the tokens.
        fn: the function from the evidence to the measure.
        better: "lower" or "higher", if one of them is better.
        column: its heading in the table that ``inspect`` prints; "" leaves it out.
    """

    group: Group
    key: str
    title: str
    meaning: str
    needs: Need
    fn: Callable[[Evidence], Measure]
    better: Literal["lower", "higher", ""] = ""
    column: str = ""

    @property
    def name(self) -> str:
        """``group.key``."""
        return f"{self.group}.{self.key}"


def _of_share(function: Callable[[Tensor], float]) -> Callable[[Evidence], Measure]:
    """A function of the experts' shares of the load."""
    return lambda seen: seen.counts.of_share(function)


def _of_outputs(likeness: Callable[[Tensor], Tensor]) -> Callable[[Evidence], Measure]:
    """The mean over all pairs of two experts of a likeness (E, E) of their outputs."""
    return lambda seen: _over_pairs(likeness(seen.outputs), seen.outputs.shape[1], "tokens", FEWEST)


def _over_pairs(likeness: Tensor | None, data: int, unit: str, needs: int = 1) -> Measure:
    """The mean of a likeness (E, E) over all pairs, which rests on ``data`` things."""
    mean = None if likeness is None else similarity.mean_offdiagonal(likeness).value
    return Measure.of(math.nan if mean is None else mean, data, unit, needs)


def _subspace(outputs: Tensor) -> Tensor:
    return similarity.subspace_overlap(outputs, min(_RANK, max(1, outputs.shape[-1] // 4)))


# fmt: off
_LINES = (
    Value("load", "max_vio", "MaxVio", "largest load over the mean load, minus 1; 0 is even, E/K - 1 is collapse",
          "counts", _of_share(load.max_vio), "lower", "MaxVio"),
    Value("load", "gini", "Gini", "Gini coefficient of the load; 0 is even",
          "counts", _of_share(load.gini), "lower"),
    Value("load", "min_share", "least share", "share of the least used expert; 1/E is even",
          "counts", _of_share(load.min_share), "higher"),
    Value("load", "max_share", "most share", "share of the most used expert; 1/E is even",
          "counts", _of_share(load.max_share), "lower"),
    Value("load", "dead", "dead", "experts with less than a tenth of an even load",
          "counts", _of_share(load.dead_experts), "lower", "dead"),
    Value("load", "concentration", "concentration", "how far the K busiest experts take all slots; 0 is even, 1 is all",
          "counts", lambda seen: seen.counts.concentration(), "lower"),
    Value("load", "concentration_sequence", "concentration / seq.", "the same inside single sequences, mean",
          "routing", lambda seen: seen.statistics.of_sequences("sequence_concentration"), "lower"),
    Value("load", "max_vio_batch", "MaxVio / batch", "MaxVio inside single batches, mean",
          "routing", lambda seen: seen.statistics.max_vio_batch(), "lower"),
    Value("load", "max_vio_sequence", "MaxVio / seq.", "MaxVio inside single sequences, mean",
          "routing", lambda seen: seen.statistics.of_sequences("sequence_vio"), "lower"),
    Value("load", "dropped", "dropped", "share of slots that a capacity emptied",
          "counts", lambda seen: seen.counts.dropped(), "lower"),
    Value("entropy", "tokens", "of tokens",
          "entropy of the scores of a token, over log E, mean; 0 is certain, 1 is undecided",
          "routing", lambda seen: seen.statistics.token_entropy(), column="entropy"),
    Value("entropy", "mean", "of the mean", "entropy of the mean scores, over log E; 1 is even use",
          "routing", lambda seen: seen.statistics.mean_entropy(), "higher"),
    Value("geometry", "sigma_1", "sigma 1", "largest singular value of the routing matrix",
          "weights", lambda seen: geometry.sigma_1(seen.matrix)),
    Value("geometry", "stable_rank", "stable rank", "squared Frobenius norm over squared sigma 1",
          "weights", lambda seen: geometry.stable_rank(seen.matrix), column="stable rank"),
    Value("geometry", "effective_rank", "effective rank", "exponential of the entropy of the spectrum",
          "weights", lambda seen: geometry.effective_rank(seen.matrix)),
    Value("geometry", "row_cosine", "row cosine", "size of the cosine between the rows of two experts, mean",
          "weights", lambda seen: geometry.row_cosine(seen.matrix)),
    Value("geometry", "row_spread", "row spread",
          "how far the rows are from all being the same, 0 to 1; 0 routes nothing",
          "weights", lambda seen: geometry.row_spread(seen.matrix)),
    Value("geometry", "jacobian", "Jacobian",
          "spectral norm of the derivative of the scores by the token, mean on the data",
          "gradients", lambda seen: geometry.jacobian_norm(seen.watched, seen.tokens[:_JACOBIANS])),
    Value("similarity", "output_cos2", "outputs cos²", "squared cosine of two experts' outputs for one token, mean",
          "outputs", lambda seen: _over_pairs(seen.output_cosines, seen.outputs.shape[1], "tokens", FEWEST),
          "lower", "output cos²"),
    Value("similarity", "output_centred", "outputs cos², centred",
          "the same of outputs less each expert's mean output: blind to what an expert adds to every token",
          "outputs", _of_outputs(similarity.centred_cosines), "lower"),
    Value("similarity", "cka", "CKA", "linear centred kernel alignment of two experts' outputs, mean",
          "outputs", _of_outputs(similarity.linear_cka), "lower"),
    Value("similarity", "subspace", "subspace", "overlap of the leading subspaces of two experts' outputs, mean",
          "outputs", _of_outputs(_subspace), "lower"),
    Value("similarity", "weight_cosine", "weights cosine",
          "cosine of two experts' weights, mean; blind to a permutation of hidden units",
          "weights", lambda seen: _over_pairs(seen.weight_cosines, *seen.weights), column="weight cos"),
    Value("stability", "noise", "flips, noise", "share of tokens whose choice changes under noise of 5% of their norm",
          "tokens", lambda seen: stability.noise_flips(seen.watched, seen.tokens, seed=seen.seed), "lower"),
    Value("stability", "bf16", "flips, bf16", "share of tokens whose choice changes when the router runs in bf16",
          "tokens", lambda seen: stability.precision_flips(seen.watched, seen.tokens), "lower", "bf16 flips"),
    Value("stability", "bf16_sound", "flips, bf16, sound",
          "the same of a sound router of this size, drawn at random: what bf16 does alone",
          "tokens", lambda seen: seen.sound_router()),
    Value("stability", "near_tie", "near ties",
          "share of tokens whose best expert left out scores within 1% of the last one chosen",
          "routing", lambda seen: seen.statistics.near_tie(), "lower", "near ties"),
    Value("stability", "margin", "margin",
          "by what share of the last score chosen the best one left out is lower, mean",
          "routing", lambda seen: seen.statistics.margin(), "higher"),
    Value("association", "mutual_information", "mutual information", "between label and expert, 0 to 1",
          "labels", lambda seen: association(seen.labels)),
)
# fmt: on

VALUES = {value.name: value for value in _LINES}
"""All values by ``group.key``, in the order in which they are shown."""


def measured(evidence: Evidence, given: Collection[Need]) -> dict[str, dict[str, Any] | None]:
    """Compute all values of a layer, by group, in a form for JSON.

    Args:
        evidence: what is known of the layer.
        given: what of it was really collected; a value that needs something else has no data, and a group without any
            value is None.
    """
    blocks: dict[str, dict[str, Any] | None] = {}
    for group in GROUPS:
        values = [value for value in VALUES.values() if value.group == group]
        known = any(value.needs in given for value in values)
        blocks[group] = {value.key: _measure(value, evidence, given).as_json() for value in values} if known else None
    return blocks


def _measure(value: Value, evidence: Evidence, given: Collection[Need]) -> Measure:
    return value.fn(evidence) if value.needs in given else Measure.of(math.nan, 0)
