"""How swapped routers start, what they may be made of, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import SIZES, batch, stock_of
from torch import nn

from spectralmoe import CosineScorer, ExpertChoice, LinearScorer, PrototypeScorer, TopP, record
from spectralmoe.hf import swap_routers
from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.watch import watch_transformers
from spectralmoe.layers import moe_layers

transformers = pytest.importorskip("transformers")


def copy_of(family: str) -> Any:
    return copy.deepcopy(stock_of(family))


def padded(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = batch(stock_of("mixtral"), rows=3, seed=seed)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("calibrated", [False, True])
@torch.no_grad()
def test_a_cosine_scorer_has_the_rows_as_keys_and_the_slope_as_temperature(calibrated, close):
    stock, model = stock_of("mixtral"), copy_of("mixtral")
    ids = batch(stock)["input_ids"]
    with watch_transformers(stock) as watching:
        stock(input_ids=ids)
        read = {call.layer.name: call.tokens for call in watching.drain()}
    swapped = swap_routers(model, "cosine", calibration=[ids] if calibrated else None)
    for layer in find_layers(stock):
        scorer = moe_layers(model)[layer.name].router.scorer
        rows = layer.matrix.norm(dim=1)
        close(scorer.keys, layer.matrix / rows[:, None])
        size = float(read[layer.name].norm(dim=1).median()) if calibrated else 32**0.5
        assert scorer.temperature == pytest.approx(1 / (size * float(rows.median())))
    assert (swapped.agreement is not None) == calibrated
    other = copy_of("mixtral")
    swap_routers(other, {"type": "cosine", "temperature": 0.5})
    assert {layer.router.scorer.temperature for layer in moe_layers(other).values()} == {0.5}


def test_agreement_is_the_share_of_tokens_with_the_same_experts():
    model = copy_of("mixtral")
    swapped = swap_routers(model, calibration=[padded(), batch(model, rows=1)["input_ids"]])
    assert swapped.agreement == dict.fromkeys(swapped.layers, 1.0)
    model = copy_of("mixtral")
    swapped = swap_routers(model, init="fresh", calibration=[padded()])
    stock = stock_of("mixtral")
    with watch_transformers(stock) as watching, torch.no_grad():
        stock(**padded())
        calls = {call.layer.name: call for call in watching.drain()}
    for name, share in swapped.agreement.items():
        real, router = padded()["attention_mask"].flatten().bool(), moe_layers(model)[name].router
        ours = router(calls[name].tokens[real]).indices
        same = [
            set(a) == set(b) for a, b in zip(ours.tolist(), calls[name].routing.indices[real].tolist(), strict=True)
        ]
        assert share == pytest.approx(sum(same) / len(same))


def test_a_scorer_is_fitted_to_the_gates_logits():
    shares = []
    for init in ("fresh", "fit"):
        swapped = swap_routers(copy_of("mixtral"), "prototype", init=init, calibration=[padded(1), padded(2)])
        shares.append(min(swapped.agreement.values()))
    assert shares[1] > max(shares[0], 0.9)


def test_a_decoder_beside_an_encoder_is_calibrated_by_ids():
    model = copy_of("switch")
    swapped = swap_routers(model, calibration=[batch(model)["input_ids"]])
    assert set(swapped.agreement) == {layer.name for layer in find_layers(stock_of("switch"))}
    assert min(swapped.agreement.values()) == 1


def test_the_modes_of_the_model_stay():
    model = copy_of("mixtral").train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    swap_routers(model, calibration=[padded()]).undo()
    assert [module.training for module in model.modules()] == modes
    swap_routers(model)
    layers = list(moe_layers(model).values())
    assert [layer.training for layer in layers] == [layer.router.training for layer in layers] == [True, False, True]


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
@pytest.mark.parametrize(
    "selector",
    [
        {"type": "topp", "p": 0.5},
        {"type": "expert_choice", "capacity": 1.0},
        "soft",
        {"type": "noisy_topk", "k": 1},
        lambda: TopP(0.9),
    ],
)
def test_any_selector_serves(family, selector):
    model = copy_of(family).train()
    swap_routers(model, "linear", selector)
    inputs = padded()
    with record(model) as tape:
        model(**inputs).logits.square().mean().backward()
    assert all(layer.router.scorer.weight.grad.isfinite().all() for layer in moe_layers(model).values())
    layer, x = tape[0].layer, torch.randn(5, 32)
    returned = layer(x)
    if family == "mixtral":
        assert returned[2].min() >= 0
        assert returned[2].shape == returned[1].shape


def test_parts_are_named_given_as_tables_or_made_by_functions():
    model = copy_of("qwen3_moe")
    swap_routers(model, {"type": "eigenbasis", "rank": 4}, {"type": "balanced", "k": 3}, init="fresh")
    for layer in moe_layers(model).values():
        assert layer.router.scorer.rank == 4
        assert layer.router.selector.k == 3
    model = copy_of("qwen3_moe")
    swap_routers(model, lambda dim, experts: CosineScorer(dim, experts, temperature=0.2), lambda: ExpertChoice(1.0))
    layers = list(moe_layers(model).values())
    assert {layer.router.scorer.temperature for layer in layers} == {0.2}
    assert layers[0].router.selector is not layers[1].router.selector


def test_a_pattern_takes_some_layers_and_the_others_another_time():
    model = copy_of("mixtral")
    inputs = padded()
    want = model(**inputs).logits
    first = swap_routers(model, layers="*.1.mlp")
    assert first.layers == list(moe_layers(model)) == ["model.layers.1.mlp"]
    with record(model) as tape:  # stock layers are read
        model(**inputs)
    assert [item.name for item in tape] == [f"model.layers.{n}.mlp" for n in range(3)]
    second = swap_routers(model, layers="*.[02].mlp")
    assert list(moe_layers(model)) == [f"model.layers.{n}.mlp" for n in range(3)]
    first.undo()
    assert list(moe_layers(model)) == second.layers
    second.undo()
    assert torch.equal(model(**inputs).logits, want)


def test_a_gate_with_a_bias_needs_a_scorer_with_one(user_error):
    with user_error("CosineScorer cannot start", "which has a bias", 'init="fit"'):
        swap_routers(copy_of("gpt_oss"), "cosine")
    with user_error("LinearScorer cannot start", "which has a bias"):
        swap_routers(copy_of("gpt_oss"), {"type": "linear", "bias": False})
    model = copy_of("mixtral")
    swap_routers(model, {"type": "linear", "bias": True})
    assert all(not layer.router.scorer.bias.any() for layer in moe_layers(model).values())


def test_what_cannot_start_as_asked_is_refused_and_leaves_the_model(user_error):
    model = copy_of("mixtral")
    kinds = [type(module) for module in model.modules()]
    with user_error("PrototypeScorer cannot start from the gate of model.layers.0.mlp", 'init="fresh"'):
        swap_routers(model, "prototype")
    with user_error('init="fit"', "calibration"):
        swap_routers(model, "prototype", init="fit")
    with user_error("unknown init 'gate'", "from_gate"):
        swap_routers(model, init="gate")
    with user_error("layers='*.7.*' matches no MoE layer", "model.layers.0.mlp"):
        swap_routers(model, layers="*.7.*")
    with user_error("unknown scorer 'liner'"):
        swap_routers(model, "liner")
    with user_error("scorer must give a Scorer for D=32, E=8"):
        swap_routers(model, lambda dim, experts: LinearScorer(dim, experts + 1))
    with user_error("calibration holds no batch"):
        swap_routers(model, calibration=[])
    with user_error("a table of the model", "got str"):
        swap_routers(model, calibration=padded())
    assert [type(module) for module in model.modules()] == kinds
    swap_routers(model)
    with user_error("the router of model.layers.0.mlp was swapped already", "undo()"):
        swap_routers(model)


def test_a_mask_of_one_expert_takes_one_expert(user_error):
    with user_error("encoder.block.1.layer.1.mlp takes one expert a token", "k=1"):
        swap_routers(copy_of("switch"), "linear", {"type": "topk", "k": 2})


def test_models_of_other_kinds_are_refused(user_error):
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with user_error("holds no mixture-of-experts layer", "dense"):
        swap_routers(dense)
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8}
    config = transformers.JetMoeConfig(**{**SIZES, **sizes, "num_key_value_heads": 2})
    with user_error("model family it cannot read"):
        swap_routers(transformers.JetMoeForCausalLM(config))


class Odd(nn.Module):
    """A gate of a rule that nobody knows: the weights are squared logits."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x):
        logits = x @ self.weight.T
        chosen = logits.topk(2)
        return logits, chosen.values.square(), chosen.indices


