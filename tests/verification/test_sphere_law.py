"""The exact law on a great sphere: decay of harmonics, moments, and what it is refused for."""

import math

import numpy as np
import pytest
import torch
from scipy.special import eval_gegenbauer, eval_legendre

from manifold_sde import LabelNoise, Problem, SphericalNoise, problems
from manifold_sde.errors import ArgumentError, TimeScaleError
from manifold_sde.verification.exact import AngleLaw, SphereLaw

Array = np.ndarray


def unit(*values: float) -> Array:
    vector = np.array(values)
    return vector / np.linalg.norm(vector)


@pytest.mark.paper("Equation (13)", "Equation (18)")
def test_on_a_circle_it_is_the_law_of_the_angle() -> None:
    p = problems.great_circle()
    angle = torch.tensor(0.8, dtype=torch.float64)
    x = 1.2 * p.facts.circle.point(angle)
    law, known = SphereLaw.of(p, x), AngleLaw.of(p, x)
    assert law.dimension == 1
    for T in (0.0, 0.7, 5.0):
        assert law.norm(T) == pytest.approx(known.norm(T), rel=1e-13)
        u = law.clock(T)
        assert u == known.clock(T)
        for order in (1, 2, 5):
            found = law.zonal_mean(order, unit(1.0, 0.0, 0.0), u)
            assert found == pytest.approx(known.at(T).moment(order).real, abs=1e-13)


def test_harmonics_are_eigenfunctions_of_the_laplacian() -> None:
    """In the angle a to the pole: f'' + (d - 1) cot(a) f' = -l (l + d - 1) f, by differences."""
    h = 1e-3
    angle = np.linspace(0.4, 2.6, 12)
    for dim in (3, 4, 6):
        law = SphereLaw.of(problems.great_sphere(dim, 0.5))
        d = law.dimension
        assert d == dim - 2
        for degree in (1, 2, 5):
            low, middle, high = (law.zonal(degree, np.cos(angle + k * h)) for k in (-1, 0, 1))
            slope, bend = (high - low) / (2 * h), (high - 2 * middle + low) / h**2
            laplacian = bend + (d - 1) / np.tan(angle) * slope
            expected = -law.rate(degree) / (0.5 * 0.25) * middle
            np.testing.assert_allclose(laplacian, expected, atol=2e-3)
            assert law.zonal(degree, 1.0) == pytest.approx(1.0)
    law = SphereLaw.of(problems.great_sphere())
    x = np.linspace(-1, 1, 9)
    np.testing.assert_allclose(law.zonal(4, x), eval_legendre(4, x), atol=1e-14)
    assert [law.rate(degree) / 0.09 for degree in (0, 1, 2, 3)] == pytest.approx([0, 1, 3, 6])


def test_moments_are_those_of_the_harmonics() -> None:
    law = SphereLaw.of(problems.great_sphere(5), torch.tensor([1.0, 2.0, -1.0, 0.5, 0.3]).double())
    pole, u = unit(0.0, 1.0, 3.0, 1.0, 0.0), 2.0
    second = law.second_moment(u)
    assert pole @ law.mean(u) == pytest.approx(law.zonal_mean(1, pole, u), abs=1e-14)
    # The zonal harmonic of degree 2 is ((d + 1) x^2 - 1) / d.
    want = ((law.dimension + 1) * (pole @ second @ pole) - 1) / law.dimension
    assert law.zonal_mean(2, pole, u) == pytest.approx(want, abs=1e-14)
    assert np.trace(second) == pytest.approx(1.0, abs=1e-14)
    np.testing.assert_allclose(law.second_moment(0.0), np.outer(law.start, law.start), atol=1e-15)


@pytest.mark.paper("Theorem 5.4")
def test_equilibrium_is_uniform() -> None:
    law = SphereLaw.of(problems.great_sphere())
    far = law.clock(300.0)
    np.testing.assert_allclose(law.second_moment(far), np.diag([1, 1, 1, 0]) / 3, atol=1e-12)
    np.testing.assert_allclose(law.mean(far), 0, atol=1e-12)


