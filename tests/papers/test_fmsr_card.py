"""The card of FMSR: every row runs, the control reads what it is said to, and the probe tells what can be told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from spectralmoe.experiments.cards import Contest, run_card
from spectralmoe.presets import find_preset

CARD = Path(__file__).parents[2] / "papers" / "fmsr"


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, tmp_path):
    pytest.importorskip("skimage")
    small = card.card(Contest(card.run_of(40, 1), card.ROWS, tries=1, more=card.measure), seeds=1)
    count, notes = run_card(small, tmp_path, tmp_path / "work", 1, lambda text, done, detail="": None)
    assert (count, notes) == (len(card.ROWS) * 2, [])
    cells = json.loads((tmp_path / "results.json").read_text())
    assert [cell["row"] for cell in cells] == list(card.ROWS)
    text = (tmp_path / "RESULTS.md").read_text()
    assert all(text.count(f"| {one} | {other} | 1 |") == 2 for one, other in card.PAIRS)
    assert all(cell.keys() >= {column.key for column in (*card.PSNR, card.TOLD, *card.PROBE)} for cell in cells)


def test_the_control_has_as_many_features_and_as_large_a_gate(card):
    spectrum, control = (
        find_preset(card.ROWS[row]).make_router(32, 4, k=1).scorer for row in ("spectrum", "random filters")
    )
    maps = torch.rand(6, 1, 16, 16)
    assert spectrum.features(maps).shape == control.features(maps).shape
    assert [p.shape for p in spectrum.parameters()] == [p.shape for p in control.parameters()]
    assert not control.filters.requires_grad
    assert control(torch.zeros(6, 32), context={"map": maps}).shape == (6, 4)


def test_filter_features_are_the_powers_of_the_responses(card, close):
    from gates import filter_features

    maps, filters = torch.randn(2, 1, 4, 5, dtype=torch.float64), torch.randn(3, 1, 3, 3, dtype=torch.float64)
    rows = []
    for image in maps[:, 0]:
        for kernel in filters[:, 0]:
            answers = [(image[i : i + 3, j : j + 3] * kernel).sum() ** 2 for i in range(2) for j in range(3)]
            rows.append((sum(answers) / len(answers) + 1e-6).log10())
    close(filter_features(maps, filters), torch.stack(rows).view(2, 3))


def test_the_probe_tells_what_is_linear_and_no_more(card):
    from measure import probe

    kinds = torch.arange(200) % 4
    centres = 3 * torch.eye(4, dtype=torch.float64)
    features = centres[kinds] + 0.1 * torch.randn(200, 4, dtype=torch.float64)
    assert torch.equal(probe(features, kinds, features + 0.01), kinds)
    noise = torch.randn(400, 3, dtype=torch.float64)
    assert (probe(noise[:200], kinds, noise[200:]) == kinds).double().mean() < 0.6
