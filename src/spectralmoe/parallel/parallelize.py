"""Functions that put expert parallelism into a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from spectralmoe.errors import UserError
from spectralmoe.experts.base import Experts
from spectralmoe.layers import moe_layers
from spectralmoe.moe import MoE
from spectralmoe.parallel.expert_parallel import ExpertParallel, Planner
from spectralmoe.parallel.plan import owners, plan_native
from spectralmoe.ranks import RankExperts
from spectralmoe.scorers import Scorer
from spectralmoe.sharding import beside, full, is_sharded

__all__ = ["clip_gradients", "expert_parameters", "parallelize_experts", "shard_experts"]


def parallelize_experts(model: nn.Module, mesh: DeviceMesh, *, ep: str = "ep", planner: Planner | None = None) -> None:
    """Distribute the experts of every MoE layer of ``model`` over a dimension of a mesh, in place.

    The experts' stacked weights become DTensors, split on the expert dimension: device p keeps E/P consecutive experts.
    The layer's dispatch becomes ``ExpertParallel``. Before the call every device must hold the same model. Routers,
    shared experts and all else stay whole on every device; data parallelism averages their gradients, without the
    experts'::

        mesh = init_device_mesh("cuda", (world,), mesh_dim_names=("ep",))
        parallelize_experts(model, mesh)
        fully_shard(model, mesh=mesh, ignored_params=expert_parameters(model))

    ``RankExperts`` layers stay whole, too. ``Capacity`` and ``ExpertChoice`` count the tokens of each device by itself.
    On a mesh of two dimensions ``shard_experts`` shards the experts over the other one.

    Make the optimizer afterwards, because the parameters are new tensors.

    Args:
        mesh: a mesh with a dimension called ``ep``.
        ep: the name of that dimension.
        planner: makes the plan of each call; None computes every expert where it is held (``plan_native``).

    Raises:
        UserError: the mesh has no such dimension; the number of devices does not divide E; a bank has tensors that are
            no stacks of experts, or are sharded already; a scorer reads the experts; a layer routes softly or is no
            ``MoE``; or there are ``RankExperts`` alone. Nothing is changed then.
    """
    _find_dimension("parallelize_experts", mesh, ep)
    part = mesh[ep]
    layers = {name: layer for name, layer in moe_layers(model).items() if not isinstance(layer, RankExperts)}
    if not layers:
        raise UserError("parallelize_experts: the model has mixtures of ranks alone, which every device computes whole")
    for name, layer in layers.items():
        _check(name, layer, part.size())
    shared: dict[Tensor, nn.Parameter] = {}
    for layer in layers.values():
        assert isinstance(layer, MoE)
        _share_out(layer.experts, part, shared)
        layer.dispatch = ExpertParallel(part, planner or plan_native)


def expert_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of distributed experts, which data parallelism must leave alone."""
    return {parameter for layer in _shared_out(model) for parameter in layer.experts.parameters()}


def shard_experts(model: nn.Module, mesh: DeviceMesh, *, dp: str = "efsdp", **options: Any) -> None:
    """Shard the experts that ``parallelize_experts`` distributed over another dimension of the mesh, by FSDP2.

    All other parameters are sharded over all devices afterwards::

        mesh = init_device_mesh("cuda", (world // 4, 4), mesh_dim_names=("efsdp", "ep"))
        parallelize_experts(model, mesh)
        shard_experts(model, mesh)
        fully_shard(model, mesh=mesh["efsdp", "ep"]._flatten("all"))

    Args:
        dp: the name of that dimension.
        options: options of ``torch.distributed.fsdp.fully_shard``.

    Raises:
        UserError: the mesh has no such dimension; no experts of the model are distributed.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    _find_dimension("shard_experts", mesh, dp)
    layers = _shared_out(model)
    if not layers:
        raise UserError("shard_experts: no experts of the model are shared out; call parallelize_experts before")
    for layer in layers:
        fully_shard(layer.experts, mesh=mesh[dp], **options)
        register_fsdp_forward_method(layer.experts, "on_stacks")


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    r"""Scale gradients so that their joint norm is at most ``max_norm``; return the norm that they had.

    It does what ``torch.nn.utils.clip_grad_norm_`` does, which refuses parameters of different meshes:
    :math:`\|g\|^2` is summed over the shards of each mesh, then over the meshes, in float32 or wider. Every device must
    call it.

    Raises:
        UserError: ``max_norm`` is below 0.
    """
    if not max_norm >= 0:
        raise UserError(f"clip_gradients: max_norm must be 0 or more, got {max_norm}")
    grads = [p.grad for p in parameters if p.grad is not None]
    wide = [torch.promote_types(grad.dtype, torch.float32) for grad in grads]
    norms = [torch.linalg.vector_norm(grad, dtype=dtype) for grad, dtype in zip(grads, wide, strict=True)]
    whole = [full(norm.square()) for norm in norms]
    norm = torch.stack(whole).sum().sqrt() if whole else torch.zeros(())
    scale = (max_norm / (norm + 1e-6)).clamp_max(1)
    for grad in grads:
        grad.mul_(beside(scale.to(grad.device), grad))
    return norm


def _find_dimension(owner: str, mesh: DeviceMesh, name: str) -> None:
    names = mesh.mesh_dim_names or ()
    if name not in names:
        raise UserError(f"{owner}: the mesh has no dimension {name!r}, but {', '.join(names) or 'no names'}")


def _shared_out(model: nn.Module) -> list[MoE]:
    """The layers whose experts ``parallelize_experts`` shared out."""
    layers = (layer for layer in moe_layers(model).values() if isinstance(layer, MoE))
    return [layer for layer in layers if isinstance(layer.dispatch, ExpertParallel)]


def _check(name: str, layer: object, devices: int) -> None:
    if not isinstance(layer, MoE):
        raise UserError(f"parallelize_experts: {name!r} is a {type(layer).__name__}, not an MoE layer of this library")
    bank = layer.experts
    if layer.router.soft:
        raise UserError(
            f"parallelize_experts: {name!r} routes softly, so every row would go to every device; use TopK(k)"
        )
    scorer = layer.router.scorer
    if type(scorer).bind_experts is not Scorer.bind_experts:
        raise UserError(
            f"parallelize_experts: {type(scorer).__name__} of {name!r} reads all experts, and no device has them all"
        )
    owners(bank.num_experts, devices)
    owned = bank.expert_parameters(0)  # a factor that all experts share may be E rows long by chance
    for title, stack in (*bank.named_parameters(), *bank.named_buffers()):
        if is_sharded(stack):
            raise UserError(
                f"parallelize_experts: {title!r} of {name!r} is sharded already; share the experts out once, and "
                "before FSDP2"
            )
        is_stack = stack.dim() > 0 and len(stack) == bank.num_experts
        if not is_stack or (isinstance(stack, nn.Parameter) and title not in owned):
            raise UserError(
                f"parallelize_experts: {title!r} of the {type(bank).__name__} of {name!r} is no stack of "
                f"E={bank.num_experts} experts, so it cannot be shared out"
            )


def _share_out(bank: Experts, mesh: DeviceMesh, shared: dict[Tensor, nn.Parameter]) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    for module in bank.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in shared:
                stack = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
                shared[parameter] = nn.Parameter(stack, parameter.requires_grad)
            setattr(module, name, shared[parameter])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, distribute_tensor(buffer, mesh, [Shard(0)]))
