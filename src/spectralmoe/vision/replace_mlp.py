"""Experts in place of a block's MLP, that start as the MLP itself.

Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", arXiv 2212.05055, here
without noise or capacity: at step 0 the model computes what the dense one did.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError, one_of
from spectralmoe.experts import Experts, FeedForward, ModuleExperts
from spectralmoe.moe import MoE
from spectralmoe.placement import Placement
from spectralmoe.router import Router
from spectralmoe.scorers import StatisticsMemory
from spectralmoe.selectors import Threshold
from spectralmoe.units import Pixel, Token
from spectralmoe.vision.attended import check_attends, put_layer
from spectralmoe.vision.blocks import block_width, choose_blocks
from spectralmoe.vision.branch_spec import BranchSpec
from spectralmoe.vision.mlp_parts import MlpParts, is_convolutional, parts_of
from spectralmoe.vision.random_weights import with_random_weights

__all__ = ["MlpCopies", "OnePixel", "replace_mlp"]

Model = TypeVar("Model", bound=nn.Module)


class OnePixel(nn.Module):
    """A convolutional MLP on (B, D, H, W) as an expert on rows (M, D): each row is an image of one pixel."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x[:, :, None, None])
        return y[:, :, 0, 0]


class MlpCopies:
    """Stands in a description for experts that have the form of the block's own MLP.

    Args:
        router: the router in front of them.
        num_experts: how many copies of the MLP.
        placement, memory: as in ``MoE``.
    """

    def __init__(
        self,
        router: Router,
        num_experts: int,
        placement: Placement | None = None,
        memory: StatisticsMemory | None = None,
    ) -> None:
        self.router, self.num_experts, self.placement, self.memory = router, num_experts, placement, memory

    def layer(self, mlp: nn.Module) -> nn.Module:
        """The layer with E copies of ``mlp``."""
        if is_convolutional(mlp):
            experts = ModuleExperts([OnePixel(copy.deepcopy(mlp)) for _ in range(self.num_experts)])
            return MoE(self.router, experts, placement=self.placement, unit=Pixel(), memory=self.memory)
        experts = ModuleExperts([copy.deepcopy(mlp) for _ in range(self.num_experts)])
        return MoE(self.router, experts, placement=self.placement, memory=self.memory)


def replace_mlp(model: Model, spec: BranchSpec, init: Literal["copy", "random"] = "copy") -> Model:
    """Put experts in place of the ``.mlp`` of the chosen blocks of ``model``, in place; returns ``model``.

    A plain MLP (linear, GELU or ReLU, linear) and one with a SiLU gate (SwiGLU: Llama's, the packed ones of ViTs)
    become a stacked ``FeedForward`` bank of the same hidden width, any other MLP (another gate or activation, inner
    norm, dropout) ``ModuleExperts``. The block's residual path, layer scale and drop path stay. Of ``spec`` the router,
    experts and blocks are used; if it has a ``bank`` of its own, which starts at random, the bottleneck, too. Parts
    that read ``attended`` get the output of the block's attention, in a block of a vision transformer
    (``AttendedBlock``). The new parameters take gradients, also where those of the MLP were frozen. For models of other
    libraries pass the part that holds the blocks: ``replace_mlp(model.encoder, ...)`` for torchvision's ViT,
    ``replace_mlp(model.vit, ...)`` for Hugging Face's, ``replace_mlp(model.model, ...)`` for its language models.

    Args:
        init: "copy": every expert starts as the MLP, so that the model computes the same at step 0. Its router gets no
            gradient from the task until the experts differ. "random": every expert gets new random weights.

    Raises:
        UserError: no blocks, or none such; a block without ``.mlp``, or with experts there; an MLP that mixes tokens;
            with "copy" a router whose weights do not sum to 1, or a bank of its own; a block that cannot give
            ``attended`` to parts that read it.

    >>> from spectralmoe import LinearScorer, TopK
    >>> model = nn.Module()
    >>> model.blocks = nn.ModuleList([nn.Module()])
    >>> model.blocks[0].mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    >>> x = torch.randn(5, 8)
    >>> y = model.blocks[0].mlp(x)
    >>> router = lambda d, e: Router(LinearScorer(d, e), TopK(2, normalize=True))
    >>> model = replace_mlp(model, BranchSpec(router=router, experts=4, blocks="all"))
    >>> torch.allclose(model.blocks[0].mlp(x), y, atol=1e-6)
    True
    """
    if init not in ("copy", "random"):
        raise one_of("init of replace_mlp", init, ["copy", "random"])
    blocks = choose_blocks(model, spec.blocks)
    layers = {path: _make_layer(path, block, spec, init) for path, block in blocks.items()}
    for path, layer in layers.items():
        put_layer(model, f"{path}.mlp", layer)
    return model


