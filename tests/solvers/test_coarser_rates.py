"""Coarser runs of SGD with the same limit: t_0 and a are kept exactly."""

from __future__ import annotations

import numpy as np
import pytest

from manifold_sde import TimeScale
from manifold_sde.solvers.coarser_rates import coarser_rates, largest_merge


@pytest.mark.parametrize("merge", [1, 3, 4, 7])
def test_coarser_rates_keep_the_law_of_the_limit(merge: int) -> None:
    """The same t_0 and a at the counts asked for, to rounding, for a schedule with a rest."""
    lr = np.concatenate([np.linspace(1e-3, 0.1, 40), np.zeros(5), np.full(55, 0.02)])
    decay = np.linspace(0.5, 0.1, 100)
    scale, counts = TimeScale(lr, decay), np.array([20, 43, 100])
    found = coarser_rates(scale, counts, merge)
    coarse = TimeScale(found.lr.tolist(), found.weight_decay.tolist())
    for name in ("accumulated", "shrinkage"):
        wanted = getattr(scale, name)(counts)
        np.testing.assert_allclose(getattr(coarse, name)(found.counts), wanted, rtol=1e-12)
    np.testing.assert_allclose(found.coarseness**2, counts / found.counts)
    if merge == 1:
        np.testing.assert_allclose(found.lr, lr, rtol=1e-12)


def test_coarser_rates_of_constant_ones_are_constant() -> None:
    """They tend to sqrt(m) eta and sqrt(m) lambda."""
    found = coarser_rates(TimeScale(1e-4, 0.01), np.array([900]), 9)
    np.testing.assert_allclose(found.lr, 3e-4, rtol=1e-4)
    np.testing.assert_allclose(found.weight_decay, 0.03, rtol=1e-4)


def test_coarser_rates_do_not_overflow() -> None:
    """After 10^7 steps a underflows and t_0 overflows; the rates stay what they are."""
    found = coarser_rates(TimeScale(0.01, 0.05), np.array([10**7]), 10**4)
    assert bool(np.isfinite(found.lr).all())
    np.testing.assert_allclose(found.lr[1:], found.lr[1], rtol=1e-6)


def test_largest_merge_keeps_the_stability_and_the_number_of_steps() -> None:
    assert largest_merge(0.1, 10_000, limit=0.31, fewest=16) == 9
    assert largest_merge(0.001, 1600, limit=0.3, fewest=16) == 100
    assert largest_merge(5.0, 10, limit=0.3, fewest=16) == 1
