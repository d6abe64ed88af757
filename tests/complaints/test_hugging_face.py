"""Complaints about the models of transformers: what they still do, and that the instruments see it.

Threads: transformers #39203, #44242, #44243, #44274, #44284, #44586, #45120, #45131, #46743, #48911; unsloth #4812;
torchtitan #1246; minimind #858; Megatron-LM #1330, #1984, #5844.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from spectralmoe.checkpoints.layers import read_checkpoint
from spectralmoe.hf.language import run, training_facts
from spectralmoe.hf.load import load_transformers
from spectralmoe.hf.watch import watch_transformers
from spectralmoe.instruments.inspector import Inspector
from spectralmoe.instruments.problems import find_problems

pytest.importorskip("transformers")

import families
from safetensors.torch import load_file, save_file


def problems(model, *batches):
    """The kinds of findings of the whole model, and of each layer by its number."""
    with watch_transformers(model) as seen, torch.no_grad():
        inspector = Inspector(seen.layers)
        for inputs in batches or [families.batch(model, 4, 64)]:
            model(**inputs)
            inspector.add(seen.drain())
    document = {"model": {"training": training_facts(model)}, "layers": inspector.layers()}
    found: dict[int | None, set[str]] = {None: set(), **{layer["layer"]: set() for layer in document["layers"]}}
    for item in find_problems(document):
        found[item["layer"]].add(item["kind"])
    return found


def routers(model):
    with watch_transformers(model) as seen:
        return [layer.router for layer in seen.layers]


def router_gradients(model):
    """Of the task loss alone: (largest entry of the routers' gradients, of the experts')."""
    inputs = families.batch(model)
    loss = nn.functional.cross_entropy(
        model(**inputs).logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()
    )
    model.zero_grad()
    loss.backward()
    gates = [p.grad for router in routers(model) for p in router.parameters()]
    experts = [p.grad for name, p in model.named_parameters() if ".experts." in name]
    return [max(float(grad.abs().max()) for grad in grads) for grads in (gates, experts)]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "olmoe", "granitemoe"])
def test_transformers_44242_a_balance_loss_that_is_off_is_found(name):
    """transformers #44242: A coefficient is set, the model trains, and there is no balance loss until an output flag is
    set.

    The model still does that; ``inspect`` says so, and is quiet once the flag is set or the coefficient is 0.
    """
    for changes, on in ({}, False), ({"output_router_logits": True}, True), ({"router_aux_loss_coef": 0.0}, False):
        model = families.build(name, **changes)
        inputs = families.batch(model)
        found = model(**inputs, labels=inputs["input_ids"])
        assert (found.aux_loss is not None) == on
        assert ("balance_off" in problems(model)[None]) == (not changes)


@pytest.mark.parametrize("name", ["llama4", "deepseek_v3"])
def test_transformers_44242_a_family_without_the_loss_is_found(name):
    """transformers #44242: The same where no flag helps: a coefficient or a selection bias that nothing acts on."""
    assert "balance_off" in problems(families.build(name))[None]


def test_transformers_45120_probabilities_under_the_name_of_logits(close):
    """transformers #45120: Routers returned probabilities as logits; the balance loss took their
    softmax once more and went flat.

    A router changed to do so is found, with the loss that is wrong by it; the routing that is read is the true one.
    """
    model = families.build("mixtral", output_router_logits=True)
    inputs = families.batch(model, 4, 64)
    with watch_transformers(model) as seen, torch.no_grad():
        model(**inputs)
        sound = seen.drain()
    assert not {"probabilities_as_logits", "double_softmax"} & set().union(*problems(model, inputs).values())
    for router in routers(model):
        forward = type(router).forward
        after = {"forward": lambda self, x, forward=forward: ((found := forward(self, x))[0].softmax(-1), *found[1:])}
        router.__class__ = type("Changed", (type(router),), after)
    found = problems(model, inputs)
    assert "double_softmax" in found.pop(None)
    assert all("probabilities_as_logits" in kinds for kinds in found.values())
    with watch_transformers(model) as seen, torch.no_grad():
        model(**inputs)
        for one, two in zip(seen.drain(), sound, strict=True):
            assert torch.equal(one.routing.indices, two.routing.indices)
            close(one.routing.probs, two.routing.probs)


def test_transformers_39203_a_model_with_dense_layers():
    """transformers #39203: ``output_router_logits=True`` failed on a Qwen3-MoE some of whose layers are dense.

    They are passed over, and the others keep the model's own numbers; the counts are those of a router on its own.
    """
    model = families.build("qwen3_moe", decoder_sparse_step=1, mlp_only_layers=[0, 2])
    gate, given = model.model.layers[3].mlp.gate, []
    gate.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    with watch_transformers(model) as seen, torch.no_grad():
        model(**families.batch(model))
        calls = seen.drain()
    assert [call.layer.number for call in calls] == [1, 3]
    indices = (given[0].reshape(-1, 32) @ gate.weight.T).topk(2).indices
    assert calls[1].routing.counts().tolist() == torch.bincount(indices.flatten(), minlength=8).tolist()