class Normed(Odd):
    """A gate of scaled tokens, which returns more than others."""

    def __init__(self, *more: object) -> None:
        super().__init__()
        self.more = more

    def forward(self, x):
        logits = nn.functional.normalize(x, dim=-1) @ self.weight.T
        return logits, *logits.softmax(-1).topk(2), *self.more


class Alone(Odd):
    """A gate that returns logits alone."""

    def forward(self, x):
        return x @ self.weight.T


def model_with(gate: nn.Module) -> nn.Module:
    layer = nn.ModuleDict({"gate": gate, "experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(4))})
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": layer})])})


def test_a_rule_that_is_unknown_needs_a_selector(user_error):
    with user_error("layers.0.mlp (Odd)", "rule that is not known", "selector="):
        swap_routers(model_with(Odd()))
    model = model_with(Odd())
    swap_routers(model, selector={"type": "topk", "normalize": True})
    logits, weights, indices = model.layers[0]["mlp"]["gate"](torch.randn(5, 8))
    assert torch.equal(indices, logits.topk(2).indices)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5))
    with user_error("family it cannot read", "float32"):
        swap_routers(model_with(Alone()))
    with user_error("routers cannot be swapped", "NoneType"):
        swap_routers(model_with(Normed(None)))


def test_a_rule_of_one_expert_with_a_constant_weight_says_so(user_error):
    config = transformers.MixtralConfig(**{**SIZES, "num_local_experts": 4, "num_experts_per_tok": 1})
    model = transformers.MixtralForCausalLM(config)
    with user_error("model.layers.0.mlp", "the weight of a token's one expert is always 1", 'selector="topk"'):
        swap_routers(model)


