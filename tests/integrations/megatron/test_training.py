"""Whole models of Megatron-core with routers of this library: training, its optimizers, its checkpoints."""

from __future__ import annotations

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron_layers import EXPERTS, B, K, S, config, layer_with, padding
from seeds import generator
from torch import nn

from spectralmoe import Monitor, attach, record
from spectralmoe.integrations.megatron import SpectralRouter
from spectralmoe.linalg import is_orthonormal

pytestmark = [
    pytest.mark.usefixtures("megatron"),
    pytest.mark.filterwarnings("ignore:::megatron", "ignore:::torch"),
]

LATER = torch.ones(1, 1, S, S, dtype=torch.bool).triu(1)
PLACES = torch.arange(S).expand(B, S)


def gpt(row, **settings):
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    spec.submodules.mlp.submodules.router = SpectralRouter.configure(row)
    still = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "bias_dropout_fusion": False}
    made = config(masked_softmax_fusion=False, **still, **settings)
    return GPTModel(config=made, transformer_layer_spec=spec, vocab_size=16, max_sequence_length=S)


def loss_of(model):
    """The mean over the real tokens of one batch, always the same."""
    text = torch.randint(16, (B, S + 1), generator=generator(4))
    losses = model(text[:, :-1], PLACES, LATER, labels=text[:, 1:], padding_mask=padding())
    return losses[~padding()].float().mean()


def routers(model):
    return [module for module in model.modules() if isinstance(module, SpectralRouter)]


@pytest.mark.parametrize("row", ["sr-moe", *(pytest.param(row, marks=pytest.mark.full) for row in ("emoe", "l2r"))])
def test_a_small_gpt_trains(row):
    model, losses = gpt(row), []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    attach(optimizer, model)
    with Monitor(model, every=8) as monitor:
        for _ in range(8):
            losses.append(loss_of(model))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
            monitor.step()
    assert losses[-1] < losses[0]
    real = int((~padding()).sum())
    assert monitor.last["tokens"] == 8 * real
    with record(model) as tape:
        loss_of(model)
    assert [item.name for item in tape] == ["decoder.layers.0.mlp", "decoder.layers.1.mlp"]
    assert [int(item.routing.counts().sum()) for item in tape] == [K * real] * 2


def trained(row, steps=4, *, bf16=False, distributed=False):
    """A model behind Megatron's own wrappers, after some steps of its own optimizer, as in docs/drop-ins.md."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    inside = gpt(row, bf16=bf16, params_dtype=dtype)
    inside = Float16Module(inside.config, inside) if bf16 else inside
    sharing = {"use_distributed_optimizer": distributed}
    model = [DistributedDataParallel(inside.config, DistributedDataParallelConfig(**sharing), inside)]
    settings = OptimizerConfig(optimizer="adam", lr=0.01, bf16=bf16, params_dtype=dtype, **sharing)
    optimizer = get_megatron_optimizer(settings, model)
    inner = [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    attach(inner, nn.ModuleList(model), group=group)
    losses = []
    for _ in range(steps):
        model[0].zero_grad_buffer()
        optimizer.zero_grad()
        losses.append(loss_of(model[0]))
        losses[-1].backward()
        finalize_model_grads(model)
        optimizer.step()
    assert losses[-1] < losses[0]
    return model[0]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("distributed", [False, True])
def test_biases_move_by_megatrons_own_optimizers(bf16, distributed, cpu_as_cuda):
    for router in routers(trained("sr-moe", bf16=bf16, distributed=distributed)):
        assert router.router.selector.bias.any()
        assert {value.dtype for value in router.state_dict().values()} == {torch.float32}


def test_bases_stay_orthonormal_or_are_refused(cpu_as_cuda, user_error):
    for router in routers(trained("emoe", steps=3)):
        assert is_orthonormal(router.router.scorer.basis.detach())
    with user_error("basis", "trained by no optimizer"):
        trained("emoe", distributed=True)


@pytest.mark.full
def test_a_distributed_checkpoint_holds_weights_and_bias(tmp_path):
    layer, other = layer_with("sr-moe"), layer_with("sr-moe")
    layer.router.router.selector.bias.copy_(torch.randn(EXPERTS, generator=generator(3)))
    dist_checkpointing.save(layer.sharded_state_dict(prefix="mlp."), tmp_path)
    loaded = dist_checkpointing.load(other.sharded_state_dict(prefix="mlp."), tmp_path)
    other.load_state_dict({name.removeprefix("mlp."): value for name, value in loaded.items()})
    for name, value in layer.router.state_dict().items():
        assert torch.equal(other.router.state_dict()[name], value), name
