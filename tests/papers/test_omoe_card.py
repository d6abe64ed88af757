"""The card for OMoE: a tiny run end to end, equal experts as a start, and controls of equal spectra or lengths."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("timm")

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
from spectralmoe.experiments.cards import Desk, run_card
from spectralmoe.optim import make_optimizer
from spectralmoe.optim.projectors import others, projectors

CARD = Path(__file__).parents[2] / "papers" / "omoe"


@pytest.fixture(scope="module")
def sizes(card):
    return replace(card.QUICK_SIZES, data="mnist5k", images=40, phase=1, experts=3, batch_size=10)


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, sizes, tmp_path):
    for ran in (True, False):
        count, notes = run_card(card.card(sizes), tmp_path, tmp_path / "work", 1, lambda text, done: None)
        assert ((count > 0), notes) == (ran, [])
    cells = json.loads((tmp_path / "results.json").read_text())
    assert [cell["row"] for cell in cells] == [*card.ROWS, *card.METHODS]
    columns = (*card.SCORES, *card.LIKENESS, *card.WEIGHTS, *card.LOADS)
    assert all(cell.keys() >= {column.key for column in columns} for cell in cells)
    assert {len(row["tries"]) for row in json.loads((tmp_path / "tuning.json").read_text()).values()} == {1}
    assert "omoe-update-random" in (tmp_path / "RESULTS.md").read_text()


def test_all_rows_start_with_equal_experts_that_compute_what_their_original_did(card, sizes, tmp_path):
    from finetune import experts_of, start

    desk = Desk(tmp_path, {})
    network, again = start(desk, 3, sizes), start(desk, 3, sizes)
    assert all(torch.equal(one, two) for one, two in zip(network.parameters(), again.parameters(), strict=True))
    assert [tuple(up.shape) for up in experts_of(network)] == 2 * [(3, 256, 64)]
    assert all((up == up[0]).all() for up in experts_of(network))
    dense, _ = desk.network("start-3", lambda: None)
    dense.backbone.head = network.backbone.head
    images = torch.rand(4, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), dense(images))


def hooked(name, **options):
    """A control around SGD, and the model that it is for."""
    import variants

    layer = MoE(Router(LinearScorer(6, 3), TopK(2)), FeedForward(3, 6, 4)).double()
    return getattr(variants, name)(torch.optim.SGD(layer.parameters(), lr=0.1), layer, **options), layer


def test_random_directions_have_the_same_spectra(card):
    rows = torch.randn(3, 20, 6, dtype=torch.float64)
    sums = rows.mT @ rows, rows.sum(1), torch.full((3,), 20)
    turned, plain = hooked("Turned")[0].protect(*sums), projectors(*sums)
    torch.testing.assert_close(torch.linalg.eigvalsh(turned), torch.linalg.eigvalsh(plain))
    torch.testing.assert_close(torch.linalg.eigvalsh(others(turned)), torch.linalg.eigvalsh(others(plain)))
    assert (turned - plain).abs().max() > 1e-3


def test_shorter_steps_are_as_short_as_projected_ones_in_their_own_direction(card):
    step, free = torch.randn(3, 4, 6, dtype=torch.float64), torch.rand(3, 6, 6, dtype=torch.float64)
    short = hooked("Shorter", match_norm=False)[0].project(step, free)
    for one, long, other in zip(short, step, free, strict=True):
        torch.testing.assert_close(one, long * (long @ other).norm() / long.norm())


@pytest.mark.parametrize("name", ["turned", "shorter"])
def test_rows_call_the_controls(card, name):
    layer = hooked("Turned")[1]
    settings = SimpleNamespace(optimizer="sgd", lr=0.1, weight_decay=0.0)
    optimizer = make_optimizer("sgd", layer, settings, row={"type": f"variants:{name}", "phase": 3, "on": "update"})
    optimizer.step()
    assert optimizer.state["orthogonal_experts"] == {"steps": 1, "gathers": True}
