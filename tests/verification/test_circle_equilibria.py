"""Equilibria and relaxation where Gamma_1 is a curve, and what the laws there are refused for.

The broken twin of the equilibrium in time is the one in the clock u: the weight ||Y||^4 left out.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_sde import CustomNoise, Problem, SphericalNoise, problems
from manifold_sde.errors import (
    ArgumentError,
    LimitMapError,
    NoiseError,
    NotOnManifoldError,
    TimeScaleError,
)
from manifold_sde.verification.exact import CircleDiffusion, PeriodicLaw
from tests.verification.circle_reference import along, constant, interpolated, invariant_density

Array = np.ndarray


# Equilibria.


@pytest.mark.paper("Theorem 5.4")
@pytest.mark.parametrize("amplitude", [0.5, 0.8])
def test_isotropic_noise_has_the_known_equilibrium(
    varying: CircleDiffusion, amplitude: float
) -> None:
    """Density proportional to pdet(H)^{-1/2} = 1 / (1 + a cos theta), in u and in time."""
    p = problems.varying_circle(amplitude)
    grid = np.linspace(-3, 3, 13)
    known = math.sqrt(1 - amplitude**2) / (2 * np.pi * (1 + amplitude * np.cos(grid)))
    laws = [CircleDiffusion.reversible(p)]
    if amplitude == 0.5:
        laws.append(varying)
    for law in laws:
        np.testing.assert_allclose(law.equilibrium.density(grid), known, atol=1e-8)
        np.testing.assert_allclose(law.equilibrium_in_clock.density(grid), known, atol=1e-8)
        assert law.equilibrium.total_variation(law.equilibrium_in_clock) < 1e-9


def test_equilibrium_in_the_clock_against_its_integral(mixed: CircleDiffusion) -> None:
    x, density = invariant_density(along(mixed))
    np.testing.assert_allclose(
        mixed.equilibrium_in_clock.density(x[::512]), density[::512], atol=1e-7
    )
    flux = (
        2 * np.pi * mixed.equilibrium_in_clock.expectation(lambda a: interpolated(mixed.drift, a))
    )
    assert flux > 0.05  # it circulates: the diffusion is not reversible


@pytest.mark.paper("Theorem 5.4")
def test_trap_the_equilibria_in_clock_and_in_time_differ(mixed: CircleDiffusion) -> None:
    """Where V varies, pi_u is not pi; the law at a long time decides for pi."""
    late = mixed.at(40.0, 1.0).angle
    np.testing.assert_allclose(
        late.density([0.0, 2.0, 4.0]), mixed.equilibrium.density([0.0, 2.0, 4.0]), atol=1e-6
    )
    assert late.total_variation(mixed.equilibrium) < 1e-6
    assert late.total_variation(mixed.equilibrium_in_clock) > 0.05


@pytest.mark.paper("Theorem 5.4")
def test_weighting_the_clock_by_the_norm_gives_the_equilibrium(mixed: CircleDiffusion) -> None:
    """The joint equilibrium in time, divided by ||Y||^4, is that in u; its angle is pi_u."""
    joint = mixed.joint_equilibrium()
    in_clock = (joint.weights / joint.norms**4).sum(1)
    np.testing.assert_allclose(
        in_clock / in_clock.sum(), mixed.equilibrium_in_clock.weights, atol=1e-10
    )
    # d E q = 0 and E V = 2 c E q; the norm's range is that of V / 2c.
    trace = joint.expectation(lambda a, r: interpolated(mixed.trace, a[:, 0])[:, None])
    assert joint.norm_moment(4) == pytest.approx(trace, rel=1e-9)
    np.testing.assert_allclose(joint.norms[[0, -1]] ** 4, [mixed.trace.min(), mixed.trace.max()])
    # The angle does not know the ratio.
    other = mixed.joint_equilibrium(2.0)
    np.testing.assert_allclose(other.angle.weights, mixed.equilibrium.weights, atol=1e-11)
    np.testing.assert_allclose(other.norms**4, joint.norms**4 / 4)


# Relaxation.


def test_spectral_gap_against_finite_differences(varying: CircleDiffusion) -> None:
    """With (18) the generator is (s^2 / 2 pi) d/dx (pi d/dx): a symmetric matrix, extrapolated."""
    assert constant(0.3, 0.5).spectral_gap == pytest.approx(0.25, rel=1e-10)

    def by_differences(n: int) -> float:
        x = 2 * np.pi * np.arange(n) / n
        at_nodes, between = (1 / (1 + 0.5 * np.cos(x + shift * np.pi / n)) for shift in (0, 1))
        rate = 0.045 / x[1] ** 2 * between / np.sqrt(at_nodes * np.roll(at_nodes, -1))
        matrix = -np.diag(0.045 / x[1] ** 2 * (between + np.roll(between, 1)) / at_nodes)
        index = np.arange(n)
        matrix[index, (index + 1) % n] += rate
        matrix[(index + 1) % n, index] += rate
        return float(-np.linalg.eigvalsh(matrix)[-2])

    known = (4 * by_differences(400) - by_differences(200)) / 3
    assert varying.spectral_gap == pytest.approx(known, rel=1e-7)
    assert varying.relaxation_time == pytest.approx(1 / known, rel=1e-7)


def test_spectral_gap_is_the_slowest_decay(mixed: CircleDiffusion) -> None:
    """The slowest pair of modes turns: sizes are compared half a turn of it apart."""
    turn = math.pi / 0.00691479
    end = mixed.equilibrium_in_clock.moment(1)
    u = 5 * mixed.relaxation_time
    left = [abs(mixed.at_clock(v, 1.0).moment(1) - end) for v in (u, u + turn)]
    assert math.log(left[0] / left[1]) / turn == pytest.approx(mixed.spectral_gap, rel=1e-4)


def test_spectral_gap_in_time(mixed: CircleDiffusion) -> None:
    # At constant V: q settles at V / 2c, so the angle's rate is 2 c / V times that in u.
    assert constant(0.1, 0.02).spectral_gap_in_time(2.0) == pytest.approx(0.01 * 4 / 0.2, rel=1e-8)
    assert constant(0.1, 0.9).spectral_gap_in_time(2.0) == pytest.approx(8.0, rel=1e-8)
    gap = mixed.spectral_gap_in_time()
    assert mixed.spectral_gap_in_time(2.0) == pytest.approx(4 * gap, rel=1e-12)
    turn = math.pi / (0.01432954 / 0.0710741956)  # half a turn of the slowest pair
    end = mixed.equilibrium.moment(1)
    left = [abs(mixed.at(T, 1.0).angle.moment(1) - end) for T in (6.0, 6.0 + turn)]
    assert math.log(left[0] / left[1]) / turn == pytest.approx(gap, rel=1e-3)


# What is refused.


def test_problems_without_such_a_law_are_refused() -> None:
    with pytest.raises(ArgumentError, match="not a curve"):
        CircleDiffusion.of(problems.great_sphere(), _great_circle_in(4), nodes=17)
    with pytest.raises(ArgumentError, match="circle of minimisers is not known"):
        CircleDiffusion.of(Problem(lambda x: (x[2] / x.norm()) ** 2, 3, SphericalNoise(0.3)))
    with pytest.raises(ArgumentError, match="does not move the direction"):
        CircleDiffusion.of(problems.label_noise_circle())
    with pytest.raises(NoiseError, match="two properties"):
        CircleDiffusion.of(problems.great_circle(noise=CustomNoise(lambda x: x[:, None] / (x @ x))))
    with pytest.raises(ArgumentError, match="noise of \\(18\\)"):
        CircleDiffusion.reversible(problems.mixed_noise_circle())
    with pytest.raises(ArgumentError, match="circle of minimisers is not known"):
        CircleDiffusion.reversible(problems.great_sphere())


def _great_circle_in(dim: int) -> Callable[[Array], Array]:
    def curve(a: Array) -> Array:
        return np.concatenate([np.stack([np.cos(a), np.sin(a)], 1), np.zeros((len(a), dim - 2))], 1)

    return curve


def _near_the_plane(profile: Callable[[Tensor], Tensor]) -> Problem:
    """A loss of the height x_3 / |x| alone, with a minimum at 0."""
    problem = Problem(lambda x: profile(x[2] / x.norm()), 3, SphericalNoise(0.3), rank=1)
    problem.facts = problems.great_circle().facts
    return problem


def test_curves_and_limits_that_are_wrong_are_refused() -> None:
    p = problems.great_circle()
    with pytest.raises(NotOnManifoldError, match="unit norm"):
        CircleDiffusion.of(p, lambda a: 2.0 * _great_circle_in(3)(a), nodes=17)
    with pytest.raises(NotOnManifoldError, match="unit norm"):
        CircleDiffusion.of(problems.mixed_noise_circle(), _great_circle_in(3), nodes=17)
    with pytest.raises(ArgumentError, match="resolve the curve"):
        CircleDiffusion.of(p, lambda a: _great_circle_in(3)(0.5 * a), nodes=17)
    with pytest.raises(ArgumentError, match="the curve does not return finite numbers"):
        CircleDiffusion.of(p, lambda a: np.zeros((3, 3)))
    with pytest.raises(ArgumentError, match="step of the differences"):
        CircleDiffusion.of(p, step=0.5)
    with pytest.raises(ArgumentError, match="number of nodes"):
        CircleDiffusion.of(p, nodes=64)
    # A slope that falls by a factor of 300 within four steps.
    flat = _near_the_plane(lambda h: h**2 / (1 + (h / 0.02) ** 2))
    with pytest.raises(LimitMapError, match="has not ended"):
        CircleDiffusion.of(flat, nodes=17)
    # Another circle of minimisers within four steps.
    waves = _near_the_plane(lambda h: 1e-3 * (1 - torch.cos(100 * h)))
    with pytest.raises(ArgumentError, match="have not converged"):
        CircleDiffusion.of(waves, nodes=17)
    assert CircleDiffusion.of(waves, nodes=17, step=0.004).drift == pytest.approx(0, abs=1e-8)


ONES = np.ones(17)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ONES, ONES, ONES[:9]), "three arrays"),
        ((ONES[:16], ONES[:16], ONES[:16]), "n odd"),
        ((ONES, ONES * math.nan, ONES), "finite: False"),
        ((ONES, ONES, -ONES), "V positive"),
        ((ONES, -ONES, ONES), "v not negative"),
        ((ONES, 0 * ONES, ONES), "stands still"),
        ((np.cos(np.arange(17) ** 2), ONES, ONES), "do not resolve"),
    ],
)
def test_values_that_are_no_coefficients_are_refused(
    arguments: tuple[Array, Array, Array], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        CircleDiffusion(*arguments)


def test_arguments_out_of_range_are_refused(varying: CircleDiffusion) -> None:
    with pytest.raises(TimeScaleError, match="u is out of range"):
        varying.at_clock(-1.0)
    with pytest.raises(TimeScaleError, match="t is out of range"):
        varying.at(-1.0)
    with pytest.raises(TimeScaleError, match="ratio is out of range"):
        varying.at(1.0, ratio=-0.5)
    with pytest.raises(ArgumentError, match="no equilibrium"):
        varying.joint_equilibrium(0.0)
    with pytest.raises(ArgumentError, match="norm is out of range"):
        varying.at(1.0, norm=0.0)
    with pytest.raises(ArgumentError, match="start is out of range"):
        varying.at_clock(1.0, math.inf)
    with pytest.raises(ArgumentError, match="the function does not return finite numbers"):
        varying.expectation(lambda a: np.ones(3), 1.0)
    with pytest.raises(ArgumentError, match="starts at -pi"):
        PeriodicLaw(np.full(9, 1 / 9)).cdf(4.0)


def test_a_variance_that_vanishes_has_no_equilibrium_here() -> None:
    x = 2 * np.pi * np.arange(33) / 33
    law = CircleDiffusion(np.zeros(33), np.sin(x) ** 2, np.ones(33))
    assert law.expectation(np.cos, 1.0) == pytest.approx(1.0, abs=1e-12)  # it stays at 0
    with pytest.raises(ArgumentError, match="need not be unique"):
        law.equilibrium_in_clock  # noqa: B018
    with pytest.raises(ArgumentError, match=r"Assumption 5\.2"):
        law.spectral_gap  # noqa: B018


def test_expectations_are_of_functions_with_finite_real_values(varying: CircleDiffusion) -> None:
    law = varying.at_clock(1.0)
    assert law.expectation(lambda a: 2) == pytest.approx(2.0, abs=1e-12)
    assert np.isnan(float(law.weights @ np.full(law.weights.shape, None, dtype=np.float64)))
    for wrong in (
        None,
        lambda a: None,
        lambda a: 1j * a,
        lambda a: np.full_like(a, math.inf),
        lambda a: np.ones(3),
        lambda a: a.nothing,
        lambda: 1.0,
    ):
        with pytest.raises(ArgumentError, match="the function does not return finite numbers"):
            law.expectation(wrong)
    with pytest.raises(ArgumentError, match="equally spaced angles"):
        PeriodicLaw(np.full(8, 1 / 8))
