"""The timing core, with a clock that the candidates turn themselves."""

import gc
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seeds import shifted

from spectralmoe.bench.timing import SAMPLE_SECONDS, SLOW, median, quiet, ratio, take_times


class Clock:
    """Work that takes as long as it says, on a clock of its own; keeps the order of the calls."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def stopwatch(self, work):
        started = self.now
        work()
        return self.now - started

    def side(self, name, seconds):
        def work():
            self.calls.append(name)
            self.now += seconds(self) if callable(seconds) else seconds

        return work


def test_sides_take_turns_in_random_order_and_ratios_are_those_of_the_same_round():
    clock = Clock()
    sides = {"a": clock.side("a", lambda c: 0.01 * len(c.calls)), "b": clock.side("b", lambda c: 0.02 * len(c.calls))}
    found = take_times(sides, 20, stopwatch=clock.stopwatch, order=random.Random(shifted(1)))
    turns = [tuple(clock.calls[i : i + 2]) for i in range(4, 44, 2)]  # behind two warm-ups each
    assert set(turns) == {("a", "b"), ("b", "a")}
    assert list(found["a"]) == list(found["b"]) == list(range(20))
    # the machine slows down by a factor of 40 over the run, the ratio does not move
    assert max(found["a"].values()) / min(found["a"].values()) > 5
    assert ratio(found["b"], found["a"]).middle == pytest.approx(2.0, rel=0.1)


def test_short_work_is_repeated_until_a_sample_can_be_read():
    clock = Clock()
    found = take_times({"a": clock.side("a", SAMPLE_SECONDS / 10)}, 3, stopwatch=clock.stopwatch)
    assert found["a"] == {i: pytest.approx(SAMPLE_SECONDS / 10) for i in range(3)}
    assert len(clock.calls) == 2 + 3 * 10


def test_only_a_slow_peer_takes_part_in_fewer_rounds():
    clock, base = Clock(), 0.1
    sides = {name: clock.side(name, s) for name, s in (("a", base), ("b", base), ("c", base), ("ours", 9 * base))}
    sides["peer"] = clock.side("peer", 2.5 * SLOW * base)
    found = take_times(sides, 12, fewer=["a", "b", "c", "peer"], stopwatch=clock.stopwatch)
    assert {name: len(times) for name, times in found.items()} == {"a": 12, "b": 12, "c": 12, "ours": 12, "peer": 4}
    assert ratio(found["ours"], found["peer"]).rounds == 4


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40))
def test_the_interval_has_the_coverage_of_its_order_statistics(values):
    found, ordered, n = median(values), sorted(values), len(values)

    def coverage(r):
        return 1 - 2 * sum(math.comb(n, i) for i in range(r)) / 2**n

    best = max((r for r in range(1, n // 2 + 1) if coverage(r) >= 0.95), default=None)
    if best is None:
        assert found.low is None
        assert found.high is None
        assert n < 6
    else:
        assert (found.low, found.high) == (ordered[best - 1], ordered[n - best])
        assert found.low <= found.middle <= found.high


def test_the_interval_holds_the_median_in_95_of_100_samples():
    source = random.Random(shifted(0))
    held = 0
    for _ in range(2000):
        found = median([source.lognormvariate(0.0, 1.0) for _ in range(21)])  # median 1
        held += found.low <= 1.0 <= found.high
    assert 0.94 < held / 2000 < 0.99


def test_no_garbage_is_collected_while_measuring():
    seen = []
    take_times({"a": lambda: seen.append(gc.isenabled())}, 2, stopwatch=lambda work: work() or 1.0)
    assert seen == [False] * len(seen)
    assert gc.isenabled()
    with pytest.raises(RuntimeError), quiet():
        raise RuntimeError
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
