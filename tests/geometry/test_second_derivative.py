"""The second derivative of Phi contracted with Sigma: against SciPy, and its corollaries.

The three terms are written out once more here, from whole third-derivative tensors, so that each
can be dropped, halved or turned: every such twin has to fail the assertion that the formula passes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde import Geometry, LabelNoise, Problem, SphericalNoise, problems
from manifold_sde.errors import (
    ArgumentError,
    DTypeError,
    NonFiniteError,
    NotOnManifoldError,
    RankError,
    ShapeError,
)
from tests.geometry.reference import Case, RandomLoss, relative

CASES = [
    Case(kind="square", dim=5, rank=1, curvature=2.0, seed=2),
    Case(kind="square", dim=6, rank=3, seed=1),
    Case(kind="linex", dim=6, rank=4, curvature=1.5, seed=3),
    Case(kind="cauchy", dim=5, rank=2, seed=4),
    Case(kind="weighted", dim=5, rank=3, seed=5),
]
TOLERANCE = 1e-6


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def limit_of(loss: RandomLoss) -> Tensor:
    """A point of the manifold, of norm 1."""
    return torch.from_numpy(loss.limit_map(loss.starts(1, 0.2)[0].numpy()))


def assert_second_derivative(found: Tensor, reference: np.ndarray) -> None:
    """Agreement with differences of SciPy's Phi to 1e-6."""
    assert relative(found, reference) < TOLERANCE


@dataclass(frozen=True)
class Terms:
    """The three terms of the formula, and what they are made of."""

    tangent: Tensor
    mixed: Tensor
    normal: Tensor
    normal_covariance: Tensor

    @property
    def total(self) -> Tensor:
        return self.tangent + self.mixed + self.normal


def three_terms(problem: Problem, y: Tensor, sigma: Tensor, rank: int) -> Terms:
    """-H^+ T[P S P], -2 P T[sym(H^+ N S P)] and -P T[L^{-1}(N S N)], from whole matrices."""
    basis = torch.eye(len(y), dtype=y.dtype)

    def row(a: Tensor) -> Tensor:
        return vmap(lambda b: problem.pointwise.third_derivative(y, a, b))(basis)

    third = vmap(row)(basis)  # third[i, j] is the derivative of the gradient along e_i and e_j
    values, vectors = torch.linalg.eigh(problem.hessian(y))
    kernel, rest = vectors[:, :-rank], vectors[:, -rank:]
    p, n = kernel @ kernel.T, rest @ rest.T
    inverse = rest @ torch.diag(1.0 / values[-rank:]) @ rest.T
    cross = inverse @ n @ sigma @ p
    inner = rest.T @ sigma @ rest
    lyapunov = rest @ (inner / (values[-rank:, None] + values[-rank:])) @ rest.T

    def contract(matrix: Tensor) -> Tensor:
        return torch.einsum("ijk,ij->k", third, matrix)

    return Terms(
        -inverse @ contract(p @ sigma @ p),
        -p @ contract(cross + cross.T),
        -p @ contract(lyapunov),
        n @ sigma @ n,
    )


@pytest.mark.paper("Equation (5)")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_differences_of_an_independent_limit_map(case: Case) -> None:
    """Sigma of random rank, its tangential and normal parts correlated; and the broken twins."""
    loss = RandomLoss(case)
    y = limit_of(loss)
    problem = loss.problem()
    factor = normal(case.dim, 1 + case.seed % 3, seed=case.seed)
    reference = loss.second_derivative(y.numpy(), factor.numpy())
    found = Geometry(problem).second_derivative(y, factor=factor)
    assert_second_derivative(found, reference)

    terms = three_terms(problem, y, factor @ factor.T, case.rank)
    assert_second_derivative(terms.total, reference)
    for term in (terms.tangent, terms.mixed, terms.normal):
        for change in (1.0, 0.5, 2.0):  # dropped, halved, turned
            with pytest.raises(AssertionError):
                assert_second_derivative(terms.total - change * term, reference)


