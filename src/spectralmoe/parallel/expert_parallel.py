"""Dispatch over several devices: rows travel to the experts that a plan gives them to, and their outputs come back."""

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
from spectralmoe.experts.base import Answer, Experts
from spectralmoe.parallel.exchange import Route, exchange, route_rows
from spectralmoe.parallel.plan import Plan, owners, plan_native
from spectralmoe.routing import Routing
from spectralmoe.sharding import is_sharded
from spectralmoe.torch_private import transforming

__all__ = ["ExpertParallel", "Planner"]

Planner = Callable[[list[int], int], Plan]
"""(tokens of each expert, P) -> a plan in which each expert has one home: ``plan_native``, ``LeastLoaded()``."""


class ExpertParallel(Dispatch):
    r"""Each of the P devices of a mesh holds E/P consecutive experts; the rows of all devices travel to them.

    Every device counts its rows; from the counts of all, all find one plan; rows travel, and with them the weights of
    experts that the plan computes away from home (``LeastLoaded``); outputs come back, and are weighted and added up
    where their tokens are. The routing and the result are those of one process.

    Of the gradients of an expert, which come from the tokens of all P devices, their sum over P is left: that of the
    mean of the devices' losses, as data parallelism takes it for everything else.

    Args:
        mesh: one-dimensional; the devices that share the experts.
        planner: the plan of each call; every device must find the same. The host waits for the counts once a call, and
            once more for its own rows where the router does not fill every slot.

    Raises:
        UserError: in a call: soft routing, which would send every row everywhere; inside a transform of ``torch.func``;
            a plan of another load, or with other homes.

    ``spectralmoe.parallel.parallelize_experts`` puts it into a model.
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
