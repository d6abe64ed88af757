"""Cost: modelled time and memory of experts on one device.

The cost model of "Least-Loaded Expert Parallelism" (arXiv 2601.17111): the time of a device is the sum over its experts
of a launch overhead and B t(B), with B tokens and t(B) the time of one; its memory is the sum of B D + D H + B H.
Differs: t(B) follows the roofline, all matrices of an expert are counted, and a copy of weights takes time on the link.
"""

from __future__ import annotations

from dataclasses import dataclass

from spectralmoe.errors import UserError

__all__ = ["Cost"]


@dataclass(frozen=True, slots=True)
class Cost:
    r"""What an expert costs on a device: a model, never a measurement.

    .. math::
        t(B) = \text{overhead} + \max\left(\frac{2 m B D H}{\text{rate}}, \frac{m D H b}{\text{memory}}\right), \qquad
        M(B) = b\,(B D + m D H + B H)

    with m matrices of D H numbers, b bytes each. An expert without tokens takes no time; its weights take memory.

    Args:
        dim: D.
        hidden: H.
        matrices: m; 2, or 3 for gated experts.
        item: b.
        overhead: seconds to launch an expert.
        rate: operations a second. This and the next two are an H200's data sheet in bf16.
        memory: bytes a second that weights are read with.
        link: bytes a second between two devices; ``math.inf``, and copies are free.

    Raises:
        UserError: one that is not positive; overhead below 0.

    >>> cost = Cost(1024, 4096, overhead=0.0)
    >>> cost.seconds(0), cost.seconds(1) == cost.seconds(100), cost.bytes(0)
    (0.0, True, 16777216)
    """

    dim: int
    hidden: int
    matrices: int = 2
    item: int = 2
    overhead: float = 1e-5
    rate: float = 9.9e14
    memory: float = 4.8e12
    link: float = 4.5e11

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "matrices", "item", "rate", "memory", "link"):
            if not getattr(self, name) > 0:
                raise UserError(f"Cost: {name} must be positive, got {getattr(self, name)}")
        if not self.overhead >= 0:
            raise UserError(f"Cost: overhead must be 0 or more, got {self.overhead}")

    @property
    def weights(self) -> int:
        """Bytes of the weights of one expert."""
        return self.matrices * self.dim * self.hidden * self.item

    def seconds(self, tokens: int) -> float:
        """Time of one expert on its tokens."""
        if not tokens:
            return 0.0
        computed = 2 * self.matrices * self.dim * self.hidden * tokens / self.rate
        return self.overhead + max(computed, self.weights / self.memory)

    def copy_seconds(self) -> float:
        """Time to send the weights of one expert."""
        return self.weights / self.link

    def bytes(self, tokens: int) -> int:
        """Memory of one expert with its tokens' inputs and hidden rows."""
        return self.weights + tokens * (self.dim + self.hidden) * self.item
