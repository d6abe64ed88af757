"""What experts stand for: tables against loops, lifts and information by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralmoe import Capacity, LinearScorer, Router, Soft, TopK, TopP
from spectralmoe.diagnostics import association, label_table, mutual_information, specialisation

SELECTORS = {"top-1": TopK(1), "top-3": TopK(3), "soft": Soft(), "top-p": TopP(0.5), "capacity": Capacity(TopK(2), 0.7)}


def route(x, kind="top-1", experts=5, mask=None):
    return Router(LinearScorer(x.shape[-1], experts), SELECTORS[kind])(x, mask=mask)


@given(st.integers(0, 10**6), st.sampled_from(list(SELECTORS)), st.booleans())
def test_tables_by_loops(seed, kind, by_sequence):
    torch.manual_seed(seed)
    x, mask = torch.randn(4, 6, 6), torch.rand(4, 6) < 0.8
    labels = torch.randint(-1, 3, (4,) if by_sequence else (4, 6))
    routing = route(x, kind, mask=mask)
    each = labels.repeat_interleave(6).tolist() if by_sequence else labels.flatten().tolist()
    want = torch.zeros(3, 5, dtype=torch.int64)
    for label, experts, weights in zip(each, routing.indices.tolist(), routing.weights.tolist(), strict=True):
        filled = [e for e in experts if e >= 0]
        if kind == "soft" and filled:
            filled = [max(zip(weights, experts, strict=True))[1]]
        for e in filled:
            if label >= 0:
                want[label, e] += 1
    found = label_table(routing, labels, 3)
    assert found.dtype == torch.int64
    assert torch.equal(found, want)


def test_tables_add_up_to_the_load():
    for kind in SELECTORS:
        routing = route(torch.randn(50, 6), kind, mask=torch.rand(50) < 0.9)
        labels = torch.randint(0, 4, (50,))
        assert torch.equal(label_table(routing, labels, 4).sum(0), routing.load_counts())


def test_no_tokens_no_labels():
    empty = label_table(route(torch.randn(0, 6)), torch.empty(0), 3)
    assert empty.tolist() == [[0] * 5] * 3
    assert label_table(route(torch.randn(2, 0, 6)), torch.tensor([0, 1]), 3).tolist() == [[0] * 5] * 3
    assert association(empty).value is None
    assert [lift.value for lift in specialisation(empty)] == [None] * 5
    unlabelled = label_table(route(torch.randn(9, 6)), torch.full((9,), -100), 3)
    assert association(unlabelled).value is None
    assert [lift.value for lift in specialisation(torch.zeros(0, 5, dtype=torch.int64))] == [None] * 5


def test_labels_that_do_not_fit_are_refused(user_error):
    with user_error("label_table", "7 labels", "N=24 tokens", "B=4 sequences"):
        label_table(route(torch.randn(4, 6, 6)), torch.zeros(7), 3)
    with user_error("label_table", "4 labels", "N=24 tokens"):
        label_table(route(torch.randn(24, 6)), torch.zeros(4), 3)
    with user_error("label_table", "label 3", "num_labels is 3"):
        label_table(route(torch.randn(2, 6)), torch.tensor([0, 3]), 3)


def test_association_is_information_about_slots():
    experts_of_their_own = torch.diag(torch.tensor([50, 30, 20]))
    assert association(experts_of_their_own).value == pytest.approx(1)
    assert association(torch.tensor([[50, 50], [50, 50]])).value == 0
    table = torch.tensor([[50, 10], [20, 70]])
    assert association(table).value == mutual_information(table).value
    assert str(association(torch.tensor([[3, 1], [1, 3]]))) == "no data (8 of 20 slots)"


def test_labels_that_choose_the_expert_are_told_from_labels_that_do_not():
    router = Router(LinearScorer(4, 4), TopK(1))
    router.scorer.weight.data = torch.eye(4)
    labels = torch.randint(0, 4, (400,))
    routing = router(torch.eye(4)[labels] + 0.1 * torch.randn(400, 4))
    assert association(label_table(routing, labels, 4)).value == pytest.approx(1)
    assert association(label_table(routing, torch.randint(0, 4, (400,)), 4)).value < 0.03


def test_lifts_by_hand():
    table = torch.tensor([[60, 20, 0], [20, 60, 0], [20, 20, 0]])  # P(label) = 0.4, 0.4, 0.2
    first, second, idle = specialisation(table)
    assert first.value == second.value == pytest.approx(0.6 / 0.4)
    assert (first.data, first.unit) == (100, "slots")
    assert str(idle) == "no data (0 of 13 slots)"
    enough, short = torch.tensor([[45, 5], [45, 5]]), torch.tensor([[45, 4], [45, 4]])
    assert [lift.value for lift in specialisation(enough)] == [1, 1]
    assert [lift.value for lift in specialisation(short)] == [1, None]
    even = specialisation(torch.full((3, 4), 25))
    assert [lift.value for lift in even] == pytest.approx([1] * 4)


def test_a_rare_label_in_a_small_expert_is_no_speciality():
    table = torch.tensor([[500, 50], [500, 49], [0, 1]])
    small = specialisation(table)[1]
    assert small.value == pytest.approx(1, abs=0.02)  # the rare label alone would have a lift of 11


@given(
    st.lists(st.lists(st.integers(0, 200), min_size=4, max_size=4), min_size=2, max_size=5),
    st.permutations(range(4)),
)
def test_lifts_by_definition_in_any_order(rows, order):
    table, n = torch.tensor(rows), sum(map(sum, rows))
    lifts = specialisation(table)
    for e, lift in enumerate(lifts):
        own = sum(row[e] for row in rows)
        ratios = [row[e] * n / own / sum(row) for row in rows if n and own * sum(row) >= 5 * n]
        assert lift.data == own
        assert lift.value == (pytest.approx(max(ratios), abs=1e-9) if ratios else None)
        assert lift.known == (own >= lift.needs)
    assert [str(lift) for lift in specialisation(table[:, order])] == [str(lifts[e]) for e in order]
