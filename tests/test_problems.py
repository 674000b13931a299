"""Problems of which something is known: every claim, checked without the toolkit's geometry.

Gradient flow is SciPy's, eigenvalues are NumPy's, laws are SciPy's with a declared false-alarm
rate.
"""

import inspect
import math
import pickle
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import integrate, stats
from torch import Tensor

from manifold_sde import LabelNoise, LeastSquaresProblem, Problem, SamplingNoise, errors, problems

GENERATOR = torch.Generator().manual_seed(17)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "section 6.1": problems.normalized_linear,
    "section 6.1, orthogonal": lambda: problems.normalized_linear(design="orthogonal"),
    "section 6.1, given radius": lambda: problems.normalized_linear(seed=2, radius=0.6),
    "section 6.1, dim 6, 2 inputs": lambda: problems.normalized_linear(6, 2, 0.2, 5),
    "great circle": problems.great_circle,
    "great sphere": problems.great_sphere,
    "great sphere, dim 6": lambda: problems.great_sphere(6),
    "varying circle": problems.varying_circle,
    "circle that does not vary": lambda: problems.varying_circle(0.0),
    "label noise": problems.label_noise_circle,
    "mixed noise": problems.mixed_noise_circle,
    "mixed noise, lower": lambda: problems.mixed_noise_circle(0.3, 0.2, 0.2),
}
each_problem = pytest.mark.parametrize("name", PROBLEMS)


def points_of_manifold(p: Problem) -> Tensor:
    """The minimiser; on a circle, points all around it at other norms; on a sphere, Phi's."""
    if p.facts.circle is not None:
        around = p.facts.circle.point(torch.linspace(-3, 3, 7, dtype=torch.float64))
    else:
        around = p.facts.limit_map(normal(7, p.dim))
    return torch.cat([p.minimizer[None], around, 0.3 * around])


@pytest.mark.paper("Assumption 2.1", "Assumption 2.3")
@each_problem
def test_minimisers_are_minimisers_of_the_rank_claimed(name: str) -> None:
    p = PROBLEMS[name]()
    facts = p.facts
    assert float(facts.minimizer.norm()) == pytest.approx(1.0, abs=1e-14)
    assert facts.rank == p.rank
    assert facts.manifold_dim == p.dim - facts.rank - 1
    assert torch.equal(p.minimizer, facts.minimizer)
    y = points_of_manifold(p)
    # Residuals are squared; the tilts of the samples cancel to rounding.
    assert float(p.loss(y).abs().max()) < (1e-28 if isinstance(p, LeastSquaresProblem) else 1e-17)
    assert float((p.gradient(y).norm(dim=-1) * y.norm(dim=-1)).max()) < 1e-13
    for point in y:
        values = np.linalg.eigvalsh(p.hessian(point).numpy())
        split = p.dim - facts.rank
        assert np.abs(values[:split]).max() < 1e-12 * values[-1]
        assert values[split] > 1e-4 * values[-1]
    p.require_scale_invariance()
    assert max(p.noise_violations().values()) < 1e-12 or isinstance(p.noise, LabelNoise)


@each_problem
def test_circles_are_circles_of_unit_vectors(name: str) -> None:
    p = PROBLEMS[name]()
    circle = p.facts.circle
    assert (circle is not None) == (p.facts.manifold_dim == 1)
    if circle is None:
        return
    angles = torch.linspace(-3.1, 3.1, 50, dtype=torch.float64)
    y = circle.point(angles)
    torch.testing.assert_close(y.norm(dim=-1), torch.ones_like(angles))
    torch.testing.assert_close(circle.angle(5.0 * y), angles)
    torch.testing.assert_close(
        circle.plane_coordinates(y).norm(dim=-1).mean(), angles.new_tensor(circle.radius)
    )
    torch.testing.assert_close(circle.basis @ circle.basis.T, torch.eye(2, dtype=torch.float64))
    assert float((circle.basis @ circle.center).abs().max()) < 1e-14
    assert circle.radius**2 + float(circle.center @ circle.center) == pytest.approx(1.0)
    assert float(circle.angle(p.minimizer)) == pytest.approx(0.0, abs=1e-12)
    assert circle.point(angles.float()).dtype == torch.float32
    assert circle.angle(y.float().reshape(5, 10, p.dim)).shape == (5, 10)


