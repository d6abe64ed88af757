"""A dense language model of transformers becomes one of its stock MoE models."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.hf.assemble import assemble
from spectralmoe.hf.load import import_transformers
from spectralmoe.hf.upcycling.calibration import Calibration, Reads, read_calibration
from spectralmoe.hf.upcycling.dense import Dense, Mlp, read_dense
from spectralmoe.hf.upcycling.methods import METHODS
from spectralmoe.hf.upcycling.plan import Plan, make_plan, router_notes
from spectralmoe.hf.upcycling.starts import STARTS
from spectralmoe.hf.upcycling.targets import Target, find_target

__all__ = ["upcycle"]


def upcycle(
    model: Any,
    *,
    target: str = "auto",
    experts: int,
    k: int,
    method: str = "copy",
    ratio: float | None = None,
    granularity: int | None = None,
    layers: str | Sequence[int] = "all",
    router: str = "random",
    scale: float | None = None,
    calibration: Calibration | None = None,
    seed: int = 0,
) -> Any:
    r"""Make a stock MoE model of a dense Llama, Mistral, Qwen2 or Qwen3.

    Every chosen layer computes :math:`y = \sum_{e \in \mathrm{top}_k} w_e(x) f_e(x)` with weights that sum to 1, where
    all :math:`f_e` start from the layer's MLP. So with ``method="copy"`` and ``"virtual"`` the model computes at step 0
    what the dense one does. Everything else is copied; the dense model stays as it is. The result is an ordinary model
    of transformers: ``save_pretrained`` writes a folder that plain ``from_pretrained`` and other engines read.

    In 16 bits two copies may tie in a router's logits, and with "virtual" a token then gets shards of both.

    Exact copies ("copy") give the router no gradient from the task until training has moved them apart; with "drop",
    "noise" and "virtual" experts differ, so the router gets one from the start. With k = 1 the only weight is always 1
    and the router gets no gradient by any method.

    Memory: the dense model, the result, and one expert while it is made; no tensor of the result is made twice.

    Args:
        model: the causal language model.
        target: a name in ``TARGETS``; "auto": the first of "mixtral", "qwen3_moe", "qwen2_moe", "glm4_moe" that fits.
            With some layers dense, "qwen3_moe" and "qwen2_moe" take any, "glm4_moe" the first ones.
        experts, k: E, and experts a token.
        method: a name in ``METHODS`` (papers and equations there). "copy"; "drop": redraw a share of the hidden units;
            "noise": add Gaussian noise; "virtual": experts are shards of copies.
        ratio: with "drop" the share (0.5), with "noise" the standard deviation relative to each matrix's (0.1).
        granularity: shards G of a copy with "virtual"; by default k, so that a token costs what it did.
        layers: "all", "lastN", or numbers of the layers that get experts, negative ones from the end.
        router: how the router's rows start, a name in ``STARTS``: "random"; "prompts": towards the mean of what the
            MLP reads in each set of ``calibration``; "principal": along the principal directions of what it reads.
        scale: size of a row's entries; by default the standard deviation of initial weights that the config names.
        calibration: sets of text, each a batch or a list of batches: ids (B, S), or a table of the model's arguments,
            as ``encode`` makes them. For "prompts" one set for each expert, in their order (with "virtual" for each
            copy).
        seed: the experts' draws do not depend on the router's start, nor the other way round.

    Returns:
        A ``MixtralForCausalLM``, ``Qwen3MoeForCausalLM``, ``Qwen2MoeForCausalLM`` or ``Glm4MoeForCausalLM``, with the
        precision, device and mode of ``model``.

    Raises:
        UserError: transformers is not installed; a model of another family, with experts, or quantised; no target that
            fits; an argument out of range; experts that do not divide into groups; calibration that is missing or
            does not fit.

    Warns:
        UserWarning: the router would get no gradient from the task.

    >>> import pytest
    >>> transformers = pytest.importorskip("transformers")
    >>> sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    >>> dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    >>> moe = upcycle(dense, experts=4, k=2, method="drop")
    >>> type(moe).__name__, tuple(moe.model.layers[0].mlp.experts.down_proj.shape)
    ('MixtralForCausalLM', (4, 16, 24))
    """
    dense = read_dense(model)
    plan = make_plan(
        dense,
        experts=experts,
        k=k,
        method=method,
        ratio=ratio,
        granularity=granularity,
        layers=layers,
        router=router,
        scale=scale,
        seed=seed,
    )
    family = find_target(target, dense, plan)
    rows = _rows(dense, plan, calibration)
    tf = import_transformers()
    config = getattr(tf, family.config)(**{**dense.common(), **family.settings(dense, plan)})
    tensors = {**_kept(dense, plan), **dict(_made(dense, plan, family, rows))}
    moe = assemble(tf.AutoModelForCausalLM, config, tensors, attention=model.config._attn_implementation)
    moe.generation_config = copy.deepcopy(model.generation_config)
    for note in router_notes(method, k):
        warnings.warn(note, stacklevel=2)
    return moe.train(model.training)


def _rows(dense: Dense, plan: Plan, calibration: Calibration | None) -> dict[int, Tensor]:
    """The router's rows (E, D) of every layer; shards of one copy have the same."""
    draw = torch.Generator().manual_seed(2 * plan.seed)
    reads: dict[int, Reads] = {}
    if calibration is not None:
        if plan.router == "random":
            raise UserError("upcycle: router 'random' reads no calibration; 'prompts' and 'principal' do")
        reads = read_calibration(dense, calibration, plan.layers, products=plan.router == "principal")
    start = STARTS[plan.router]
    rows = {layer: start(plan.groups, dense.width, reads.get(layer), draw) for layer in plan.layers}
    return {layer: (plan.scale * value).repeat_interleave(plan.granularity, 0) for layer, value in rows.items()}


