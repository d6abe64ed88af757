"""Terms in the loss of a Hugging Face model: their weight under accumulation and over ranks, and nothing twice."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate import Accelerator
from families import ELEVEN, build
from torch import nn
from torch.nn import functional as F
from trainers import InOrder, batch_of, make_trainer, sequences, swap_balanced

from spectralmoe import Term, penalty, record
from spectralmoe.hf import add_terms, attach_callback
from spectralmoe.hf.layers import find_layers
from spectralmoe.regularizers import load_balance, output_overlap, path_coupling, router_z, spectral_norm

LINEAR = {"z": Term(router_z, 1e-2), "norm": Term(spectral_norm, 1e-2)}
BALANCE = {"balance": Term(load_balance, 0.1)}
GATE = "model.layers.0.mlp.gate.weight"


def mixtral(**changes: Any) -> Any:
    return build("mixtral", num_hidden_layers=2, **changes).train()


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def gradient(model: nn.Module) -> torch.Tensor:
    return model.get_parameter(GATE).grad.clone()


def plain_penalty(model: nn.Module, inputs: Any, terms: Any) -> torch.Tensor:
    with record(model, terms=terms) as tape:
        model(**inputs)
    return penalty(tape, terms)[0]


def test_the_loss_is_the_models_and_the_penalty(close):
    model, inputs = mixtral(), batch_of(sequences(3, padded=True))
    plain = model(**inputs).loss
    added = add_terms(model, LINEAR | BALANCE)
    loss = model(**inputs).loss
    close(loss - plain, plain_penalty(model, inputs, LINEAR | BALANCE))
    assert added.last.keys() == {"z", "norm", "balance"}
    assert not added.last["z"].requires_grad
    loss.backward()
    assert all(bool((layer.live_matrix.grad != 0).any()) for layer in find_layers(model))
    model.eval()
    assert torch.equal(model(**inputs).loss, plain)
    added.remove()
    added.remove()
    assert torch.equal(model.train()(**inputs).loss, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_term_of_the_model_gets_the_records_of_all_layers(close):
    model, inputs = mixtral(), batch_of(sequences(3, padded=True))
    with record(model) as tape:
        plain = model(**inputs).loss
    mask = inputs["attention_mask"].flatten().bool()
    masses = [item.routing.probs.gather(1, item.routing.indices.clamp_min(0)).sum(1)[mask] for item in tape]
    with add_terms(model, {"coupling": Term(path_coupling, 0.5)}):
        loss = model(**inputs).loss
    close(loss - plain, -0.5 * (masses[0] * masses[1]).mean())
    loss.backward()
    assert all(bool((layer.live_matrix.grad != 0).any()) for layer in find_layers(model))


def test_a_part_of_a_batch_counts_by_its_labels(close):
    model, inputs = mixtral(), batch_of(sequences(3, padded=True))
    counted, total = int((inputs["labels"][:, 1:] != -100).sum()), torch.tensor(100)
    plain = model(**inputs, num_items_in_batch=total).loss
    with add_terms(model, LINEAR):
        loss = model(**inputs, num_items_in_batch=total).loss
        assert "num_items_in_batch" not in inputs
        shifted_labels = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
        same = model(**inputs, num_items_in_batch=total, shift_labels=shifted_labels).loss
    close(loss - plain, plain_penalty(model, inputs, LINEAR) * counted / 100)
    close(same, loss)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name == "mixtral" else pytest.mark.full) for name in ELEVEN]
)
def test_the_trainer_accumulates_what_one_batch_is(family, tmp_path, close):
    """With terms that are means over tokens, and a selection bias, which counts whole batches."""
    data, trained = sequences(8, vocabulary=260), []
    for steps, size in ((1, 4), (4, 1)):
        model = build(family).train()
        if family == "switch":
            model.accepts_loss_kwargs = False  # its loss pays no heed to the number of labels
        swap_balanced(model)
        options = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": size, "max_steps": 2}
        with add_terms(model, LINEAR):
            make_trainer(model, tmp_path, InOrder(data), callbacks=[attach_callback()], **options).train()
        trained.append(parameters_of(model))
    one, four = trained
    biases = [name for name in one if name.endswith("selector.bias")]
    assert biases
    for name in one:
        if name in biases:
            assert torch.equal(one[name], four[name]), name
            assert bool((one[name] != 0).any())
        else:
            close(four[name], one[name])


def test_a_term_of_a_batch_s_statistics_is_the_mean_over_its_parts(tmp_path, close):
    """By labels, exactly; the term of the whole batch is another number."""
    model, items = mixtral(), sequences(4, padded=True)
    parts, total = [batch_of([item]) for item in items], sum(int((item["labels"][1:] != -100).sum()) for item in items)
    with add_terms(model, BALANCE):
        for part in parts:
            model(**part, num_items_in_batch=torch.tensor(total)).loss.backward()
    accumulated = gradient(model)
    model.zero_grad()
    model(**batch_of(items)).loss.backward()
    for part in parts:
        share = int((part["labels"][:, 1:] != -100).sum()) / total
        (share * plain_penalty(model, part, BALANCE)).backward()
    close(accumulated, gradient(model))
    model.zero_grad()
    with add_terms(model, BALANCE):
        model(**batch_of(items)).loss.backward()
    assert not torch.allclose(accumulated, gradient(model), rtol=1e-3, atol=1e-5)


def test_the_family_s_own_balance_loss_is_not_counted_twice(close):
    model = mixtral(output_router_logits=True, router_aux_loss_coef=0.5)
    inputs = batch_of(sequences(2))
    whole = model(**inputs)
    plain = model(**inputs, output_router_logits=False).loss
    close(whole.loss - plain, 0.5 * whole.aux_loss)
    with add_terms(model, BALANCE):
        for more in ({}, {"output_router_logits": True}):
            close(model(**inputs, **more).loss - plain, plain_penalty(model, inputs, BALANCE).detach())
    with add_terms(model, LINEAR):  # it has another purpose
        close(model(**inputs).loss - whole.loss, plain_penalty(model, inputs, LINEAR).detach())
    assert (model.config.router_aux_loss_coef, model.config.output_router_logits) == (0.5, True)
    assert torch.equal(model(**inputs).loss, whole.loss)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_trainer_that_reads_aux_loss_alone(family, close):
    """TRL's formula: the sum of log-probabilities over all labels, and coefficient * aux_loss / accumulation steps."""
    model = build(family).train()
    parts = [batch_of(items) for items in (sequences(4, vocabulary=260)[:2], sequences(4, vocabulary=260)[2:])]
    terms, coefficient, gradients = {"z": Term(router_z, 1e-2)}, 1.0, []

    def loss_of(inputs: Any, labels: int, steps: int) -> torch.Tensor:
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**given)
        logits, targets = outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        assert torch.equal(outputs.aux_loss, outputs["aux_loss"])
        return F.cross_entropy(logits, targets, reduction="sum") / labels + coefficient * outputs.aux_loss / steps

    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    labels = int((whole["labels"][:, 1:] != -100).sum())
    with add_terms(model, terms, into="aux_loss"):
        for batches in (parts, [whole]):
            model.zero_grad()
            for inputs in batches:
                loss_of(inputs, labels, len(batches)).backward()
            gradients.append([layer.live_matrix.grad.clone() for layer in find_layers(model)])
    model.zero_grad()
    with add_terms(model, terms):
        model(**whole).loss.backward()
    gradients.append([layer.live_matrix.grad for layer in find_layers(model)])
    for one, two, three in zip(*gradients, strict=True):
        close(one, two)
        close(two, three)


