"""Put MoE into vision models: branches (adapters) behind blocks, or experts in place of MLPs; read old EMoE weights."""

from spectralmoe.vision.blocks import choose_blocks, model_blocks
from spectralmoe.vision.branch_spec import BranchSpec
from spectralmoe.vision.branches import Branch, add_branches, put_branch
from spectralmoe.vision.emoe_checkpoint import load_emoe_checkpoint
from spectralmoe.vision.patches import patch_experts
from spectralmoe.vision.replace_mlp import replace_mlp

__all__ = [
    "Branch",
    "BranchSpec",
    "add_branches",
    "choose_blocks",
    "load_emoe_checkpoint",
    "model_blocks",
    "patch_experts",
    "put_branch",
    "replace_mlp",
]
