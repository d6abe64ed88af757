"""Cost: a model of the time and memory that experts take on one device.

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
    r"""Models the time and the memory of an expert on a device; nothing is measured.

    .. math::
        t(B) = \text{overhead} + \max\left(\frac{2 m B D H}{\text{rate}}, \frac{m D H b}{\text{memory}}\right), \qquad
        M(B) = b\,(B D + m D H + B H)

    t is the time in seconds and M the memory in bytes for B tokens, with m matrices of D H numbers of b bytes. An
    expert without tokens takes no time, but its weights take memory.

    Args:
        dim: D.
        hidden: H.
        matrices: m; 2, or 3 for gated experts.
        item: b, bytes a number.
        overhead: the time to launch an expert, in seconds.
        rate: operations a second. The defaults of this and the next two come from an H200's data sheet, for bf16.
        memory: bytes a second at which weights are read.
        link: bytes a second between two devices; with ``math.inf`` copies take no time.

    Raises:
        UserError: an argument is not positive, or overhead is below 0.

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
        """The bytes of the weights of one expert."""
        return self.matrices * self.dim * self.hidden * self.item

    def seconds(self, tokens: int) -> float:
        """Return the time of one expert on ``tokens`` tokens, in seconds."""
        if not tokens:
            return 0.0
        computed = 2 * self.matrices * self.dim * self.hidden * tokens / self.rate
        return self.overhead + max(computed, self.weights / self.memory)

    def copy_seconds(self) -> float:
        """Return the time to send the weights of one expert, in seconds."""
        return self.weights / self.link

    def bytes(self, tokens: int) -> int:
        """Return the bytes of one expert's weights and of the inputs and hidden activations of its tokens."""
        return self.weights + tokens * (self.dim + self.hidden) * self.item
