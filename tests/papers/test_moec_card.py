"""The MoEC card: its rows are what they are called, and what its measures mean."""

from pathlib import Path

import pytest
import torch

from spectralmoe import Router
from spectralmoe.experiments.cards import run_card
from spectralmoe.presets import find_preset

CARD = Path(__file__).parents[2] / "papers" / "moec"


@pytest.mark.full
def test_a_tiny_run_holds_every_row_and_field(card, tmp_path):
    run = card.run_of(64, 1).model_copy(update={"data": "digits"})
    small = card.card(run, (8, 16), seeds=1, tries=1)
    for ran in (5 + 10, 0):  # a rerun does only what is missing
        count, _ = run_card(small, tmp_path, tmp_path / "work", 1, lambda *text: None)
        assert count == ran
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| MoEC | + uniform dropout | 16 |" in text
    assert "## From 8 to 16 experts" in text


def test_rows_leave_out_as_many_experts_and_differ_by_what_they_say(card):
    from rows import ROWS

    presets = {row: find_preset(table) for row, table in ROWS.items()}
    routers = {row: preset.make_router(64, 32, k=1) for row, preset in presets.items()}
    assert len({shapes(router) for router in routers.values()}) == 1
    kept = {row: getattr(router.selector, "taking_part", torch.ones(32)).sum() for row, router in routers.items()}
    assert [int(number) for number in kept.values()] == [32, 32, 16, 16, 16]
    groups = {row: getattr(router.selector, "groups", None) for row, router in routers.items()}
    assert list(groups.values()) == [None, None, 8, 1, 8]
    assert [len(preset.terms) for preset in presets.values()] == [1, 2, 1, 1, 2]


def shapes(router: Router) -> tuple[object, ...]:
    return tuple((name, tuple(value.shape)) for name, value in router.scorer.state_dict().items())


def test_likeness_is_that_of_a_group_and_of_two(card):
    from measure import likeness

    one, two = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 0.0])
    together = torch.stack([one] * 4 + [two] * 4, dim=1)
    assert likeness(together) == pytest.approx((1.0, 0.0))
    assert likeness(torch.stack([one, two] * 4, dim=1)) == pytest.approx((1 / 3, 1 / 2))


def test_what_more_experts_bring_is_paired_by_row_and_seed(card):
    from measure import by_size

    values = {("a", 0): (70.0, 75.0, 72.0), ("a", 1): (70.0, 60.0, 50.0)}
    cells = [
        {"row": row, "seed": seed, "experts": experts, "accuracy": value, "cpu": "x"}
        for (row, seed), reached in values.items()
        for experts, value in zip((8, 16, 64), reached, strict=True)
    ]
    found = by_size([*cells, {"row": "b", "seed": 0, "experts": 8, "diverged": "at step 1", "cpu": "x"}])
    assert [(cell["growth"], cell["best"]) for cell in found] == [(2.0, 4.0), (-20.0, 3.0)]
