"""Router-only mode: layers found in safetensors files of all layouts, their values, what is said of broken files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import output_of
from safetensors.torch import save_file
from torch import nn

import spectralmoe
from spectralmoe import Balanced, FeedForward, LinearScorer, ModuleExperts, MoE, Router, TopK
from spectralmoe.checkpoints.inspection import expert_gram, inspect_checkpoint
from spectralmoe.checkpoints.layers import read_checkpoint
from spectralmoe.report.documents import as_document

E, D, F = 4, 8, 6
PARTS = ("gate_proj", "up_proj", "down_proj")


def numbered(prefix="model.layers.0.mlp", gate="gate.weight", names=("gate_proj", "up_proj", "down_proj"), e=E):
    """Tensors of a layer with one module an expert."""
    found = {f"{prefix}.{gate}": torch.randn(e, D)}
    for i in range(e):
        for name in names:
            shape = (D, F) if name in ("down_proj", "w2", "wo") else (F, D)
            found[f"{prefix}.experts.{i}.{name}.weight"] = torch.randn(shape)
    return found


def stacked(prefix="model.layers.0.mlp", gate="gate.weight"):
    """Tensors of a layer as transformers holds it."""
    return {
        f"{prefix}.{gate}": torch.randn(E, D),
        f"{prefix}.experts.gate_up_proj": torch.randn(E, 2 * F, D),
        f"{prefix}.experts.down_proj": torch.randn(E, D, F),
    }


def written(folder, tensors, config=None, name="model.safetensors"):
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def vectors(tensors, pick):
    """(E, P): what ``pick(e)`` names, flattened, in float64."""
    return torch.stack([torch.cat([tensors[key].double().flatten() for key in pick(e)]) for e in range(E)])


def cosines(rows):
    """By definition, pair by pair."""
    return torch.tensor([[float(a @ b / a.norm() / b.norm()) for b in rows] for a in rows])


def check_values(layer, matrix, rows, close):
    close(layer.matrix(), matrix)
    gram, size = expert_gram(layer)
    assert size == rows.shape[1]
    torch.testing.assert_close(gram, rows @ rows.T, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------------------------- layouts

LAYOUTS = {
    "mixtral": lambda: numbered("model.layers.0.block_sparse_moe", names=("w1", "w2", "w3")),
    "qwen": numbered,
    "nested": lambda: numbered("model.language_model.layers.0.mlp"),
    "stacked": stacked,
    "llama4": lambda: stacked("language_model.model.layers.0.feed_forward", "router.weight"),
    "gemma": lambda: {**stacked("model.layers.0", "router.proj.weight"), "model.layers.0.router.scale": torch.ones(D)},
    "hunyuan": lambda: numbered(gate="gate.wg.weight"),
    "nllb": lambda: {
        key.replace("experts.", "experts.expert_"): value
        for key, value in numbered("model.layers.0.ffn", "router.classifier.weight", ("fc1", "wo")).items()
    },
    "granite": lambda: {
        "model.layers.0.block_sparse_moe.router.layer.weight": torch.randn(E, D),
        "model.layers.0.block_sparse_moe.input_linear.weight": torch.randn(E, 2 * F, D),
        "model.layers.0.block_sparse_moe.output_linear.weight": torch.randn(E, D, F),
    },
    "jetmoe": lambda: {
        "model.layers.0.self_attention.experts.router.layer.weight": torch.randn(E, D),
        "model.layers.0.self_attention.experts.input_linear.weight": torch.randn(E, F, D),
        "model.layers.0.self_attention.experts.output_linear.weight": torch.randn(E, D, F),
        "model.layers.0.self_attention.experts.bias": torch.randn(D),
    },
    "dbrx": lambda: {
        "transformer.blocks.0.ffn.router.layer.weight": torch.randn(E, D),
        "transformer.blocks.0.ffn.experts.mlp.w1": torch.randn(E * F, D),
        "transformer.blocks.0.ffn.experts.mlp.w2": torch.randn(E * F, D),
    },
}
ROUTERS = re.compile(r"router|\.gate\.")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path, close):
    tensors = LAYOUTS[layout]()
    others = {
        "model.embed_tokens.weight": torch.randn(20, D),
        "model.layers.0.self_attn.gate.weight": torch.randn(3, D),
        "model.layers.0.self_attn.conv.weight": torch.randn(E, 1, 3),
        "model.layers.0.mlp.shared_expert.gate_proj.weight": torch.randn(E, D),
        "model.layers.0.mlp.shared_expert_gate.weight": torch.randn(1, D),
        "model.layers.0.mlp.shared_experts.0.up_proj.weight": torch.randn(E, D),
        "model.layers.1.mlp.gate_proj.weight": torch.randn(F, D),
    }
    (layer,) = read_checkpoint(written(tmp_path, {**others, **tensors})).layers
    assert (layer.number, layer.stack, layer.num_experts, layer.width, layer.note) == (0, "", E, D, None)
    router = next(key for key, value in tensors.items() if ROUTERS.search(key) and value.dim() == 2)
    assert router.startswith(f"{layer.name}.")
    own = [key for key in tensors if not ROUTERS.search(key) and not key.endswith("experts.bias")]
    if any(re.search(r"experts\.(expert_)?0\.", key) for key in own):
        rows = vectors(tensors, lambda e: [key for key in own if re.search(rf"experts\.(expert_)?{e}\.", key)])
    else:
        rows = torch.cat([tensors[key].double().reshape(E, -1) for key in own], 1)
    check_values(layer, tensors[router], rows, close)


def test_correction_bias_is_not_a_bias_of_the_logits(tmp_path):
    correction, bias = torch.randn(E), torch.randn(E)
    deepseek = {**stacked(), "model.layers.0.mlp.gate.e_score_correction_bias": correction}
    oss = {**stacked("model.layers.1.mlp", "router.weight"), "model.layers.1.mlp.router.bias": bias}
    lfm = {**stacked("model.layers.2.feed_forward"), "model.layers.2.feed_forward.expert_bias": correction}
    first, second, third = read_checkpoint(written(tmp_path, {**deepseek, **oss, **lfm})).layers
    assert first.bias() is None
    assert first.correction_bias().equal(correction)
    assert second.bias().equal(bias)
    assert second.correction_bias() is None
    assert third.correction_bias().equal(correction)


def test_biases_of_stacked_experts_belong_to_the_experts(tmp_path):
    tensors = stacked(gate="router.weight")
    tensors |= {
        "model.layers.0.mlp.experts.gate_up_proj_bias": torch.randn(E, 2 * F),
        "model.layers.0.mlp.experts.down_proj_bias": torch.randn(E, D),
    }
    (layer,) = read_checkpoint(written(tmp_path, tensors)).layers
    assert sum(block.shape[1] for block in layer.expert_vectors()) == 3 * F * D + 2 * F + D


def test_stacks_of_an_encoder_and_a_decoder(tmp_path):
    tensors = {
        **numbered("decoder.block.1.layer.2.mlp", "router.classifier.weight"),
        **numbered("encoder.block.11.layer.1.mlp", "router.classifier.weight"),
        **numbered("encoder.block.3.layer.1.mlp", "router.classifier.weight"),
    }
    layers = read_checkpoint(written(tmp_path, tensors)).layers
    assert [(layer.stack, layer.number) for layer in layers] == [("encoder", 3), ("encoder", 11), ("decoder", 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_kinds_of_numbers(dtype, tmp_path, close):
    tensors = {key: value.to(dtype) for key, value in numbered().items()}
    checkpoint = read_checkpoint(written(tmp_path, tensors))
    assert checkpoint.dtype == str(dtype).removeprefix("torch.")
    assert checkpoint.parameters == sum(t.numel() for t in tensors.values())
    names = ("down_proj", "gate_proj", "up_proj")
    pick = lambda e: [f"model.layers.0.mlp.experts.{e}.{name}.weight" for name in names]  # noqa: E731
    check_values(checkpoint.layers[0], tensors["model.layers.0.mlp.gate.weight"].float(), vectors(tensors, pick), close)


def test_blocks_hold_every_weight_once(tmp_path, monkeypatch):
    tensors = stacked()
    (layer,) = read_checkpoint(written(tmp_path, tensors)).layers
    monkeypatch.setattr("spectralmoe.checkpoints.layers._NUMBERS", 5 * E)
    blocks = list(layer.expert_vectors())
    assert max(block.shape[1] for block in blocks) == 5
    expected = torch.cat(
        [tensors[f"model.layers.0.mlp.experts.{name}"].flatten(1) for name in ("down_proj", "gate_up_proj")], 1
    )
    assert torch.cat(blocks, 1).equal(expected)


# ---------------------------------------------------------------------------------------- files


def shards(folder, lose=None, index=None):
    """The same layer in two shards and an index."""
    tensors = {key: value.contiguous() for key, value in numbered().items()}
    keys = list(tensors)
    halves = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
    for file, own in halves.items():
        save_file({key: tensors[key] for key in own if key != lose}, folder / file)
    places = {key: file for file, own in halves.items() for key in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index or {"metadata": {}, "weight_map": places}))
    return tensors


def test_shards_and_files_without_an_index(tmp_path, close):
    tensors = shards(tmp_path)
    (layer,) = read_checkpoint(tmp_path).layers
    close(layer.matrix(), tensors["model.layers.0.mlp.gate.weight"])
    (tmp_path / "model.safetensors.index.json").unlink()
    assert read_checkpoint(tmp_path).layers[0].num_experts == E


def test_single_file_with_the_config_beside_it(tmp_path):
    written(tmp_path, numbered(), {"text_config": {"num_experts_per_tok": 3}}, name="weights.safetensors")
    checkpoint = read_checkpoint(str(tmp_path / "weights.safetensors"))
    assert (checkpoint.name, checkpoint.layers[0].top_k) == ("weights", 3)


def test_paths_that_are_no_checkpoint(tmp_path, user_error):
    with user_error("no such file or folder", "nowhere"):
        read_checkpoint(tmp_path / "nowhere")
    with user_error("holds no safetensors files", "save_pretrained"):
        read_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with user_error("pytorch_model.bin", "pickles", "never read", "as safetensors"):
            read_checkpoint(path)
    (tmp_path / "notes.txt").write_text("x")
    with user_error("notes.txt", "not a safetensors file"):
        read_checkpoint(tmp_path / "notes.txt")


@pytest.mark.parametrize("keep", [0, 4, 40, -1, -300])
def test_truncated_file(keep, tmp_path, user_error):
    file = written(tmp_path, numbered()) / "model.safetensors"
    os.truncate(file, keep if keep >= 0 else file.stat().st_size + keep)
    with user_error(str(file), "not a whole safetensors file"):
        read_checkpoint(tmp_path)


def test_file_that_shrinks_while_it_is_read(tmp_path, user_error):
    file = written(tmp_path, numbered()) / "model.safetensors"
    (layer,) = read_checkpoint(tmp_path).layers
    os.truncate(file, 8)
    with user_error(str(file), "ends inside"):
        layer.matrix()


def test_not_a_safetensors_file_inside(tmp_path, user_error):
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3)
    with user_error("model.safetensors", "not a whole safetensors file"):
        read_checkpoint(tmp_path)


def test_index_and_shards_that_disagree(tmp_path, user_error):
    shards(tmp_path, lose="model.layers.0.mlp.experts.2.up_proj.weight")
    with user_error("experts.2.up_proj.weight", "lacks", "model.safetensors.index.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with user_error("model-2.safetensors", "lacks", "fetch"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index", [[1], {"weight_map": None}, {"weight_map": {"a": "../a.safetensors"}}, {"weight_map": {"a": 1}}]
)
def test_index_of_another_form(index, tmp_path, user_error):
    shards(tmp_path, index=index)
    with user_error("model.safetensors.index.json", "weight_map"):
        read_checkpoint(tmp_path)


def test_one_tensor_in_two_files(tmp_path, user_error):
    for name in ("a.safetensors", "b.safetensors"):
        written(tmp_path, numbered(), name=name)
    with user_error("a.safetensors", "b.safetensors"):
        read_checkpoint(tmp_path)


def test_broken_config(tmp_path, user_error):
    written(tmp_path, numbered(), config=[])
    with user_error("config.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with user_error("config.json"):
        read_checkpoint(tmp_path)


# ---------------------------------------------------------------------------------------- layers that are not whole


def test_dense_model(tmp_path, user_error):
    dense = {f"model.layers.0.mlp.{name}.weight": torch.randn(F, D) for name in ("gate_proj", "up_proj", "gate")}
    with user_error(str(tmp_path), "no MoE layer", "dense"):
        read_checkpoint(written(tmp_path, dense))


def test_experts_that_lack_tensors(tmp_path, user_error):
    tensors = numbered()
    del tensors["model.layers.0.mlp.experts.3.down_proj.weight"]
    del tensors["model.layers.0.mlp.experts.1.up_proj.weight"]
    with user_error("model.layers.0.mlp", "expert 1 has no up_proj", "expert 3 has no down_proj"):
        read_checkpoint(written(tmp_path, tensors))


def test_a_layer_that_lacks_what_others_have(tmp_path, user_error):
    tensors = {**stacked(), **stacked("model.layers.1.mlp")}
    del tensors["model.layers.1.mlp.experts.down_proj"]
    with user_error("model.layers.1.mlp", "no experts.down_proj"):
        read_checkpoint(written(tmp_path, tensors))


def test_expert_of_another_shape(tmp_path, user_error):
    tensors = numbered()
    tensors["model.layers.0.mlp.experts.2.up_proj.weight"] = torch.randn(F - 1, D)
    with user_error("expert 2 has up_proj.weight of shape [5, 8]", "[6, 8]"):
        read_checkpoint(written(tmp_path, tensors))


@pytest.mark.parametrize("make", [numbered, stacked])
def test_router_with_another_number_of_rows(make, tmp_path, user_error):
    tensors = {**make(), "model.layers.0.mlp.gate.weight": torch.randn(E + 1, D)}
    with user_error("model.layers.0.mlp", "5 rows", "4 experts"):
        read_checkpoint(written(tmp_path, tensors))


@pytest.mark.parametrize("make", [numbered, stacked])
def test_experts_without_a_router(make, tmp_path, user_error):
    tensors = {**make(), **make("model.layers.1.mlp")}
    del tensors["model.layers.1.mlp.gate.weight"]
    with user_error("model.layers.1.mlp.experts", "router"):
        read_checkpoint(written(tmp_path, tensors))


def test_quantised_router(tmp_path, user_error):
    tensors = {**numbered(), "model.layers.0.mlp.gate.weight": torch.zeros(E * D // 2, 1, dtype=torch.uint8)}
    with user_error("model.layers.0.mlp", "gate.weight U8", "floating-point"):
        read_checkpoint(written(tmp_path, tensors))


# ---------------------------------------------------------------------------------------- inspections

QUANTISED = {
    "mxfp4": lambda: {
        "model.layers.0.mlp.router.weight": torch.randn(E, D),
        "model.layers.0.mlp.experts.gate_up_proj_blocks": torch.zeros(E, 2 * F, 1, 4, dtype=torch.uint8),
        "model.layers.0.mlp.experts.gate_up_proj_scales": torch.zeros(E, 2 * F, 1, dtype=torch.uint8),
        "model.layers.0.mlp.experts.gate_up_proj_bias": torch.zeros(E, 2 * F),
    },
    "fp8": lambda: {
        "model.layers.0.mlp.gate.weight": torch.randn(E, D),
        **{
            f"model.layers.0.mlp.experts.{e}.up_proj.weight": torch.zeros(F, D).to(torch.float8_e4m3fn)
            for e in range(E)
        },
        **{f"model.layers.0.mlp.experts.{e}.up_proj.weight_scale_inv": torch.ones(1, 1) for e in range(E)},
    },
    "gptq": lambda: {
        "model.layers.0.mlp.gate.weight": torch.randn(E, D),
        **{f"model.layers.0.mlp.experts.{e}.up_proj.qweight": torch.zeros(1, D, dtype=torch.int32) for e in range(E)},
        **{f"model.layers.0.mlp.experts.{e}.up_proj.scales": torch.ones(1, D) for e in range(E)},
    },
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_experts_are_no_data(kind, tmp_path):
    document = inspect_checkpoint(written(tmp_path, QUANTISED[kind]()))
    (layer,) = document["layers"]
    assert layer["similarity"]["weight_cosine"]["value"] is None
    assert layer["similarity"]["matrices"]["weights"] is None
    assert layer["geometry"]["sigma_1"]["value"] > 0
    assert any("quantised" in note for note in document["data"]["notes"])
    assert document["model"]["parameters"] is None


def test_document(tmp_path):
    tensors = numbered()
    folder = written(
        tmp_path, tensors, {"architectures": ["XForCausalLM"], "model_type": "x", "num_experts_per_tok": 2}
    )
    document = inspect_checkpoint(folder)
    json.dumps(document, allow_nan=False)
    assert document["model"] == {
        "name": tmp_path.name,
        "source": str(tmp_path),
        "library": "transformers",
        "class": "XForCausalLM",
        "mode": "router-only",
        "dtype": "float32",
        "parameters": E * D * (3 * F + 1),
        "groups": None,
    }
    (layer,) = document["layers"]
    assert [layer[key] for key in ("name", "layer", "stack", "experts", "top_k", "width")] == [
        "model.layers.0.mlp", 0, "", E, 2, D,
    ]  # fmt: skip
    assert [layer[key] for key in ("load", "entropy", "stability", "association")] == [None] * 4
    matrix = tensors["model.layers.0.mlp.gate.weight"].double()
    sigma = torch.linalg.svdvals(matrix)
    shares = sigma / sigma.sum()
    geometry = layer["geometry"]
    assert geometry["sigma_1"]["value"] == pytest.approx(float(sigma[0]), rel=1e-5)
    assert geometry["stable_rank"]["value"] == pytest.approx(float(sigma.square().sum() / sigma[0] ** 2), rel=1e-5)
    assert geometry["effective_rank"]["value"] == pytest.approx(float((-shares * shares.log()).sum().exp()), rel=1e-5)
    assert geometry["spectrum"] == pytest.approx(sigma.tolist(), rel=1e-5)
    assert geometry["jacobian"]["value"] is None
    rows = cosines(matrix)
    upper = [(i, j) for j in range(E) for i in range(j)]
    assert geometry["row_cosine"]["value"] == pytest.approx(
        sum(abs(float(rows[p])) for p in upper) / len(upper), abs=1e-5
    )
    torch.testing.assert_close(torch.tensor(layer["similarity"]["matrices"]["rows"]), rows, rtol=0, atol=1e-4)
    names = ("down_proj", "gate_proj", "up_proj")
    weights = cosines(vectors(tensors, lambda e: [f"model.layers.0.mlp.experts.{e}.{name}.weight" for name in names]))
    torch.testing.assert_close(torch.tensor(layer["similarity"]["matrices"]["weights"]), weights, rtol=0, atol=1e-4)
    mean = layer["similarity"]["weight_cosine"]
    assert mean["value"] == pytest.approx(sum(float(weights[p]) for p in upper) / len(upper), abs=1e-5)
    assert (mean["data"], mean["unit"]) == (E * 3 * F * D, "weights")
    for name in ("output_cos2", "cka", "subspace"):
        assert layer["similarity"][name]["value"] is None


def test_copied_experts_are_found_and_others_are_not(tmp_path):
    tensors = {**stacked(), **stacked("model.layers.1.mlp"), **numbered("model.decoder.2.mlp")}
    for name in ("gate_up_proj", "down_proj"):
        tensors[f"model.layers.1.mlp.experts.{name}"][3] = tensors[f"model.layers.1.mlp.experts.{name}"][1]
    document = inspect_checkpoint(written(tmp_path, {key: t.bfloat16() for key, t in tensors.items()}))
    table = document["layers"][1]["similarity"]["matrices"]["weights"]
    assert table[1][3] == table[3][1] == 1.0
    found = [item for item in document["findings"] if item["kind"] == "homogeneous"]
    assert [item["layer"] for item in found] == [1]


def test_gates_alone(tmp_path):
    tensors = numbered()
    whole = inspect_checkpoint(written(tmp_path, tensors))
    gates = inspect_checkpoint(tmp_path, experts=False)
    assert gates["layers"][0]["geometry"] == whole["layers"][0]["geometry"]
    assert gates["layers"][0]["similarity"]["weight_cosine"]["value"] is None
    assert "the experts were not read" in gates["data"]["notes"]


@pytest.mark.parametrize("where", ["gate.weight", "experts.2.up_proj.weight"])
def test_weights_that_are_not_finite(where, tmp_path):
    tensors = numbered()
    tensors[f"model.layers.0.mlp.{where}"][0, 0] = float("nan")
    document = inspect_checkpoint(written(tmp_path, tensors))
    json.dumps(document, allow_nan=False)
    assert document["layers"][0]["finite"] is False
    assert any(item["kind"] == "not_finite" for item in document["findings"])


# ---------------------------------------------------------------------------------------- folders of this library


def test_own_folder(tmp_path, make_scorer, scorer_name, close):
    layer = MoE(Router(make_scorer(scorer_name, D, E), Balanced(2)), FeedForward(E, D, F, bias=True))
    layer.router.selector.bias.copy_(torch.randn(E))
    spectralmoe.save(nn.Sequential(nn.Linear(D, D), layer), tmp_path)
    (found,) = read_checkpoint(tmp_path).layers
    assert (found.name, found.num_experts, found.width, found.top_k) == ("1", E, D, 2)
    matrix = layer.router.scorer.matrix
    assert (found.matrix() is None) == (matrix is None)
    if matrix is not None:
        close(found.matrix(), matrix.detach())
    assert found.correction_bias().equal(layer.router.selector.bias)
    rows = torch.stack(
        [torch.cat([v.flatten() for v in layer.experts.expert_parameters(e).values()]) for e in range(E)]
    )
    gram, _ = expert_gram(found)
    torch.testing.assert_close(gram, (rows @ rows.T).double().detach(), rtol=1e-5, atol=1e-5)
    inspect_checkpoint(tmp_path)


def test_own_modules_as_experts(tmp_path, close):
    layer = MoE(Router(LinearScorer(D, E), TopK(1)), ModuleExperts([nn.Linear(D, D) for _ in range(E)]))
    spectralmoe.save(layer, tmp_path)
    (found,) = read_checkpoint(tmp_path).layers
    close(found.matrix(), layer.router.scorer.weight.detach())
    assert sum(block.shape[1] for block in found.expert_vectors()) == D * D + D


def test_own_router_with_zero_experts(tmp_path, close):
    layer = MoE(Router(LinearScorer(D, E + 2), TopK(1)), FeedForward(E, D, F))
    spectralmoe.save(layer, tmp_path)
    (found,) = read_checkpoint(tmp_path).layers
    assert found.num_experts == E
    close(found.matrix(), layer.router.scorer.weight.detach())


def test_own_config_that_describes_another_router(tmp_path, user_error):
    layer = MoE(Router(LinearScorer(D, E), TopK(1)), FeedForward(E, D, F))
    spectralmoe.save(layer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layers"][""]["router"]["scorer"]["num_experts"] = E + 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with user_error("config.json", "another router"):
        read_checkpoint(tmp_path).layers[0].matrix()


# ---------------------------------------------------------------------------------------- Hugging Face models

FAMILIES = [
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "llama4", "granitemoe", "switch",
]  # fmt: skip


def moe_modules(model):
    """Name -> module that holds a router and its experts, in the loaded model."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "experts") and (hasattr(module, "gate") or hasattr(module, "router"))
    }


