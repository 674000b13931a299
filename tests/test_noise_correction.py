"""The term of the Stratonovich drift from the noise itself: sum over j of d sigma_j [P sigma_j].

Against differences of the factor, against closed forms, and within the whole drift against the
conversion from Ito's form, where everything is a difference of a closed form.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from manifold_sde import (
    CustomNoise,
    LabelNoise,
    LeastSquaresProblem,
    Problem,
    SamplingNoise,
    SphericalNoise,
    problems,
)

DIM = 5
GENERATOR = torch.Generator().manual_seed(31)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


ROWS = normal(4, DIM)
WEIGHTS = (4 / 5, -1 / 5, 4 / 105, -1 / 280)
SECOND = (8 / 5, -1 / 5, 8 / 315, -1 / 560)


def difference(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, h: float = 1e-2) -> Tensor:
    """First derivative along v, of eighth order."""
    terms = [w * (f(x + k * h * v) - f(x - k * h * v)) for k, w in enumerate(WEIGHTS, start=1)]
    return sum(terms[1:], terms[0]) / h


def second_difference(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, h: float) -> Tensor:
    """Second derivative along v, of eighth order."""
    terms = [w * (f(x + k * h * v) + f(x - k * h * v)) for k, w in enumerate(SECOND, start=1)]
    return (sum(terms[1:], terms[0]) - 205 / 72 * f(x)) / h**2


def residuals(x: Tensor) -> Tensor:
    return torch.sin(ROWS @ (x / x.norm())) - 0.2


def layered(x: Tensor) -> Tensor:
    """Sample losses through torch's own layer norm and normalisation."""
    hidden = F.layer_norm(ROWS[:, :2] @ x[:4].reshape(2, 2) @ ROWS[:2, :3], (3,), eps=0.01)
    return torch.tanh(hidden).pow(3).sum(1) * F.normalize(x, dim=0)[4]


def tangent_factor(x: Tensor) -> Tensor:
    unit = x / x.norm()
    columns = torch.stack([unit.roll(1), torch.tanh(ROWS[0] * unit), unit**2], dim=1)
    return (columns - torch.outer(unit, unit @ columns)) / x.norm()


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "spherical": lambda: LeastSquaresProblem(residuals, DIM, SphericalNoise(0.3)),
    "sampling": lambda: LeastSquaresProblem(residuals, DIM, SamplingNoise(2)),
    "sampling, layers": lambda: Problem(layered, DIM, SamplingNoise()),
    "without replacement": lambda: LeastSquaresProblem(
        residuals, DIM, SamplingNoise(2, replacement=False)
    ),
    "labels": lambda: LeastSquaresProblem(residuals, DIM, LabelNoise(0.5, 2)),
    "custom": lambda: LeastSquaresProblem(residuals, DIM, CustomNoise(tangent_factor)),
    "custom with a radial part": lambda: LeastSquaresProblem(
        residuals, DIM, CustomNoise(lambda x: tangent_factor(x) + x[:, None] / (x @ x))
    ),
}
X = normal(3, DIM)
X = X / X.norm(dim=1, keepdim=True) * torch.tensor([[0.8], [1.0], [1.3]], dtype=torch.float64)


def random_projections() -> Tensor:
    """Symmetric matrices, the second of them a projection."""
    matrices = normal(3, DIM, DIM)
    matrices = matrices + matrices.mT
    basis = torch.linalg.qr(normal(DIM, 3))[0]
    matrices[1] = basis @ basis.T
    return matrices


PROJECTIONS = random_projections()


def by_differences(p: Problem, x: Tensor, projection: Tensor, h: float = 1e-2) -> Tensor:
    """Column by column, from the factor at shifted points."""
    sigma = p.noise_factor(x)
    total = torch.zeros_like(x)
    for j in range(sigma.shape[1]):
        direction = projection @ sigma[:, j]
        size = direction.norm()
        if size > 0:
            column = lambda z: p.noise_factor(z)[:, j]  # noqa: B023, E731
            total = total + size * difference(column, x, direction / size, h)
    return total


@pytest.mark.parametrize("name", PROBLEMS)
def test_against_differences_of_the_factor(name: str) -> None:
    p = PROBLEMS[name]()
    got = p.noise_correction(X, PROJECTIONS)
    for i, x in enumerate(X):
        want = by_differences(p, x, PROJECTIONS[i], 1e-3 if "layers" in name else 1e-2)
        torch.testing.assert_close(got[i], want, rtol=1e-8, atol=1e-9 * float(want.norm()))
        alone = p.noise_correction(x, PROJECTIONS[i])
        torch.testing.assert_close(alone, got[i], rtol=1e-11, atol=1e-12)
    one = p.noise_correction(X, PROJECTIONS[1])  # a matrix for all points
    torch.testing.assert_close(one[1], got[1], rtol=1e-11, atol=1e-12)


def test_broken_twins_of_the_correction() -> None:
    """The derivative of the norm alone; the symmetry of the Jacobians where there is none."""
    p, x, projection = PROBLEMS["spherical"](), X[0], PROJECTIONS[0]
    want = by_differences(p, x, projection)
    square = x @ x
    tangential = projection.trace() - x @ projection @ x / square
    without_turning = -(0.09 / square**2) * x * tangential
    assert not torch.allclose(without_turning, want, rtol=1e-3)
    p = PROBLEMS["custom"]()
    want = by_differences(p, x, projection)
    assumed = 0.5 * torch.func.grad(
        lambda z: (projection @ tangent_factor(z) * tangent_factor(z)).sum()
    )(x)
    assert not torch.allclose(assumed, want, rtol=1e-3)


