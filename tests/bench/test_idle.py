"""Whether the machine is idle, from made-up clocks."""

import math

import pytest

from spectralmoe import UserError
from spectralmoe.bench.idle import LIMIT, WINDOW, Idle, own_seconds, processor_seconds


class Machine:
    """Processors that count the seconds of work of all, and of us."""

    def __init__(self):
        self.now = self.work = self.ours = 0.0

    def run(self, seconds, ours=0, others=0):
        self.now += seconds
        self.work += (ours + others) * seconds
        self.ours += ours * seconds

    def idle(self, others=0):
        """Others do this during the first look."""
        return Idle(
            lambda: self.work, lambda: self.ours, lambda: self.now, lambda seconds: self.run(seconds, others=others)
        )


def test_our_own_threads_are_no_load_of_others():
    machine = Machine()
    idle = machine.idle()
    for _ in range(3):
        machine.run(30, ours=2)
        assert idle.others() == pytest.approx(0, abs=1e-9)


def test_a_machine_that_was_busy_a_minute_ago_is_idle_now():
    machine = Machine()
    machine.run(600, others=2)
    assert machine.idle().demand("at the start") == 0


def test_others_are_seen_beside_our_own_threads():
    machine = Machine()
    idle = machine.idle(others=0.25)
    assert idle.demand("here") == pytest.approx(0.25)
    machine.run(100, ours=1, others=0.4)
    assert idle.others() == pytest.approx(0.4)
    machine.run(10, ours=2, others=LIMIT + 0.4)
    with pytest.raises(UserError, match=r"not idle during layer: others keep 0\.9 threads busy .*--allow-busy"):
        idle.demand("during layer")


def test_a_look_too_soon_gives_the_last_answer_and_widens_the_next_window():
    machine = Machine()
    idle = machine.idle()
    assert idle.others() == 0
    machine.run(WINDOW / 2, others=1)
    assert idle.others() == 0
    machine.run(WINDOW / 2, others=0)
    assert idle.others() == pytest.approx(0.5)


def test_a_machine_that_does_not_say_is_not_called_idle():
    idle = Idle(lambda: math.nan, lambda: 0.0, iter(range(100)).__next__, lambda seconds: None)
    assert math.isnan(idle.others())
    with pytest.raises(UserError, match="install psutil, or add --allow-busy"):
        idle.demand("at the start")


def test_this_machine_counts_its_work_and_ours_within_it():
    before = processor_seconds(), own_seconds()
    sum(range(10**6))
    after = processor_seconds(), own_seconds()
    assert math.isnan(after[0]) or after[0] >= before[0] > 0
    assert after[1] >= before[1] > 0
