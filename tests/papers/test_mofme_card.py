"""The card of MoFME: blocks of the sizes that are said, a gate's calibration by hand, and a tiny run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from seeds import shifted

pytest.importorskip("skimage")

from spectralmoe.experiments.cards import run_card
from spectralmoe.experiments.cards.small_runs import small_restoration

CARD = Path(__file__).parents[2] / "papers" / "mofme"
SMALL = small_restoration(8, 1, measured=2, stem=4, network={"width": 8, "k": 2})


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, tmp_path):
    small = card.card(card.Sizes(SMALL, tries=1, seeds=1))
    for ran in (True, False):  # a rerun does only what is missing
        count, notes = run_card(small, tmp_path, tmp_path / "work", 1, lambda text, done, detail="": None)
        assert ((count > 0), notes) == (ran, [])
    cells = json.loads((tmp_path / "results.json").read_text())
    assert [cell["row"] for cell in cells] == card.ROWS
    routed = [cell for cell in cells if not cell["row"].startswith("one")]
    assert all(cell.keys() >= {column.key for column in card.COLUMNS} for cell in routed)
    text = (tmp_path / "RESULTS.md").read_text()
    assert all(f"| {one} | {other} | 1 |" in text for one, other in card.PAIRS)
    of = {cell["row"]: cell for cell in cells}
    for row in card.LINEAR:  # the same network with softer weights: the same choices
        one, other = of[row], of[row + card.TEMPERED]
        assert all(one[key] == other[key] for key in ("numbers", "mflop", "max_vio"))
        assert (one["psnr"] == other["psnr"]) == (one["temperature"] == 1)


def test_a_place_has_the_numbers_that_are_said_and_the_one_network_those_of_modulations(card):
    from blocks import make_place

    dim, said = 16, {"networks": lambda e: 8 * e, "linear": lambda e: 2 * e + 10, "vector": lambda e: 10}
    for row, recipe in card.RECIPES.items():
        place = make_place(recipe, dim, 2)
        matrices = {n: p for n, p in place.named_parameters() if not n.endswith(("experts.bias", "scorer.weight"))}
        numbers = sum(p.numel() for p in matrices.values())
        assert numbers == said.get(recipe.kind, said["linear"])(recipe.experts) * dim**2, row
        assert place(torch.randn(2, 4, 4, dim)).shape == (2, 4, 4, dim)


def test_under_one_seed_all_else_starts_alike(card):
    sizes = card.Sizes(SMALL.model_copy(update={"train_size": 1}), tries=1, seeds=1)
    frozen = SMALL.optimization.model_copy(update={"lr": 0.0, "weight_decay": 0.0})
    sizes = replace(sizes, run=sizes.run.model_copy(update={"optimization": frozen}))
    states = [card.trained(sizes, row, 1.0, shifted(3))[0].state_dict() for row in ("networks, 4", "one network, 4")]
    outside = [name for name in states[0] if ".moe." not in name]
    assert len(outside) > 8
    assert all(torch.equal(states[0][name], states[1][name]) for name in outside)


def test_a_gate_that_knows_the_kinds_is_right_and_calibrated(card):
    from gates import Gate, calibration_error, fit_temperature, kind_scores, kinds_of_experts, told

    kinds = torch.arange(40) % 4
    sharp = 20.0 * torch.eye(4)[kinds][:, None]
    gate = Gate(sharp, torch.zeros(40, 1, 2), kinds)
    assert told(gate, gate) == {"kinds_right": 1.0, "ece": pytest.approx(0.0, abs=1e-5)}
    halves = torch.tensor([[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    of_expert = kinds_of_experts(halves[kinds], kinds)
    torch.testing.assert_close(of_expert, halves)
    assert calibration_error(kind_scores(sharp, of_expert), kinds) == pytest.approx(0.0, abs=1e-5)
    assert calibration_error(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1])) == pytest.approx(0.4)
    assert fit_temperature(gate._replace(logits=0.02 * sharp)) < 0.5


def test_a_tempered_network_chooses_alike_and_weighs_otherwise(card):
    from gates import look, tempered

    from spectralmoe import record

    network = card.trained(card.Sizes(SMALL, tries=1, seeds=1), "modulated, 4", 1.0, shifted(0))[0]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    pairs = card.opened(SMALL.model_dump_json(include={"data", "train_size", "restore"})).parts["test"]
    items, outputs = [], []
    for each in (network, tempered(network, 4.0)):
        with record(each) as tape:
            outputs.append(each(pairs.images, severity=pairs.severity))
        items += tape
    plain, soft = (item.routing for item in items)
    assert torch.equal(soft.members(), plain.members())
    torch.testing.assert_close(soft.logits, plain.logits / 4)
    chosen = plain.logits.gather(1, soft.indices)
    torch.testing.assert_close(soft.weights, (chosen / 4).softmax(-1))
    assert (soft.weights - plain.weights).abs().max() > 1e-3
    assert not torch.equal(*outputs)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    torch.testing.assert_close(look(tempered(network, 4.0), pairs).logits.flatten(0, 1), soft.logits)