@pytest.mark.parametrize("name", ["sampling", "without replacement", "labels"])
def test_noise_of_gradients_is_half_a_gradient(name: str) -> None:
    """Half the gradient of tr(P Sigma(x)) at fixed P, from the covariance by hand."""
    p = PROBLEMS[name]()
    for x, projection in zip(X, PROJECTIONS, strict=True):
        trace = lambda z: (projection * p.noise_covariance(z)).sum()  # noqa: B023, E731
        want = 0.5 * torch.stack(
            [difference(trace, x, e) for e in torch.eye(DIM, dtype=torch.float64)]
        )
        got = p.noise_correction(x, projection)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.norm()))


@pytest.mark.paper("Equation (18)")
@pytest.mark.parametrize("n_samples", [2, 5, 8])
def test_closed_form_on_the_manifold_for_the_noise_of_18(n_samples: int) -> None:
    """-s^2 (dim Gamma - 1) y / |y|^4."""
    p = problems.normalized_linear(n_samples=n_samples, design="orthogonal")
    y = 1.3 * p.minimizer
    projection = kernel_projection(p, y)
    want = -0.09 * (p.dim - n_samples - 1) * y / 1.3**4
    torch.testing.assert_close(p.noise_correction(y, projection), want, rtol=1e-9, atol=1e-12)


def kernel_projection(p: Problem, y: Tensor) -> Tensor:
    values, basis = torch.linalg.eigh(p.hessian(y))
    kernel = basis[:, values < 1e-6 * values[-1]]
    return kernel @ kernel.T


# The whole drift, on a curved manifold of dimension 3 with noise that does not vanish there.

MODEL = problems.normalized_linear(dim=DIM, n_samples=2, seed=4, design="orthogonal")
PUSHES = normal(4, DIM)
PUSHES = PUSHES - PUSHES.mean(0)


def pushed_samples(x: Tensor) -> Tensor:
    """The losses of the linear model plus sample losses that cancel in the mean."""
    unit = x / x.norm()
    return (
        MODEL.pointwise.loss(x)
        + torch.sin(2.0 * (PUSHES @ unit))
        - torch.sin(2.0 * (PUSHES @ unit)).mean()
    )


DRIFTS: dict[str, Callable[[], Any]] = {
    "spherical": lambda: SphericalNoise(0.3),
    "sampling": SamplingNoise,
    "custom": lambda: CustomNoise(tangent_factor),
}


def stratonovich_drift(p: Problem, y: Tensor, c: float, *, mixed: float = 0.5) -> Tensor:
    """-c y - P T[L^-1(N Sigma N)/2 + sym(H^+ N Sigma P)/2] - P sum_j d sigma_j[P sigma_j] / 2."""
    values, basis = torch.linalg.eigh(p.hessian(y))
    split = int((values < 1e-6 * values[-1]).sum())
    projection = basis[:, :split] @ basis[:, :split].T
    fast = basis[:, split:]
    inverse = fast @ torch.diag(1.0 / values[split:]) @ fast.T
    sigma = p.noise_covariance(y)
    inner = fast.T @ sigma @ fast / (values[split:, None] + values[split:])
    cross = inverse @ sigma @ projection
    matrix = 0.5 * fast @ inner @ fast.T + mixed * 0.5 * (cross + cross.T)
    weights, directions = torch.linalg.eigh(matrix)
    third = sum(
        (w * p.third_derivative(y, v, v) for w, v in zip(weights, directions.T, strict=True)),
        torch.zeros_like(y),
    )
    return -c * y - projection @ (third + 0.5 * p.noise_correction(y, projection))


def converted_drift(p: Problem, y: Tensor, c: float) -> Tensor:
    """Ito's drift with differences of the closed form of Phi, then the conversion along Gamma."""
    phi = MODEL.facts.limit_map
    assert phi is not None
    sigma = p.noise_factor(y)
    total = -c * y
    for j in range(sigma.shape[1]):
        size = sigma[:, j].norm()
        if size == 0:
            continue
        unit = sigma[:, j] / size
        total = total + 0.5 * size**2 * second_difference(phi, y, unit, 2e-2)

        def projected(t: Tensor, j: int = j) -> Tensor:
            z = phi(y + t * kernel_projection(p, y) @ sigma[:, j])
            return kernel_projection(p, z) @ p.noise_factor(z)[:, j]

        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        total = total - 0.5 * difference(projected, zero, one, 1e-2)
    return total


@pytest.mark.parametrize("name", DRIFTS)
def test_the_whole_drift_against_the_conversion_from_ito(name: str) -> None:
    p = Problem(pushed_samples, DIM, DRIFTS[name](), rank=2)
    assert MODEL.facts.limit_map is not None
    y = 1.2 * MODEL.facts.limit_map(X[1])
    assert float(p.gradient(y).norm()) < 1e-13
    assert float(p.noise_trace(y)) > 1e-2
    got, want = stratonovich_drift(p, y, 0.5), converted_drift(p, y, 0.5)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7 * float(want.norm()))
    # Tangent to the cone, with a radial part that the norm equation demands.
    assert float((got - kernel_projection(p, y) @ got).norm()) < 1e-10
    unit = y / y.norm()
    at_unit = stratonovich_drift(p, unit, 0.5)
    assert float(unit @ at_unit + 0.5 - 0.5 * p.noise_trace(unit)) == pytest.approx(0, abs=1e-10)
    if name != "spherical":  # whose tangent and normal parts are not correlated
        for mixed in (0.0, 1.0):
            twin = stratonovich_drift(p, y, 0.5, mixed=mixed)
            assert not torch.allclose(twin, want, rtol=1e-3, atol=1e-4)
