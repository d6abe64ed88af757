"""Put MoE into vision models of others: branches, experts in place of an MLP, old EMoE weights."""

from spectralmoe.surgery.blocks import choose_blocks, model_blocks
from spectralmoe.surgery.branches import Branch, add_branches, put_branch
from spectralmoe.surgery.emoe_checkpoint import load_emoe_checkpoint
from spectralmoe.surgery.hf_watch import watch_transformers
from spectralmoe.surgery.replace_mlp import ChannelsFirst, replace_mlp
from spectralmoe.surgery.spec import BranchSpec, EMoESpec

__all__ = [
    "Branch",
    "BranchSpec",
    "ChannelsFirst",
    "EMoESpec",
    "add_branches",
    "choose_blocks",
    "load_emoe_checkpoint",
    "model_blocks",
    "put_branch",
    "replace_mlp",
    "watch_transformers",
]