@each_problem
def test_log_pseudo_determinant_is_that_of_the_eigenvalues(name: str) -> None:
    p = PROBLEMS[name]()
    known = p.facts.log_pseudo_determinant
    assert known is not None
    y = points_of_manifold(p)
    want = [
        np.log(np.linalg.eigvalsh(p.hessian(point).numpy())[-p.facts.rank :]).sum() for point in y
    ]
    np.testing.assert_allclose(known(y).numpy(), want, rtol=1e-9, atol=1e-9)
    assert known(y.float()).dtype == torch.float32
    assert known(y[0]).shape == ()


Array = NDArray[np.float64]


def linear_model_gradient(p: Any, x: Array) -> Array:
    norm = np.linalg.norm(x)
    unit, inputs = x / norm, p.inputs.numpy()
    g = inputs.T @ (inputs @ unit - p.targets.numpy()) / len(inputs) / norm
    return g - unit * (unit @ g)


def circle_gradient(amplitude: float, x: Array) -> Array:
    norm = np.linalg.norm(x)
    u = x / norm
    weight = 1.0 + amplitude * u[0]
    g = weight * u[2] * np.array([amplitude * u[2], 0.0, weight]) / norm
    return g - u * (u @ g)


def sphere_gradient(x: Array) -> Array:
    norm = np.linalg.norm(x)
    u = x / norm
    g = np.zeros_like(x)
    g[-1] = u[-1] / norm
    return g - u * (u @ g)


def end_of_flow(gradient: Callable[[Array], Array], x: Array) -> Array:
    """Gradient flow by SciPy at relative tolerance 1e-12, until nothing is left to flow."""
    solution = integrate.solve_ivp(
        lambda t, z: -gradient(z), (0.0, 1e5), x, "LSODA", rtol=1e-12, atol=1e-13
    )
    assert solution.success
    end: Array = solution.y[:, -1]
    assert np.linalg.norm(gradient(end)) < 1e-11
    return end


def test_gradients_by_hand_are_those_of_the_problems() -> None:
    for p in (problems.normalized_linear(), problems.normalized_linear(6, 2, 0.2, 5)):
        x = normal(p.dim)
        np.testing.assert_allclose(p.gradient(x), linear_model_gradient(p, x.numpy()), atol=1e-13)
    x = normal(3)
    for a in (0.0, 0.6):
        p = problems.varying_circle(a)
        np.testing.assert_allclose(p.gradient(x), circle_gradient(a, x.numpy()), atol=1e-13)


