"""Dense models become stock MoE models: the same logits at step 0 in plain transformers, for every pair that fits."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_models import DENSE, dense_model, ids
from families import FAMILIES

from spectralmoe.hf import upcycle
from spectralmoe.hf.upcycling import METHODS, TARGETS

tf = pytest.importorskip("transformers")

PAIRS = {
    "llama": ["mixtral", "qwen2_moe", "glm4_moe"],
    "llama_tied": ["mixtral", "qwen2_moe", "glm4_moe"],
    "mistral_window": ["mixtral", "qwen2_moe"],
    "qwen2": ["qwen2_moe", "glm4_moe"],
    "qwen2_window": ["qwen2_moe"],
    "qwen3": ["qwen3_moe", "glm4_moe"],
    "qwen3_window": ["qwen3_moe"],
}
"""Dense model -> targets that fit, the one that "auto" takes first."""

EQUAL = [(dense, target) for dense, targets in PAIRS.items() for target in targets]


def quiet(*args: Any, **options: Any) -> Any:
    """``upcycle`` without its warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return upcycle(*args, **options)


def reloaded(model: Any, folder: Any) -> Any:
    """The model that plain transformers reads from the folder that plain transformers wrote."""
    model.save_pretrained(folder)
    again, info = tf.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return again.eval()


@pytest.fixture(scope="session")
def dense_of() -> Callable[[str], Any]:
    """``dense_of(name)``: a tiny dense model, and the logits that it gives."""
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            made[name] = dense_model(name)
        return made[name]

    return make


@pytest.mark.parametrize(("name", "target"), EQUAL)
def test_the_model_computes_what_the_dense_one_does(name, target, dense_of, tmp_path):
    model, expected = dense_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plans = {"copy": {"experts": 4, "k": 2}, "virtual": {"experts": 8, "k": 4, "granularity": 2}}
    if target != "mixtral":
        plans["last layers"] = {"experts": 4, "k": 2, "layers": [-1, -2]}
    for plan, options in plans.items():
        method = plan if plan == "virtual" else "copy"
        moe = quiet(model, target=target, method=method, seed=1, **options)
        assert moe.config.model_type == target
        for one in (moe, reloaded(moe, tmp_path / plan)):
            torch.testing.assert_close(one(ids()).logits, expected, atol=1e-4, rtol=0, msg=plan)
        assert one.generation_config.max_length == 77
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_pairs_are_all_that_fit(dense_of, user_error):
    for name, targets in PAIRS.items():
        model, _ = dense_of(name)
        assert quiet(model, experts=4, k=2).config.model_type == targets[0]
        if "_" not in name:
            for target in sorted(TARGETS.keys() - set(targets)):
                with user_error(type(model).__name__, target, "replace_mlp"):
                    upcycle(model, target=target, experts=4, k=2)
    assert set(PAIRS) == set(DENSE)


def test_some_layers(dense_of):
    model, expected = dense_of("llama")
    moe = quiet(model, experts=4, k=2, layers=[1])
    kinds = [hasattr(layer.mlp, "experts") for layer in moe.model.layers]
    assert (moe.config.model_type, kinds) == ("qwen2_moe", [False, True, False])
    torch.testing.assert_close(moe(ids()).logits, expected, atol=1e-4, rtol=0)


def test_the_last_layers(dense_of):
    first, second = (quiet(dense_of("llama")[0], experts=4, k=2, layers=layers) for layers in ("last2", [-1, 1]))
    assert first.config.mlp_only_layers == second.config.mlp_only_layers == [0]


