"""The interface that a family of MoE models in transformers needs as a target of ``upcycle``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spectralmoe.hf.upcycling.dense import Dense, Mlp
from spectralmoe.hf.upcycling.plan import Plan

__all__ = ["Target"]


class Target:
    """A family of MoE models whose layers are a dense decoder's but for the experts.

    Attributes:
        config: the name of its config's class in transformers.
    """

    config: str

    def refusal(self, dense: Dense, plan: Plan) -> str | None:
        """Why this family cannot compute what ``dense`` does; None where it can."""
        raise NotImplementedError

    def settings(self, dense: Dense, plan: Plan) -> dict[str, Any]:
        """The config's settings beside ``dense.common()``."""
        raise NotImplementedError

    def more(self, plan: Plan, mlp: Mlp) -> dict[str, Tensor]:
        """Tensors of a MoE layer beside its router's matrix and its experts, by their name in the layer.

        Args:
            mlp: expert 0 as it starts.
        """
        return {}