def test_a_gate_that_does_more_than_a_product_starts_nothing(user_error, close):
    model, x = model_with(Normed()), torch.randn(50, 8)
    gate = model.layers[0]["mlp"]["gate"]
    with user_error("LinearScorer cannot start from the gate of layers.0.mlp, which is no matrix alone"):
        swap_routers(model)
    swap_routers(model, lambda dim, experts: Unit(gate), init="fresh")
    close(model.layers[0]["mlp"]["gate"](x)[0], gate(x)[0])


class Unit(LinearScorer):
    """The scorer that such a gate is."""

    def __init__(self, gate: Normed) -> None:
        super().__init__(8, 4)
        self.weight.data.copy_(gate.weight.detach())

    def forward(self, x, *, context=None):
        return super().forward(nn.functional.normalize(x, dim=-1))


def test_a_forward_that_another_library_replaced_is_refused(user_error):
    model = model_with(Odd())
    gate = model.layers[0]["mlp"]["gate"]
    gate.forward = gate.forward
    with user_error("the forward of layers.0.mlp's router was replaced", "swap first"):
        swap_routers(model, selector="topk")


def test_prototypes_are_ours(close):
    model = copy_of("olmoe")
    swap_routers(model, PrototypeScorer, init="fresh")
    x = torch.randn(6, 32)
    layer = next(iter(moe_layers(model).values()))
    close(layer(x)[0], layer.router.scorer(x))
