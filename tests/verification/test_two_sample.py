"""The test of the energy distance against permutations, and its p-values against their law."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from manifold_sde import errors
from manifold_sde.verification.two_sample import (
    compare_laws,
    energy_test,
    mean_difference,
    runs_for_mean,
    weighted_chi_squared_tail,
)


def sphere(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_the_statistic_is_the_energy_distance() -> None:
    """With all points as landmarks nothing is projected away."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 3)), rng.normal(size=(70, 3)) + 0.3
    both = np.concatenate([a, b])
    scale = np.abs(both - both.mean(0)).mean()
    distance = 2 * cdist(a, b).mean() - cdist(a, a).mean() - cdist(b, b).mean()
    expected = 60 * 70 / 130 * distance / scale
    assert energy_test(a, b).statistic == pytest.approx(expected, rel=1e-6)


def test_the_p_value_is_that_of_permutations() -> None:
    rng = np.random.default_rng(1)
    a, b = sphere(rng, 300, 4), sphere(rng, 300, 4)
    b[:, 0] += 0.12
    distances = cdist(np.concatenate([a, b]), np.concatenate([a, b]))
    signs = np.ones(600)
    signs[300:] = -1
    rows = np.stack([signs] + [rng.permutation(signs) for _ in range(20_000)])
    found = -np.einsum("ri,ri->r", rows @ distances, rows)
    share = (found[1:] >= found[0]).mean()
    assert 0.0005 < share < 0.2
    assert energy_test(a, b).p_value == pytest.approx(share, rel=0.25)


def test_p_values_are_uniform_under_the_hypothesis() -> None:
    """1000 pairs; false alarms at 1e-4 of Kolmogorov's test; and the tail itself."""
    rng = np.random.default_rng(2)
    found = [
        energy_test(sphere(rng, 150, 3), sphere(rng, 200, 3), seed=i).p_value for i in range(1000)
    ]
    assert stats.kstest(found, "uniform").pvalue > 1e-4
    assert stats.binomtest(int((np.array(found) < 0.01).sum()), 1000, 0.01).pvalue > 1e-4


def test_it_finds_a_change_of_spread_that_no_mean_shows() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 800, 2))
    assert energy_test(a, 1.25 * b).p_value < 1e-4
    assert abs(mean_difference(a[:, 0], 1.25 * b[:, 0])) < 4


@pytest.mark.parametrize("weights", [[1.0], [1.0] * 12, [3.0, 1.0, 0.5, 0.1, 0.01]])
def test_the_tail_of_a_weighted_sum(weights: list[float]) -> None:
    rng = np.random.default_rng(4)
    sums = rng.chisquare(1, size=(1_000_000, len(weights))) @ np.array(weights)
    for value in np.quantile(sums, [0.1, 0.5, 0.9, 0.99, 0.999]):
        share = (sums > value).mean()
        assert weighted_chi_squared_tail(float(value), weights) == pytest.approx(share, rel=0.12)
    mean = float(np.sum(weights))
    assert weighted_chi_squared_tail(mean, weights) == pytest.approx((sums > mean).mean(), rel=0.05)


def test_declared_functionals_find_what_they_are_for() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 400, 20))
    b[:, 3] += 0.5
    found = compare_laws(a, b, {"first": lambda x: x[:, 0], "fourth": lambda x: x[:, 3]})
    assert found.worst == "fourth"
    assert found.p_value < 1e-4
    assert abs(found.z["first"]) < 4
    same = compare_laws(a, rng.normal(size=(400, 20)), {"first": lambda x: x[:, 0]})
    assert same.p_value > 1e-3


def test_the_number_of_runs_finds_the_effect_at_the_rate_declared() -> None:
    """2000 trials at a miss rate of 0.1, and as many without an effect."""
    n = runs_for_mean(0.3, false_alarm=0.01, miss=0.1)
    rng = np.random.default_rng(6)
    for effect, expected in ((0.3, 0.9), (0.0, 0.01)):
        a, b = rng.normal(size=(2, 2000, n))
        z = np.array([mean_difference(x, y + effect) for x, y in zip(a, b, strict=True)])
        rejected = int((2 * stats.norm.sf(np.abs(z)) < 0.01).sum())
        assert stats.binomtest(rejected, 2000, expected).pvalue > 1e-4


def test_samples_that_cannot_be_used() -> None:
    good = np.zeros((60, 2))
    for bad in (np.zeros((10, 2)), np.zeros((60, 3)), np.full((60, 2), np.nan), np.zeros(60)):
        with pytest.raises(errors.ArgumentError, match="not two samples"):
            energy_test(good, bad)
    with pytest.raises(errors.ArgumentError, match="no sample size"):
        runs_for_mean(0.0, 1e-4, 0.01)
    assert energy_test(good, good).p_value == 1.0


def test_a_tolerated_distance_is_taken_away() -> None:
    """Laws that are as far apart as the pairs, or less far, are not told apart; others are."""
    rng = np.random.default_rng(7)
    a, b, p = rng.normal(size=(3, 2000, 2))
    shift = np.array([0.3, 0.0])
    assert energy_test(a, b + shift).p_value < 1e-6
    assert energy_test(a, b + shift, tolerated=(p, p + shift)).p_value > 1e-2
    assert energy_test(a, b + 3.0 * shift, tolerated=(p, p + shift)).p_value < 1e-6
    # Pairs of one law tolerate nothing but rounding.
    q = rng.normal(size=(2000, 2))
    assert energy_test(a, b + shift, tolerated=(p, q)).p_value < 1e-5


def test_with_a_tolerance_false_alarms_are_rare() -> None:
    """At the edge of what is tolerated the p-value is a bound: 200 pairs at the level 0.05."""
    rng = np.random.default_rng(8)
    shift = np.array([0.2, 0.0])
    pilot = rng.normal(size=(500, 2))
    alarms = 0
    for i in range(200):
        a, b = rng.normal(size=(2, 200, 2))
        found = energy_test(a, b + shift, seed=i, tolerated=(pilot, pilot + shift))
        alarms += found.p_value < 0.05
    assert stats.binomtest(alarms, 200, 0.05, alternative="greater").pvalue > 1e-4
