"""Which experts get which degradation, image by image."""

from __future__ import annotations

import pytest
import torch

from spectralmoe import ContextScorer, LinearScorer, Router, TopK
from spectralmoe.data.degradations import KINDS
from spectralmoe.data.photos import PHOTO_PARTS, Photo, PhotoData
from spectralmoe.diagnostics.entropy import token_entropy
from spectralmoe.experiments.cards import experts_of_kinds, told_by_experts
from spectralmoe.experiments.compare.look import active_flops, active_parameters, choices
from spectralmoe.experiments.compare.settings import CompareSettings
from spectralmoe.experts import HeterogeneousExperts, PatchMixer
from spectralmoe.models import restoration_moe
from spectralmoe.recorder import record
from spectralmoe.training.settings.restoration import Restore
from spectralmoe.training.tasks import ImageTask, RestorationTask
from spectralmoe.units import Sample

D, E, RANKS = 8, 2, (2, 8)


@pytest.fixture
def task():
    photos = {part: [Photo(part, torch.rand(1, 48, 48))] for part in PHOTO_PARTS}
    return RestorationTask(PhotoData("photos", photos), Restore(patch=16, measured=3, unit="sample"), train_size=5)


@pytest.fixture
def network():
    return restoration_moe(
        width=D,
        num_experts=E,
        unit=Sample(),
        router=lambda dim, experts: Router(LinearScorer(dim, experts), TopK(1)),
        experts=lambda *sizes: HeterogeneousExperts([PatchMixer(D, rank, 2) for rank in RANKS]),
    )


def test_every_image_is_counted_where_it_went(task, network):
    chosen = []
    layer = network.blocks[0].moe
    layer.router.register_forward_hook(lambda _, given, routing: chosen.extend(routing.indices[:, 0].tolist()))
    table = experts_of_kinds(network, task)
    kinds = task.parts["test"].kinds.tolist()
    want = [[sum(pair == (kind, e) for pair in zip(kinds, chosen, strict=True)) for e in range(E)] for kind in range(5)]
    assert table.tolist() == want
    assert table.sum(1).tolist() == [3] * len(KINDS)


def test_whole_images_cost_what_the_chosen_expert_costs(task, network):
    """The rest of the network is the same, so two networks differ by their experts alone."""
    flops, numbers, sample, layer = [], [], task.example(), network.blocks[0].moe
    for e in range(E):
        layer.router.scorer.forward = lambda x, *, context=None, e=e: torch.eye(E)[e].expand(len(x), E)
        flops.append(active_flops(network, sample))
        numbers.append(active_parameters(network, sample))
    costs = layer.experts.costs((D, 8, 8)).tolist()
    assert flops[1] - flops[0] == costs[1] - costs[0]
    sizes = [sum(parameter.numel() for parameter in expert.parameters()) for expert in layer.experts.experts]
    assert numbers[1] - numbers[0] == sizes[1] - sizes[0]
    loads = {"blocks.0.moe": torch.tensor([0.75, 0.25])}
    for one, two, found in (
        (*flops, active_flops(network, sample, loads)),
        (*numbers, active_parameters(network, sample, loads)),
    ):
        assert found == pytest.approx(0.75 * one + 0.25 * two, abs=1)
    seen = choices(network, task.inputs("test"))
    assert seen["entropy"] is not None
    assert [seen[key] for key in ("output_overlap", "output_centred", "noise_flips")] == [None] * 3


def test_choices_are_looked_at_with_the_severity_of_the_images(task):
    network = restoration_moe(
        width=D, num_experts=E, router=lambda dim, e: Router(ContextScorer(dim, e, width=4), TopK(1))
    )
    network.blocks[0].moe.router.scorer.weight.data = 5 * torch.eye(E, 4)
    inputs, beside = task.inputs("test"), task.beside("test")
    with record(network) as tape:
        network(inputs, **beside)
    told, untold = choices(network, inputs, beside), choices(network, inputs)
    assert told["entropy"] == pytest.approx(token_entropy(tape[0].routing).value, abs=1e-5)
    assert untold["entropy"] == pytest.approx(1, abs=1e-5)  # no severity: even scores
    assert told["entropy"] < 0.9
    assert told["noise_flips"] is None  # tokens alone do not choose
    seen = []
    network.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    for samples, most in ((4, 4), (100, len(inputs)), (None, len(inputs))):
        seen.clear()
        choices(network, inputs, beside, samples=samples)
        assert sum(seen) == most


def test_what_the_expert_tells():
    assert told_by_experts(torch.tensor([[4, 0], [4, 0], [0, 4], [0, 4]])) == pytest.approx(0.5)
    assert told_by_experts(torch.zeros(2, 3)) == 0
    assert told_by_experts(torch.tensor([[3], [9]])) == 0


def test_a_row_on_maps_is_for_whole_samples(user_error):
    def settings(unit):
        return CompareSettings(data="restore:photos", routers=["moce-ir"], restore={"unit": unit})

    settings("sample").check()
    with user_error("moce-ir", "PatchMixer", "Sample"):
        settings("pixel").check()


def test_other_tasks_have_no_kinds(network, user_error):
    from spectralmoe.data.image_data import load_data

    with user_error("experts_of_kinds", "digits"):
        experts_of_kinds(network, ImageTask(load_data("digits").subset(20)))