def in_memory(module):
    """Routing matrix and expert vectors (E, P) of a module of transformers."""
    router = getattr(module, "gate", None) or module.router
    matrix = (router.classifier if hasattr(router, "classifier") else router).weight
    if isinstance(module.experts, nn.ModuleDict):
        return matrix, torch.stack([torch.cat([p.flatten() for p in e.parameters()]) for e in module.experts.values()])
    return matrix, torch.cat([p.flatten(1) for p in module.experts.parameters()], 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["hub", "memory", "shards"])
def test_families(family, form, tmp_path, close):
    pytest.importorskip("transformers")
    families = pytest.importorskip("families")
    model = families.FAMILIES[family]()
    if form == "memory":
        written(tmp_path, {key: value.clone() for key, value in model.state_dict().items()}, model.config.to_dict())
    else:
        model.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if form == "shards" else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (form == "shards")
    checkpoint, modules = read_checkpoint(tmp_path), moe_modules(model)
    assert len(checkpoint.layers) == len(modules) > 0
    k = getattr(model.config, "num_experts_per_tok", None)
    for layer, (name, module) in zip(checkpoint.layers, modules.items(), strict=True):
        matrix, rows = in_memory(module)
        assert (layer.num_experts, layer.width) == tuple(matrix.shape)
        assert (layer.number, layer.top_k) == (int(re.search(r"\d+", name)[0]), k)
        assert layer.stack == (name.split(".")[0] if family == "switch" else "")
        close(layer.matrix(), matrix.detach())
        gram, size = expert_gram(layer)
        assert size == rows.shape[1]
        torch.testing.assert_close(gram, (rows @ rows.T).double().detach(), rtol=1e-4, atol=1e-4)
        correction = getattr(getattr(module, "gate", None), "e_score_correction_bias", None)
        assert (layer.correction_bias() is None) == (correction is None)
        if correction is not None:
            close(layer.correction_bias(), correction)
        assert (layer.bias() is not None) == (family == "gpt_oss")


