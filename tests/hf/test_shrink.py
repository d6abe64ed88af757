"""Smaller Hugging Face models: plain transformers loads them, and they compute what masked routers would."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from families import FAMILIES, MORE, SIZES, batch, build
from seeds import generator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from spectralmoe.hf import merge_experts, prune_experts, swap_routers
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.shrinking.calibration import Calibration
from spectralmoe.hf.structure import correction_bias
from spectralmoe.hf.watch import watch_transformers

transformers = pytest.importorskip("transformers")

family = pytest.mark.parametrize("family", [*FAMILIES, *MORE])


@functools.cache
def model_of(family: str) -> Any:
    """The tiny model, not to be changed. DeepSeek's groups hold four experts here, so that two can go."""
    return build(family, **({"n_group": 2, "topk_group": 1} if family == "deepseek_v3" else {}))


def some_experts(layers: list[HFLayer]) -> dict[str, list[int]]:
    """Half of each half of the experts of every layer, or three of four, drawn."""
    kept = {}
    for place, layer in enumerate(layers):
        half = layer.num_experts // 2
        orders = [torch.randperm(half, generator=generator(2 * place + part)).tolist() for part in range(2)]
        kept[layer.name] = sorted([*orders[0][:2], *(half + e for e in orders[1][: 2 if half > 2 else 1])])
    return kept


def matrix_of(layer: HFLayer) -> Tensor:
    return next(value for value in layer.router.parameters() if value.shape[0] == layer.num_experts)


class Masked(TorchFunctionMode):
    """Linear maps with the matrix of a router give the experts that were not kept minus infinity."""

    def __init__(self, layers: list[HFLayer], kept: dict[str, list[int]]) -> None:
        super().__init__()
        self.gone = {matrix_of(one).data_ptr(): gone(one, kept[one.name]) for one in layers}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear and args[1].data_ptr() in self.gone:
            result[..., self.gone[args[1].data_ptr()]] = -torch.inf
        return result


def gone(layer: HFLayer, kept: list[int]) -> list[int]:
    return [e for e in range(layer.num_experts) if e not in kept]


@family
@torch.no_grad()
def test_the_model_computes_what_it_did_with_the_others_masked_and_plain_transformers_loads_it(family, close, tmp_path):
    model = copy.deepcopy(model_of(family))
    inputs, layers = batch(model), find_layers(model)
    kept = some_experts(layers)
    small = prune_experts(model, kept)
    ours = small(**inputs).logits

    for layer in layers:
        if layer.correction_bias is not None:  # of the choice alone: no score at all
            bias = correction_bias((layer.router, layer.layer), layer.num_experts)
            bias.view(-1)[gone(layer, kept[layer.name])] = -torch.inf
    with Masked(layers, kept):
        masked = model(**inputs).logits
    close(ours, masked)
    assert not torch.allclose(ours, model_of(family)(**inputs).logits, atol=1e-3)

    small.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert {key: list(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")} == {
        "missing_keys": [],
        "unexpected_keys": [],
        "mismatched_keys": [],
    }
    close(loaded.eval()(**inputs).logits, ours)
    assert [layer.num_experts for layer in find_layers(loaded)] == [len(experts) for experts in kept.values()]


# --- all of them, merging


@family
@torch.no_grad()
def test_keeping_all_experts_changes_nothing(family):
    model = model_of(family)
    total, before = find_layers(model)[0].num_experts, copy.deepcopy(model.state_dict())
    for small in (prune_experts(model, total), merge_experts(model, total)):
        assert small is not model
        assert small.config.to_dict() == model.config.to_dict()
        assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
        for value in small.parameters():
            value.zero_()  # memory of its own
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "switch"])
@torch.no_grad()
def test_merged_experts_are_means_by_load_and_the_router_keeps_the_busiest(family, close, tmp_path):
    model = copy.deepcopy(model_of(family)).requires_grad_(False)
    inputs, layers = batch(model, rows=4), find_layers(model)
    keep = layers[0].num_experts // 2
    small = merge_experts(model, keep, calibration=[inputs])
    with watch_transformers(model) as seen:
        model(**inputs)
        calls = seen.drain()
    for layer, call, after in zip(layers, calls, find_layers(small), strict=True):
        groups = 2 if family == "deepseek_v3" else 1
        busiest, joined = merged_by_hand(call.routing, groups, keep)
        close(after.matrix, layer.matrix[busiest])
        if layer.correction_bias is not None:
            close(after.correction_bias, layer.correction_bias[busiest])
        load = call.routing.load_counts().double()
        for e, members in enumerate(joined):
            shares = load[members] / load[members].sum() if load[members].any() else torch.full((len(members),), 1.0)
            mean = sum(
                share * layer.expert_weights(m).double()
                for share, m in zip(shares / shares.sum(), members, strict=True)
            )
            close(after.expert_weights(e), mean, torch.float32)
    assert not any(value.requires_grad for value in small.parameters())
    small.save_pretrained(tmp_path)
    close(type(model).from_pretrained(tmp_path).eval()(**inputs).logits, small(**inputs).logits)


