"""Devices, kernels, and the shapes they refuse.

Threads: transformers #46743, #48644; megablocks #155, #168.
"""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from seeds import shifted

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
from spectralmoe.dispatch import DISPATCHES

PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def reference(layer, x):
    """The definition in float64 on the CPU."""
    twin = copy.deepcopy(layer).double().cpu()
    twin.dispatch = "loop"
    with torch.no_grad():
        return twin(x.double().cpu())


def make(width, **options):
    return MoE(Router(LinearScorer(width, 4), TopK(2)), FeedForward(4, width, width + 2, bias=True), **options)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("dispatch", [*DISPATCHES, "auto"])
@pytest.mark.parametrize("width", [16, 18, 7])
def test_transformers_46743_and_megablocks_155_every_dispatch_on_every_device(device, dispatch, width):
    """transformers #46743, megablocks #155: The fast path was called on a CPU that lacked it, or refused rows that are
    no multiple of 16 bytes; another library was only ever run on two kinds of GPU.

    Here every dispatch gives the sum of the definition in every precision and at every width, on the CPU as on CUDA.
    """
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        torch.manual_seed(shifted(0))
        layer = make(width, dispatch=dispatch).to(device, dtype)
        x = torch.randn(30, width, dtype=dtype, device=device, requires_grad=True)
        y = layer(x)
        y.square().mean().backward()
        torch.testing.assert_close(y.double().cpu(), reference(layer, x), rtol=tolerance, atol=tolerance)
        assert x.grad.isfinite().all()


STRIDES = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "a slice of wider rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "an offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view_as(x),
    "one row for all": lambda x: x[:1].expand_as(x),
    "no row": lambda x: x[:0],
}


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("lay", STRIDES.values(), ids=STRIDES)
def test_transformers_48644_any_layout_in_memory(dispatch, lay, close):
    """transformers #48644: Grouped matrix products were handed tensors whose strides they do not take.

    Here tokens may lie in memory as they like.
    """
    layer, x = make(16, dispatch=dispatch), torch.randn(20, 16)
    laid, packed = (tensor.detach().requires_grad_() for tensor in (lay(x), lay(x).contiguous()))
    found = []
    for tokens in (laid, packed):
        layer.zero_grad()
        y = layer(tokens)
        y.sum().backward()
        found.append([y, tokens.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    for one, two in zip(*found, strict=True):
        close(one, two)


def test_transformers_48644_the_gradient_of_a_plain_sum(close):
    """transformers #48644: The kernel refuses a gradient that is one number for all entries, as ``.sum()`` gives it.

    Here a loss on the experts' outputs may be any function of them.
    """
    bank, x, found = FeedForward(4, 16, 24), torch.randn(20, 16), []
    for loss in (torch.Tensor.sum, lambda values: (values * torch.ones_like(values)).sum()):
        bank.zero_grad()
        loss(bank(x, torch.tensor([5, 0, 8, 7]))).backward()
        found.append(bank.up.grad)
    assert found[0].any()
    close(*found)


def test_megablocks_168_no_compiled_extension_and_no_triton():
    """megablocks #168: A new release of Triton broke the sparse path, and the library with it.

    Here nothing but torch is needed to route and to train: it works where Triton cannot be imported at all.
    """
    code = """
import sys
sys.modules["triton"] = None
import torch
from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
layer = MoE(Router(LinearScorer(16, 4), TopK(2)), FeedForward(4, 16, 32))
layer(torch.randn(10, 16)).sum().backward()
print(bool(layer.experts.up.grad.any()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.strip() == "True", done.stderr
