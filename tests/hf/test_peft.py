"""LoRA on the experts and trained routers together: swapped, with terms and selection bias, reloaded, merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

import peft
from families import build
from trainers import InOrder, batch_of, make_trainer, sequences, swap_balanced

from spectralmoe import Term, penalty, record
from spectralmoe.hf import add_terms, attach_callback, resume_safe, swap_routers
from spectralmoe.layers import moe_layers
from spectralmoe.regularizers import load_balance, router_z

TERMS = {"balance": Term(load_balance, 0.1), "z": Term(router_z, 0.1)}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def lora_of(model: Any) -> Any:
    """LoRA on the experts, a trained copy of each router."""
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=EXPERTS, modules_to_save=["gate"])
    return peft.get_peft_model(model, config)


def swapped(family: str, scorer: str) -> Any:
    model = build(family)
    if scorer == "linear":
        swap_balanced(model)
    else:
        swap_routers(model, {"type": scorer, "rank": 4}, init="fresh")
    return model


@pytest.mark.parametrize(
    ("family", "scorer"), [("mixtral", "linear"), ("qwen3_moe", "eigenbasis"), ("deepseek_v3", "linear")]
)
def test_an_adapter_is_trained_reloaded_and_merged(family, scorer, tmp_path, close):
    torch.manual_seed(0)  # of fresh scorers, the same at the reload
    model = lora_of(swapped(family, scorer)).train()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    options = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 0.1}
    with add_terms(model, TERMS) as added:
        make_trainer(
            model, tmp_path, InOrder(sequences(8, vocabulary=260)), callbacks=[attach_callback()], **options
        ).train()
    assert added.last.keys() == TERMS.keys()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(".lora_" in name or ".modules_to_save." in name for name in moved)
    assert any("experts" in name for name in moved)
    assert all(any(f"{name}.gate.modules_to_save" in each for each in moved) for name in moe_layers(model))
    assert any(name.endswith("selector.bias") for name in moved) == (scorer == "linear")

    model.eval()
    inputs = batch_of(sequences(2, vocabulary=260, padded=True))
    with torch.no_grad():
        trained = model(**inputs).logits
        model.save_pretrained(tmp_path / "adapter")
        torch.manual_seed(0)
        again = peft.PeftModel.from_pretrained(swapped(family, scorer), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(**inputs).logits, trained)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, trained, rtol=1e-4, atol=1e-4)
    assert list(moe_layers(merged)) == list(moe_layers(model))


def test_terms_on_stock_routers_that_an_adapter_trains(close):
    model, inputs = build("mixtral"), batch_of(sequences(2, padded=True))
    with record(model) as tape:
        plain = model(**inputs).loss
    expected = plain + penalty(tape, TERMS)[0]
    wrapped = lora_of(model).train()
    with add_terms(wrapped, TERMS):
        loss = wrapped(**inputs).loss
    close(loss.detach(), expected.detach())
    loss.backward()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "gate" in name:
            assert bool((parameter.grad != 0).any()), name


def test_an_adapter_that_copies_the_routers_after_add_terms_is_named(user_error):
    model, inputs = build("mixtral"), batch_of(sequences(2))
    with add_terms(model, TERMS), user_error("add_terms", "PEFT", "after get_peft_model"):
        lora_of(model).train()(**inputs)


def test_a_training_of_an_adapter_goes_on_exactly(tmp_path):
    options = {"per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    models = []
    for folder, steps, resume in (("whole", 4, False), ("parts", 2, False), ("parts", 4, True)):
        torch.manual_seed(0)
        models.append(lora_of(swapped("mixtral", "linear")).train())
        made = make_trainer(
            models[-1],
            tmp_path / folder,
            sequences(8, vocabulary=260),
            callbacks=[attach_callback()],
            max_steps=steps,
            **options,
        )
        resume_safe(made)
        with add_terms(models[-1], TERMS):
            made.train(resume_from_checkpoint=resume)
    whole, _, resumed = (model.state_dict() for model in models)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