@pytest.mark.parametrize("case", CASES[1:3], ids=str)
def test_nearest_point_lacks_exactly_the_third_term(case: Case) -> None:
    loss = RandomLoss(case)
    y = limit_of(loss)
    factor = normal(case.dim, 2, seed=8)
    total = np.zeros(case.dim)
    for column in factor.numpy().T:
        size, h = np.linalg.norm(column), 1e-2
        step = h * column / size
        sides = [
            loss.nearest(y.numpy() + k * step) + loss.nearest(y.numpy() - k * step)
            for k in (1, 2, 3)
        ]
        second = 270 * sides[0] - 27 * sides[1] + 2 * sides[2] - 490 * y.numpy()
        total += second / (180 * h**2) * size**2
    found = Geometry(loss.problem()).second_derivative(y, factor=factor)
    terms = three_terms(loss.problem(), y, factor @ factor.T, case.rank)
    assert_second_derivative(found - terms.normal, total)
    with pytest.raises(AssertionError):
        assert_second_derivative(found, total)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_radial_part_is_the_trace_of_the_normal_noise(case: Case) -> None:
    """<y, d^2 Phi[Sigma]> = tr(N Sigma N), for every Sigma, at several points and norms."""
    loss = RandomLoss(case)
    geometry = Geometry(loss.problem())
    y = limit_of(loss) * torch.tensor([[0.5], [1.0], [3.0]], dtype=torch.float64)
    factor = normal(3, case.dim, case.dim, seed=1)
    sigma = factor @ factor.mT
    found = (y * geometry.second_derivative(y, sigma)).sum(-1)
    rows = geometry.tangent_projection(y[:, None], sigma)  # sigma P
    inside = torch.diagonal(rows, dim1=-2, dim2=-1).sum(-1)  # tr(Sigma P)
    expected = torch.diagonal(sigma, dim1=-2, dim2=-1).sum(-1) - inside
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_homogeneity() -> None:
    """d^2 Phi is (-1)-homogeneous: with y -> a y it falls by a."""
    loss = RandomLoss(CASES[1])
    geometry = Geometry(loss.problem())
    y, factor = limit_of(loss), normal(6, 2)
    at_one = geometry.second_derivative(y, factor=factor)
    for scale in (1e-3, 1e3):
        there = geometry.second_derivative(scale * y, factor=factor)
        torch.testing.assert_close(scale * there, at_one, rtol=1e-9, atol=1e-9)


