"""A stand-in for a CUDA device on machines without one: tensors say that they are there, numbers stay on the CPU.

What it is for: code that makes a tensor on the wrong device fails as it would on a device, and every place where the
host would have to wait for the device is written down. Values and gradients are those of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

import spectralmoe.experts  # noqa: F401 (makes its operators known)

__all__ = ["CUDA", "OnDevice", "StandIn", "inside", "on_stand_in", "run_backward"]

CUDA = torch.device("cuda", 0)

aten = torch.ops.aten
READS = {  # operators whose result, or its shape, the host must know; and those whose kernel asks whether it went well
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten._linalg_eigh,
    aten._linalg_svd,
    torch.ops.spectralmoe.grouped_gemm,
    torch.ops.spectralmoe.grouped_outer,
}
LOADS_ON_HOST = {torch.ops.spectralmoe.grouped_gemm, torch.ops.spectralmoe.grouped_outer}
"""Operators of ours that read the loads: nobody waits where these are on the host already."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


class OnDevice(Tensor):
    """A tensor on the stand-in; ``inner`` has its numbers."""

    inner: Tensor
    device = CUDA  # type: ignore[assignment]
    is_cuda = True  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        pass

    def __repr__(self) -> str:
        return f"OnDevice({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _look(func, args, kwargs)
        bare_args, bare_kwargs = tree_map_only(OnDevice, lambda x: x.inner, (args, kwargs))
        result = tree_map_only(Tensor, OnDevice, func(*bare_args, **bare_kwargs))
        return return_and_correct_aliasing(func, args, kwargs, result)


class StandIn(TorchFunctionMode):
    """Inside, ``device="cuda"`` means the stand-in.

    Attributes:
        waits: the operators for which the host waited, in order.
    """

    current: StandIn | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __enter__(self) -> StandIn:
        StandIn.current = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        StandIn.current = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy") and isinstance(args[0], OnDevice):
            self.waits.append(name)
            return getattr(args[0].inner.detach(), name)()
        if name in ("to", "cpu", "cuda") and isinstance(args[0], Tensor):
            return self._moved(func, name, args, kwargs)
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == "cuda":
            kwargs["device"] = "cpu"
            made = func(*args, **kwargs)
            if func in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(made, OnDevice):
                self.waits.append(f"{name}(device=)")
            return made if isinstance(made, OnDevice) else OnDevice(made)
        if name == "new_tensor" and isinstance(args[0], OnDevice):
            self.waits.append(name)
            return OnDevice(args[0].inner.new_tensor(*args[1:], **kwargs))
        if name == "one_hot" and isinstance(args[0], OnDevice):  # torch makes its zeros where C++ sees the tensor
            return OnDevice(func(args[0].inner, *args[1:], **kwargs))
        return func(*args, **kwargs)

    def _moved(self, func: Callable[..., Tensor], name: str, args: Any, kwargs: Any) -> Tensor:
        """``x.to(...)``, ``x.cpu()``, ``x.cuda()``: over to the other side, with gradient, and then the dtype."""
        x, *given = args
        given += [kwargs.get("device"), kwargs.get("other"), kwargs.get("dtype"), name if name != "to" else None]
        places = [each.device if isinstance(each, Tensor) else each for each in given]
        places = [torch.device(each) for each in places if isinstance(each, str | torch.device)]
        if not places:
            return func(*args, **kwargs)
        if (places[0].type == "cuda") != isinstance(x, OnDevice):
            # a copy to a device that does not block is staged by the driver at once
            if places[0].type == "cpu" or not kwargs.get("non_blocking"):
                self.waits.append(f"{name}({places[0].type})")
            x = _Move.apply(x)
        dtypes = [each.dtype if isinstance(each, Tensor) else each for each in given]
        dtypes = [each for each in dtypes if isinstance(each, torch.dtype)]
        return x.to(dtypes[0]) if dtypes else x


class _Move(torch.autograd.Function):
    """To the other side; the gradient goes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.inner.clone() if isinstance(x, OnDevice) else OnDevice(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.inner if isinstance(grad, OnDevice) else OnDevice(grad)


def on_stand_in(module: Any) -> Any:
    """``module`` itself, with its parameters and buffers on the stand-in."""
    moved: dict[int, Tensor] = {}  # what modules share stays shared
    for part in module.modules():
        for name, x in part._parameters.items():
            if x is not None:
                new = torch.nn.Parameter(OnDevice(x.detach().clone()), x.requires_grad)
                part._parameters[name] = moved.setdefault(id(x), new)
        for name, x in part._buffers.items():
            if x is not None:
                part._buffers[name] = moved.setdefault(id(x), OnDevice(x.clone()))
    return module


def run_backward(loss: Tensor) -> None:
    """``loss.backward()``, in which the stand-in sees functions too: those of a forward that is done again."""
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def inside(x: Tensor) -> Tensor:
    """The numbers of ``x``, wherever it is."""
    return x.inner if isinstance(x, OnDevice) else x


def _look(func: Any, args: Any, kwargs: Any) -> None:
    """Note a wait; refuse operands on two devices."""
    packet, flat = func.overloadpacket, tree_flatten((args, kwargs))[0]
    tensors = [x for x in flat if isinstance(x, Tensor)]
    strangers = [x for x in tensors if not isinstance(x, OnDevice) and (x.dim() or packet in (aten.cat, aten.stack))]
    waits = packet in READS
    if packet is aten.cat and torch._C._current_graph_task_id() != -1:
        strangers = []  # zeros for a part without gradient, which autograd makes where C++ sees the tensor
    elif packet is aten.scatter and torch._C._current_graph_task_id() != -1:
        strangers = [x for x in strangers if x is not args[0]]  # such zeros too, of a maximum in torch 2.11
    elif packet in LOADS_ON_HOST:
        waits, strangers = isinstance(args[2], OnDevice), [x for x in strangers if x is not args[2]]
    elif packet in INDEXING:
        indices = [i for i in args[1] if i is not None]
        waits = any(i.dtype in (torch.bool, torch.uint8) or not isinstance(i, OnDevice) for i in indices)
        strangers = [x for x in strangers if all(x is not i for i in indices)]
    elif packet is aten.repeat_interleave:
        waits = kwargs.get("output_size") is None
    elif packet is aten.copy_ and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
        waits, strangers = True, []
    if strangers:
        raise RuntimeError(f"{func}: expected all tensors on one device, but found cuda:0 and cpu")
    if waits and StandIn.current is not None:
        StandIn.current.waits.append(str(func))