@pytest.mark.paper("Equation (13)")
def test_euler_maruyama_in_space_has_the_law() -> None:
    """A simulation of (13) in R^3 = Gamma, 20,000 paths of 400 steps, from norm 1.2.

    There half the second derivative of Phi is s^2 y / (2 |y|^4) and P sigma = (s/|y|)(I - y y^T /
    |y|^2). Harmonics of degree 1, 2 and 3 within 4.5 standard errors (false alarm 2e-5 in all) and
    2e-3 for the step. Twins off by 5 standard errors and more: the clock without the start's norm,
    the sphere's dimension wrong by one.
    """
    s, T, n, steps = 0.8, 1.0, 20_000, 400
    law = SphereLaw.of(problems.great_sphere(4, s), 1.2 * problems.great_sphere().minimizer)
    generator = np.random.default_rng(4)
    h = T / steps
    y = np.zeros((n, 3))
    y[:, 0] = 1.2
    for _ in range(steps):
        square = (y**2).sum(1, keepdims=True)
        w = math.sqrt(h) * generator.standard_normal((n, 3))
        tangent = w - y * (y * w).sum(1, keepdims=True) / square
        y = y + h * (-0.5 * y + 0.5 * s**2 * y / square**2) + s / np.sqrt(square) * tangent
    pole = unit(1.0, 0.5, -0.3, 0.0)
    cosines = y @ pole[:3] / np.linalg.norm(y, axis=1)
    assert np.abs((y**2).sum(1) ** 2 / law.norm(T) ** 4 - 1).mean() < 0.06

    def distances(u: float, change: float = 1.0) -> list[float]:
        found = []
        for degree in (1, 2, 3):
            values = eval_legendre(degree, cosines)
            gap = abs(values.mean() - law.zonal_mean(degree, pole, u * change))
            found.append(max(gap - 2e-3, 0.0) / (values.std() / math.sqrt(n)))
        return found

    u = law.clock(T)
    assert max(distances(u)) < 4.5
    assert max(distances(SphereLaw.of(problems.great_sphere(4, s)).clock(T))) > 5
    assert max(distances(u, 3 / 2)) > 5  # rates l (l + d) / (l (l + d - 1)) of degree 1, d = 2


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (Problem(lambda x: x[0] ** 2 / (x @ x), 3, SphericalNoise(0.3)), "not known"),
        (problems.varying_circle(), "not known"),
        (problems.great_sphere(noise=LabelNoise(0.3)), "its noise is LabelNoise"),
        (problems.normalized_linear(), "off a subspace"),
    ],
    ids=["no facts", "no Phi", "label noise", "a small circle"],
)
def test_other_problems_are_refused(problem: Problem, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SphereLaw.of(problem)


def test_arguments_that_are_wrong_are_refused() -> None:
    law = SphereLaw.of(problems.great_sphere())
    with pytest.raises(ArgumentError, match="x0 must be one point"):
        SphereLaw.of(problems.great_sphere(), torch.eye(4, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="pole"):
        law.zonal_mean(1, [0.0, 0.0, 0.0, 1.0], 1.0)
    with pytest.raises(ArgumentError, match="pole"):
        law.zonal_mean(1, [1.0, 0.0, 0.0], 1.0)
    with pytest.raises(TimeScaleError, match="u is out of range"):
        law.mean(-1.0)
    with pytest.raises(TimeScaleError, match="T is out of range"):
        law.clock(-1.0)
    for start, tangent, scale in (
        (law.start[:3], law.tangent, 0.3),
        (2 * law.start, law.tangent, 0.3),
        (law.start, law.tangent[:1], 0.3),
        (law.start, law.tangent, -0.3),
        (unit(0.0, 0.0, 0.0, 1.0), law.tangent, 0.3),
    ):
        with pytest.raises(ArgumentError, match="great sphere"):
            SphereLaw(start, tangent, scale)


def test_degrees_are_integers_whose_harmonics_are_numbers() -> None:
    law = SphereLaw.of(problems.great_sphere())
    assert law.zonal(10**5, 0.3) == pytest.approx(eval_legendre(10**5, 0.3), abs=1e-12)
    for degree in (-1, 1.0, True, None, 10**18, 2**70):
        for method in (law.rate, lambda degree: law.zonal(degree, 0.3)):
            with pytest.raises(ArgumentError, match="degree is not an integer"):
                method(degree)
    basis = np.eye(200)
    wide = SphereLaw(basis[0], basis[:150], 0.3)
    assert wide.zonal(2, 0.0) == pytest.approx(-1 / 149, rel=1e-12)  # (d + 1) c^2 - 1 over d
    with np.errstate(invalid="ignore", over="ignore"):
        top = eval_gegenbauer(10**5, 74.0, 1.0)
        assert np.isnan(eval_gegenbauer(10**5, 74.0, 0.3) / top)  # what it would be
    with pytest.raises(ArgumentError, match="too large for a float"):
        wide.zonal(10**5, 0.3)
