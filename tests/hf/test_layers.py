"""MoE layers of Hugging Face models: found by structure; routing and experts against float64 by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, SIZES, build
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.diagnostics.entropy import are_probabilities
from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.watch import watch_transformers
from spectralmoe.instruments import Inspector

pytest.importorskip("transformers")

family = pytest.mark.parametrize("family", list(FAMILIES))

# path of the first layer, numbers of the layers, E, K
FOUND = {
    "mixtral": ("model.layers.0.mlp", [0, 1, 2], 8, 2),
    "qwen2_moe": ("model.layers.0.mlp", [0, 2], 8, 3),
    "qwen3_moe": ("model.layers.1.mlp", [1, 3], 8, 2),
    "olmoe": ("model.layers.0.mlp", [0, 1, 2], 8, 2),
    "deepseek_v3": ("model.layers.1.mlp", [1, 2], 8, 2),
    "gpt_oss": ("model.layers.0.mlp", [0, 1, 2], 4, 2),
    "llama4": ("model.layers.1.feed_forward", [1, 3], 4, 1),
    "granitemoe": ("model.layers.0.block_sparse_moe", [0, 1, 2], 8, 2),
    "switch": ("encoder.block.1.layer.1.mlp", [1, 3, 1, 3], 8, 1),
}


@family
def test_layers_are_found_with_the_models_own_numbers(family):
    layers = find_layers(FAMILIES[family]())
    name, numbers, experts, top_k = FOUND[family]
    assert layers[0].name == name
    assert [layer.number for layer in layers] == numbers
    assert {(layer.num_experts, layer.top_k) for layer in layers} == {(experts, top_k)}
    stacks = [layer.stack for layer in layers]
    assert stacks == (["encoder", "encoder", "decoder", "decoder"] if family == "switch" else [""] * len(layers))
    for layer in layers:
        assert layer.matrix.shape == (experts, 32)


# --- routing, by hand from the weights


def softmax_then_top(logits: Tensor, k: int, renormalised: bool) -> tuple[Tensor, Tensor, Tensor]:
    probs = logits.softmax(-1)
    weights, indices = probs.topk(k)
    return probs, weights / weights.sum(-1, keepdim=True) if renormalised else weights, indices


def deepseek(logits: Tensor, bias: Tensor, k: int, groups: int, on: int) -> tuple[Tensor, Tensor, Tensor]:
    scores = torch.zeros_like(logits)
    weights, indices = [], []
    for token, row in enumerate(logits):
        plain = [1 / (1 + float(torch.exp(-value))) for value in row]
        biased = [value + float(bias[e] - bias.min()) for e, value in enumerate(plain)]
        size = len(biased) // groups
        best = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        kept = sorted(range(groups), key=lambda g: -best[g])[:on]
        for e in range(len(biased)):
            scores[token, e] = biased[e] if e // size in kept else 0
        chosen = sorted(range(len(biased)), key=lambda e: -float(scores[token, e]))[:k]
        total = sum(plain[e] for e in chosen)
        weights.append([2.5 * plain[e] / total for e in chosen])
        indices.append(chosen)
    return scores, torch.tensor(weights, dtype=logits.dtype), torch.tensor(indices)


def by_hand(family: str, router: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, scores, weights and indices in float64."""
    matrix = next(value for value in router.parameters() if value.dim() == 2).detach().double()
    logits = x.double() @ matrix.T
    if family in {"mixtral", "qwen3_moe"}:
        return logits, *softmax_then_top(logits, 2, True)
    if family in {"qwen2_moe", "olmoe"}:
        return logits, *softmax_then_top(logits, 3 if family == "qwen2_moe" else 2, False)
    if family == "deepseek_v3":
        return logits, *deepseek(logits, router.e_score_correction_bias.double(), 2, 4, 2)
    if family == "llama4":
        weights, indices = logits.sigmoid().topk(1)
        return logits, logits.sigmoid(), weights, indices
    if family == "switch":
        return logits, *softmax_then_top(logits, 1, False)
    if family == "gpt_oss":
        logits = logits + router.bias.detach().double()
    top, indices = logits.topk(2)
    return logits, logits.softmax(-1), top.softmax(-1), indices


