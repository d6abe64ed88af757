"""Ranks as experts in a language model of transformers, as an adapter: put in by name, trained, saved alone."""

from __future__ import annotations

import pytest
import torch
from dense_models import dense_model, ids

from spectralmoe import Context, ContextScorer, attach, feed, record
from spectralmoe.layers import moe_layers
from spectralmoe.ranks import add_ranks
from spectralmoe.saving.ranks import load_ranks, save_ranks

pytest.importorskip("transformers")


def test_an_adapter_by_severity_in_a_language_model(tmp_path):
    model, logits = dense_model("llama")
    add_ranks(model, ["*.q_proj", "*.v_proj"], ranks=6, shared=2, zero=2, k=3, scorer=ContextScorer)
    assert list(moe_layers(model))[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    context = Context(samples={"severity": torch.tensor([0.1, 0.9])})
    with feed(model, context=context):
        assert torch.equal(model(ids()).logits, logits)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    attach(optimizer, model)
    model.train().gradient_checkpointing_enable()
    for _ in range(2):
        optimizer.zero_grad()
        with feed(model, context=context), record(model) as tape:
            model(ids(), labels=ids()).loss.backward()
        optimizer.step()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert len(tape) == 6
    assert all(
        (item.routing.indices.view(2, -1, 3) == item.routing.indices.view(2, -1, 3)[:, :1]).all() for item in tape
    )
    save_ranks(model, tmp_path)
    loaded = load_ranks(tmp_path, dense_model("llama")[0])
    model.eval()
    outputs = []
    for each in (model, loaded):
        with feed(each, context=context):
            outputs.append(each(ids()).logits)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], logits)
