"""The wrapped normal law against theta functions, quadrature and its own samples."""

import itertools
import math

import mpmath
import numpy as np
import pytest
from scipy import integrate

from manifold_sde.errors import ArgumentError
from manifold_sde.verification.exact import WrappedNormal
from manifold_sde.verification.exact.wrapped_normal import wrap

# Both sides of the variance 4 where one series takes over from the other.
VARIANCES = [1e-4, 0.09, 1.0, 3.999, 4.001, 9.0, 60.0]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", [0.0, 2.9, -40.0])
def test_density_is_the_theta_function(mean: float, variance: float) -> None:
    law = WrappedNormal(mean, variance)
    angles = np.linspace(-math.pi, math.pi, 41)
    nome = mpmath.exp(-mpmath.mpf(variance) / 2)
    expected = [
        float(mpmath.jtheta(3, (mpmath.mpf(a) - mpmath.mpf(mean)) / 2, nome) / (2 * mpmath.pi))
        for a in angles
    ]
    assert np.allclose(law.density(angles), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", [0.0, 2.9, -40.0])
def test_distribution_function_is_the_integral_of_the_density(mean: float, variance: float) -> None:
    law = WrappedNormal(mean, variance)
    # At the smallest variance the density is a spike of width 0.01: say where it is.
    spike = float(wrap(mean))
    for end in (-3.0, -0.4, 0.0, 0.03, 2.9, math.pi):
        cuts = sorted({-math.pi, end, *(c for c in (spike - 0.1, spike + 0.1) if -3.14 < c < end)})
        pieces = [
            integrate.quad(law.density, a, b, epsabs=1e-13, epsrel=1e-12, limit=400)[0]
            for a, b in itertools.pairwise(cuts)
        ]
        assert float(law.cdf(end)) == pytest.approx(sum(pieces), abs=1e-11)


@pytest.mark.parametrize("variance", VARIANCES)
def test_distribution_function_runs_from_0_to_1(variance: float) -> None:
    law = WrappedNormal(0.7, variance)
    values = law.cdf(np.linspace(-math.pi, math.pi, 1001))
    assert abs(values[0]) < 1e-12
    assert abs(values[-1] - 1) < 1e-12
    assert (np.diff(values) > -1e-13).all()


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("order", [0, 1, 2, -3])
def test_moments_are_integrals(order: int, variance: float) -> None:
    law = WrappedNormal(0.7, variance)
    # The trapezoidal rule on a circle converges faster than any power of the spacing.
    grid = -math.pi + 2 * math.pi * np.arange(20_000) / 20_000
    expected = (law.density(grid) * np.exp(1j * order * grid)).mean() * 2 * math.pi
    assert law.moment(order) == pytest.approx(expected, abs=1e-12)


def test_point_mass() -> None:
    law = WrappedNormal(1.0, 0.0)
    assert law.cdf([-math.pi, 0.99, 1.0, math.pi]).tolist() == [0.0, 0.0, 1.0, 1.0]
    assert law.moment(2) == pytest.approx(np.exp(2j))
    assert law.sample(3, seed=0).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ArgumentError, match="no density"):
        law.density(0.0)


def test_samples_have_the_moments_and_follow_the_seed() -> None:
    law = WrappedNormal(-2.0, 1.5)
    draws = law.sample((100, 400), seed=3)
    assert np.array_equal(draws, law.sample((100, 400), seed=np.random.default_rng(3)))
    # Each of the four numbers is within 4.5 standard errors, false alarm 3e-5 in all.
    for order in (1, 2):
        error = 4.5 / math.sqrt(2 * draws.size)
        difference = np.exp(1j * order * draws).mean() - law.moment(order)
        assert abs(difference.real) < 2 * error
        assert abs(difference.imag) < 2 * error


@pytest.mark.parametrize(
    ("mean", "variance"), [(math.nan, 1.0), (0.0, -1e-9), (0.0, math.inf), (math.inf, 1.0)]
)
def test_what_is_not_a_law_is_refused(mean: float, variance: float) -> None:
    with pytest.raises(ArgumentError, match="mean and variance"):
        WrappedNormal(mean, variance)


@pytest.mark.parametrize("angle", [3.2, -7.0, math.nan])
def test_angles_off_the_interval_are_refused(angle: float) -> None:
    with pytest.raises(ArgumentError, match="starts at -pi"):
        WrappedNormal(0.0, 1.0).cdf([0.0, angle])


def test_moments_of_high_order_do_not_overflow() -> None:
    order, variance = 4 * 10**9, 1e-20
    law = WrappedNormal(0.0, variance)
    assert law.moment(order) == pytest.approx(math.exp(-0.08), rel=1e-12)
    assert np.square(np.int64(order)) < 0  # whole numbers overflow
    for wrong in (0.5, True, None, 2**70):
        with pytest.raises(ArgumentError, match="order is not an integer"):
            law.moment(wrong)  # type: ignore[arg-type]


def test_draws_have_a_shape_and_a_seed() -> None:
    law = WrappedNormal(0.3, 2.0)
    expected = 0.3 + math.sqrt(2.0) * np.random.default_rng(5).standard_normal((2, 3))
    for seed in (5, np.int32(5), np.random.default_rng(5)):
        assert (law.sample((2, 3), seed) == expected).all()
    for size in (None, -1, 1.5, (2, True), 10**18):
        with pytest.raises(ArgumentError, match="size is not an integer"):
            law.sample(size, 0)  # type: ignore[arg-type]
    for seed in (None, -1, 2**64):
        with pytest.raises(ArgumentError, match="seed is not an integer"):
            law.sample(3, seed)  # type: ignore[arg-type]
