"""Late layers behind stored hidden states: the loss and the gradients of the whole model."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from families import batch, build

from spectralmoe.hf.training.frozen_prefix import after_prefix, check_prefix, without_prefix
from spectralmoe.hf.training.text_windows import Windows
from spectralmoe.hf.training.trained_parts import chosen_layers, decoder_layers, train_only


def parts(family, layers):
    model = build(family).train()
    chosen = chosen_layers(model, layers)
    train_only(model, ["routers", "experts"], layers)
    ids = batch(model, rows=3)["input_ids"]
    return model, *decoder_layers(model, chosen[0]), Windows(ids, ids)


def gradients(model):
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"])
def test_loss_and_gradients_are_those_of_the_whole_model(family, close):
    model, stack, first, windows = parts(family, "last1")
    whole = model(input_ids=windows.inputs, labels=windows.labels).loss
    whole.backward()
    wanted = gradients(model)
    model.zero_grad()
    check_prefix(model, stack, first, windows)
    cached = after_prefix(model, stack, first, windows, 2)
    assert cached.inputs.shape == (*windows.inputs.shape, model.config.hidden_size)
    before = [*stack]
    with without_prefix(stack, first):
        late = model(inputs_embeds=cached.inputs, labels=windows.labels).loss
        late.backward()
        assert {name.split(".")[2] for name, _ in model.named_parameters() if ".layers." in name} == {
            str(place) for place in range(first, len(stack))
        }
    assert [*stack] == before
    assert model.training
    close(late, whole)
    got = gradients(model)
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        close(value, wanted[name])


def test_a_family_that_scales_its_input_is_refused(user_error):
    model, stack, first, windows = parts("granitemoe", "last1")
    model.model.embedding_multiplier = 3.0
    with user_error("GraniteMoeForCausalLM", "train all layers"):
        check_prefix(model, stack, first, windows)
    assert len(model.state_dict()) == len(build("granitemoe").state_dict())