def _kept(dense: Dense, plan: Plan) -> dict[str, Tensor]:
    """Copies of the tensors outside of the layers that get experts, tied ones of one piece of memory."""
    replaced = tuple(f"model.layers.{layer}.mlp." for layer in plan.layers)
    copies: dict[tuple[int, torch.Size], Tensor] = {}
    kept = {}
    for name, value in dense.model.state_dict().items():
        if not name.startswith(replaced):
            place = (value.data_ptr(), value.shape)
            kept[name] = copies[place] if place in copies else copies.setdefault(place, value.clone())
    return kept


@torch.no_grad()
def _made(dense: Dense, plan: Plan, family: Target, rows: dict[int, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the layers that get experts."""
    draw = torch.Generator().manual_seed(2 * plan.seed + 1)
    for layer in plan.layers:
        mlp, prefix = dense.mlp(layer), f"model.layers.{layer}.mlp"
        first, gate_up, down = _stacked(mlp, plan, draw)
        yield f"{prefix}.experts.gate_up_proj", gate_up
        yield f"{prefix}.experts.down_proj", down
        yield f"{prefix}.gate.weight", rows[layer].to(mlp.gate.device, mlp.gate.dtype)
        for name, value in family.more(plan, first).items():
            yield f"{prefix}.{name}", value


def _stacked(mlp: Mlp, plan: Plan, draw: torch.Generator) -> tuple[Mlp, Tensor, Tensor]:
    """Expert 0, and of all experts gate and up (E, 2F, D) and down (E, D, F)."""
    method, (hidden, width) = METHODS[plan.method], mlp.gate.shape
    hidden, number = hidden // plan.granularity, plan.granularity if method.splits else plan.ratio
    gate_up, down = mlp.gate.new_empty(plan.experts, 2, hidden, width), mlp.down.new_empty(plan.experts, width, hidden)
    for e in range(plan.experts):
        gate_up[e, 0], gate_up[e, 1], down[e] = method.expert(mlp, e, number, draw)
    return Mlp(gate_up[0, 0], gate_up[0, 1], down[0]), gate_up.flatten(1, 2), down
