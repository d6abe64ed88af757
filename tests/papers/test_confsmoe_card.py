"""The ConfSMoE card: its rows are what they are called, and what its measures mean."""

from pathlib import Path

import pytest
import torch

from spectralmoe import record
from spectralmoe.experiments.cards import Trained, run_card
from spectralmoe.experts import ConfidentExperts
from spectralmoe.presets import find_preset
from spectralmoe.training.settings.views import Views
from spectralmoe.training.tasks import open_task

CARD = Path(__file__).parents[2] / "papers" / "confsmoe"


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, tmp_path):
    small = card.card(card.run_of(60, 1), ("zeros", "noise", "stage 1"), seeds=1, tries=1)
    for ran in (6 + 18, 0):  # a rerun does only what is missing
        count, _ = run_card(small, tmp_path, tmp_path / "work", 1, lambda *text: None)
        assert count == ran
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| confidence | softmax + Balanced | zeros |" in text
    assert "| stage 1 | noise | confidence |" in text


def test_rows_are_what_they_are_called(card):
    from rows import GATE_PAIRS, PLACEHOLDER_PAIRS, PLACEHOLDERS, ROWS

    layers = {row: find_preset(table) for row, table in ROWS.items()}
    routers = {row: preset.make_router(8, 4, k=1) for row, preset in layers.items()}
    banks = {row: preset.make_experts(4, 8, 6, default={"type": "feed_forward"}) for row, preset in layers.items()}
    confident = [row for row, bank in banks.items() if isinstance(bank, ConfidentExperts)]
    assert confident == ["confidence", "confidence, router learns"]
    trained = {row: router(torch.randn(5, 8)).weights.requires_grad for row, router in routers.items()}
    assert [row for row, gets in trained.items() if not gets] == ["no gate", "confidence"]
    assert {row for pair in GATE_PAIRS for row in pair} <= ROWS.keys()
    assert {kind for pair in PLACEHOLDER_PAIRS for kind in pair} <= PLACEHOLDERS.keys()
    for settings in PLACEHOLDERS.values():
        Views(**settings)


def test_usage_and_correlation_by_hand(card):
    from measure import correlation, usage_entropy

    assert usage_entropy(torch.tensor([0.25] * 4)) == pytest.approx(1.0)
    assert usage_entropy(torch.tensor([0.5, 0.5, 0.0, 0.0])) == pytest.approx(0.5)
    x = torch.tensor([0.0, 1.0, 2.0])
    assert correlation(x, 3 - 2 * x) == pytest.approx(-1.0)
    assert correlation(x, torch.ones(3)) is None


def test_what_is_measured_of_confidence_is_that_of_rows_one_by_one(card):
    from measure import correlation, measure
    from rows import ROWS

    run = card.run_of(60, 1).model_copy(update={"router": ROWS["confidence"], "depth": 1})
    task = open_task(run)
    network = task.build(run).eval()
    bank = network.blocks[0].moe.experts
    torch.nn.init.normal_(bank.direction)
    seen = []
    layer = network.blocks[0].moe
    with torch.no_grad():
        layer.register_forward_hook(
            lambda _, given, kwargs, out: seen.append((given[0], kwargs["mask"])), with_kwargs=True
        )
        network(task.inputs("test"))
        (tokens, mask), pairs = seen[0], []
        labels = task.data.test.labels.repeat(4)
        chosen = layer.router(tokens, mask=mask).indices.view(*mask.shape)
        for sample, view in mask.nonzero().tolist()[:200:7]:
            row = bank.experts.expert(tokens[sample, view][None], int(chosen[sample, view]))
            pairs.append((sample, view, network.head(row).argmax().item() == labels[sample].item()))
        with record(network, keep=("confidence", "unweighed")) as tape:
            network(task.inputs("test"))
        item, right = tape[0], network.head(tape[0].tensor("unweighed")).argmax(-1)
        place = {slot: number for number, slot in enumerate(item.order.tolist())}
        for sample, view, is_right in pairs:
            assert (right[place[3 * sample + view]] == labels[sample]).item() == is_right
    values = measure(Trained(network, task, None))
    every = (right == labels.repeat_interleave(3)[item.order]).double()
    assert values["alone"] == pytest.approx(float(every.mean()))
    assert values["correlation"] == pytest.approx(correlation(item.tensor("confidence").double(), every))
