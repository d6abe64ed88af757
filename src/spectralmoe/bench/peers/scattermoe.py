"""scattermoe: Triton kernels that gather, multiply and scatter at once (Tan et al., arXiv 2403.08245)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.bench.problem import Problem, route
from spectralmoe.bench.subject import Skipped, Subject

__all__ = ["subjects"]


def subjects(problem: Problem) -> Iterator[Subject | Skipped]:
    """Its two fused linear layers behind a plain router."""
    if problem.device.type != "cuda":
        yield Skipped("scattermoe", "runs on a GPU only")
        return
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    sizes = problem.sizes

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Parameter(problem.router)
            self.up, self.down = nn.Parameter(problem.up), nn.Parameter(problem.down)

        def forward(self, x: Tensor) -> Tensor:
            chosen = route(x.float(), self.router, sizes.k)
            place = flatten_sort_count(chosen.indices, num_experts=sizes.e)
            h = parallel_linear(x, self.up.mT, sizes.k, *place, grouped_out=True)
            if problem.activation == "swiglu":
                gate, value = h.chunk(2, -1)
                h = F.silu(gate) * value
            else:
                h = F.gelu(h)
            y: Tensor = parallel_linear(h, self.down.mT, 1, *place, grouped_in=True, gates=chosen.weights.to(x.dtype))
            return y

    layer = Layer()
    weights = {"router": layer.router, "up": layer.up, "down": layer.down}
    yield Subject("scattermoe", layer, layer, lambda: {name: weight.grad for name, weight in weights.items()})
