"""Families of MoE models in transformers that dense models become: one file a family, each a line in ``TARGETS``."""

from spectralmoe.errors import UserError, one_of
from spectralmoe.hf.upcycling.dense import OTHERS, Dense
from spectralmoe.hf.upcycling.plan import Plan
from spectralmoe.hf.upcycling.targets.base import Target
from spectralmoe.hf.upcycling.targets.glm4_moe import Glm4Moe
from spectralmoe.hf.upcycling.targets.mixtral import Mixtral
from spectralmoe.hf.upcycling.targets.qwen2_moe import Qwen2Moe
from spectralmoe.hf.upcycling.targets.qwen3_moe import Qwen3Moe

__all__ = ["TARGETS", "Target", "find_target"]

TARGETS: dict[str, Target] = {
    "mixtral": Mixtral(),
    "qwen3_moe": Qwen3Moe(),
    "qwen2_moe": Qwen2Moe(),
    "glm4_moe": Glm4Moe(),
}
"""``model_type`` -> family, in the order in which "auto" tries them."""


def find_target(name: str, dense: Dense, plan: Plan) -> Target:
    """The family called ``name``; with "auto" the first that computes what ``dense`` does.

    Raises:
        UserError: an unknown name; a family that cannot, or none that can.
    """
    if name != "auto" and name not in TARGETS:
        raise one_of("target of upcycle", name, ["auto", *TARGETS])
    tried = TARGETS if name == "auto" else {name: TARGETS[name]}
    refusals = {each: target.refusal(dense, plan) for each, target in tried.items()}
    fitting = [each for each, why in refusals.items() if why is None]
    if not fitting:
        reasons = "; ".join(f"{each}: {why}" for each, why in refusals.items())
        raise UserError(f"this {type(dense.model).__name__} does not fit ({reasons}); {OTHERS}")
    return TARGETS[fitting[0]]
