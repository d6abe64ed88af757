"""The limit is the arithmetic of the layer: the same numbers as autograd, the same count of operations."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from spectralmoe.bench.limit import IdealLayer, matmul_rate
from spectralmoe.bench.problem import Problem, Sizes

CPU = torch.device("cpu")


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("how", ["bmm", "mm"])
@pytest.mark.parametrize("sizes", [Sizes(32, 8, 16, 4, 2), Sizes(3, 8, 16, 16, 2), Sizes(33, 8, 16, 4, 1)])
def test_forward_and_backward_are_those_of_autograd(activation, how, sizes):
    problem = Problem(sizes, activation, torch.float64, CPU)
    limit = IdealLayer(problem, how)
    x, up, down = (t.clone().requires_grad_() for t in limit.operands())
    h = torch.einsum("end,ehd->enh", x, up)
    a = F.gelu(h) if activation == "gelu" else F.silu(h[..., : sizes.h]) * h[..., sizes.h :]
    y = torch.einsum("enh,edh->end", a, down)
    y.backward(limit.gradient)
    for found, right in zip(limit.forward_and_backward(), (y, x.grad, up.grad, down.grad), strict=True):
        torch.testing.assert_close(found, right)
    torch.testing.assert_close(limit.forward(), y)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("form", ["forward", "forward and backward"])
def test_operations_are_counted(activation, form):
    problem = Problem(Sizes(64, 8, 16, 4, 2), activation, torch.float32, CPU)  # 32 rows an expert
    limit = IdealLayer(problem, "bmm")
    with FlopCounterMode(display=False) as counter:
        limit.forward() if form == "forward" else limit.forward_and_backward()
    assert counter.get_total_flops() == problem.flops(form)
    rate = matmul_rate(torch.float32, CPU, 32)
    with FlopCounterMode(display=False) as counter:
        rate.work()
    assert counter.get_total_flops() == rate.flops


def test_few_tokens_touch_only_the_experts_that_they_can_choose():
    problem = Problem(Sizes(3, 8, 16, 16, 2), "swiglu", torch.float32, CPU)
    x, up, down = IdealLayer(problem, "mm").operands()
    assert x.shape == (6, 1, 8)
    assert len(up) == len(down) == 6
