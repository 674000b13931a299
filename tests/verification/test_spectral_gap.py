"""The relaxation rate from the generator: against known gaps, and against each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from manifold_sde import CustomNoise, LeastSquaresProblem, SphericalNoise, problems
from manifold_sde.errors import ArgumentError
from manifold_sde.verification.exact import CircleDiffusion, SpectralGap, spectral_gap


def holds(found: SpectralGap, rate: float, in_time: float) -> bool:
    """Whether both rates are right within their errors, which are small."""
    close = abs(found.rate - rate) <= found.error + 1e-9 * rate
    close &= abs(found.rate_in_time - in_time) <= found.error_in_time + 1e-9 * in_time
    return close and found.error < 0.02 * rate and found.error_in_time < 0.02 * in_time


@pytest.mark.parametrize("dim", [4, 6])
@pytest.mark.parametrize("method", ["auto", "galerkin"])
def test_great_spheres(dim: int, method: str) -> None:
    """D s^2 / 2 in the clock; in time the norm stays at q = V / 2C."""
    found = spectral_gap(problems.great_sphere(dim), method=method, points=400, ratio=2.0)
    rate = (dim - 2) * 0.09 / 2
    assert holds(found, rate, min(rate * 4.0 / (0.09 * (dim - 1)), 8.0))
    assert found.method == {"auto": "known"}.get(method, method)
    assert found.relaxation_time == pytest.approx(1.0 / found.rate)


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_steps_of_sgd(ratio: float) -> None:
    """The same from either time: of (13), and per step lambda / eta for the ratio, times eta^2."""
    lr, decay = 0.02, 0.05
    per_step = spectral_gap(problems.great_sphere(), ratio=decay / lr).rate_in_time * lr**2
    found = spectral_gap(problems.great_sphere(), ratio=ratio)
    assert found.steps(lr, decay) == pytest.approx(1.0 / per_step, rel=1e-12)
    with pytest.raises(ArgumentError, match="weight_decay"):
        found.steps(lr, 0.0)


def test_section_61() -> None:
    """s^2 / (2 r^2)."""
    problem = problems.normalized_linear(design="orthogonal")
    circle = problem.facts.circle
    found = spectral_gap(problem)
    assert found.rate == pytest.approx(0.09 / (2.0 * circle.radius**2), rel=1e-12)


def test_a_circle_of_varying_curvature_by_two_roads() -> None:
    exact = CircleDiffusion.reversible(problems.varying_circle())
    fourier = spectral_gap(problems.varying_circle())
    galerkin = spectral_gap(problems.varying_circle(), method="galerkin", points=600)
    for found in (fourier, galerkin):
        assert holds(found, exact.spectral_gap, exact.spectral_gap_in_time())
    assert (fourier.method, galerkin.method) == ("fourier", "galerkin")


@pytest.mark.thorough
def test_noise_of_varying_trace_that_is_not_reversible() -> None:
    """In time the rate is another one than in the clock over the mean norm: 10 % here."""
    problem = problems.mixed_noise_circle()
    fourier = spectral_gap(problem)
    found = spectral_gap(problem, method="galerkin", points=600)
    assert holds(found, fourier.rate, fourier.rate_in_time)
    law = CircleDiffusion.of(problem)
    by_mean = fourier.rate / float(law.equilibrium_in_clock.expectation(lambda _: law.trace))
    assert abs(by_mean / fourier.rate_in_time - 1.0) > 0.05  # the broken twin: no weights ||Y||^4


class Residual:
    """(1 + a u_1) u_4: Gamma_1 is a 2-sphere along which pdet H varies."""

    def __call__(self, x: Tensor) -> Tensor:
        u = x / x.norm()
        return (1.0 + 0.6 * u[:1]) * u[3:]


def sturm_liouville(a: float, order: int) -> float:
    """The slowest rate on the sphere with the density 1 / (1 + a x), of e^{i m longitude} f(x).

    Rayleigh-Ritz with f = (1 - x^2)^{m/2} times Legendre polynomials, per unit of s^2 / 2.
    """
    x, w = np.polynomial.legendre.leggauss(80)
    density = w / (1.0 + a * x)
    values, slopes = [], []
    for k in range(25):
        p = np.polynomial.legendre.Legendre.basis(k)
        if order == 0:
            values.append(p(x))
            slopes.append(np.sqrt(1.0 - x**2) * p.deriv()(x) if k else 0.0 * x)
        else:  # f' sqrt(1 - x^2) = (1 - x^2) p' - x p
            values.append(np.sqrt(1.0 - x**2) * p(x))
            slopes.append((1.0 - x**2) * (p.deriv()(x) if k else 0.0 * x) - x * p(x))
    f, g = np.array(values), np.array(slopes)
    energy = (g * density) @ g.T
    if order:
        energy += ((f / (1.0 - x**2)) * density) @ f.T
    rates = scipy.linalg.eigh(energy, (f * density) @ f.T, eigvals_only=True)
    return float(rates[1] if order == 0 else rates[0])


def test_a_sphere_of_varying_curvature() -> None:
    """Two dimensions, no closed form: against a Sturm-Liouville problem."""
    problem = LeastSquaresProblem(Residual(), 4, SphericalNoise(0.3), rank=1)
    start = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    found = spectral_gap(problem, start, points=800)
    expected = 0.5 * 0.09 * min(sturm_liouville(0.6, 0), sturm_liouville(0.6, 1))
    assert sturm_liouville(0.0, 0) == pytest.approx(2.0, rel=1e-10)  # l (l + 1) of the sphere
    assert sturm_liouville(0.0, 1) == pytest.approx(2.0, rel=1e-10)
    assert holds(found, expected, expected / (0.09 * 3))
    uniform = 0.09
    assert abs(expected / uniform - 1.0) > 0.02  # what the uniform law would have is told apart
    assert not holds(found, uniform, uniform / (0.09 * 3))


def test_what_has_no_gap_is_told() -> None:
    with pytest.raises(ArgumentError, match="nothing relaxes in time"):
        spectral_gap(problems.great_circle(), ratio=0.0)
    with pytest.raises(ArgumentError, match="method is not one"):
        spectral_gap(problems.great_circle(), method="ulam")
    with pytest.raises(ArgumentError, match="points is not a number"):
        spectral_gap(problems.great_circle(), points=10)
    still = CustomNoise(lambda x: torch.zeros(4, 1, dtype=x.dtype) * x.norm())
    with pytest.raises(ArgumentError, match="does not move the direction"):
        spectral_gap(problems.great_sphere(noise=still))
    assert math.isfinite(spectral_gap(problems.great_circle()).rate)
