"""Suite ``branch``: an EMoE branch at ViT-B size, alone and in the whole network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.bench.case import Candidate, Case
from spectralmoe.bench.gate import difference
from spectralmoe.bench.settings import Settings
from spectralmoe.errors import UserError, first_line
from spectralmoe.moe import MoE
from spectralmoe.vision import Branch, BranchSpec, add_branches, put_branch
from spectralmoe.vision.blocks import choose_blocks

__all__ = ["cases", "count"]

FORMS = {"the authors' form": ("emoe-faithful", 64), "default form": ("emoe", 2)}
"""A preset, and how much wider a dense adapter is that does the router's arithmetic too."""
FULL, QUICK = (8, 197, 768, 192, 8), (1, 17, 128, 16, 8)
"""Images, tokens, D, bottleneck, E."""
CHECKED = 64  # tokens that go through the plain loop


class DenseBranch(nn.Module):
    """h + alpha * adapter(h), behind the same LayerNorm or none."""

    def __init__(self, dim: int, width: int, norm: bool) -> None:
        super().__init__()
        self.norm, self.alpha = norm, nn.Parameter(torch.ones(()))
        self.up, self.down = nn.Linear(dim, width, bias=False), nn.Linear(width, dim, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        x = F.layer_norm(h, h.shape[-1:]) if self.norm else h
        branched: Tensor = h + self.alpha * self.down(F.gelu(self.up(x)))
        return branched


def count(settings: Settings) -> int:
    """How many cases there will be."""
    return len(FORMS) + 1


def cases(settings: Settings) -> Iterator[Case]:
    """The branch against dense ones; then six of them in a ViT-B of timm's, with a frozen backbone."""
    for form in FORMS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield _alone(form, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield _in_vit(settings)


def _alone(form: str, settings: Settings) -> Case:
    images, tokens, dim, width, experts = QUICK if settings.quick else FULL
    preset, more = FORMS[form]
    spec = BranchSpec.of(preset, bottleneck=width, experts=experts, start="authors")
    branch = Branch(spec.make_moe(dim), norm=spec.norm).to(settings.device)
    h, gradient = (torch.randn(images, tokens, dim).to(settings.device) for _ in range(2))
    check = partial(_against_loop, branch, h[:1, :CHECKED])
    candidates = [Candidate("EMoE branch", partial(_step, branch, h, gradient), "ours", check=check)]
    for wide, note in ((width, "the compute of one expert"), (width + more, "that of expert and router")):
        dense = DenseBranch(dim, wide, spec.norm).to(settings.device)
        candidates.append(Candidate(f"dense, width {wide}", partial(_step, dense, h, gradient), "unlike", note=note))
    name = f"{form}, B{images} S{tokens} D{dim} H{width} E{experts} k1 float32 forward and backward"
    return Case("branch", name, candidates, settings.device)


def _in_vit(settings: Settings) -> Case:
    from spectralmoe.vision.model import VisionMoE

    kind, side, batch = ("vit_tiny_patch16_224", 64, 1) if settings.quick else ("vit_base_patch16_224", 224, 2)
    name = f"{kind}, {side} pixels, six branches, B{batch} float32 forward and backward"
    try:
        plain = VisionMoE(kind, 10, arguments={"img_size": side}).requires_grad_(False)
    except UserError as error:
        return Case("branch", name, [], settings.device, skipped={"timm": first_line(error)})
    ours, dense, spec = copy.deepcopy(plain), copy.deepcopy(plain), BranchSpec.of("emoe", start="authors")
    add_branches(ours.backbone, spec)
    for path, block in choose_blocks(dense.backbone, spec.blocks).items():
        adapter: Any = DenseBranch(plain.backbone.embed_dim, spec.bottleneck, spec.norm)
        put_branch(path, block, adapter)
    for block in choose_blocks(plain.backbone, spec.blocks).values():
        block.requires_grad_()
    images = torch.rand(batch, 3, side, side).to(settings.device)
    gradient = torch.randn(batch, 10).to(settings.device)

    def candidate(
        label: str, net: nn.Module, note: str = "", check: Callable[[], str | None] | None = None
    ) -> Candidate:
        step = partial(_step, net.to(settings.device), images, gradient)
        return Candidate(label, step, "unlike" if check is None else "ours", check=check, note=note)

    candidates = [
        candidate("EMoE branches", ours, check=partial(_output_against_loop, ours, images[:1])),
        candidate("dense branches", dense),
        candidate("no branches", plain, note="the six blocks learn instead"),
    ]
    return Case("branch", name, candidates, settings.device)


def _step(module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
    """Forward and backward; features in front of a branch need a gradient, images do not."""
    module.zero_grad(set_to_none=True)
    x = inputs.detach().requires_grad_(inputs.dim() == 3)
    module(x).backward(gradient)


def _twin(module: nn.Module) -> nn.Module:
    """In float64 with dispatch="loop"."""
    twin = copy.deepcopy(module).double()
    for part in twin.modules():
        if isinstance(part, MoE):
            part.dispatch = "loop"
    return twin


def _against_loop(module: nn.Module, inputs: Tensor) -> str | None:
    """None if output and all gradients agree with the loop in float64; else a description of the difference."""
    results: list[dict[str, Tensor | None]] = []
    for net, x in ((module, inputs.clone()), (_twin(module), inputs.double())):
        net.zero_grad(set_to_none=True)
        y = net(x.requires_grad_())
        y.backward(torch.ones_like(y))
        gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
        results.append({"output": y.detach(), "input": x.grad, **gradients})
    return difference(results[0], {k: v for k, v in results[1].items() if v is not None}, torch.float32)


@torch.no_grad()
def _output_against_loop(module: nn.Module, inputs: Tensor) -> str | None:
    """The output alone: the gradients of a branch are checked where it is alone."""
    return difference({"output": module(inputs)}, {"output": _twin(module)(inputs.double())}, torch.float32)
