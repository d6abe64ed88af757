"""The terms of SR-MoE's loss against singular values of the matrices that they name."""

import pytest
import torch

from spectralmoe import UserError, penalty, record
from spectralmoe.models import sr_moe, sr_moe_terms


@pytest.fixture
def network():
    return sr_moe(3, features=5, width=12, depth=3, num_experts=4).train()


def spectrum(matrix):
    values = torch.linalg.svdvals(matrix.double())
    return values[0], values.square().sum() / values[0] ** 2


def parts_of(network, **options):
    x = torch.randn(20, 5)
    with record(network) as tape:
        network(x)
    total, parts = penalty(tape, sr_moe_terms(network, **options))
    return tape, total, parts


@pytest.mark.parametrize("matrix", ["router", "gates", "processor"])
def test_values_are_those_of_the_named_matrix(network, matrix):
    tape, total, parts = parts_of(network, matrix=matrix, norm=0.3, rank=0.2, bound=0.5)
    norm = rank = 0.0
    for stage, item in zip(network.stages, tape, strict=True):
        m = {
            "router": stage.moe.router.scorer.prototypes,
            "gates": item.routing.probs * (4 / 20) ** 0.5,
            "processor": stage.processor[0].weight,
        }[matrix].detach()
        sigma, stable = spectrum(m)
        norm += float((sigma - 0.5).clamp_min(0) ** 2)
        rank += float(1 - stable / (4 if matrix != "processor" else 12))
    assert float(parts["spectral_norm"]) == pytest.approx(norm, rel=1e-4)
    assert float(parts["stable_rank"]) == pytest.approx(rank, rel=1e-4)
    assert float(total.detach()) == pytest.approx(0.3 * norm + 0.2 * rank, rel=1e-4)


def test_each_reading_trains_its_own_matrix(network):
    def trained(matrix):
        network.zero_grad()
        parts_of(network, matrix=matrix)[1].backward()
        return {name for name, p in network.stages[0].named_parameters() if p.grad is not None and p.grad.any()}

    assert trained("router") == {"moe.router.scorer.prototypes"}
    assert trained("processor") == {"processor.0.weight"}
    assert trained("both") == {"moe.router.scorer.prototypes", "processor.0.weight"}
    assert {"moe.router.scorer.prototypes", "processor.0.weight"} < trained("gates")


def test_a_part_without_weight_is_left_out(network):
    assert list(sr_moe_terms(network, rank=0.0)) == ["spectral_norm"]
    assert list(sr_moe_terms(network, norm=0.0)) == ["stable_rank"]


def test_unknown_matrix(network):
    with pytest.raises(UserError, match="unknown matrix of sr_moe_terms 'gate'; did you mean 'gates'"):
        sr_moe_terms(network, matrix="gate")
