"""Least squares: residuals, Jacobians, and the Hessian where the residuals vanish."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from manifold_sde import (
    LabelNoise,
    LeastSquaresProblem,
    Problem,
    SamplingNoise,
    SphericalNoise,
    errors,
    problems,
)

GENERATOR = torch.Generator().manual_seed(5)
ROWS = torch.randn(7, 4, dtype=torch.float64, generator=GENERATOR)
X = torch.randn(2, 3, 4, dtype=torch.float64, generator=GENERATOR)


def residuals_of(n: int) -> Callable[[Tensor], Tensor]:
    def residuals(x: Tensor) -> Tensor:
        return ROWS[:n].to(x) @ (x / x.norm()) - 0.3

    return residuals


@pytest.mark.parametrize("n", [1, 3, 4, 7])
def test_jacobian_by_hand(n: int) -> None:
    """J = Z (I - x x^T / |x|^2) / |x|, by rows or by columns, whichever are fewer."""
    p = LeastSquaresProblem(residuals_of(n), 4, SphericalNoise(0.3))
    unit = X / X.norm(dim=-1, keepdim=True)
    projector = torch.eye(4, dtype=X.dtype) - unit[..., :, None] * unit[..., None, :]
    want = ROWS[:n] @ projector / X.norm(dim=-1)[..., None, None]
    torch.testing.assert_close(p.jacobian(X), want, rtol=1e-13, atol=1e-13)
    assert p.jacobian(X[0, 0]).shape == (n, 4)
    torch.testing.assert_close(p.residuals(X), unit @ ROWS[:n].T - 0.3)
    assert p.residuals(X.float()).dtype == torch.float32
    assert p.jacobian(X[:0].to("meta")).shape == (0, 3, n, 4)


def test_the_same_as_a_problem_of_half_squares() -> None:
    residuals = residuals_of(7)
    p = LeastSquaresProblem(residuals, 4, SphericalNoise(0.3))
    q = Problem(lambda x: 0.5 * residuals(x) ** 2, 4, SphericalNoise(0.3))
    a, b = X[0, 0], X[1, 1]
    for got, want in [
        (p.loss(X), q.loss(X)),
        (p.loss(X), 0.5 * p.residuals(X).square().mean(-1)),
        (p.sample_losses(X), q.sample_losses(X)),
        (p.gradient(X), q.gradient(X)),
        (p.gradient(X), (p.jacobian(X).mT @ p.residuals(X)[..., None])[..., 0] / 7),
        (p.hessian(X), q.hessian(X)),
        (p.third_derivative(X, a, b), q.third_derivative(X, a, b)),
    ]:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_hessian_where_the_residuals_vanish() -> None:
    p = problems.normalized_linear()
    y = p.facts.circle.point(torch.linspace(-3, 3, 5, dtype=torch.float64))
    jacobian = p.jacobian(y)
    torch.testing.assert_close(p.hessian(y), jacobian.mT @ jacobian / 8, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("residuals", "error", "message"),
    [
        (None, errors.DTypeError, "not a function"),
        (lambda x: x.sum(), errors.ShapeError, "a residual a sample"),
        (lambda x: x[:0], errors.ShapeError, "wrong shape"),
        (lambda x: x.outer(x)[None], errors.ShapeError, r"\(1, 4, 4\)"),
        (lambda x: x[:7] @ ROWS, errors.ArgumentError, "raised at a test point"),
        (lambda x: x.detach() / x.norm(), errors.DifferentiationError, "residual function"),
        (lambda x: x.sqrt(), errors.NonFiniteError, "nan"),
        (lambda x: x.float(), errors.DTypeError, "float32"),
    ],
)
def test_residuals_that_cannot_be_used(
    residuals: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        LeastSquaresProblem(residuals, 4, SphericalNoise(0.3))
    assert all(word in str(caught.value) for word in ("received", "expected", "hint"))


def test_representation_says_the_samples() -> None:
    p = LeastSquaresProblem(residuals_of(3), 4, LabelNoise(0.2, 5), rank=3)
    assert repr(p) == (
        "LeastSquaresProblem('residuals', dim=4, n_samples=3, "
        "LabelNoise(scale=0.2, batch_size=5), rank=3)"
    )


def two_outputs(x: Tensor) -> Tensor:
    """Three samples of two outputs."""
    return (ROWS[:6] @ (x / x.norm()) - 0.3).reshape(3, 2)


def test_several_outputs_a_sample() -> None:
    """A sample's loss is half the sum of its squares; everything else follows."""
    p = LeastSquaresProblem(two_outputs, 4, SphericalNoise(0.3))
    q = Problem(lambda x: 0.5 * two_outputs(x).square().sum(1), 4, SphericalNoise(0.3))
    assert (p.n_samples, p.pointwise.n_outputs, p.pointwise.n_residuals) == (3, 2, 6)
    flat = LeastSquaresProblem(residuals_of(6), 4, SphericalNoise(0.3))
    for got, want in [
        (p.sample_losses(X), q.sample_losses(X)),
        (p.gradient(X), q.gradient(X)),
        (p.hessian(X), q.hessian(X)),
        (p.loss(X), 2.0 * flat.loss(X)),
        (p.residuals(X), flat.residuals(X)),
        (p.jacobian(X), flat.jacobian(X)),
    ]:
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_sampling_noise_draws_whole_samples() -> None:
    p = LeastSquaresProblem(two_outputs, 4, SamplingNoise())
    q = Problem(lambda x: 0.5 * two_outputs(x).square().sum(1), 4, SamplingNoise())
    torch.testing.assert_close(p.noise_covariance(X), q.noise_covariance(X))
    single = LeastSquaresProblem(residuals_of(6), 4, SamplingNoise()).noise_covariance(X)
    assert not torch.allclose(p.noise_covariance(X), single)


def test_labels_of_several_outputs() -> None:
    """The covariance over what is drawn: samples one by one, labels by their two moments."""
    noise = LabelNoise(0.5)
    p = LeastSquaresProblem(two_outputs, 4, noise)
    x = X[0, 0]

    def drawn(sample: int, labels: list[float]) -> Tensor:
        uniform = torch.tensor([(sample + 0.5) / 3], dtype=x.dtype)
        normals = torch.tensor(labels, dtype=x.dtype)
        return noise.stochastic_gradient(p.pointwise, x, normals, uniform)

    corners = [[a, b] for a in (-1.0, 1.0) for b in (-1.0, 1.0)]
    gradients = torch.stack([drawn(k, c) for k in range(3) for c in corners])
    torch.testing.assert_close(gradients.mean(0), p.gradient(x))
    centred = gradients - gradients.mean(0)
    torch.testing.assert_close(p.noise_covariance(x), centred.T @ centred / len(centred))
    w = torch.arange(1.0, p.n_noise + 1, dtype=x.dtype)
    torch.testing.assert_close(p.noise_product(x, w), p.noise_factor(x) @ w)
    pulled = noise.transposed_product(p.pointwise, x, X[1, 1])
    torch.testing.assert_close(pulled, p.noise_factor(x).T @ X[1, 1])
