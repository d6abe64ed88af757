"""The generator of interference: powers as asked, jammers as their equations say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from seeds import shifted

from spectralmoe.data.interference import _MAKERS, CLASSES, PRIMITIVES, _unit, synthetic_interference
from spectralmoe.scorers.spectrum import spectrum_features

T = 256


def made(kind, n=20, length=T):
    """``n`` jammers of one kind, of unit power."""
    return _unit(_MAKERS[kind](n, length, np.random.default_rng(shifted(0))))


@pytest.mark.parametrize("kind", PRIMITIVES)
def test_each_jammer_has_unit_power(kind):
    power = np.mean(np.abs(made(kind)) ** 2, axis=1)
    np.testing.assert_allclose(power, 1, rtol=1e-12)


@pytest.mark.parametrize("asked", [-10.0, 0.0, 15.0])
def test_the_jnr_is_as_asked(asked):
    """The same draws at another ratio differ by the jammers alone."""
    seed = shifted(1)
    here, there = (synthetic_interference(42, jnr=jnr, seed=seed) for jnr in (asked, asked + 20))
    jammers = (there.signals - here.signals) / (10 ** ((asked + 20) / 20) - 10 ** (asked / 20))
    noise = here.signals - 10 ** (asked / 20) * jammers
    power, floor = jammers.abs().square().mean(1), noise.abs().square().mean()
    measured = asked + 10 * (power / floor).log10()
    assert (measured - asked).abs().max() < 0.2
    assert (here.jnr == asked).all()


def test_ratios_fill_the_range_and_the_seed_makes_them():
    data = synthetic_interference(420, jnr=(-5, 15), seed=shifted(2), length=T)
    assert -5 <= data.jnr.min() < -3
    assert 13 < data.jnr.max() <= 15
    again = synthetic_interference(420, jnr=(-5, 15), seed=shifted(2), length=T)
    assert torch.equal(again.signals, data.signals)
    other = synthetic_interference(420, jnr=(-5, 15), seed=shifted(3), length=T)
    assert not torch.equal(other.signals, data.signals)


def test_21_classes_in_turn_of_one_and_of_two():
    data = synthetic_interference(63, seed=0, length=T)
    assert len(set(CLASSES)) == 21
    assert data.labels.bincount().tolist() == [3] * 21
    assert [CLASSES[label].count("+") + 1 for label in data.labels] == data.components.tolist()
    assert data.signals.dtype == torch.complex64


def test_jammers_are_what_they_are_called():
    power = {kind: np.abs(np.fft.fft(made(kind), axis=1)) ** 2 for kind in PRIMITIVES}
    share = {kind: np.sort(p / p.sum(1, keepdims=True), axis=1)[:, ::-1] for kind, p in power.items()}
    assert (share["tone"][:, :3].sum(1) > 0.8).all()  # a line and its two neighbours
    assert (share["multitone"][:, :20].sum(1) > 0.8).all()
    for kind, width in (("narrow-band noise", 0.05), ("partial-band noise", 0.5)):
        assert (np.count_nonzero(share[kind] > 1e-20, axis=1) <= width * T + 2).all()
    envelope = {kind: np.abs(made(kind)) for kind in PRIMITIVES}
    for kind in ("tone", "chirp"):
        np.testing.assert_allclose(envelope[kind], 1)
    on = (envelope["pulse"] > 0).mean(1)
    assert ((on > 0.05) & (on < 0.6)).all()
    steps = np.angle(made("chirp")[:, 1:] * made("chirp")[:, :-1].conj()) / (2 * np.pi)
    assert (np.ptp(steps, axis=1) > 0.09).all()
    assert (np.ptp(np.abs(np.diff(steps, axis=1).round(6)), axis=1) <= 1 + 1e-6).all()


def test_features_do_not_see_the_phase():
    signals = synthetic_interference(21, seed=shifted(4), length=T).signals.to(torch.complex128)[:, None]
    turned = signals * torch.exp(torch.tensor(1.3j))
    torch.testing.assert_close(spectrum_features(turned), spectrum_features(signals), rtol=0, atol=1e-6)


def test_mistakes_are_named(user_error):
    with user_error("n must be at least 1 and length 128, got 0 and 1024"):
        synthetic_interference(0, seed=0)
    with user_error("got 3 and 64"):
        synthetic_interference(3, seed=0, length=64)
    for jnr in ((3.0, 1.0), float("nan"), (0.0, float("inf"))):
        with user_error("jnr must be a range of finite dB"):
            synthetic_interference(3, seed=0, jnr=jnr)
