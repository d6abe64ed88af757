"""Expert parallelism: a dispatch that sends rows to the devices of their experts and brings the outputs back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from spectralmoe.dispatch import Dispatch
from spectralmoe.dispatch.base import combine, sort_slots, spread
from spectralmoe.errors import UserError
from spectralmoe.experts import Answer, Experts
from spectralmoe.parallel.exchange import Route, exchange, route_rows
from spectralmoe.parallel.plan import Plan, owners, plan_native
from spectralmoe.routing import Routing
from spectralmoe.sharding import is_sharded
from spectralmoe.torch_private import transforming

__all__ = ["ExpertParallel", "Planner"]

Planner = Callable[[list[int], int], Plan]
"""A function (tokens of each expert, P) -> plan with one home an expert, such as ``plan_native``."""


class ExpertParallel(Dispatch):
    r"""Runs each expert on the device that holds it: each of P devices holds E/P consecutive experts.

    ``parallelize_experts`` puts it into a model. In each call the devices share the counts of their rows, and each
    makes the same plan of them. Rows are sent to their experts' devices; with ``LeastLoaded`` the weights of some
    experts are sent, too. The outputs are sent back and added up where their tokens are. Routing and result are those
    of a single process.

    The gradient of an expert is summed over the tokens of all P devices and divided by P. So it is that of the mean of
    the devices' losses, which data parallelism takes for all other parameters.

    Args:
        mesh: a mesh of one dimension, the devices that share the experts.
        planner: makes the plan of each call; all devices must get the same from it. The CPU waits for the counts once a
            call, and once more if the router does not fill every slot.

    Raises:
        UserError: the mesh has several dimensions. In a call: routing is soft, so that every row would go everywhere;
            the plan is of another load, has other homes or replicas; or it runs inside a transform of ``torch.func``.
    """

    of_machine = True

    def __init__(self, mesh: DeviceMesh, planner: Planner = plan_native) -> None:
        if mesh.ndim != 1:
            raise UserError(f"ExpertParallel: the mesh must have one dimension, got {mesh.ndim}; take mesh['ep']")
        self.mesh, self.planner = mesh, planner

    def __deepcopy__(self, memo: object) -> Self:
        return self  # a copy of a model stands on the same devices

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        if routing.soft or transforming():
            what = "a transform of torch.func" if transforming() else "soft routing"
            raise UserError(f"ExpertParallel: {what} would send every row to every expert; choose a few, with TopK(k)")
        slots = sort_slots(routing, experts.num_experts)
        answer, _ = self.answer(spread(x, slots), slots.counts, experts, hidden=False)
        return combine(answer, routing.weights.to(x.dtype), slots)

    def answer(self, rows: Tensor, counts: Tensor, experts: Experts, *, hidden: bool) -> tuple[Answer, Tensor | None]:
        group, rank = self.mesh.get_group(), self.mesh.get_local_rank()
        route, plan = self._route(counts.to(rows.device, non_blocking=True), group, rank)
        came = exchange(rows.index_select(0, route.order), route.sends, route.receives, group)

        def stacks(own: dict[str, Tensor]) -> dict[str, Tensor]:
            return self._with_guests(own, route, plan, group, rank)

        sizes = route.counts if experts.reads_loads(came) else route.counts.to(came.device, non_blocking=True)
        made, inside = experts.on_stacks(came.index_select(0, route.by_expert), sizes, stacks, hidden=hidden)

        def back(values: Tensor) -> Tensor:
            arrived = values.index_select(0, route.by_expert.argsort())
            return exchange(arrived, route.receives, route.sends, group).index_select(0, route.order.argsort())

        gain = None if made.gain is None else back(made.gain)
        said = None if made.said is None else {name: back(values) for name, values in made.said.items()}
        return Answer(back(made.y), gain, said), None if inside is None else back(inside)

    def _route(self, counts: Tensor, group: dist.ProcessGroup, rank: int) -> tuple[Route, Plan]:
        devices = self.mesh.size()
        everyones = counts.new_empty(devices * len(counts))
        dist.all_gather_into_tensor(everyones, counts.contiguous(), group=group)
        loads = everyones.view(devices, -1).cpu()
        load: list[int] = loads.sum(0).tolist()
        plan = self.planner(load, devices)
        if plan.load != load or plan.homes != tuple((home,) for home in owners(len(load), devices)):
            raise UserError(
                "ExpertParallel: the planner's plan is of another load, or holds experts on several devices or on "
                "other ones; here each of the P devices is home of E/P consecutive experts"
            )
        return route_rows(plan, loads, rank, counts.device), plan

    def _with_guests(
        self, shards: dict[str, Tensor], route: Route, plan: Plan, group: dist.ProcessGroup, rank: int
    ) -> dict[str, Tensor]:
        """The stacks of the experts that are computed here: this device's own, then those of others."""
        devices = self.mesh.size()
        own = {name: _Averaged.apply(_local(shard, self.mesh), devices) for name, shard in shards.items()}
        if not plan.copies:
            return own
        each = len(plan.homes) // devices
        sent = sorted((copy.target, copy.expert) for copy in plan.copies if copy.source == rank)
        sends = [sum(target == device for target, _ in sent) for device in range(devices)]
        receives = [sum(e // each == device for e in route.guests) for device in range(devices)]
        chosen = torch.tensor([e - rank * each for _, e in sent], dtype=torch.int64)
        flat = torch.cat([stack.reshape(len(stack), -1) for stack in own.values()], 1)
        chosen = chosen.to(flat.device, non_blocking=True)
        guests = exchange(flat.index_select(0, chosen), sends, receives, group)
        parts = guests.split([stack[0].numel() for stack in own.values()], 1)
        return {
            name: torch.cat([stack, part.to(stack.dtype).view(-1, *stack.shape[1:])])
            for (name, stack), part in zip(own.items(), parts, strict=True)
        }


class _Averaged(torch.autograd.Function):
    """The identity; its gradient is divided by the number of devices that it comes from."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, devices: int) -> Tensor:
        ctx.devices = devices
        return stack.view_as(stack)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.devices, None


def _local(stack: Tensor, mesh: DeviceMesh) -> Tensor:
    """This device's experts."""
    if not is_sharded(stack) or stack.device_mesh != mesh:
        raise UserError(
            "ExpertParallel: the bank is not shared out over this mesh; call parallelize_experts(model, mesh)"
        )
    return stack.to_local()
