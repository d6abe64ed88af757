"""What a comparison measures of a trained network besides its scores: routing choices, and cost of a sample."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from spectralmoe.diagnostics.entropy import token_entropy
from spectralmoe.diagnostics.evaluation import run_over
from spectralmoe.diagnostics.measure import mean_of
from spectralmoe.diagnostics.similarity import centred_cosines, cosine_matrix, expert_outputs, mean_offdiagonal
from spectralmoe.diagnostics.stability import noise_flips
from spectralmoe.diagnostics.watch import watch
from spectralmoe.experts import Experts
from spectralmoe.layers import moe_layers
from spectralmoe.moe import MoE
from spectralmoe.recorder import record
from spectralmoe.routing import Routing

__all__ = ["active_flops", "active_parameters", "choices"]

_NUMBERS, _THROUGH_ALL = 2**12, 256
"""Numbers of the inputs that are looked at by default; tokens of each layer that go through every expert."""


@torch.no_grad()
def choices(
    model: nn.Module, inputs: Tensor, beside: Mapping[str, Tensor] | None = None, *, samples: int | None = None
) -> dict[str, float | None]:
    """How firm the choices of the routers are and how alike the experts, mean over layers; None where too few tokens
    say anything. All but the entropy are None where router and experts read different things, and the flips where a
    router reads side information or its tokens compete.

    Args:
        inputs: (N, ...), of which some are looked at, spread evenly.
        beside: rows (N, ...) of what the model takes by keyword, such as a severity.
        samples: how many are looked at; None: about 4,000 numbers of them. A share p of n tokens is known to
            1.96 sqrt(p (1 - p) / n) at best, since tokens of one sample are alike: 11 points at p = 1/2 and n = 80, 3
            points at n = 1,000.
    """
    most = max(1, min(len(inputs), _NUMBERS // inputs[:1].numel() if samples is None else samples))
    chosen = torch.linspace(0, len(inputs) - 1, most).long()
    with watch(model) as seen:
        run_over(model, inputs[chosen], **{name: values[chosen] for name, values in (beside or {}).items()})
        calls = seen.drain()
    keys = ("entropy", "output_overlap", "output_centred", "noise_flips")
    measured: dict[str, list[float | None]] = {key: [] for key in keys}
    for call in calls:
        measured["entropy"].append(token_entropy(call.routing).value)
        if not len(call.tokens):  # the experts read something else than the router, such as whole maps
            continue
        tokens = call.tokens[torch.linspace(0, len(call.tokens) - 1, _THROUGH_ALL).long().unique()]
        outputs = expert_outputs(call.layer, tokens).flatten(2)
        measured["output_overlap"].append(mean_offdiagonal(cosine_matrix(outputs)).value)
        measured["output_centred"].append(mean_offdiagonal(centred_cosines(outputs)).value)
        measured["noise_flips"].append(noise_flips(call.layer, call.tokens).value if call.layer.reroutes else None)
    return {key: mean_of([value for value in values if value is not None]) for key, values in measured.items()}


Loads = Mapping[str, Tensor]
"""Layer name -> share of the load of each expert (E,)."""


def active_parameters(model: nn.Module, sample: Tensor, loads: Loads | None = None) -> int:
    """Parameters that a token meets: those outside the banks, of each bank what its experts share, and of their own as
    much as the sample (1, ...) has experts a token.

    Args:
        loads: over many samples: experts of unequal size count by them; None: by what the sample chose. The experts of
            a bank that does not say what is whose have even parts of it.
    """
    counted = copy.deepcopy(model).eval()
    layers = [layer for layer in moe_layers(counted).values() if isinstance(layer, MoE)]
    banks = {id(p) for layer in layers for p in layer.experts.parameters()}
    total = float(sum(p.numel() for p in counted.parameters() if id(p) not in banks))
    with torch.no_grad(), record(counted) as tape:
        counted(sample.to(next(counted.parameters()).device))
    for item in tape:
        if isinstance(item.layer, MoE):
            bank = item.layer.experts
            counts = item.routing.counts()[: bank.num_experts]
            size = sum(p.numel() for p in bank.parameters())
            parts = [bank.expert_parameters(e).values() for e in range(bank.num_experts)]
            own = [float(sum(p.numel() for p in each)) for each in parts]
            if not 0 < sum(own) <= size:
                own = [size / bank.num_experts] * bank.num_experts
            slots = _spread(counts, own, loads, item.name).tolist()
            used = sum(n * count for n, count in zip(own, slots, strict=True)) / len(item.routing.logits)
            total += size - sum(own) + used
    return round(total)


def active_flops(model: nn.Module, sample: Tensor, loads: Loads | None = None) -> int:
    """Floating-point operations of one forward for one sample (1, ...): only the experts that it uses count.

    What runs outside the banks is counted as it runs, the chosen experts by ``Experts.costs``, the sum of all by
    ``Experts.mix_cost``.

    Args:
        loads: over many samples: experts of unequal cost count by them; None: by what the sample chose.
    """
    counted, total = copy.deepcopy(model).cpu().eval(), 0.0
    with torch.no_grad(), record(counted, keep=("input", "output")) as tape:
        counted(sample)
    for item in tape:
        if isinstance(item.layer, MoE) and item.kept is not None:
            bank, shape = item.layer.experts, item.input.shape[1:]
            if item.routing.soft:
                total += len(item.routing.logits) * bank.mix_cost(shape)
            else:
                costs = bank.costs(shape)
                total += float(_spread(item.kept.slots.counts, costs.tolist(), loads, item.name).to(costs) @ costs)
            item.layer.dispatch = partial(_nothing, item.output.shape[1:])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted(sample)
    return int(total) + int(counter.get_total_flops())


def _spread(counts: Tensor, values: Sequence[float], loads: Loads | None, name: str) -> Tensor:
    """The slots (E,) of a sample; where ``values`` of the experts differ, as many in the proportions of ``loads``."""
    load = None if loads is None else loads.get(name)
    if load is None or len(load) != len(counts) or len(set(values)) == 1:
        return counts
    return counts.sum() * load.to(counts.device, torch.float64)


def _nothing(shape: Sequence[int], x: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """A dispatch without experts, which give rows of ``shape``."""
    return x.new_zeros(len(x), *shape)