def merged_by_hand(routing: Any, groups: int, keep: int) -> tuple[list[int], list[list[int]]]:
    """The busiest experts of each group, and beside each those whose logits have the largest cosine with its own."""
    load, logits, size = routing.load_counts().tolist(), routing.logits.double(), routing.num_experts // groups
    busiest: list[int] = []
    joined: list[list[int]] = []
    for start in range(0, groups * size, size):
        order = sorted(range(start, start + size), key=lambda e: (-load[e], e))
        centres = sorted(order[: keep // groups])
        members = {centre: [centre] for centre in centres}
        for e in sorted(order[keep // groups :]):
            cosines = [float(F.cosine_similarity(logits[:, e], logits[:, centre], dim=0)) for centre in centres]
            members[centres[cosines.index(max(cosines))]].append(e)
        busiest += centres
        joined += members.values()
    return busiest, joined


# --- which ones stay


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "llama4", "switch"])
@torch.no_grad()
def test_reap_is_the_mean_part_of_an_expert_in_the_output(family, close):
    model = model_of(family)
    inputs = batch(model)
    known = Calibration("test", model, [inputs], tokens=1000, seed=0)
    with watch_transformers(model) as seen:
        model(**inputs)
        calls = seen.drain()
    for call in calls:
        layer, routing = call.layer, call.routing
        parts: list[list[float]] = [[] for _ in range(layer.num_experts)]
        for token, experts, weights in zip(call.tokens, routing.indices.tolist(), routing.weights, strict=True):
            for e, weight in zip(experts, weights, strict=True):
                if e >= 0:
                    part = (
                        layer.expert(weight * token[None], e)
                        if family == "llama4"
                        else weight * layer.expert(token[None], e)
                    )
                    parts[e].append(float(part.norm()))
        mean = torch.tensor([sum(values) / max(len(values), 1) for values in parts])
        close(known.saliency("reap", layer.name), mean, torch.float32)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "deepseek_v3", "glm4_moe", "gpt_oss", "llama4"])
@torch.no_grad()
def test_removal_is_what_the_layer_does_without_the_expert(family, close):
    """The tokens of an expert that is gone go where the router with this row masked sends them."""
    model = copy.deepcopy(model_of(family))
    inputs = batch(model, rows=1)
    known = Calibration("test", model, [inputs], tokens=1000, seed=0)
    layer = known.layers[next(iter(known.layers))]
    with watch_transformers(model) as seen:
        model(**inputs)
        x = next(call.tokens for call in seen.drain() if call.layer.name == layer.name)

    def run() -> Tensor:
        output = layer.layer(x[None])
        return (output[0] if isinstance(output, tuple) else output).view(len(x), -1).double()

    whole = run()
    bias = None if layer.correction_bias is None else layer.correction_bias.clone()
    changes = []
    for e in range(layer.num_experts):
        others = [other for other in range(layer.num_experts) if other != e]
        if bias is not None:
            correction_bias((layer.router,), layer.num_experts)[e] = -torch.inf
        with Masked([layer], {layer.name: others}):
            changes.append((run() - whole).square().sum(-1).mean())
        if bias is not None:
            correction_bias((layer.router,), layer.num_experts).copy_(bias)
    close(known.saliency("removal", layer.name), torch.stack(changes), torch.float32)


