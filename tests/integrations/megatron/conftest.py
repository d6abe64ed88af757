"""Megatron-core in one process on a CPU."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import nullcontext
from unittest.mock import MagicMock

import pytest
import torch
from torch.overrides import TorchFunctionMode


class CpuAsCuda(TorchFunctionMode):
    """What is to be made on a CUDA device is made on the CPU, and its type says CUDA."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.type and len(args) == 1:
            return func(*args, **kwargs).replace("torch.", "torch.cuda.")
        return args[0] if func is torch.Tensor.cuda else func(*args, **kwargs)


@pytest.fixture
def cpu_as_cuda() -> Iterator[None]:
    with CpuAsCuda():
        yield


@pytest.fixture(scope="module")
def megatron_process() -> Iterator[None]:
    """A process group of this process alone, and what Megatron-core asks of CUDA."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer.moe import moe_utils
    from megatron_layers import SCALE

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "current_device", lambda: "cpu")
        patched.setattr(torch.cuda, "synchronize", lambda: None)
        patched.setattr(torch.cuda, "Stream", MagicMock)  # of the dispatcher alltoall
        patched.setattr(torch.cuda, "current_stream", MagicMock)
        patched.setattr(torch.cuda, "stream", nullcontext)
        patched.setattr(moe_utils, "te_general_gemm", None, raising=False)
        torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)  # draws nothing on CUDA
        moe_utils.MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(SCALE))
        yield
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@pytest.fixture
def megatron(megatron_process) -> None:
    """The same, with a fresh tracker of auxiliary losses."""
    from megatron.core.transformer.moe import moe_utils

    moe_utils.get_moe_layer_wise_logging_tracker().clear()