def test_what_would_be_lost_is_an_error(user_error):
    model, inputs = mixtral(), batch_of(sequences(2))
    ids = {"input_ids": inputs["input_ids"]}
    with add_terms(model, LINEAR):
        with user_error("no loss", "labels", "aux_loss"):
            model(**ids)
        with user_error("tuple", "return_dict"):
            model(**inputs, return_dict=False)
        with torch.no_grad():
            model(**ids)
        model.eval()(**ids)
        model.train()
        with pytest.raises(TypeError):
            model(**inputs, nothing_of_the_kind=object(), input_ids=3)
        assert model(**inputs).loss.requires_grad  # a forward that failed leaves nothing open
    with user_error("into", "'los'", "aux_loss"):
        add_terms(model, LINEAR, into="los")
    with user_error("at least one term"):
        add_terms(model, {})
    with user_error("'output'", "tokens"):
        add_terms(model, {"overlap": Term(output_overlap, 1.0)})
    with user_error("no MoE layer", "Linear"):
        add_terms(nn.Linear(2, 2), LINEAR)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_accelerate_accumulates_what_one_batch_is(close):
    gradients = []
    for size in (2, 4):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4 // size)
        model = mixtral()
        with add_terms(model, LINEAR):
            prepared = accelerator.prepare(model)
            for start in range(0, 4, size):
                with accelerator.accumulate(prepared):
                    accelerator.backward(prepared(**batch_of(sequences(4)[start : start + size])).loss)
        gradients.append(gradient(model))
    close(*gradients)


def test_label_smoothing_is_an_error(tmp_path, user_error):
    model = mixtral()
    with add_terms(model, LINEAR), user_error("no loss"):
        make_trainer(model, tmp_path, sequences(4), label_smoothing_factor=0.1, max_steps=1).train()


def test_a_weight_may_follow_the_step(close):
    model, inputs = mixtral(), batch_of(sequences(2))
    plain = model(**inputs).loss
    with add_terms(model, {"z": Term(router_z, lambda step: 0.1 * step)}) as added:
        assert torch.equal(model(**inputs).loss, plain)
        added.step = 2
        close(model(**inputs).loss - plain, 0.2 * added.last["z"])


def test_two_models_are_apart(close):
    one, two, inputs = mixtral(), mixtral(), batch_of(sequences(2))
    plain = two(**inputs).loss
    with add_terms(one, LINEAR) as added:
        assert torch.equal(two(**inputs).loss, plain)
        assert not added.last
        close(one(**inputs).loss - plain, plain_penalty(two, inputs, LINEAR).detach())


def test_a_copy_is_without_them(user_error):
    model, inputs = mixtral(), batch_of(sequences(2))
    plain = model(**inputs).loss
    with add_terms(model, LINEAR) as added:
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs).loss, plain)
        assert not added.last
        assert not torch.equal(model(**inputs).loss, plain)
        with user_error("DataParallel", "torchrun"):
            model._replicate_for_data_parallel()(**inputs)
    twin(**inputs).loss.backward()


def test_checkpointing_changes_no_gradient(close):
    gradients = []
    for checkpointing in (False, True):
        model = mixtral()
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its new name is not in older versions
                model.gradient_checkpointing_enable({"use_reentrant": False})
        with add_terms(model, LINEAR | BALANCE):
            model(**batch_of(sequences(2, padded=True))).loss.backward()
        gradients.append(gradient(model))
    close(*gradients)
