"""Plans: every token once, capacities kept, copies only where they help, the same on every rank."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from seeds import shifted

from spectralmoe.parallel import (
    Copy,
    Cost,
    Interval,
    Plan,
    plan_least_loaded,
    plan_native,
    plan_replicas,
)

PLANNERS = {
    "native": plan_native,
    "least_loaded": plan_least_loaded,
    "always": lambda load, devices: plan_least_loaded(load, devices, chunk=1, threshold=0),
    "replicas": plan_replicas,
    "no_spare": lambda load, devices: plan_replicas(load, devices, spare=0),
}


def skewed(share: float, hot: int = 1, experts: int = 32, total: int = 8 * 32_768) -> list[int]:
    """``share`` of all tokens to the first experts, the rest even over all of them."""
    even = round(total * (1 - share)) // experts
    rest = total - even * experts
    return [even + (rest * (e + 1) // hot - rest * e // hot if e < hot else 0) for e in range(experts)]


def draws(number: int) -> list[tuple[list[int], int]]:
    """Loads of every kind with a number of devices: even, skewed, empty experts, nothing, one expert a device."""
    draw, found = random.Random(shifted(0)), [([0] * 8, 4), ([5] * 8, 8), ([0, 0, 0, 9_999], 2), ([7, 1], 1)]
    for _ in range(number):
        devices, each = draw.choice((1, 2, 3, 8, 16)), draw.choice((1, 2, 4))
        scale = draw.choice((3, 500, 20_000))
        found.append(([int(scale * draw.random() ** draw.choice((1, 8))) for _ in range(devices * each)], devices))
    return found


@pytest.mark.parametrize("name", PLANNERS)
def test_every_token_once_and_the_sum_is_kept(name):
    for load, devices in draws(40):
        plan = PLANNERS[name](load, devices)
        assert plan.load == load
        for number, parts in zip(load, plan.intervals, strict=True):
            assert [part.start for part in parts] == [0, *[part.end for part in parts[:-1]]][: len(parts)]
            assert all(part.start < part.end and 0 <= part.device < devices for part in parts)
            assert sum(part.end - part.start for part in parts) == number
        assert len(plan.device_load()) == devices
        assert sum(plan.device_load()) == sum(load)
        assert PLANNERS[name](torch.tensor(load), devices) == plan


@pytest.mark.parametrize(("capacity", "chunk"), [(1.0, 1), (1.0, 300), (1.1, 300), (1.3, 1)])
def test_no_device_is_over_its_capacity_unless_forced(capacity, chunk):
    forced = 0
    for load, devices in draws(60):
        plan = plan_least_loaded(load, devices, capacity=capacity, chunk=chunk, threshold=0)
        limit = math.ceil(Fraction(round(10 * capacity), 10) * sum(load) / devices)
        assert plan.forced == sum(max(0, tokens - limit) for tokens in plan.device_load())
        for (home,), parts in zip(plan.homes, plan.intervals, strict=True):
            assert all(end - start >= chunk for device, start, end in parts[:-1] if device != home)
        forced += plan.forced
    assert chunk > 1 or not forced


def test_a_balanced_load_moves_nothing():
    for threshold in (0, 1.3):
        assert plan_least_loaded([512] * 64, 8, threshold=threshold) == plan_native([512] * 64, 8)
    assert plan_native([512] * 64, 8).copies == []
    uneven = [300, 0, 100, 200, 150, 150]  # inside a device the experts may differ
    assert plan_least_loaded(uneven, 3, threshold=0).copies == []


def test_one_device_is_the_native_plan():
    assert plan_least_loaded([9000, 0, 1], 1, threshold=0) == plan_native([9000, 0, 1], 1)


def test_below_the_threshold_the_native_plan_stays():
    load = [1290, 710, 1000, 1000]
    assert plan_least_loaded(load, 4, chunk=1).copies == []
    assert plan_least_loaded(load, 4, chunk=1, threshold=1.29).copies == [Copy(0, 0, 1)]
    assert plan_least_loaded([1300, 700, 1000, 1000], 4, chunk=1).copies == [Copy(0, 0, 1)]


def test_nearly_all_tokens_to_one_of_32_experts():
    """Seven copies are the fewest: at a capacity of the mean, 7.6 times the mean need eight devices."""
    load = skewed(0.95)
    plan = plan_least_loaded(load, 8)
    assert plan_native(load, 8).imbalance() == pytest.approx(7.65, abs=5e-3)
    assert plan.imbalance() == pytest.approx(1.0, abs=1e-4)
    assert plan.copies == [Copy(0, 0, device) for device in range(1, 8)]
    assert plan_least_loaded(skewed(0.95, hot=4), 8).imbalance() == pytest.approx(1.0, abs=1e-4)
    looser = plan_least_loaded(load, 8, capacity=1.1)
    assert looser.imbalance() == pytest.approx(1.1, abs=1e-4)
    assert len(looser.copies) == 7


def test_by_hand():
    """C = 10. Expert 0 keeps 10 - 2, spills 12; devices 1 and 2 have 4 of their own and take 6 each."""
    plan = plan_least_loaded([20, 2, 3, 1, 4, 0], 3, chunk=1)
    assert plan.intervals[0] == (Interval(0, 0, 8), Interval(1, 8, 14), Interval(2, 14, 20))
    assert plan.device_load() == [10, 10, 10]
    assert plan.copies == [Copy(0, 0, 1), Copy(0, 0, 2)]
    assert plan.forced == 0
    # the helpers have room for 6 each, which is too little: one takes all
    plan = plan_least_loaded([20, 2, 3, 1, 4, 0], 3, chunk=7)
    assert plan.intervals[0] == (Interval(0, 0, 8), Interval(1, 8, 20))
    assert plan.device_load() == [10, 12, 8]  # experts 2 (3 tokens) and 3 (1) find device 1 full
    assert plan.copies == [Copy(0, 0, 1), Copy(2, 1, 2), Copy(3, 1, 2)]
    assert plan.forced == 2


def test_replicas_by_hand():
    """Six places: two more of expert 0 (12 -> 6 -> 4); no device holds an expert twice."""
    plan = plan_replicas([12, 3, 2], 3)
    assert sorted(plan.homes[0]) == [0, 1, 2]
    assert sum(map(len, plan.homes)) <= 6
    assert max(plan.device_load()) < max(plan_native([12, 3, 2], 3).device_load())
    assert plan.copies == []
    late = plan_replicas([3, 2, 12], 3, seen=[12, 3, 2])  # placed by what is no longer true
    assert late.homes == plan.homes
    assert late.imbalance() > plan.imbalance()


def test_replicas_fit_their_places():
    for load, devices in draws(40):
        for spare in (0, 1, 3):
            plan = plan_replicas(load, devices, spare=spare)
            held = [len(work) for work in plan.work()]
            assert max(held) <= len(load) // devices + spare
            assert all(homes and len(set(homes)) == len(homes) for homes in plan.homes)
            assert plan.copies == []


def test_modelled_time_and_memory_by_hand():
    """Two experts of 2 x 8 numbers on two devices; at rate 1 a token takes 64 seconds, a copy takes 64 / 32."""
    cost = Cost(2, 8, item=2, overhead=10, rate=1, memory=0.5, link=32)
    assert (cost.seconds(0), cost.seconds(1), cost.seconds(3)) == (0, 10 + 128, 10 + 192)  # reading weights: 128
    plan = Plan(2, ((0,), (1,)), ((Interval(0, 0, 4), Interval(1, 4, 6)), (Interval(1, 0, 3),)))
    assert plan.work() == [{0: 4}, {1: 3, 0: 2}]
    assert plan.modelled_time(cost) == 2 + (10 + 192) + (10 + 128)
    assert plan.modelled_bytes(cost) == 2 * 64 + 5 * 10 * 2
    assert plan_native([0, 0], 2).modelled_time(cost) == 0
    assert plan_native([0, 0], 2).modelled_bytes(cost) == 64


def test_a_plan_does_not_grow_with_the_tokens():
    plans = [plan_least_loaded(skewed(0.95, experts=256, total=total), 64) for total in (10**7, 10**12)]
    assert len({sum(map(len, plan.intervals)) for plan in plans}) == 1
    plan = plans[1]
    assert plan.imbalance() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plan_least_loaded([1, 2, 3], 2), "2 devices cannot share 3 experts evenly; take one of 1, 3"),
        (lambda: plan_native([1, 2], 0), "devices must be a whole number from 1 on, got 0"),
        (lambda: plan_native([], 1), "load needs the tokens of each expert"),
        (lambda: plan_native([1, -2], 1), "load of expert 1 must be a whole number from 0 on, got -2"),
        (lambda: plan_native(torch.tensor([0.5]), 1), "load of expert 0 must be a whole number from 0 on, got 0.5"),
        (lambda: plan_native(torch.ones(2, 2), 1), r"load of expert 0 must be a whole number"),
        (lambda: plan_native(torch.tensor(3), 1), "load needs the tokens of each expert"),
        (lambda: plan_least_loaded([1], 1, capacity=0.9), "capacity must be a number from 1 on, got 0.9"),
        (lambda: plan_least_loaded([1], 1, capacity=math.nan), "capacity must be a number from 1 on, got nan"),
        (lambda: plan_least_loaded([1], 1, chunk=0), "chunk must be a whole number of tokens from 1 on, got 0"),
        (lambda: plan_least_loaded([1], 1, threshold=-1), "threshold must be 0 or more, got -1"),
        (lambda: plan_replicas([1], 1, spare=-1), "spare must be a whole number of places from 0 on, got -1"),
        (lambda: plan_replicas([1, 1], 1, seen=[1]), "seen has 1 experts, load has 2"),
        (lambda: Cost(0, 4), "Cost: dim must be positive, got 0"),
        (lambda: Cost(4, 4, overhead=-1), "Cost: overhead must be 0 or more"),
    ],
)
def test_misuse_is_one_line(user_error, call, words):
    with user_error(words):
        call()
