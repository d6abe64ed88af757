"""Old EMoE weights: the layout that the authors publish, read into faithful branches.

Cheng et al., "Eigenbasis-Guided Routing for Mixture-of-Experts" (EMoE), arXiv 2601.12137. Written from the names and
shapes of the tensors: ``vit.*`` and, for block i, ``branches.<i>.alpha``, ``.router.basis.Q`` (D, R), ``.router.gamma``
(R,), ``.router.masks`` (E, R), ``.router.bias`` (E,), ``.experts.<e>.down.weight`` (H, D), ``.up.weight`` (D, H).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from spectralmoe.checkpoints.weights_file import read_tensors, state_dict_of, without_prefix
from spectralmoe.errors import refuse_differences
from spectralmoe.layers import below
from spectralmoe.rows import K
from spectralmoe.vision.blocks import block_width, choose_blocks, model_blocks
from spectralmoe.vision.branch_spec import BranchSpec
from spectralmoe.vision.branches import add_branches

__all__ = ["load_emoe_checkpoint"]

Model = TypeVar("Model", bound=nn.Module)

_UNUSED = ("router.basis.P", "router.basis.log_lambda")  # take no part in what the model computes


def load_emoe_checkpoint(
    vit: Model,
    source: str | Path | Mapping[str, Tensor],
    *,
    experts: int = 8,
    rank: int = 128,
    bottleneck: int = 192,
    blocks: str | Sequence[int] = "last6",
    k: K = 1,
    tau: float = 1.0,
) -> Model:
    """Give ``vit`` the backbone and the branches of an EMoE checkpoint, in place; returns ``vit``.

    The file does not hold k and tau: take them from where the checkpoint came from (the defaults are those of the
    authors' training script). ``vit(images)`` then gives the logits of the authors' model in evaluation mode. The
    tensors ``P`` and ``log_lambda`` of each branch are not read: the output does not depend on them.

    Args:
        vit: a timm ViT built with the arguments of the checkpoint's backbone.
        source: a state dict, alone or under a key of ``WRAPPERS``, or the path of a file that holds one
            (``read_tensors``: never run as code).
        k: experts a token, or "soft": the authors' modes "top1", "top2" and "soft".
        blocks: "all", "lastN", "1,3" or a list of indices.

    Raises:
        UserError: a file that is missing or holds no weights; tensors that are missing, extra or of another shape
            (with the list); what ``add_branches`` refuses. ``vit`` is then unchanged.
    """
    row = {"preset": "emoe-faithful", "rank": rank, "temperature": tau}
    spec = BranchSpec.of(row, k=k, experts=experts, bottleneck=bottleneck, blocks=blocks)
    state = state_dict_of(source, "the source") if isinstance(source, Mapping) else read_tensors(Path(source))
    order, chosen = list(model_blocks(vit)), choose_blocks(vit, blocks)
    prefixes = {path: f"branches.{order.index(path)}." for path in chosen}
    wanted = {f"vit.{name}": value.shape for name, value in vit.state_dict().items() if ".moe_branch." not in name}
    for path, prefix in prefixes.items():
        shapes = _branch_shapes(block_width(path, chosen[path]), rank, spec)
        wanted |= {prefix + name: shape for name, shape in shapes.items()}
    tensors = {name: value for name, value in without_prefix(state, wanted).items() if not name.endswith(_UNUSED)}
    given = {name: value.shape for name, value in tensors.items()}
    refuse_differences("the EMoE checkpoint does not fit the model and settings", wanted, given)
    add_branches(vit, spec)
    vit.load_state_dict(below("vit.", tensors), strict=False)  # the branches come next
    for path, prefix in prefixes.items():
        vit.get_submodule(f"{path}.moe_branch").load_state_dict(_to_ours(below(prefix, tensors), experts))
    return vit


def _branch_shapes(dim: int, rank: int, spec: BranchSpec) -> dict[str, torch.Size]:
    """Names and shapes of one branch in the authors' layout."""
    hidden = spec.bottleneck
    router = {"basis.Q": (dim, rank), "gamma": (rank,), "masks": (spec.experts, rank), "bias": (spec.experts,)}
    shapes: dict[str, tuple[int, ...]] = {"alpha": (), **{f"router.{name}": shape for name, shape in router.items()}}
    for e in range(spec.experts):
        shapes |= {f"experts.{e}.down.weight": (hidden, dim), f"experts.{e}.up.weight": (dim, hidden)}
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def _to_ours(theirs: dict[str, Tensor], experts: int) -> dict[str, Tensor]:
    """The state dict of a ``Branch`` from one in the authors' layout: their "down" goes into the bottleneck."""
    return {
        "alpha": theirs["alpha"],
        "moe.router.scorer.basis": theirs["router.basis.Q"],
        "moe.router.scorer.gain": theirs["router.gamma"],
        "moe.router.scorer.mask_logits": theirs["router.masks"].T,
        "moe.router.scorer.bias": theirs["router.bias"],
        "moe.experts.up": torch.stack([theirs[f"experts.{e}.down.weight"] for e in range(experts)]),
        "moe.experts.down": torch.stack([theirs[f"experts.{e}.up.weight"] for e in range(experts)]),
    }
