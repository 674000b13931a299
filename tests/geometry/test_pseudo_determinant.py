"""The logarithm of the pseudo-determinant: from the Jacobian where the residuals vanish."""

from collections.abc import Callable

import mpmath
import pytest
import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, jvp, vmap

from manifold_sde import Geometry, LeastSquaresProblem, Problem, SphericalNoise, problems
from manifold_sde.errors import DifferentiationError, NotOnManifoldError, RankError
from tests.geometry.reference import Case, RandomLoss

NOISE = SphericalNoise(0.3)
DIGITS = 50


def points(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def exact(loss: RandomLoss, y: Tensor) -> mpmath.mpf:
    """The logarithm of det(J J^T / Xi) to fifty digits, with J by hand."""
    with mpmath.workdps(DIGITS):
        x = mpmath.matrix(y.tolist())
        norm = mpmath.norm(x)
        u = x / norm
        rows = []
        for row, bend in zip(loss.rows, loss.bend, strict=True):
            slope = mpmath.matrix(row.tolist()) + mpmath.matrix(bend.tolist()) * u
            rows.append(list((slope - u * (u.T * slope)[0]) / norm))
        jacobian = mpmath.matrix(rows)
        return mpmath.log(mpmath.det(jacobian * jacobian.T / len(rows)))


def assert_digits(found: Tensor, expected: mpmath.mpf) -> None:
    """Agreement to eleven decimals."""
    assert abs(mpmath.mpf(float(found)) - expected) < 1e-11


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_jacobian_keeps_the_digits_that_the_hessian_loses(seed: int) -> None:
    """H has the condition number 1e8: the broken twin is the same loss without its residuals."""
    loss = RandomLoss(Case(dim=8, rank=5, condition=1e8, seed=seed))
    y = torch.from_numpy(loss.minimizer)
    geometry = Geometry(loss.problem())
    for point in (y, 3.0 * y, geometry.retract(y + 1e-9 * loss.starts(1)[0])):
        assert_digits(geometry.log_pseudo_determinant(point), exact(loss, point))
    plain = Geometry(Problem(loss.torch_loss, 8, NOISE, rank=5))
    from_hessian = plain.log_pseudo_determinant(y)
    assert abs(mpmath.mpf(float(from_hessian)) - exact(loss, y)) < 1e-6
    with pytest.raises(AssertionError):
        assert_digits(from_hessian, exact(loss, y))


@pytest.mark.parametrize("seed", [0, 1130])
def test_model_of_section_6_1(seed: int) -> None:
    """J J^T = (Z Z^T - t t^T) / |y|^2 on Gamma, whatever the point; H is worst at seed 0."""
    model = problems.normalized_linear(seed=seed)
    with mpmath.workdps(DIGITS):
        z, t = mpmath.matrix(model.inputs.tolist()), mpmath.matrix(model.targets.tolist())
        gram = mpmath.log(mpmath.det((z * z.T - t * t.T) / 8))
        y = 1.7 * model.facts.circle.point(torch.linspace(0, 6, 5, dtype=torch.float64))
        for point in Geometry(model).limit_map(y):
            size = mpmath.norm(mpmath.matrix(point.tolist()))
            found = Geometry(model).log_pseudo_determinant(point)
            assert_digits(found, gram - 16 * mpmath.log(size))


def slope(x: Tensor) -> Tensor:
    """The residual f of the circle of varying curvature; |grad f| = 1 + cos(theta) / 2 on it."""
    u = x / x.norm()
    return (1.0 + 0.5 * u[0]) * u[2]


@pytest.mark.parametrize(
    ("residuals", "factor"),
    [
        (lambda x: torch.stack([slope(x), 0.4 + slope(x) ** 2]), 0.5 * (1.0 + 0.8)),
        (lambda x: (0.4 + slope(x) ** 2)[None], 0.8),  # here J vanishes
    ],
)
def test_residuals_that_do_not_vanish(residuals: Callable[[Tensor], Tensor], factor: float) -> None:
    """H = (J^T J + sum r_k d^2 r_k) / Xi: the Jacobian alone would be wrong by far."""
    problem = LeastSquaresProblem(residuals, 3, NOISE, rank=1)
    theta = torch.linspace(0, 6, 7, dtype=torch.float64)
    y = 2.0 * torch.stack([theta.cos(), theta.sin(), torch.zeros_like(theta)], -1)
    expected = torch.log(factor * (1.0 + 0.5 * theta.cos()) ** 2 / 4.0)
    found = Geometry(problem).log_pseudo_determinant(y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    plain = Problem(lambda x: 0.5 * residuals(x) ** 2, 3, NOISE, rank=1)
    torch.testing.assert_close(found, Geometry(plain).log_pseudo_determinant(y), rtol=0, atol=1e-14)
    twin = problem.jacobian(y).square().sum((-1, -2)).div(problem.n_samples or 1).log()
    with pytest.raises(AssertionError):
        torch.testing.assert_close(twin, expected, rtol=0, atol=1e-1)


def test_each_point_by_its_own_route() -> None:
    """Minimal at s = x_3/|x| = 0 with r = 0, and at s = 0.3 with r = 0.018: r r'' (1 - s^2)."""

    def residuals(x: Tensor) -> Tensor:
        s = x[2:] / x.norm()
        return s * ((s - 0.4) ** 2 + 0.05)

    geometry = Geometry(LeastSquaresProblem(residuals, 3, NOISE))
    y = points((1.0, 0.0, 0.0), (0.91**0.5, 0.0, 0.3), (0.0, -1.0, 0.0))
    expected = torch.tensor([0.0441, 0.018 * 0.2 * 0.91, 0.0441], dtype=torch.float64).log()
    found = geometry.log_pseudo_determinant(y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    alone = torch.stack([geometry.log_pseudo_determinant(point) for point in y])
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-14)


def test_shapes_and_dtypes() -> None:
    problem = problems.varying_circle(0.5)
    geometry = Geometry(problem)
    y = problem.facts.circle.point(torch.linspace(0, 6, 6, dtype=torch.float64))
    found = geometry.log_pseudo_determinant(y.reshape(2, 3, 3))
    assert found.shape == (2, 3)
    torch.testing.assert_close(geometry.log_pseudo_determinant(y[4]), found[1, 1])
    assert geometry.log_pseudo_determinant(y[:0]).shape == (0,)
    assert geometry.log_pseudo_determinant(y.to("meta")).shape == (6,)
    single = geometry.log_pseudo_determinant(y.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found.flatten(), rtol=0, atol=1e-5)
    free = Problem(lambda x: 0.0 * x.sum() / x.norm(), 3, NOISE)
    with pytest.raises(RankError, match="the Hessian is zero"):
        Geometry(free).log_pseudo_determinant(y[0])


def test_errors_are_those_of_the_hessian() -> None:
    loss = RandomLoss(Case(dim=6, rank=3, seed=1))
    geometry, y = Geometry(loss.problem()), torch.from_numpy(loss.minimizer)
    with pytest.raises(NotOnManifoldError, match="1 of 2 points; at worst gradient norm"):
        geometry.log_pseudo_determinant(torch.stack([y, loss.starts(1, 1e-3)[0]]))
    wrong = LeastSquaresProblem(loss.torch_residuals, 6, NOISE, rank=2)
    with pytest.raises(RankError, match=r"declared rank 2 .*\n.* largest gap is at rank 3"):
        Geometry(wrong).log_pseudo_determinant(y)


@pytest.mark.parametrize("norm", [1.0, 2.5])
def test_derivative_along_the_circle(norm: float) -> None:
    """2 log(1 + a cos(theta)) - 2 log |y|: the slope along the circle, -2/|y| along the ray."""
    problem = problems.varying_circle(0.5)
    function = Geometry(problem).log_pseudo_determinant
    theta = torch.linspace(0.3, 6, 5, dtype=torch.float64)
    zero = torch.zeros_like(theta)
    ray = torch.stack([theta.cos(), theta.sin(), zero], -1)
    along = torch.stack([-theta.sin(), theta.cos(), zero], -1)
    turn = -theta.sin() / (1.0 + 0.5 * theta.cos())
    expected = (turn[:, None] * along - 2.0 * ray) / norm
    y = norm * ray
    for found in (vmap(jacrev(function))(y), vmap(jacfwd(function))(y)):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    leaf = y.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf).sum(), leaf)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    moved = jvp(function, (y,), (along,))[1]
    torch.testing.assert_close(moved, turn / norm, rtol=1e-11, atol=1e-12)
    with pytest.raises(DifferentiationError, match="differentiable once"):
        jacfwd(jacfwd(function))(y[0])


