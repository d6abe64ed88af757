"""The card of the generalization bound: what its networks and its correlations are, and a tiny run end to end."""

import json
from pathlib import Path

import pytest
import torch

from spectralmoe.experiments.cards import run_card

CARD = Path(__file__).parents[2] / "papers" / "bound"


@pytest.mark.full
def test_a_tiny_run_holds_every_cell(card, tmp_path):
    sizes = card.Sizes(card.Budget(hidden=4, steps=3), sizes=(20, 30), ks=(1, 16), experts=(4, 16), seeds=1)
    for ran in (True, False):  # a rerun does only what is missing
        count, notes = run_card(card.card(sizes), tmp_path, tmp_path / "work", 1, lambda *text: None)
        assert ((count > 0), notes) == (ran, [])
    cells = json.loads((tmp_path / "results.json").read_text())
    assert len(cells) == 2 * (3 + 3 + 2)
    assert all(cell.keys() >= {column.key for column in card.COLUMNS} for cell in cells)
    assert {cell["bound"] for cell in cells if cell["row"] == "frozen" and cell["n"] == 20} == {
        cell["bound"] for cell in cells if cell["row"] == "dense" and cell["n"] == 20
    }
    tuned = json.loads((tmp_path / "tuning.json").read_text())
    assert [len(tuned[row]["tries"]) for row in card.ROWS] == [4, 4, 4]


def test_frozen_routers_stay_and_dense_networks_have_as_many_parameters(card):
    from networks import make_network, train_network

    budget = card.Budget(hidden=4, steps=5)
    x, labels = torch.randn(40, 6), torch.randint(3, (40,))
    frozen = make_network("frozen", 8, 2, budget, 6, 3)
    before = frozen.experts.router.scorer.weight.clone()
    train_network(frozen, x, labels, budget, 0.1)
    assert torch.equal(frozen.experts.router.scorer.weight, before)
    bank = sum(p.numel() for p in frozen.experts.experts.parameters())
    dense = sum(p.numel() for p in make_network("dense", 8, 1, budget, 6, 3).experts.parameters())
    assert bank - dense == 7 * 6  # each expert has a bias of its own behind it


def test_a_fifth_of_the_labels_is_wrong(card):
    from networks import accuracy_under_noise, with_noise

    labels = torch.randint(10, (200,))
    noisy = with_noise(labels, 10, 0.2, 1)
    assert int((noisy != labels).sum()) == 40
    assert 0 <= int(noisy.min()) <= int(noisy.max()) < 10
    draws = [float((with_noise(labels, 10, 0.2, seed) == noisy).float().mean()) for seed in range(2, 40)]
    assert sum(draws) / len(draws) == pytest.approx(accuracy_under_noise(0.8, 10, 0.2), abs=0.02)


def test_correlations_are_of_ranks_over_all_sizes_and_at_one(card):
    def cell(n, k, gap, bound):
        return {"row": "learned", "seed": 0, "cpu": "A", "n": n, "gap": gap, "bound": bound, "samples_an_expert": k}

    cells = [cell(1, 1, 9, 5), cell(1, 2, 8, 6), cell(2, 1, 4, 3), cell(2, 2, 3, 4)]
    found = card.correlations(cells)[0]
    assert found["bound"] == pytest.approx(0.6)
    assert found["bound_at_one_n"] == pytest.approx(-1)
    assert found["samples_an_expert"] == pytest.approx(-0.447, abs=1e-3)
    assert found["samples_an_expert_at_one_n"] == pytest.approx(-1)