@pytest.mark.paper("Definition 2.6", "Lemma 2.7")
@pytest.mark.parametrize(
    "name",
    [
        "section 6.1",
        "section 6.1, orthogonal",
        "section 6.1, dim 6, 2 inputs",
        "great sphere, dim 6",
    ],
)
def test_closed_form_of_the_limit_map_against_gradient_flow(name: str) -> None:
    p = PROBLEMS[name]()
    phi = p.facts.limit_map
    assert phi is not None
    y = points_of_manifold(p)[:2]
    x = y + 0.2 * normal(*y.shape) / math.sqrt(p.dim)
    by_hand = (
        sphere_gradient if name == "great sphere, dim 6" else partial(linear_model_gradient, p)
    )
    for point in x:
        want = end_of_flow(by_hand, point.numpy())
        np.testing.assert_allclose(phi(point).numpy(), want, rtol=0, atol=1e-8)
    torch.testing.assert_close(phi(3.0 * x), 3.0 * phi(x))
    torch.testing.assert_close(phi(x).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(phi(y), y)
    assert phi(x.float()).dtype == torch.float32
    assert phi(x.reshape(2, 1, -1)).shape == (2, 1, p.dim)


def test_broken_twin_the_nearest_point_is_not_the_limit() -> None:
    """On the circle of varying curvature, by 1e-3 where gradient flow is known to 1e-8."""
    x = np.array([0.1, 1.0, 0.3])
    nearest = np.array([0.1, 1.0, 0.0])
    nearest *= np.linalg.norm(x) / np.linalg.norm(nearest)
    assert np.abs(end_of_flow(partial(circle_gradient, 0.5), x) - nearest).max() > 1e-3


# The normalised linear model.


@pytest.mark.paper("Equation (18)")
def test_the_default_is_a_typical_draw() -> None:
    """Radius and condition number near their medians over seeds, 0.40 and 150."""
    p = problems.normalized_linear()
    assert (p.dim, p.n_samples, p.noise.scale) == (10, 8, 0.3)  # type: ignore[attr-defined]
    values = np.linalg.eigvalsh(p.hessian(p.minimizer).numpy())[2:]
    assert 0.38 < p.facts.circle.radius < 0.42
    assert 130 < values[-1] / values[0] < 170
    assert f"{values[-1] / values[0]:.3g}" in p.facts.statement


@pytest.fixture(scope="module")
def draws() -> list[problems.NormalizedLinear]:
    """Draws of the paper's design."""
    return [problems.normalized_linear(seed=seed) for seed in range(150)]


def test_the_default_is_near_the_medians(draws: list[problems.NormalizedLinear]) -> None:
    """Each median within 4.5 of its standard errors, which are 5 % and 13 %."""
    radii = [q.facts.circle.radius for q in draws]
    conditions = [np.linalg.cond(q.jacobian(q.minimizer).numpy()) ** 2 for q in draws]
    p = problems.normalized_linear()
    assert np.median(radii) == pytest.approx(p.facts.circle.radius, rel=0.22)
    assert np.log(np.median(conditions)) == pytest.approx(np.log(147), abs=0.6)


def test_squared_radius_has_its_beta_law(draws: list[problems.NormalizedLinear]) -> None:
    """Beta((D - N)/2, N/2), false alarm 1e-4. Twin: one degree of freedom off."""
    squares = [1.0 - float(q.minimizer @ span(q) @ q.minimizer) for q in draws]
    np.testing.assert_allclose(squares, [q.facts.circle.radius**2 for q in draws])
    assert stats.kstest(squares, stats.beta(1.0, 4.0).cdf).pvalue > 1e-4
    assert stats.kstest(squares, stats.beta(1.5, 3.5).cdf).pvalue < 1e-4


def span(p: problems.NormalizedLinear) -> Tensor:
    basis = torch.linalg.qr(p.inputs.T)[0]
    return basis @ basis.T


def test_designs() -> None:
    p = problems.normalized_linear(design="orthogonal")
    torch.testing.assert_close(p.inputs @ p.inputs.T, 8.0 * torch.eye(8, dtype=torch.float64))
    assert p.facts.circle.radius == pytest.approx(0.8)
    assert p.design == "orthogonal"
    torch.testing.assert_close(p.targets, p.inputs @ p.minimizer)
    x = normal(10)
    torch.testing.assert_close(p.residuals(x), p.inputs @ (x / x.norm() - p.minimizer))
    for radius in (0.1, 0.5, 0.99):
        q = problems.normalized_linear(radius=radius)
        assert q.facts.circle.radius == pytest.approx(radius)
        assert torch.equal(q.inputs, problems.normalized_linear().inputs)
    assert torch.equal(
        problems.normalized_linear(seed=7).inputs,
        problems.normalized_linear(np.int64(10), seed=np.int64(7)).inputs,
    )  # type: ignore[arg-type]
    assert isinstance(problems.normalized_linear(noise=SamplingNoise()).noise, SamplingNoise)


# The circles.


def test_curvature_along_the_varying_circle() -> None:
    for amplitude in (0.0, 0.3, 0.9):
        p = problems.varying_circle(amplitude)
        angles = torch.linspace(-3, 3, 9, dtype=torch.float64)
        hessian = p.hessian(p.facts.circle.point(angles))
        want = torch.zeros(9, 3, 3, dtype=torch.float64)
        want[:, 2, 2] = (1.0 + amplitude * angles.cos()) ** 2
        torch.testing.assert_close(hessian, want, rtol=1e-12, atol=1e-13)


def test_drift_of_label_noise() -> None:
    """The angle follows theta' = (kappa/2) a sin(theta) (1 + a cos(theta)).

    That is -(kappa/4) d(tr H)/d(theta).

    The drift of the theory, half the second derivative of Phi contracted with Sigma, is taken from
    SciPy's gradient flow: Phi(y + h e) for the one direction of Sigma.
    """
    amplitude, scale, batch = 0.6, 0.5, 2
    p = problems.label_noise_circle(amplitude, scale, batch)
    kappa = scale**2 / batch
    h = 0.02
    for theta in (0.4, 1.9):
        angle = torch.tensor(theta, dtype=torch.float64)
        y = p.facts.circle.point(angle)
        sigma = p.noise_covariance(y)
        assert float(sigma[2, 2]) == pytest.approx(kappa * (1 + amplitude * math.cos(theta)) ** 2)
        assert float(sigma[:2].abs().max()) < 1e-15
        shifted = []
        for k in (1, 2):
            up = y.numpy() + np.array([0.0, 0.0, k * h])
            end = end_of_flow(partial(circle_gradient, amplitude), up)
            shifted.append(math.atan2(end[1], end[0]) - theta)
        second = (16 * shifted[0] - shifted[1]) / (6 * h**2)  # even in h
        drift = 0.5 * second * float(sigma[2, 2])
        want = kappa / 2 * amplitude * math.sin(theta) * (1 + amplitude * math.cos(theta))
        assert drift == pytest.approx(want, rel=1e-5)
        trace = [float(p.hessian(p.facts.circle.point(angle + e)).trace()) for e in (1e-5, -1e-5)]
        assert want == pytest.approx(-kappa / 4 * (trace[0] - trace[1]) / 2e-5, rel=1e-8)
    assert "without diffusion" in p.facts.statement.replace("\n", " ")


# Arguments, statements, pickles.


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: problems.normalized_linear(10, 9), "n_samples <= dim - 2"),
        (lambda: problems.normalized_linear(10, 0), "n_samples=0"),
        (lambda: problems.normalized_linear(10.0, 8), "dim=10.0"),
        (lambda: problems.normalized_linear(10, True), "n_samples=True"),
        (lambda: problems.normalized_linear(design="uniform"), "'gaussian' or 'orthogonal'"),
        (lambda: problems.normalized_linear(radius=1.0), "the radius"),
        (lambda: problems.normalized_linear(radius=0.0), "the radius"),
        (lambda: problems.normalized_linear(radius="0.5"), "received: '0.5'"),
        (lambda: problems.normalized_linear(radius=math.nan), "nan"),
        (lambda: problems.normalized_linear(seed=-1), "seed is not an integer"),
        (lambda: problems.normalized_linear(seed=None), "seed is not an integer"),
        (lambda: problems.normalized_linear(noise_scale=0.0), "scale must be positive"),
        (lambda: problems.great_sphere(2), "at least 3"),
        (lambda: problems.great_sphere(3.0), "received: 3.0"),
        (lambda: problems.varying_circle(1.0), "the amplitude"),
        (lambda: problems.varying_circle(-0.1), "-0.1"),
        (lambda: problems.varying_circle(None), "None"),
        (lambda: problems.label_noise_circle(2.0), "the amplitude"),
        (lambda: problems.label_noise_circle(label_scale=0.0), "scale must be positive"),
        (lambda: problems.label_noise_circle(batch_size=0), "batch_size is not an integer"),
    ],
)
def test_arguments_that_cannot_be(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(errors.ArgumentError, match=message) as caught:
        build()
    assert all(word in str(caught.value) for word in ("received", "expected", "hint"))


@each_problem
def test_statements_say_what_is_known(name: str) -> None:
    facts = PROBLEMS[name]().facts
    assert ("Phi" in facts.statement) == (facts.limit_map is not None)
    assert "pi is" in facts.statement or "without diffusion" in facts.statement


@each_problem
def test_problems_pickle(name: str) -> None:
    p = PROBLEMS[name]()
    again = pickle.loads(pickle.dumps(p))
    x = normal(3, p.dim)
    for method in ("loss", "gradient", "noise_factor"):
        assert torch.equal(getattr(again, method)(x), getattr(p, method)(x))
    assert again.facts.statement == p.facts.statement
    assert torch.equal(again.facts.log_pseudo_determinant(x), p.facts.log_pseudo_determinant(x))
    if p.facts.limit_map is not None:
        assert torch.equal(again.facts.limit_map(x), p.facts.limit_map(x))
    assert (repr(again), again.dim, again.rank) == (repr(p), p.dim, p.rank)


def test_a_worker_process_takes_a_problem() -> None:
    p = problems.normalized_linear()
    with get_context("spawn").Pool(1) as pool:
        far = pool.apply(gradient_at, (p, p.minimizer + 0.1))
    torch.testing.assert_close(far, p.gradient(p.minimizer + 0.1))


def gradient_at(p: Problem, x: Tensor) -> Tensor:
    torch.set_num_threads(1)
    return p.gradient(x)


def test_every_problem_is_tested_here() -> None:
    makers = {n for n in problems.__all__ if inspect.isfunction(getattr(problems, n))}
    source = inspect.getsource(inspect.getmodule(normal))  # type: ignore[arg-type]
    assert all(f"problems.{name}" in source for name in makers)