@family
def test_routing_is_that_of_the_weights(family, close):
    x = torch.randn(64, 32)
    for layer in find_layers(FAMILIES[family]()):
        routing = layer.route(x)
        logits, scores, weights, indices = by_hand(family, layer.router, x)
        close(routing.logits, logits)
        close(routing.scores, scores)
        order = routing.indices.argsort(-1)
        assert torch.equal(routing.indices.gather(1, order), indices.sort(-1).values)
        close(routing.weights.gather(1, order), weights.gather(1, indices.argsort(-1)))
        again = routing.scores.topk(indices.shape[1]).indices
        assert torch.equal(again.sort(-1).values, indices.sort(-1).values)  # what the top-k was taken of


def test_a_negative_bias_keeps_scores_in_order_and_from_being_negative():
    layer = find_layers(build("deepseek_v3", n_group=1, topk_group=1))[0]
    layer.router.e_score_correction_bias.uniform_(-3, 0)
    routing = layer.route(torch.randn(50, 32))
    assert bool((routing.scores >= 0).all())
    assert torch.equal(routing.scores.topk(2).indices.sort(-1).values, routing.indices.sort(-1).values)


def test_several_experts_of_dense_weights():
    layer = find_layers(build("llama4", num_experts_per_tok=2))[0]
    x = torch.randn(40, 32)
    weights, indices = (x.double() @ layer.matrix.double().T).sigmoid().topk(2)
    routing = layer.route(x)
    assert torch.equal(routing.indices, indices)
    torch.testing.assert_close(routing.weights, weights.float())


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "llama4", "gpt_oss"])
def test_all_experts_chosen_still_tells_logits_from_weights(name):
    experts = FOUND[name][2]
    layer = find_layers(build(name, num_experts_per_tok=experts))[0]
    x = torch.randn(30, 32)
    routing = layer.route(x)
    bias = getattr(layer.router, "bias", None)
    torch.testing.assert_close(routing.logits, F.linear(x, layer.matrix, bias).detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(routing.indices.sort(-1).values, torch.arange(experts).expand(30, -1))


# --- experts, by hand from the weights


def expert_by_hand(family: str, experts: nn.Module, x: Tensor, e: int) -> Tensor:
    x = x.double()
    if family == "switch":
        mlp = experts[f"expert_{e}"]
        return (x @ mlp.wi.weight.double().T).relu() @ mlp.wo.weight.double().T
    up, down = experts.gate_up_proj[e].double(), experts.down_proj[e].double()
    if family == "gpt_oss":
        both = x @ up + experts.gate_up_proj_bias[e].double()
        gate, linear = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        inner = (linear + 1) * gate * torch.sigmoid(1.702 * gate)
        return inner @ down + experts.down_proj_bias[e].double()
    gate, linear = (x @ (up if family == "llama4" else up.T)).chunk(2, dim=-1)
    return (F.silu(gate) * linear) @ (down if family == "llama4" else down.T)


@family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_expert_is_that_of_the_weights(family, dtype, close):
    model = FAMILIES[family]().to(dtype)
    layer = find_layers(model)[-1]
    x = 3 * torch.randn(20, 32, dtype=dtype)
    for e in (0, layer.num_experts - 1):
        close(layer.expert(x, e), expert_by_hand(family, layer.experts, x, e).detach())


def test_widths_that_the_grouped_kernel_refuses():
    layer = find_layers(build("mixtral", hidden_size=18, num_attention_heads=1, num_key_value_heads=1))[0]
    x = torch.randn(5, 18)
    torch.testing.assert_close(layer.expert(x, 3).double(), expert_by_hand("mixtral", layer.experts, x, 3).detach())


def output_by_parts(layer: Any, x: Tensor) -> Tensor:
    """The layer's output from its routing and single experts, the shared expert added as the model does."""
    routing, module = layer.route(x), layer.layer
    total = torch.zeros_like(x)
    before = type(layer.experts).__name__.startswith("Llama4")
    for token in range(len(x)):
        for weight, e in zip(routing.weights[token], routing.indices[token].tolist(), strict=True):
            one = x[token : token + 1]
            total[token] += (layer.expert(one * weight, e) if before else layer.expert(one, e) * weight)[0]
    for name in ("shared_expert", "shared_experts", "shared_mlp"):
        shared = getattr(module, name, None)
        if shared is not None:
            gate = getattr(module, "shared_expert_gate", None)
            total += shared(x) * (1 if gate is None else torch.sigmoid(gate(x)))
    return total


def output_of(layer: Any, x: Tensor) -> Tensor:
    found = layer.layer(x[None])
    return (found[0] if isinstance(found, tuple) else found).reshape(x.shape)


@family
@torch.no_grad()
def test_routing_and_experts_make_the_layers_output(family):
    x = torch.randn(12, 32)
    for layer in find_layers(FAMILIES[family]()):
        torch.testing.assert_close(output_by_parts(layer, x), output_of(layer, x), atol=1e-5, rtol=1e-4)


# Families that nothing in the library was written for: (config, model, arguments)
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Glm4Moe": (
        "Glm4Moe",
        {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    ),
    "Ernie4_5_Moe": ("Ernie4_5_Moe", {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 24}),
    "MiniMaxM2": ("MiniMaxM2", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}),
    "Dots1": (
        "Dots1",
        {
            "n_shared_experts": 1,
            "n_group": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
        },
    ),
    "Phimoe": ("Phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "DeepseekV2": (
        "DeepseekV2",
        {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 24}
        | {"topk_method": "group_limited_greedy", "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8}
        | {"qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4},
    ),
}


@pytest.mark.parametrize("name", list(OTHERS))
@torch.no_grad()
def test_families_that_no_code_knows(name):
    import transformers

    prefix, arguments = OTHERS[name]
    try:
        config = getattr(transformers, f"{prefix}Config")(**{**SIZES, "first_k_dense_replace": 1, **arguments})
        model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    except AttributeError:
        pytest.skip(f"this transformers has no {prefix}")
    for value in model.parameters():
        value += 0.1 * torch.randn_like(value)
    layers = find_layers(model)
    x = torch.randn(12, 32)
    for layer in layers:
        routing = layer.route(x)
        assert routing.indices.shape == (12, arguments.get("num_experts_per_tok", arguments.get("moe_k")))
        again = routing.scores.topk(routing.indices.shape[1]).indices
        assert torch.equal(again.sort(-1).values, routing.indices.sort(-1).values)
        torch.testing.assert_close(output_by_parts(layer, x), output_of(layer, x), atol=1e-5, rtol=1e-4)


# Families whose router reads more than tokens. Of the layer: a bias for the choice, optional or not.
BIASED: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2_moe": (
        "Lfm2Moe",
        {"num_experts": 8, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]}
        | {"use_expert_bias": True},
    ),
    "lfm2_moe_without": (
        "Lfm2Moe",
        {"num_experts": 8, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]}
        | {"use_expert_bias": False},
    ),
    "afmoe": ("Afmoe", {"num_experts": 8, "num_shared_experts": 1, "num_dense_layers": 1}),
    "hy_v3": ("HYV3", {"num_experts": 8}),
    "minimax_m2": ("MiniMaxM2", {"num_local_experts": 8}),
}