@pytest.mark.parametrize("by", ["frequency", "reap", "removal"])
@torch.no_grad()
def test_the_most_salient_experts_stay(by):
    model = model_of("mixtral")
    inputs = [batch(model, seed=seed) for seed in range(2)]
    small = prune_experts(model, 5, by=by, calibration=iter(inputs))
    known = Calibration("test", model, inputs, tokens=1000, seed=0)
    for layer, after in zip(find_layers(model), find_layers(small), strict=True):
        best = sorted(known.saliency(by, layer.name).topk(5).indices.tolist())
        assert torch.equal(after.matrix, layer.matrix[best])


@torch.no_grad()
def test_draws_are_seeded():
    model = model_of("olmoe")
    inputs = batch(model, rows=4)

    def rows(**options: Any) -> list[Any]:
        return find_layers(prune_experts(model, 4, **options))[0].matrix.tolist()

    one, two, three = (rows(by="random", seed=seed) for seed in (0, 0, 1))
    assert one == two != three
    few = [Calibration("test", model, [inputs], tokens=9, seed=seed) for seed in (0, 0, 1)]
    name = next(iter(few[0].layers))
    one, two, three = (known.saliency("reap", name).tolist() for known in few)
    assert one == two != three


@pytest.mark.parametrize("by", [None, "frequency"])
@torch.no_grad()
def test_given_groups_are_joined_and_the_others_stay(by, close):
    model = copy.deepcopy(model_of("mixtral")).requires_grad_(False)
    layers, joined = find_layers(model), [[5, 0, 3], [1], [2], [4], [6], [7]]
    small = merge_experts(model, {layer.name: [[5, 0, 3]] for layer in layers}, by=by, calibration=[batch(model)])
    loads = Calibration("", model, [batch(model)], 0, 0).counts
    for layer, after in zip(layers, find_layers(small), strict=True):
        load = loads[layer.name].double() if by else torch.ones(8, dtype=torch.float64)
        centre = [0, 3, 5][int(load[[0, 3, 5]].argmax())]
        close(after.matrix, layer.matrix[[centre, 1, 2, 4, 6, 7]])
        for e, members in enumerate(joined):
            shares = load[members] if load[members].any() else torch.ones(len(members))
            mean = sum(
                s * layer.expert_weights(m) for s, m in zip((shares / shares.sum()).tolist(), members, strict=True)
            )
            close(after.expert_weights(e), mean)


