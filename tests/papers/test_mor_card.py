"""The MoR card: its rows are what they are called, the control shuffles severity alone, and what its measures mean."""

from pathlib import Path

import numpy as np
import pytest
import torch
from seeds import shifted
from torch.nn import functional as F

from spectralmoe import Context, feed, record
from spectralmoe.experiments.cards import run_card
from spectralmoe.layers import moe_layers

CARD = Path(__file__).parents[2] / "papers" / "mor"
P = 3


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, tmp_path):
    from network import ROWS

    pytest.importorskip("skimage")
    small = card.card(card.Sizes(train=16, held=8, width=4, base=1, epochs=1, batch=8, tries=1, seeds=1))
    for ran in (2 * len(ROWS) + 1, 0):  # a rerun does only what is missing
        count, notes = run_card(small, tmp_path, tmp_path / "work", 1, lambda *text: None)
        assert (count, notes) == (ran, [])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| mor | mor, shuffled |" in text
    assert "## Ranks in use" in text


@pytest.fixture
def network():
    """A row -> its network around one and the same frozen one, with ranks that are in use."""
    from network import ROWS, Restorer

    def make(row):
        base = Restorer(1, 4)
        base.convolutions[2].linear.weight.data.normal_()
        made = ROWS[row].network(base, width=P)
        for layer in moe_layers(made).values():
            layer.up.data.normal_()
        return made

    return make


def run(network, severity=None):
    images = torch.rand(2, 1, 8, 8)
    severity = torch.randn(2, P) if severity is None else severity
    with feed(network, context=Context(samples={"severity": severity})), record(network) as tape:
        network(images)
    return tape


def test_an_unfolded_convolution_is_one(card, close):
    from network import Unfolded

    layer, x = Unfolded(3, 5), torch.rand(2, 3, 6, 7)
    close(layer(x), F.conv2d(x, layer.linear.weight.view(5, 3, 3, 3), layer.linear.bias, padding=1))


def test_rows_have_as_many_ranks_as_they_say(card, network):
    ranks = {"lora, rank 16": (16, 16), "lora, rank 40": (40, 40)}
    from network import ROWS

    for row in ROWS:
        made = network(row)
        layers = list(moe_layers(made).values())
        assert len(layers) == 3
        assert {(len(layer.down), layer.shared + layer.k) for layer in layers} == {ranks.get(row, (40, 16))}, row
        zero = 4 if row == "ranks, zero experts" or "mor," in f"{row}," else 0
        assert {layer.zero for layer in layers} == {zero}, row
        assert not made.convolutions[0].linear.linear.weight.requires_grad


def test_a_lora_row_has_gates_of_one_and_a_mixture_of_loras_takes_whole_ones(card, network, close):
    for item in run(network("lora, rank 16")):
        close(item.routing.gates(), torch.ones(2 * 16, 16))
    for item in run(network("lora-moe")):
        gates = item.routing.gates().unflatten(1, (8, 4))
        close(gates, gates[:, :, :1].expand_as(gates))
        assert ((gates[:, :, 0] > 0).sum(1) == 2).all()


def test_ranks_follow_the_sample_and_not_the_pixel(card, network):
    for item in run(network("mor")):
        chosen = item.routing.indices.view(2, 16, -1)
        assert (chosen == chosen[:, :1]).all()


def test_the_control_shuffles_what_the_gate_reads_and_nothing_else(card):
    from task import Pairs, Restoration, Samples

    task = Restoration.__new__(Restoration)
    count = 12
    images = torch.arange(count).float()[:, None, None, None]
    pairs = Pairs(images, images, images[:, 0, 0].expand(-1, 4), torch.zeros(count).long())
    severity = torch.arange(count).float()[:, None].expand(-1, P)
    task.parts = dict.fromkeys(("train", "test"), Samples(pairs, severity, severity[:, 0]))
    for reads, moved in (("estimated", False), ("shuffled", True)):
        task.reads = reads
        for found in (task.batch(torch.arange(count), np.random.default_rng(shifted(0))), task.as_given("test")):
            assert torch.equal(found.pairs.images, images)
            assert torch.equal(found.severity[:, 0], found.strength)
            assert sorted(found.strength.tolist()) == list(range(count))
            assert torch.equal(found.severity, severity) == (not moved)


def test_rank_correlation_by_hand(card):
    assert card.spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 5.0, 1.0])) == pytest.approx(-1)
    assert card.spearman(torch.tensor([1.0, 1.0, 3.0]), torch.tensor([0.0, 1.0, 2.0])) == pytest.approx(0.75**0.5)
    assert card.spearman(torch.ones(3), torch.rand(3)) is None