def make(prefix: str, kind: str = "ForCausalLM", **arguments: Any) -> Any:
    """A tiny model whose biases of the choice are large; skips where this transformers has none such."""
    import transformers

    try:
        config = getattr(transformers, f"{prefix}Config")(**arguments)
        model = getattr(transformers, f"{prefix}{kind}")(config).eval()
    except AttributeError:
        pytest.skip(f"this transformers has no {prefix}")
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("correction_bias", "expert_bias")):
                value.copy_(torch.linspace(-1, 1, len(value)))
            elif value.is_floating_point() and "inv_freq" not in name:
                value += 0.1 * torch.randn_like(value)
    return model


@pytest.mark.parametrize("name", list(BIASED))
@torch.no_grad()
def test_a_router_gets_what_its_layer_gives_it(name):
    prefix, arguments = BIASED[name]
    common = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    model = make(prefix, **{**SIZES, **common, **arguments})
    before = find_layers(model)[-1]
    with watch_transformers(model) as watching:
        model(input_ids=torch.randint(4, 260, (2, 30)))
        calls = watching.drain()
    assert before.name == calls[-1].layer.name
    for call, layer in [*((call, call.layer) for call in calls), (calls[-1], before)]:
        assert layer.reroutes
        again = layer.route(call.tokens)
        assert torch.equal(again.indices, call.routing.indices)
        torch.testing.assert_close(again.weights, call.routing.weights, atol=1e-5, rtol=1e-4)
        bias = layer.correction_bias
        if bias is not None:
            scores = (call.tokens.double() @ layer.matrix.double().T).sigmoid() + bias.double()
            assert torch.equal(scores.topk(2).indices.sort(-1).values, again.indices.sort(-1).values)
    assert (bias is None) == (name == "lfm2_moe_without")