def test_calibration_leaves_the_model_as_it_was():
    model = copy.deepcopy(model_of("mixtral")).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    small = prune_experts(model, 4, calibration=[batch(model)])
    assert modes == [module.training for module in model.modules()] == [module.training for module in small.modules()]
    assert not any(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@torch.no_grad()
def test_half_precision_stays():
    model = copy.deepcopy(model_of("qwen3_moe")).bfloat16()
    small = prune_experts(model, 4, by="reap", calibration=[batch(model)])
    merged = merge_experts(model, 4, calibration=[batch(model)])
    for other in (small, merged):
        assert {value.dtype for value in other.parameters()} == {torch.bfloat16}
        assert other(**batch(model)).logits.isfinite().all()


# --- what cannot be


@pytest.mark.parametrize(
    ("family", "keep", "words"),
    [
        ("mixtral", 9, ["keep", "from 1 to 8", "got 9"]),
        ("mixtral", 0, ["keep", "got 0"]),
        ("mixtral", True, ["keep", "got True"]),
        ("qwen2_moe", 2, ["keep=2 is less than the 3 experts"]),
        ("deepseek_v3", 5, ["keep=5", "2 groups", "multiple of 2, from 4"]),
        ("deepseek_v3", 2, ["keep=2", "at least 2 experts each"]),
        ("mixtral", {"model.layers.0.mlp": [0, 1]}, ["equally many", "model.layers.1.mlp", "not named"]),
        ("mixtral", {"model.layers.7.mlp": [0, 1]}, ["unknown layer", "'model.layers.7.mlp'"]),
        ("mixtral", {"model.layers.0.mlp": 4}, ["given a list", "got 4 for model.layers.0.mlp"]),
        ("mixtral", {f"model.layers.{i}.mlp": [0, i] for i in range(3)}, ["kept only once", "[0, 0]"]),
        ("mixtral", {f"model.layers.{i}.mlp": [0, 1, 2, 3][: i + 2] for i in range(3)}, ["equally many", "[2, 3, 4]"]),
        ("mixtral", {f"model.layers.{i}.mlp": [0, 8] for i in range(3)}, ["no expert 8", "0 to 7"]),
        ("deepseek_v3", {f"model.layers.{i}.mlp": [0, 1, 2, 4] for i in (1, 2)}, ["2 groups", "equally many"]),
    ],
)
def test_a_number_that_cannot_be_kept(family, keep, words, user_error):
    with user_error("prune_experts", *words):
        prune_experts(model_of(family), keep, calibration=[batch(model_of(family))])


@pytest.mark.parametrize(
    ("family", "groups", "words"),
    [
        ("mixtral", [0, 1], ["lists of experts", "[[0, 3], [1, 2]]"]),
        ("mixtral", [[0, 1], [2, 0]], ["must not overlap", "expert 0"]),
        ("mixtral", [[0, 8]], ["no expert 8", "0 to 7"]),
        ("mixtral", [[*range(8)]], ["keep=1 is less than the 2 experts"]),
        ("deepseek_v3", [[0, 7], [1, 6]], ["2 groups", "[0, 7] reaches over two"]),
        ("deepseek_v3", [[0, 1], [2, 3]], ["2 groups"]),
    ],
)
def test_groups_that_cannot_be(family, groups, words, user_error):
    model = model_of(family)
    with user_error("merge_experts", *words):
        merge_experts(model, {layer.name: groups for layer in find_layers(model)}, by=None)


def test_nothing_to_judge_by(user_error):
    model = model_of("mixtral")
    for calibration in (None, []):
        with user_error("prune_experts: frequency needs text", "calibration=", "encode"):
            prune_experts(model, 4, calibration=calibration)
    with user_error("merge_experts: reap needs text"):
        merge_experts(model, 4, by="reap")
    with user_error("by", "'frequenzy'", "'frequency'", "reap"):
        prune_experts(model, 4, by="frequenzy", calibration=[batch(model)])
    with user_error("merge_experts", "by='frequency'", "the groups"):
        merge_experts(model, 4, by=None)
    with user_error("prune_experts", "ids (B, S)", "got str"):
        prune_experts(model, 4, calibration="text")
    lost = copy.deepcopy(model)
    with torch.no_grad():
        find_layers(lost)[0].experts.down_proj.fill_(torch.nan)
    with user_error("by='reap'", "'model.layers.0.mlp'", "not a finite number"):
        prune_experts(lost, 4, by="reap", calibration=[batch(model)])


def test_models_that_it_cannot_make_smaller(user_error):
    with user_error("LlamaForCausalLM", "no mixture-of-experts layer", "dense"):
        prune_experts(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), 2)
    with user_error("prune_experts: takes a model of transformers", "got Sequential"):
        prune_experts(nn.Sequential(model_of("mixtral")), 2)
    changed = copy.deepcopy(model_of("mixtral"))
    changed.model.layers[1].mlp.gate.extra = nn.Parameter(torch.zeros(3))
    with user_error("MixtralForCausalLM", "cannot make smaller", "extra 'model.layers.1.mlp.gate.extra'"):
        prune_experts(changed, 4, by="random")
    swapped = copy.deepcopy(model_of("mixtral"))
    swap_routers(swapped, layers="*.1.mlp")
    with user_error("model.layers.1.mlp was swapped", "undo", "fold_routers"):
        prune_experts(swapped, 4, by="random")
    unnamed = copy.deepcopy(model_of("mixtral"))
    unnamed.config.num_local_experts = 9
    with user_error("MixtralConfig", "names no number of 8 experts"):
        prune_experts(unnamed, 4, by="random")
    nowhere = copy.deepcopy(model_of("mixtral")).to("meta")
    with user_error("model.layers.0.mlp", "not in memory"):
        prune_experts(nowhere, 4, by="random")