@pytest.mark.parametrize("kind", ["square", "linex"])
def test_derivative_is_that_of_the_values(kind: str) -> None:
    """Differences of order four along Gamma, by way of the retraction."""
    loss = RandomLoss(Case(kind=kind, dim=6, rank=3, seed=3))
    geometry, y = Geometry(loss.problem()), torch.from_numpy(loss.minimizer)
    step = 1e-3 * torch.eye(6, dtype=torch.float64)
    sides = [
        geometry.log_pseudo_determinant(geometry.retract(y + k * step))
        - geometry.log_pseudo_determinant(geometry.retract(y - k * step))
        for k in (1, 2)
    ]
    expected = geometry.tangent_projection(y, (8 * sides[0] - sides[1]) / 12e-3)
    found = jacrev(geometry.log_pseudo_determinant)(y)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert abs(float(found @ y) + 2 * 3) < 1e-10  # degree -2 for each of M = 3 eigenvalues
    with pytest.raises(AssertionError):
        torch.testing.assert_close(0.5 * found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.compile
@pytest.mark.slow
def test_compiled_values_and_derivatives() -> None:
    problem = problems.varying_circle(0.5)
    y = 1.5 * problem.facts.circle.point(torch.linspace(0, 6, 20, dtype=torch.float64))
    compiled, eager = Geometry(problem, compile=True), Geometry(problem)
    torch.testing.assert_close(
        compiled.log_pseudo_determinant(y), eager.log_pseudo_determinant(y), rtol=0, atol=1e-13
    )
    torch.testing.assert_close(
        vmap(jacrev(compiled.log_pseudo_determinant))(y),
        vmap(jacrev(eager.log_pseudo_determinant))(y),
        rtol=1e-11,
        atol=1e-12,
    )
