"""Whether the machine is idle, from made-up clocks."""

import math

import pytest

from spectralmoe import UserError
from spectralmoe.bench.idle import LIMIT, Idle


class Machine:
    """A kernel that averages the runnable threads of this process and of others over a minute, every 5 seconds."""

    def __init__(self):
        self.now = self.used = self.average = 0.0

    def run(self, seconds, ours, others):
        for _ in range(int(seconds / 5)):
            kept = math.exp(-5 / 60)
            self.average = self.average * kept + (ours + others) * (1 - kept)
            self.used, self.now = self.used + 5 * ours, self.now + 5

    def idle(self):
        return Idle(lambda: self.average, lambda: self.used, lambda: self.now)


def test_our_own_threads_are_no_load_of_others():
    machine = Machine()
    idle = machine.idle()
    for _ in range(20):
        machine.run(30, ours=2, others=0)
        assert idle.others() < 0.05
    assert machine.average > 1.9


def test_others_are_seen_beside_our_own_threads():
    machine = Machine()
    idle = machine.idle()
    machine.run(300, ours=2, others=0)
    idle.demand("here")
    machine.run(120, ours=1, others=1)
    assert 0.8 < idle.others() < 1.05
    with pytest.raises(UserError, match=r"not idle during layer: others keep 0\.9 threads busy .*--allow-busy"):
        idle.demand("during layer")
    machine.run(300, ours=1, others=0)
    assert idle.demand("now") < LIMIT