def test_without_transformers(tmp_path):
    written(tmp_path, numbered())
    code = (
        "import sys; from spectralmoe.checkpoints.inspection import inspect_checkpoint;"
        "inspect_checkpoint(sys.argv[1]); assert 'transformers' not in sys.modules"
    )
    output_of(code, tmp_path)


# ---------------------------------------------------------------------------------------- memory

MEASURE = """
import sys, threading, time
import torch
torch.set_num_threads(1)

def anonymous():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

before, peak, done = anonymous(), [0.0], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
from spectralmoe.checkpoints.inspection import inspect_checkpoint
document = inspect_checkpoint(sys.argv[1])
done.set(); thread.join()
cosines = [layer["similarity"]["matrices"]["weights"][0][1] for layer in document["layers"]]
print(max(peak[0], anonymous()) - before, *cosines)
"""


def sparse_checkpoint(file: Path, gigabytes: float) -> None:
    """Holes with some ones in each expert, which take no disk: 8 stacked experts, then 32 separate ones."""
    stacked, separate = int(2816 * gigabytes), int(704 * gigabytes)
    shapes = {"layers.0.moe.gate.weight": (8, 4096), "layers.1.mlp.gate.weight": (32, 4096)}
    shapes |= {
        "layers.0.moe.experts.gate_up_proj": (8, 2 * stacked, 4096),
        "layers.0.moe.experts.down_proj": (8, 4096, stacked),
    }
    shapes |= {f"layers.1.mlp.experts.{e}.w{j}.weight": (separate, 4096) for e in range(32) for j in (1, 2, 3)}
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 2 * torch.Size(shape).numel()
        header[name], at = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        start = opened.tell()
        opened.truncate(start + at)
        for entry in header.values():
            first, last = entry["data_offsets"]
            for place in range(first, last, (last - first) // (8 if len(entry["shape"]) == 3 else 1)):
                opened.seek(start + place)
                opened.write(b"\x80\x3f" * 64)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.full
@pytest.mark.parametrize("gigabytes", [0.5, 4])
def test_gigabytes_in_little_memory(gigabytes, tmp_path):
    file = tmp_path / "model.safetensors"
    sparse_checkpoint(file, gigabytes)
    assert file.stat().st_size > 1e9 * gigabytes
    result = subprocess.run([sys.executable, "-c", MEASURE, str(file)], capture_output=True, text=True, check=True)
    above, *cosines = map(float, result.stdout.split())
    assert above < 300
    assert cosines == [1.0, 1.0]


def test_huge_and_tiny_weights_are_finite_and_not_empty(tmp_path):
    tensors = numbered()
    for e, size in enumerate((1e30, 1e-30, 1.0, 0.0)):
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"model.layers.0.mlp.experts.{e}.{name}.weight"] *= size
    document = inspect_checkpoint(written(tmp_path, tensors))
    layer = document["layers"][0]
    assert (layer["finite"], layer["empty_experts"]) == (True, [3])
    assert {item["kind"] for item in document["findings"]} == {"empty_expert", "no_data"}
    rows = [
        torch.cat([tensors[f"model.layers.0.mlp.experts.{e}.{n}.weight"].double().flatten() for n in PARTS])
        for e in range(3)
    ]
    found = torch.tensor([row[:3] for row in layer["similarity"]["matrices"]["weights"][:3]])
    torch.testing.assert_close(found, cosines(rows), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gate", [torch.zeros(E, D), torch.ones(E, 1) * torch.randn(D), torch.empty(E, 0)])
def test_a_gate_that_tells_nothing_apart(gate, tmp_path):
    document = inspect_checkpoint(written(tmp_path, {**numbered(), "model.layers.0.mlp.gate.weight": gate}))
    assert "no_router" in {item["kind"] for item in document["findings"]}


def test_what_weights_do_not_tell_is_said(tmp_path):
    document = inspect_checkpoint(written(tmp_path, numbered()))
    assert [item["kind"] for item in document["findings"]] == ["no_data"]


# ---------------------------------------------------------------------------------------- other families, other files


def test_a_bias_with_two_dimensions_is_no_matrix(tmp_path, close):
    """Ernie keeps the bias of the choice as (1, E), others a bias or a scale as (E, 1)."""
    tensors, prefix = numbered(), "model.layers.0.mlp"
    correction, bias = torch.randn(1, E), torch.randn(E, 1)
    tensors[f"{prefix}.moe_statics.e_score_correction_bias"] = correction
    tensors[f"{prefix}.gate.bias"] = bias
    tensors[f"{prefix}.gate.temperature"] = torch.ones(1, E)
    (layer,) = read_checkpoint(written(tmp_path, tensors)).layers
    close(layer.matrix(), tensors[f"{prefix}.gate.weight"])
    assert layer.correction_bias().equal(correction[0])
    assert layer.bias().equal(bias[:, 0])


@pytest.mark.parametrize("make", [numbered, stacked])
def test_zero_experts(make, tmp_path, close):
    """A router with choices that are no experts, where the config tells how many experts there are."""
    prefix = "model.layers.0.mlp"
    gate, bias = torch.randn(E + 2, D), torch.randn(E + 2)
    tensors = {**make(), f"{prefix}.gate.weight": gate, f"{prefix}.gate.e_score_correction_bias": bias}
    if make is stacked:  # as LongCat holds one of its tensors
        tensors[f"{prefix}.experts.gate_up_proj"] = torch.randn(E + 2, 2 * F, D)
    folder = written(tmp_path, tensors, {"n_routed_experts": E, "zero_expert_num": 2, "moe_topk": 2})
    checkpoint = read_checkpoint(folder)
    (layer,) = checkpoint.layers
    assert (layer.num_experts, layer.width, layer.top_k) == (E, D, 2)
    assert "the router has 2 rows more than there are experts" in checkpoint.notes[0]
    assert layer.correction_bias().equal(bias)
    if make is stacked:
        names = (f"{prefix}.experts.down_proj", f"{prefix}.experts.gate_up_proj")
        rows = torch.cat([tensors[name][:E].double().flatten(1) for name in names], 1)
    else:
        rows = vectors(tensors, lambda e: [f"{prefix}.experts.{e}.{n}.weight" for n in PARTS])
    check_values(layer, gate, rows, close)
    document = inspect_checkpoint(folder)
    shown = torch.tensor(document["layers"][0]["similarity"]["matrices"]["rows"])
    torch.testing.assert_close(shown, cosines(gate[:E].double()), rtol=0, atol=1e-4)
    assert "the router has 2 rows more" in document["data"]["notes"][1]
    as_document(document, "x")  # the page takes it


PACKED_GATES = {
    "awq": {
        "qweight": torch.zeros(D, 1, dtype=torch.int32),
        "scales": torch.ones(2, E),
        "qzeros": torch.zeros(2, 1).int(),
    },
    "compressed-tensors": {
        "weight_packed": torch.zeros(E, 1, dtype=torch.int32),
        "weight_scale": torch.ones(E, 2),
        "weight_shape": torch.tensor([E, D]),
    },
    "bitsandbytes 4 bit": {"weight": torch.zeros(E * D // 2, 1).byte(), "weight.absmax": torch.ones(1)},
    "bitsandbytes 8 bit": {"weight": torch.zeros(E, D, dtype=torch.int8), "SCB": torch.ones(E)},
    "fp8": {"weight": torch.ones(E, D).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)},
    "mxfp4": {"weight_blocks": torch.zeros(E, 1, 4).byte(), "weight_scales": torch.zeros(E, 1).byte()},
    "hadamard": {"qweight": torch.zeros(E, 4).byte(), "forward_hadamard_matrix": torch.randn(D, D)},
    "trellis": {
        "trellis": torch.zeros(1, 1, 8, dtype=torch.int16),
        "suh": torch.ones(D),
        "codebook": torch.randn(E, D),
    },
}


@pytest.mark.parametrize("kind", PACKED_GATES)
def test_a_quantised_gate_is_called_so_and_never_read_as_numbers(kind, tmp_path, user_error):
    tensors = numbered()
    del tensors["model.layers.0.mlp.gate.weight"]
    tensors |= {f"model.layers.0.mlp.gate.{name}": value for name, value in PACKED_GATES[kind].items()}
    with user_error("model.layers.0.mlp", "its router is quantised"):
        read_checkpoint(written(tmp_path, tensors))


def test_a_table_of_indices_beside_the_gate_is_not_quantised(tmp_path, close):
    tensors = {**numbered(), "model.layers.0.mlp.gate.tid2eid": torch.zeros(20, 2, dtype=torch.int64)}
    (layer,) = read_checkpoint(written(tmp_path, tensors)).layers
    close(layer.matrix(), tensors["model.layers.0.mlp.gate.weight"])


QUANTISED_EXPERTS = {
    "other bits an expert": {
        f"model.layers.0.mlp.experts.{e}.up_proj.{name}": value
        for e in range(E)
        for name, value in (
            ("qweight", torch.zeros(1 + e % 2, D).int()),
            ("zeros" if e else "scales", torch.ones(1, D)),
        )
    },
    "stacked, E not in front": {
        "model.layers.0.mlp.experts.gate_up_proj.qweight": torch.zeros(2, E, F).int(),
        "model.layers.0.mlp.experts.gate_up_proj.scales": torch.ones(2, E, F),
    },
    "8 bits with scales in front": {
        "model.layers.0.mlp.experts.down_proj": torch.ones(E, D, F).to(torch.float8_e4m3fn),
        "model.layers.0.mlp.experts.down_proj_scale": torch.ones(1, E, 1),
    },
}


@pytest.mark.parametrize("kind", QUANTISED_EXPERTS)
def test_no_layout_of_quantised_experts_is_called_lost(kind, tmp_path):
    tensors = {"model.layers.0.mlp.gate.weight": torch.randn(E, D), **QUANTISED_EXPERTS[kind]}
    checkpoint = read_checkpoint(written(tmp_path, tensors))
    (layer,) = checkpoint.layers
    assert (layer.num_experts, layer.width) == (E, D)
    assert "quantised" in layer.note
    assert list(layer.expert_vectors()) == []
    assert checkpoint.parameters is None


def test_quantised_experts_with_a_gap(tmp_path, user_error):
    tensors = QUANTISED["gptq"]()
    for name in ("qweight", "scales"):
        del tensors[f"model.layers.0.mlp.experts.1.up_proj.{name}"]
    with user_error("no tensor of expert 1"):
        read_checkpoint(written(tmp_path, tensors))


@pytest.mark.parametrize("config", [{"base_model_name_or_path": "me/base"}, {}])
def test_an_adapter_is_called_that(tmp_path, user_error, config):
    adapter = {"base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight": torch.randn(2, D)}
    folder = written(tmp_path, adapter, name="adapter_model.safetensors")
    with user_error("adapter of PEFT"):
        read_checkpoint(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with user_error("adapter of PEFT", *config.values()):
        read_checkpoint(folder)
    written(folder, numbered())  # with its model beside it
    assert read_checkpoint(folder).layers[0].num_experts == E


EXPERTS_IN_CONFIG = [
    {"num_experts": 16, "is_moe": True},
    {"text_config": {"n_routed_experts": 8}},
    {"ffn_config": {"moe_num_experts": 8}},
    {"thinker_config": {"text_config": {"num_local_experts": 4}}, "quantization_config": {}},
]


@pytest.mark.parametrize("config", EXPERTS_IN_CONFIG)
def test_a_family_of_another_kind_is_not_called_dense(config, tmp_path, user_error):
    tensors = {"model.layers.0.mlp.down_embed.weight": torch.randn(16, D)}
    with user_error("config.json names experts", "_experts = ", "load the model"):
        read_checkpoint(written(tmp_path, tensors, config))


@pytest.mark.parametrize("config", [{"num_experts": 16384, "is_moe": False}, {"num_local_experts": 0}, {"n": 1}])
def test_a_dense_model_of_a_family_with_experts(config, tmp_path, user_error):
    with user_error("dense"):
        read_checkpoint(written(tmp_path, {"model.layers.0.mlp.up_proj.weight": torch.randn(F, D)}, config))


def test_a_whole_file_beside_an_index_was_left_by_an_earlier_save(tmp_path, close):
    tensors = shards(tmp_path)
    written(tmp_path, numbered(e=2))
    checkpoint = read_checkpoint(tmp_path)
    close(checkpoint.layers[0].matrix(), tensors["model.layers.0.mlp.gate.weight"])
    assert "model.safetensors beside the shards" in checkpoint.notes[0]
    assert checkpoint.notes[0] in inspect_checkpoint(tmp_path)["data"]["notes"]
    for file in tmp_path.glob("model-*"):  # now the index is the older one
        file.unlink()
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.layers[0].num_experts == 2
    assert "names no file that is there" in checkpoint.notes[0]


@pytest.mark.parametrize("name", ["/etc/a.safetensors", "../a.safetensors", "..", "", "below/a.safetensors"])
def test_an_index_that_leaves_its_folder(name, tmp_path, user_error):
    shards(tmp_path, index={"weight_map": {"a": name}})
    with user_error("model.safetensors.index.json", "weight_map"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_names_that_no_file_system_has(name, tmp_path, user_error):
    with user_error():
        read_checkpoint(tmp_path / name)
    shards(tmp_path, index={"weight_map": {"a": name}})
    with user_error("lacks"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        (10**9).to_bytes(8, "little") + b"{}",
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
    ],
)
def test_headers_that_are_none(content, tmp_path, user_error):
    (tmp_path / "model.safetensors").write_bytes(content)
    with user_error("model.safetensors", "not a whole safetensors file"):
        read_checkpoint(tmp_path)


def test_a_config_with_a_byte_order_mark_and_nan(tmp_path):
    written(tmp_path, numbered())
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"num_experts_per_tok": 2, "eps": NaN, "num_experts": NaN}')
    assert read_checkpoint(tmp_path).layers[0].top_k == 2


def test_links_as_a_cache_of_the_hub_keeps_them(tmp_path, close):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    tensors = numbered()
    written(tmp_path / "blobs", tensors, name="1234")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/1234")
    (layer,) = read_checkpoint(tmp_path / "snapshot").layers
    close(layer.matrix(), tensors["model.layers.0.mlp.gate.weight"])


def test_a_file_that_is_replaced_while_it_is_read(tmp_path, user_error):
    (layer,) = read_checkpoint(written(tmp_path, numbered())).layers
    written(tmp_path, numbered())
    with user_error("was written while it was read"):
        layer.matrix()


def test_own_folder_of_a_save_that_was_killed(tmp_path, close):
    """config.json is new, the weights have not got their plain name yet."""
    layers = [MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, F)) for _ in range(2)]
    spectralmoe.save(layers[0], tmp_path)
    old = (tmp_path / "model.safetensors").read_bytes()
    spectralmoe.save(layers[1], tmp_path)
    digest = json.loads((tmp_path / "config.json").read_text())["sha256"]
    (tmp_path / "model.safetensors").rename(tmp_path / f".{digest}.spectralmoe-weights")
    (tmp_path / "model.safetensors").write_bytes(old)
    close(read_checkpoint(tmp_path).layers[0].matrix(), layers[1].router.scorer.matrix.detach())