def _make_layer(path: str, block: nn.Module, spec: BranchSpec, init: str) -> MoE:
    mlp = getattr(block, "mlp", None)
    if not isinstance(mlp, nn.Module):
        parts = ", ".join(f".{name}" for name, _ in block.named_children()) or "no parts"
        raise UserError(
            f"block {path!r} ({type(block).__name__}) has no .mlp to replace, but {parts}; use add_branches"
        )
    if any(isinstance(module, MoE) for module in mlp.modules()):
        raise UserError(f"block {path!r} has experts in its .mlp already; leave it out of blocks")
    if init == "copy" and spec.bank is not None:
        raise UserError(
            "replace_mlp(init='copy'): experts of their own form are no copies of the MLP; use init='random'"
        )
    dim = block_width(path, block)
    if not _works_on_lone_tokens(mlp, dim):
        raise UserError(
            f"block {path!r}: its .mlp ({type(mlp).__name__}) mixes tokens or takes more than them, so experts cannot "
            "take its place; use add_branches"
        )
    bank = _fresh_bank(mlp, spec, dim) if init == "random" else None
    with torch.random.fork_rng(devices=[], enabled=bank is not None):  # under one seed the same bank for every router
        router = spec.make_router(dim)
    if bank is None:
        if not _sums_to_one(router):
            raise UserError(
                "replace_mlp(init='copy'): the router's weights must sum to 1 for the model to stay as it is; use soft "
                "routing (k = 'soft', Soft()) or normalised top-k with k >= 2 (normalize = true in the router's table, "
                "TopK(2, normalize=True)), or start afresh with init='random'"
            )
        bank = _bank_of_copies(mlp, spec.experts)
    weight = next(mlp.parameters())
    unit = Pixel() if is_convolutional(mlp) else Token()
    layer = MoE(router, bank.requires_grad_(), unit=unit).to(weight.device, weight.dtype).train(mlp.training)
    if "attended" in layer.reads:
        check_attends(path, block, dim)
    return layer


def _sums_to_one(router: Router) -> bool:
    sometimes_none = any(isinstance(s, Threshold) and s.fallback == "none" for s in router.selector.modules())
    return (router.selector.normalize and not sometimes_none) or (router.soft and router.selector.score == "softmax")


def _fresh_bank(mlp: nn.Module, spec: BranchSpec, dim: int) -> Experts:
    """A bank with initial weights: that of the row, or one of the form of ``mlp``."""
    if spec.bank is not None:
        return spec.bank(spec.experts, dim, spec.bottleneck)
    bank = _bank_of_copies(mlp, spec.experts)
    _start_afresh(bank)
    return bank


def _bank_of_copies(mlp: nn.Module, experts: int) -> Experts:
    parts = parts_of(mlp)
    if parts is not None:
        return _stacked(parts, experts)
    copies = [copy.deepcopy(mlp) for _ in range(experts)]
    return ModuleExperts([OnePixel(one) for one in copies] if is_convolutional(mlp) else copies)


@torch.no_grad()
def _stacked(parts: MlpParts, experts: int) -> FeedForward:
    """E copies of an MLP as one bank."""
    width, hidden = parts.down.shape
    bank = FeedForward(experts, width, hidden, activation=parts.activation, bias=parts.up_bias is not None)
    bank = bank.to(parts.up.device, parts.up.dtype)
    for name, parameter in bank.named_parameters():
        parameter.copy_(getattr(parts, name))
    return bank


@torch.no_grad()
def _works_on_lone_tokens(mlp: nn.Module, dim: int) -> bool:
    """Whether an expert gives row by row what ``mlp`` gives for an image of 2 x 2 tokens, under random weights."""
    whole, draw = with_random_weights(mlp)
    whole.eval()
    rows = torch.randn(4, dim, generator=draw)
    image = rows.view(1, 2, 2, dim)
    try:
        y = whole(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if is_convolutional(mlp) else whole(image)
        return torch.allclose(y.reshape(4, dim), _bank_of_copies(whole, 1).expert(rows, 0), rtol=1e-3, atol=1e-3)
    except Exception:  # whatever the MLP's own code says to lone rows, or to a call without its other inputs
        return False


def _start_afresh(bank: Experts) -> None:
    """Initial weights instead of the copied ones."""
    if isinstance(bank, FeedForward):
        bias = bank.up_bias is not None
        fresh = FeedForward(bank.num_experts, bank.dim, bank.width, activation=bank.activation, bias=bias)
        bank.load_state_dict(fresh.state_dict())
    for module in bank.modules():
        if isinstance(reset := getattr(module, "reset_parameters", None), MethodType):
            reset()
