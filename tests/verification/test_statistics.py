"""The tests are tested: p-values uniform under the hypothesis, faults found at declared rates."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import linear_sum_assignment

from manifold_sde.errors import ArgumentError
from manifold_sde.verification.exact import WrappedNormal
from manifold_sde.verification.exact.wrapped_normal import wrap
from manifold_sde.verification.statistics import (
    _watson_tail,
    circular_distance,
    detectable_variance_ratio,
    holm,
    variance_ratio,
    watson_test,
)

LAW = WrappedNormal(0.4, 1.3)


@pytest.mark.parametrize("n", [60, 240])
@pytest.mark.parametrize("law", [LAW, WrappedNormal(3.0, 0.05), WrappedNormal(0.0, 30.0)])
def test_watson_p_values_are_uniform_under_the_hypothesis(law: WrappedNormal, n: int) -> None:
    """4000 samples, false alarm 1e-4 a case; p-values raised to the power 1/1.2 are found out."""
    p = watson_test(law.sample((4000, n), seed=n), law.cdf).p_value
    assert p.shape == (4000,)
    assert stats.kstest(p, "uniform").pvalue > 1e-4
    assert stats.kstest(p ** (1 / 1.2), "uniform").pvalue < 1e-4  # broken twin


@pytest.mark.parametrize("n", [8, 20, 60])
@pytest.mark.parametrize("level", [0.1, 0.01])
def test_watson_raises_false_alarms_as_often_as_declared(level: float, n: int) -> None:
    """20,000 samples, false alarm 1e-4: 0.01 is told from 0.013, and 0.1 from 0.109."""
    p = watson_test(LAW.sample((20_000, n), seed=n), LAW.cdf).p_value
    low, high = stats.binom(20_000, level).interval(1 - 1e-4)
    assert low <= (p < level).sum() <= high


def test_watson_statistic_is_the_textbook_one() -> None:
    """W^2 of Cramer and von Mises by SciPy, less the part of the mean."""
    u = np.random.default_rng(0).uniform(size=50)
    mises = stats.cramervonmises(u, "uniform").statistic
    watson = mises - 50 * (u.mean() - 0.5) ** 2
    corrected = (watson - 0.1 / 50 + 0.1 / 2500) * (1 + 0.8 / 50)
    found = watson_test(2 * math.pi * u - math.pi, lambda a: (a + math.pi) / (2 * math.pi))
    assert found.statistic == pytest.approx(corrected, rel=1e-12)


@pytest.mark.parametrize(("statistic", "level"), [(0.152, 0.10), (0.187, 0.05), (0.267, 0.01)])
def test_watson_tail_is_that_of_the_tables(statistic: float, level: float) -> None:
    assert float(_watson_tail(np.array(statistic))) == pytest.approx(level, rel=0.04)


def test_watson_does_not_depend_on_where_the_circle_is_cut() -> None:
    angles = LAW.sample(60, seed=2)
    here = watson_test(angles, LAW.cdf)
    turned = WrappedNormal(LAW.mean + 2.0, LAW.variance)
    there = watson_test(angles + 2.0 + 2 * math.pi, turned.cdf)
    assert there.statistic == pytest.approx(here.statistic, rel=1e-9)


@pytest.mark.parametrize(
    "broken",
    [
        WrappedNormal(LAW.mean, 2.2 * LAW.variance),
        WrappedNormal(LAW.mean, LAW.variance / 2.2),
        WrappedNormal(LAW.mean + 0.7, LAW.variance),
    ],
    ids=["variance too large", "variance too small", "mean off"],
)
def test_watson_finds_the_fault(broken: WrappedNormal) -> None:
    """At n = 240 and false alarm 1e-4, at most 5 % of 400 samples of a faulty law pass."""
    p = watson_test(broken.sample((400, 240), seed=8), LAW.cdf).p_value
    assert (p < 1e-4).mean() > 0.95


@pytest.mark.parametrize(("n", "fault"), [(8, 2.0), (60, 1.2)])
def test_variance_p_values_are_uniform_under_the_hypothesis(n: int, fault: float) -> None:
    """1500 samples, false alarm 1e-4; a prediction that is off by the fault is found out."""
    draws = np.random.default_rng(n).normal(3.0, 2.0, size=(1500, n))
    p = [variance_ratio(row, 4.0).p_value for row in draws]
    assert stats.kstest(p, "uniform").pvalue > 1e-4
    broken = [variance_ratio(row, 4.0 * fault).p_value for row in draws]
    assert stats.kstest(broken, "uniform").pvalue < 1e-4


@pytest.mark.parametrize("which", [0, 1], ids=["too small", "too large"])
def test_declared_rates_of_the_variance_test(which: int) -> None:
    """At the ratio that is declared detectable, 2000 samples miss as often as declared, 2 %."""
    n, alarm, miss = 60, 1e-3, 0.02
    ratio = detectable_variance_ratio(n, alarm, miss)[which]
    draws = np.random.default_rng(5).normal(0.0, math.sqrt(ratio), size=(2000, n))
    missed = sum(variance_ratio(row, 1.0).p_value > alarm for row in draws)
    low, high = stats.binom(2000, miss).interval(1 - 1e-4)
    assert low <= missed <= high


def test_standard_error_is_the_spread_of_the_ratio() -> None:
    draws = np.random.default_rng(1).standard_t(9, size=(2000, 200))
    ratios = [variance_ratio(row, 9 / 7) for row in draws]
    spread = np.std([r.value for r in ratios])
    assert np.mean([r.standard_error for r in ratios]) == pytest.approx(spread, rel=0.08)
    assert np.mean([r.value for r in ratios]) == pytest.approx(1.0, abs=0.02)
    assert np.mean([r.kurtosis for r in ratios]) > 3.5


def test_circular_distance_of_a_rotated_law_and_of_opposite_points() -> None:
    narrow = WrappedNormal(3.1, 0.01)
    quantiles = 3.1 + 0.1 * stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    assert circular_distance(quantiles, narrow.cdf) < 2e-3
    for shift in (0.4, -1.3):  # 3.1 + 0.4 is beyond the cut
        assert circular_distance(quantiles + shift, narrow.cdf) == pytest.approx(
            abs(shift), abs=2e-3
        )
    point = WrappedNormal(0.0, 0.0)
    assert circular_distance(np.full(9, math.pi), point.cdf) == pytest.approx(math.pi, abs=2e-3)


def test_circular_distance_is_the_best_assignment() -> None:
    """Against the optimal assignment of n angles to n quantiles, by SciPy."""
    angles = np.random.default_rng(4).uniform(-math.pi, math.pi, 400) * 0.9
    grid = np.linspace(-math.pi, math.pi, 200_001)
    quantiles = np.interp((np.arange(400) + 0.5) / 400, LAW.cdf(grid), grid)
    costs = np.abs(wrap(angles[:, None] - quantiles[None]))
    rows, columns = linear_sum_assignment(costs)
    expected = costs[rows, columns].mean()
    assert circular_distance(angles, LAW.cdf) == pytest.approx(expected, abs=5e-3)


def test_holm() -> None:
    assert holm([0.5]).tolist() == [0.5]
    assert holm([0.2, 0.001, 0.03, 0.9]) == pytest.approx([0.4, 0.004, 0.09, 0.9])
    assert (holm([0.9, 0.8, 0.7]) <= 1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: watson_test([0.1] * 7, LAW.cdf), "angles are not a sample"),
        (lambda: watson_test([math.nan] * 9, LAW.cdf), "not finite"),
        (lambda: circular_distance(1.0, LAW.cdf), "angles are not a sample"),
        (lambda: variance_ratio(np.zeros((3, 9)), 1.0), "one sample"),
        (lambda: variance_ratio(np.arange(9.0), 0.0), "variance predicted"),
        (lambda: detectable_variance_ratio(3, 0.1, 0.1), "two error rates"),
        (lambda: detectable_variance_ratio(60, 0.1, 1.0), "two error rates"),
    ],
)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


def test_constant_sample_has_ratio_zero() -> None:
    ratio = variance_ratio(np.ones(20), 1.0)
    assert (ratio.value, ratio.standard_error, ratio.p_value) == (0.0, 0.0, 0.0)
    assert math.isnan(ratio.kurtosis)