def test_generation_is_that_of_the_dense_model(dense_of):
    for name in ("llama", "qwen3"):
        model, _ = dense_of(name)
        moe = quiet(model, target="glm4_moe", experts=4, k=2)
        options = {"max_new_tokens": 6, "max_length": None, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(moe.generate(ids(), **options), model.generate(ids(), **options))


def test_the_result_is_its_own_and_trains(dense_of):
    model, _ = dense_of("llama_tied")
    frozen = copy.deepcopy(model).requires_grad_(False).train()
    moe = upcycle(frozen, experts=4, k=2, method="drop")
    assert moe.training
    assert moe.lm_head.weight is moe.model.embed_tokens.weight
    shared = {value.data_ptr() for value in frozen.parameters()} & {value.data_ptr() for value in moe.parameters()}
    assert not shared
    moe(ids(), labels=ids()).loss.backward()
    assert all(value.grad is not None and value.grad.any() for name, value in moe.named_parameters() if "gate." in name)


def test_precision_is_kept(dense_of):
    model, expected = dense_of("qwen2")
    half = copy.deepcopy(model).to(torch.bfloat16)
    moe = quiet(half, target="glm4_moe", experts=4, k=2)
    bias = moe.model.layers[0].mlp.gate.e_score_correction_bias
    assert (moe.dtype, bias.dtype, bias.any().item()) == (torch.bfloat16, torch.float32, False)
    torch.testing.assert_close(moe(ids()).logits.float(), expected, atol=0.1, rtol=0.1)


def test_everything_is_drawn_from_the_seed(dense_of):
    model, _ = dense_of("llama")
    state = torch.get_rng_state()
    first, again, other = (upcycle(model, experts=4, k=2, method="noise", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [dict(one.named_parameters()) for one in (first, again, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    for name in ("gate.weight", "experts.down_proj"):
        assert not torch.equal(*(one[f"model.layers.0.mlp.{name}"] for one in (weights[0], weights[2])))


def test_a_router_without_a_gradient_is_warned_of(dense_of):
    model, _ = dense_of("llama")
    with pytest.warns(UserWarning, match="'copy' makes experts that are alike.*'drop'"):
        upcycle(model, experts=4, k=2)
    with pytest.warns(UserWarning, match="k=1.*use k >= 2"):
        upcycle(model, experts=4, k=1, method="drop")
    for method in ("drop", "noise", "virtual"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            upcycle(model, experts=4, k=2, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_warned_of_is_so(method, dense_of):
    """Copies give the router no gradient beyond rounding; experts that differ do, shards of a copy among them."""
    moe = quiet(dense_of("llama")[0], experts=4, k=2, method=method)
    moe(ids(), labels=ids()).loss.backward()
    sizes = [float(layer.mlp.gate.weight.grad.abs().max()) for layer in moe.model.layers]
    assert max(sizes) < 1e-6 if method == "copy" else min(sizes) > 1e-5, sizes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target": "mixtrel"}, ["'mixtrel'", "mixtral", "auto"]),
        ({"method": "clone"}, ["'clone'", "copy, drop, noise, virtual"]),
        ({"router": "hash"}, ["'hash'", "principal, prompts, random"]),
        ({"experts": 1, "k": 1}, ["experts=1"]),
        ({"k": 5}, ["k=5"]),
        ({"ratio": 0.5}, ["'copy' takes no ratio"]),
        ({"method": "drop", "ratio": 1.5}, ["ratio", "1.5"]),
        ({"method": "noise", "ratio": -1}, ["ratio", "-1"]),
        ({"granularity": 2}, ["'copy'", "granularity"]),
        ({"method": "virtual", "experts": 6, "k": 4}, ["experts (6)", "granularity=4"]),
        ({"method": "virtual", "granularity": 4}, ["k (2)", "granularity=4"]),
        ({"method": "virtual", "experts": 10, "k": 5}, ["hidden width (48)", "granularity=5"]),
        ({"method": "virtual", "granularity": 0}, ["granularity", "0"]),
        ({"scale": 0.0}, ["scale"]),
        ({"layers": "some"}, ["layers='some'"]),
        ({"layers": "last4"}, ["out of range", "3 layers"]),
        ({"layers": [3]}, ["[3]", "3 layers"]),
        ({"layers": []}, ["layers=[]"]),
        ({"calibration": [ids()]}, ["'random'", "calibration"]),
        ({"router": "principal"}, ["'principal'", "calibration"]),
        ({"router": "prompts", "calibration": [{"input_ids": ids()}]}, ["'prompts'", "4", "got 1"]),
        ({"router": "principal", "calibration": ["text"]}, ["a batch must be", "got str"]),
        ({"router": "principal", "calibration": []}, ["calibration", "there is none"]),
        ({"router": "principal", "calibration": [{"input_ids": ids()[:1, :2]}]}, ["2 directions"]),
    ],
)
def test_mistakes(options, words, dense_of, user_error):
    model, _ = dense_of("llama")
    with user_error(*words):
        upcycle(model, **{"experts": 4, "k": 2, **options})


def test_models_that_cannot_be_upcycled(dense_of, user_error):
    with user_error("MixtralForCausalLM", "8 experts already"):
        upcycle(FAMILIES["mixtral"](), experts=4, k=2)
    with user_error("Linear", "llama, mistral, qwen2, qwen3", "spectralmoe.vision.replace_mlp"):
        upcycle(torch.nn.Linear(4, 4), experts=4, k=2)
    with user_error("LlamaModel", "LlamaForCausalLM"):
        upcycle(dense_of("llama")[0].model, experts=4, k=2)
    with user_error("mlp_bias", "replace_mlp"):
        upcycle(dense_model("llama", mlp_bias=True)[0], experts=4, k=2)
    with user_error("LlamaForCausalLM", "qwen2_moe: its attention has no bias at its output", "replace_mlp"):
        upcycle(dense_model("llama", attention_bias=True)[0], experts=4, k=2)
    packed = copy.deepcopy(dense_of("llama")[0])
    packed.model.layers[0].mlp.gate_proj.weight = torch.nn.Parameter(torch.zeros(8, 1).byte(), requires_grad=False)
    with user_error("quantised"):
        upcycle(packed, experts=4, k=2)