def test_transformers_48911_logits_of_a_router_that_balances_by_a_bias(close):
    """transformers #48911: Models that balance with a bias never hand out their router logits.

    They are read where the router computes them, without the bias; the choice is the model's own, with it.
    """
    model = families.build("deepseek_v3")
    with watch_transformers(model) as seen, torch.no_grad():
        model(**families.batch(model))
        calls = seen.drain()
    assert len(calls) == 2
    for call in calls:
        gate = model.get_submodule(call.layer.name).gate
        close(call.routing.logits, call.tokens @ gate.weight.detach().T)
        assert gate.e_score_correction_bias.any()
        assert torch.equal(call.routing.indices, gate(call.tokens)[2])


@pytest.mark.parametrize("how", ["class", "method"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_unsloth_4812_routers_of_rewritten_classes_are_seen(name, how):
    """unsloth #4812: Tools that rewrite the classes of a model made its recorder see nothing.

    Routers are found by what they hold and return: one of another class that inherits from nothing but Module, or one
    whose forward a tool has wrapped, gives the same findings and the same routing.
    """
    model = families.build(name)
    inputs, found, kinds = families.batch(model), [], []
    for rewritten in (False, True):
        for router in routers(model) if rewritten else ():
            forward = type(router).forward
            if how == "class":
                router.__class__ = type("Rewritten", (nn.Module,), {"forward": forward})
            else:
                router.forward = functools.partial(forward, router)
        with watch_transformers(model) as seen, torch.no_grad():
            model(**inputs)
            found.append(seen.drain())
        kinds.append(problems(model))
    assert kinds[0] == kinds[1]
    assert len(found[0]) == len(found[1]) > 1
    for one, two in zip(*found, strict=True):
        assert torch.equal(one.routing.indices, two.routing.indices)
        assert torch.equal(one.routing.logits, two.routing.logits)


def test_minimind_858_a_router_without_a_gradient_is_found():
    """minimind #858: One expert a token with renormalised weights: the task does not train the router, and nothing says
    so.
    """
    for normalized in (True, False):
        model = families.build("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=normalized)
        gate, experts = router_gradients(model)
        assert (gate < 1e-5 * experts) == normalized
        found = problems(model)
        found.pop(None)
        assert all(("no_router_gradient" in kinds) == normalized for kinds in found.values())


def test_torchtitan_1246_collapse_inside_sequences_is_found():
    """torchtitan #1246: All tokens of a sequence went to one expert, while the batch as a whole looked even.

    Sequences of one repeated token each do that here. Counts of the batch alone would call it sound.
    """
    model = families.build("mixtral")
    for router in routers(model):
        with torch.no_grad():
            router.weight.mul_(20)
    rows = torch.arange(10, 90)[:, None]
    found = problems(model, {"input_ids": rows.expand(-1, 60)})
    assert "sequence_collapse" in found[0]
    assert "collapse" not in found[0]
    mixed = {"input_ids": rows[torch.randperm(4800).view(80, 60) % 80, 0]}
    assert "sequence_collapse" not in problems(model, mixed)[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_megatron_1984_padding_is_not_counted(side):
    """Megatron-LM #1984: Pad tokens skewed counts and loss.

    What is counted here with an attention mask is what is counted for each sequence on its own.
    """
    model = families.build("mixtral")
    ids, mask = families.batch(model, 2, 24)["input_ids"], torch.ones(2, 24, dtype=torch.long)
    mask[1, slice(0, 9) if side == "left" else slice(15, 24)] = 0
    alone = []
    with watch_transformers(model) as seen, torch.no_grad():
        model(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask)
        padded = seen.drain()
        for row, real in zip(ids, mask, strict=True):
            model(input_ids=row[None, real == 1])
            alone.append(seen.drain())
    for call, *parts in zip(padded, *alone, strict=True):
        assert call.routing.counts().sum() == 2 * mask.sum()
        assert torch.equal(call.routing.counts(), sum(part.routing.counts() for part in parts))


def test_megatron_1330_gradient_checkpointing_is_not_counted_twice():
    """Megatron-LM #1330: Routers run again in backward; a hook on them counts everything twice."""
    model = families.build("mixtral").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    fired = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: fired.append(0))
    with watch_transformers(model) as seen:
        model(**families.batch(model)).logits.square().mean().backward()
        calls = seen.drain()
    assert len(fired) == 2
    assert [call.layer.number for call in calls] == [0, 1, 2]


@pytest.mark.parametrize("left_out", ["all", "one"])
def test_megatron_5844_experts_that_are_not_in_the_files(tmp_path, left_out, user_error):
    """Megatron-LM #5844: A converted Mixtral held no experts; they were made up at random when it was loaded, with a
    success message.

    Loading for an inspection, and reading the files alone, both name what is missing.
    """
    families.build("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gone = [name for name in tensors if ".experts." in name and (left_out == "all" or ".experts.3.w2." in name)]
    assert len(gone) == (72 if left_out == "all" else 3)
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with user_error("experts"):
        load_transformers(str(tmp_path))
    with user_error("expert"):
        read_checkpoint(tmp_path)


def test_transformers_46743_a_model_whose_rows_no_kernel_takes(tmp_path):
    """transformers #46743: The default kernel of transformers wants rows of a multiple of 16 bytes, on the CPU too, and
    crashes on others.

    A model that is loaded for an inspection there runs by the plain loop.
    """
    changes = {"hidden_size": 18, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 23}
    families.build("mixtral", **changes).save_pretrained(tmp_path)
    loaded = load_transformers(str(tmp_path))
    with watch_transformers(loaded.model) as seen:
        run(loaded, [families.batch(loaded.model)])
        assert len(seen.drain()) == 3