class Shifted(nn.Module):
    """A layer that gives its router a tensor, which is optional there and has another name."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor, offset: Tensor | None = None, k: int = 1) -> tuple[Tensor, ...]:
            logits = x @ self.weight.T + (0 if offset is None else offset)
            return logits, *logits.softmax(-1).topk(k)

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = self.Gate(), nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.shift = nn.Parameter(torch.tensor([0.0, 0.0, 100.0, 90.0]))

    def forward(self, x: Tensor) -> Tensor:
        self.gate(x, self.shift, k=2)
        return x


@torch.no_grad()
def test_optional_inputs_of_a_router_are_those_of_the_call():
    model = nn.ModuleDict({"layers": nn.ModuleList([Shifted()])})
    with watch_transformers(model) as watching:
        model["layers"][0](torch.randn(20, 8))
        watching.drain()
    assert watching.layers[0].route(torch.randn(5, 8)).indices.tolist() == [[2, 3]] * 5


NLLB = {
    "vocab_size": 260,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_experts": 8,
    "encoder_sparse_step": 1,
    "decoder_sparse_step": 1,
    "expert_capacity": 64,
}


@torch.no_grad()
def test_a_router_that_reads_more_of_its_tokens_is_seen_but_not_run_again(user_error):
    arguments = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8, "n_routed_experts": 8}
    hashed = make("DeepseekV4", **{**SIZES, **arguments})
    nllb = make("NllbMoe", "ForConditionalGeneration", **NLLB)
    ids = torch.randint(4, 260, (2, 40))
    for model, inputs in ((hashed, {}), (nllb, {"decoder_input_ids": ids})):
        with watch_transformers(model) as watching:
            model(input_ids=ids, **inputs)
            inspector = Inspector(watching.layers)
            calls = watching.drain()
            inspector.add(calls)
        assert not watching.layers[0].reroutes
        for layer, call in zip(inspector.layers(), calls, strict=True):
            chosen = call.routing.indices[call.routing.indices >= 0]
            assert layer["load"]["counts"] == chosen.bincount(minlength=8).tolist()
            if not call.layer.reroutes:
                assert [layer["stability"][name]["value"] for name in ("noise", "bf16")] == [None, None]
                assert layer["geometry"]["jacobian"]["value"] is None
    first = find_layers(hashed)[0]
    with user_error("model.layers.0.mlp", "input_ids", "beside the tokens"):
        first.route(torch.randn(5, 32))


# --- precision, side effects


@family
def test_another_precision_is_that_of_a_model_loaded_in_it(family, tmp_path):
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    x = torch.randn(64, 32)
    for layer, loaded in zip(find_layers(model), find_layers(half), strict=True):
        ours, theirs = layer.route(x, torch.bfloat16), loaded.route(x.bfloat16())
        for name in ("logits", "weights", "indices", "scores"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@family
def test_looking_changes_nothing(family):
    model = FAMILIES[family]().train().bfloat16()
    model.get_submodule(FOUND[family][0]).eval()
    calls: list[int] = []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    layer = find_layers(model)[0]
    layer.router.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(6, 32, requires_grad=True)
    seen = [layer.route(x), layer.route(x, torch.bfloat16), layer.expert(x, 0), layer.expert_weights(0)]
    assert not any(value.requires_grad for value in (*seen[0], *seen[1], *seen[2:]))
    assert modes == [module.training for module in model.modules()]
    assert calls == []
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype


@family
def test_weights_of_an_expert_are_all_of_it(family):
    layer = find_layers(FAMILIES[family]())[0]
    vectors = [layer.expert_weights(e) for e in range(layer.num_experts)]
    assert sum(len(vector) for vector in vectors) == sum(value.numel() for value in layer.experts.parameters())
    assert sorted(torch.cat(vectors).tolist()) == sorted(
        torch.cat([value.detach().flatten() for value in layer.experts.parameters()]).tolist()
    )


# --- what cannot be read, what is misleading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_probabilities_are_seen_and_undone(dtype, close):
    layer = find_layers(FAMILIES["olmoe"]().to(dtype))[0]
    x = torch.randn(30, 32).to(dtype)
    honest = layer.route(x)
    assert not are_probabilities(layer.raw_logits(x))
    forward = layer.router.forward
    layer.router.forward = lambda x: ((parts := forward(x))[0].softmax(-1), *parts[1:])
    assert are_probabilities(layer.raw_logits(x))
    routing = find_layers(nn.ModuleDict({"layers": nn.ModuleList([layer.layer])}))[0].route(x)
    close(routing.logits.softmax(-1), honest.logits.softmax(-1), dtype)
    close(routing.scores, honest.scores, dtype)


def test_a_dense_model_has_nothing_to_see(user_error):
    import transformers

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with user_error("LlamaForCausalLM", "no mixture-of-experts layer", "dense"):
        find_layers(model)


def test_experts_that_a_part_of_the_config_names_do_not_pass_for_a_dense_model(user_error):
    import transformers

    config = transformers.DbrxConfig(
        vocab_size=260,
        d_model=32,
        n_heads=4,
        n_layers=1,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 48, "hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    )
    with user_error("DbrxForCausalLM", "names 8 experts", "cannot read"):
        find_layers(transformers.DbrxForCausalLM(config))


def test_experts_in_an_unknown_form_do_not_pass_for_a_dense_model(user_error):
    model = FAMILIES["mixtral"]()
    for layer in model.model.layers:
        layer.mlp.specialists = layer.mlp.experts
        del layer.mlp.experts
    with user_error("MixtralForCausalLM", "names 8 experts", "cannot read"):
        find_layers(model)


@pytest.mark.parametrize("answer", [lambda out: "words", lambda out: out[2], lambda out: (out[0], out[0], out[0])])
def test_an_unknown_router_is_named(answer, user_error):
    layer = find_layers(FAMILIES["mixtral"]())[1]
    forward = layer.router.forward
    layer.router.forward = lambda x: answer(forward(x))
    with user_error("model.layers.1.mlp", "MixtralSparseMoeBlock", "a model family it cannot read"):
        layer.route(torch.randn(5, 32))


def test_experts_without_a_router_are_named(user_error):
    model = FAMILIES["mixtral"]()
    del model.model.layers[2].mlp.gate
    with user_error("model.layers.2.mlp", "a model family it cannot read", "no router for 8 experts"):
        find_layers(model)


def test_a_shared_expert_as_wide_as_there_are_experts_is_no_router():
    model = build("qwen2_moe", shared_expert_intermediate_size=8)
    assert all(layer.router is layer.layer.gate for layer in find_layers(model))


def test_as_many_experts_as_the_model_is_wide():
    model = build("olmoe", num_experts=32)
    assert [layer.num_experts for layer in find_layers(model)] == [32, 32, 32]