def gradient_by_differences(function: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """Differences of order four of a batched scalar function."""
    h = 1e-3
    basis = torch.eye(len(y), dtype=y.dtype)
    sides = [function(y + k * h * basis) - function(y - k * h * basis) for k in (1, 2)]
    return (8 * sides[0] - sides[1]) / (12 * h)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_label_noise_drifts_down_the_trace_of_the_hessian(case: Case) -> None:
    """Sigma = kappa H on Gamma: half of it is -(kappa / 4) P grad tr H, and nothing diffuses."""
    loss = RandomLoss(case)
    problem = loss.problem(LabelNoise(0.3, batch_size=2))
    geometry, y, kappa = Geometry(problem), limit_of(loss), 0.09 / 2
    torch.testing.assert_close(
        problem.noise_covariance(y), kappa * problem.hessian(y), rtol=1e-9, atol=1e-12
    )
    slope = gradient_by_differences(
        lambda z: torch.diagonal(problem.hessian(z), dim1=-2, dim2=-1).sum(-1), y
    )
    expected = -kappa / 4 * geometry.tangent_projection(y, slope)
    half = 0.5 * geometry.second_derivative(y)
    torch.testing.assert_close(geometry.tangent_projection(y, half), expected, rtol=1e-7, atol=1e-9)
    assert float((half - expected).norm()) < 1e-9  # it has no other part
    moved = geometry.tangent_projection(y, problem.noise_factor(y).mT)
    assert float(moved.norm()) < 1e-9


def test_label_noise_circle_moves_as_it_says() -> None:
    """The angle has the speed (kappa / 2) a sin(theta) (1 + a cos(theta))."""
    problem = problems.label_noise_circle(0.5, 0.3, 2)
    theta = torch.linspace(0.1, 6.2, 7, dtype=torch.float64)
    zero = torch.zeros_like(theta)
    y = torch.stack([theta.cos(), theta.sin(), zero], -1)
    along = torch.stack([-theta.sin(), theta.cos(), zero], -1)
    speed = (0.5 * Geometry(problem).second_derivative(y) * along).sum(-1)
    expected = 0.045 / 2 * 0.5 * theta.sin() * (1 + 0.5 * theta.cos())
    torch.testing.assert_close(speed, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.paper("Equation (18)")
@pytest.mark.parametrize("case", CASES[1:3], ids=str)
def test_isotropic_noise_drifts_down_the_log_pseudo_determinant(case: Case) -> None:
    """For (18): along Gamma -(s^2 / 4|y|^2) grad log pdet H, radially +s^2 M y / (2 |y|^4)."""
    loss, s = RandomLoss(case), 0.3
    problem = loss.problem(SphericalNoise(s))
    geometry = Geometry(problem)
    y = 1.4 * limit_of(loss)
    half = 0.5 * geometry.second_derivative(y)
    identity = torch.eye(case.dim, dtype=torch.float64)
    projector = geometry.tangent_projection(y, identity)

    def on_manifold(z: Tensor) -> Tensor:
        return geometry.log_pseudo_determinant(geometry.retract(z))

    slope = projector @ gradient_by_differences(on_manifold, y)
    expected = -(s**2) / (4 * y.square().sum()) * slope
    torch.testing.assert_close(projector @ half, expected, rtol=1e-6, atol=1e-8)
    radial = s**2 * case.rank / (2 * y.norm() ** 3)
    torch.testing.assert_close(half @ y / y.norm(), radial, rtol=1e-10, atol=0)
    twin = 2 * expected
    with pytest.raises(AssertionError):
        torch.testing.assert_close(projector @ half, twin, rtol=1e-6, atol=1e-8)


def test_great_circle_by_hand() -> None:
    """Phi = |x| (x_1, x_2, 0) / sqrt(x_1^2 + x_2^2), at (r, 0, 0): d_3 d_3 Phi_1 = 1/r alone."""
    geometry = Geometry(problems.great_circle())
    y = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
    sigma = torch.diag(torch.tensor([0.0, 3.0, 5.0], dtype=torch.float64))
    expected = torch.tensor([2.5, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(geometry.second_derivative(y, sigma), expected)


def test_covariance_factor_and_the_problems_own_noise_agree() -> None:
    loss = RandomLoss(CASES[3])
    problem = loss.problem(SphericalNoise(0.2))
    geometry = Geometry(problem)
    y = torch.stack([limit_of(loss), -limit_of(loss), 2 * limit_of(loss)])
    y = geometry.limit_map(y + 0.01 * normal(3, 5))
    whole = geometry.second_derivative(y, problem.noise_covariance(y))
    factor = geometry.second_derivative(y, factor=problem.noise_factor(y))
    own = geometry.second_derivative(y)
    torch.testing.assert_close(factor, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(own, whole, rtol=1e-10, atol=1e-12)


def test_shapes_and_batches() -> None:
    loss = RandomLoss(CASES[1])
    geometry = Geometry(loss.problem())
    y, sigma = limit_of(loss), torch.eye(6, dtype=torch.float64)
    one = geometry.second_derivative(y, sigma)
    assert one.shape == (6,)
    batch = geometry.second_derivative(y.expand(2, 3, 6), sigma)
    assert batch.shape == (2, 3, 6)
    torch.testing.assert_close(batch[1, 2], one)
    assert geometry.second_derivative(y, sigma.expand(4, 6, 6)).shape == (4, 6)
    assert geometry.second_derivative(y.expand(2, 1, 6), sigma.expand(4, 6, 6)).shape == (2, 4, 6)
    assert geometry.second_derivative(y[None][:0], sigma).shape == (0, 6)
    single = geometry.second_derivative(y.float(), sigma.float())
    assert single.dtype == torch.float32
    assert relative(single, one) < 1e-3


def bad_arguments() -> list[tuple[dict, type[Exception], str]]:
    identity = torch.eye(6, dtype=torch.float64)
    bent = identity.clone()
    bent[0, 1] = 0.1
    holed = identity.clone()
    holed[2, 2] = torch.nan
    return [
        ({"covariance": identity, "factor": identity}, ArgumentError, "given twice"),
        ({"covariance": bent}, ArgumentError, "not symmetric"),
        ({"covariance": holed}, NonFiniteError, "NaN or infinity"),
        ({"covariance": identity[:5]}, ShapeError, "covariance has the wrong shape"),
        ({"factor": identity[:5]}, ShapeError, "factor has the wrong shape"),
        ({"factor": identity[0]}, ShapeError, "factor has the wrong shape"),
        ({"covariance": identity.float()}, DTypeError, "not of the kind"),
        ({"covariance": identity.numpy()}, DTypeError, "not of the kind"),
        ({"covariance": identity.expand(3, 6, 6)}, ShapeError, "do not fit together"),
    ]


@pytest.mark.parametrize(("options", "error", "message"), bad_arguments())
def test_bad_arguments(options: dict, error: type[Exception], message: str) -> None:
    loss = RandomLoss(CASES[1])
    y = torch.from_numpy(loss.minimizer).expand(2, 6)
    with pytest.raises(error, match=message):
        Geometry(loss.problem()).second_derivative(y, **options)


def test_points_off_the_manifold_are_refused() -> None:
    loss = RandomLoss(CASES[1])
    geometry = Geometry(loss.problem())
    with pytest.raises(NotOnManifoldError, match=r"gradient norm .* distance estimate"):
        geometry.second_derivative(loss.starts(3))
    wrong = Geometry(Problem(loss.torch_loss, 6, SphericalNoise(0.3), rank=2))
    with pytest.raises(RankError, match="declared rank 2"):
        wrong.second_derivative(torch.from_numpy(loss.minimizer))
