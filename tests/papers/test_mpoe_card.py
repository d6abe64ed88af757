"""The MPOE card: a tiny run end to end, rows that start as the dense network, and a control of equal numbers."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from seeds import shifted

from spectralmoe.experiments.cards import Desk, run_card
from spectralmoe.experts import MPOExperts
from spectralmoe.layers import moe_layers
from spectralmoe.moe import MoE
from spectralmoe.optim import make_optimizer

CARD = Path(__file__).parents[2] / "papers" / "mpoe"


@pytest.fixture(scope="module")
def sizes(card):
    return replace(card.QUICK_SIZES, windows=16, tune_windows=8, batch_size=8)


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, sizes, tmp_path):
    for ran in (True, False):
        count, notes = run_card(card.card(sizes), tmp_path, tmp_path / "work", 1, lambda *text: None)
        assert ((count > 0), notes) == (ran, [])
    cells = json.loads((tmp_path / "results.json").read_text())
    assert [cell["row"] for cell in cells] == list(card.ROWS)
    assert all(cell.keys() >= {column.key for column in (card.BITS, *card.OWN)} for cell in cells)
    assert all((cell["moved_central"] is None) == ("mpoe" not in cell["row"]) for cell in cells)
    assert "| mpoe + mask | mpoe + slow |" in (tmp_path / "RESULTS.md").read_text()


def test_all_rows_start_as_their_dense_network_and_the_control_has_the_numbers_of_the_method(card, sizes, tmp_path):
    from upcycle import HIDDEN, NARROW, start, upcycled

    desk, numbers = Desk(tmp_path, {}), {}
    tokens = torch.randint(256, (2, 9))
    for name, row in card.ROWS.items():
        dense = start(desk, 3, NARROW if row.cut else HIDDEN, sizes)
        network = upcycled(dense, row, 3)
        with torch.no_grad():
            torch.testing.assert_close(network(tokens), dense(tokens), atol=1e-4, rtol=1e-4)
        banks = [layer.experts for layer in moe_layers(network).values() if isinstance(layer, MoE)]
        numbers[name] = sum(p.numel() for bank in banks for p in bank.parameters())
    assert numbers["mpoe"] == numbers["switch, cut"] == 49_152
    assert numbers["switch"] == 8 * numbers["dense"] == 262_144


def test_slow_steps_are_adamws_own_times_a_fixed_share(card):
    settings, steps = SimpleNamespace(optimizer="adamw", lr=0.01, weight_decay=0.0), []
    for row in (None, {"type": "upcycle:slowed"}):
        torch.manual_seed(shifted(0))
        bank = MPOExperts(4, 8, 8)
        optimizer = make_optimizer("adamw", bank, settings, row=row)
        before = {name: value.detach().clone() for name, value in bank.named_parameters()}
        bank(torch.ones(3, 8), torch.tensor([2, 0, 1, 0])).square().sum().backward()
        optimizer.step()
        steps.append({name: value.detach() - before[name] for name, value in bank.named_parameters()})
    for name, step in steps[0].items():
        torch.testing.assert_close(steps[1][name], step * (0.5 if "central" in name else 1.0), atol=1e-6, rtol=1e-4)
