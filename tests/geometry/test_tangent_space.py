"""The projection on the tangent space, the rank by its gap, and the retraction."""

import pytest
import torch
from torch import Tensor

from manifold_sde import DirectionDiffusion, Geometry, Problem, SphericalNoise, problems
from manifold_sde.errors import (
    ArgumentError,
    NonFiniteError,
    NotOnManifoldError,
    RankError,
)
from manifold_sde.solvers import predict_sgd, solve
from tests.geometry.reference import Case, RandomLoss, relative

NOISE = SphericalNoise(0.3)
CASES = [Case(dim=5, rank=1, seed=2), Case(kind="linex", dim=6, rank=4, seed=3)]
STIFF = Case(dim=8, rank=6, condition=1e4, seed=2)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def minimizers(loss: RandomLoss, count: int = 1) -> Tensor:
    return Geometry(loss.problem(), rtol=1e-6).limit_map(loss.starts(count, 0.2))


def diagonal(*curvatures: float) -> Problem:
    """Curvatures at (1, 0, 0, ...) on the unit sphere, one for each further coordinate."""
    weights = torch.tensor((0.0, *curvatures), dtype=torch.float64)
    return Problem(lambda x: 0.5 * (weights.to(x) * x * x).sum() / (x @ x), len(weights), NOISE)


def first(dim: int) -> Tensor:
    return torch.eye(dim, dtype=torch.float64)[0]


@pytest.mark.paper("Lemma 2.8")
@pytest.mark.parametrize("case", [*CASES, STIFF], ids=str)
def test_projection(case: Case) -> None:
    loss = RandomLoss(case)
    problem = loss.problem()
    geometry = Geometry(problem)
    y = torch.from_numpy(loss.minimizer)
    identity = torch.eye(case.dim, dtype=torch.float64)
    p = geometry.tangent_projection(y, identity)
    torch.testing.assert_close(p, p.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-12)
    assert round(float(p.trace())) == case.dim - case.rank
    torch.testing.assert_close(p @ y, y, rtol=0, atol=1e-10)  # dPhi(y) y = y
    assert float((problem.hessian(y) @ p).norm()) < 1e-12
    v = normal(3, case.dim)
    torch.testing.assert_close(geometry.tangent_projection(y, v), v @ p, rtol=0, atol=1e-12)


@pytest.mark.paper("Lemma 2.8")
def test_projection_is_the_derivative_of_scipys_limit_map() -> None:
    loss = RandomLoss(CASES[1])
    y = torch.from_numpy(loss.minimizer)
    expected = torch.from_numpy(loss.limit_map_jacobian(loss.minimizer))
    p = Geometry(loss.problem()).tangent_projection(y, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-9)


def test_shapes() -> None:
    loss = RandomLoss(CASES[0])
    geometry = Geometry(loss.problem())
    y = minimizers(loss, 6)
    v = normal(2, 3, 5)
    batch = geometry.tangent_projection(y.reshape(2, 3, 5), v)
    assert batch.shape == (2, 3, 5)
    one = geometry.tangent_projection(y[4], v[1, 1])
    torch.testing.assert_close(batch[1, 1], one, rtol=0, atol=1e-14)
    assert geometry.tangent_projection(y, v[0, 0]).shape == (6, 5)
    assert geometry.tangent_projection(y[0], v).shape == (2, 3, 5)
    assert geometry.tangent_projection(y[:0], v[0, :0]).shape == (0, 5)
    assert geometry.rank(y[:0]).shape == (0,)
    assert geometry.retract(y[:0]).shape == (0, 5)
    assert geometry.rank(y).tolist() == [1] * 6
    assert geometry.rank(y[0]).shape == ()
    assert geometry.spectral_gap(y.reshape(3, 2, 5)).shape == (3, 2)
    assert geometry.log_pseudo_determinant(y.reshape(3, 2, 5)).shape == (3, 2)
    single = geometry.tangent_projection(y.float(), v[0, 0].float())
    assert single.dtype == torch.float32
    assert relative(single.double(), geometry.tangent_projection(y, v[0, 0])) < 1e-5


def test_log_pseudo_determinant_is_what_the_problems_say() -> None:
    for problem in (problems.varying_circle(0.5), problems.normalized_linear(seed=1)):
        y = 1.7 * problem.facts.circle.point(torch.linspace(0, 6, 5, dtype=torch.float64))
        found = Geometry(problem).log_pseudo_determinant(y)
        torch.testing.assert_close(found, problem.facts.log_pseudo_determinant(y))


@pytest.mark.parametrize("case", [*CASES, STIFF], ids=str)
def test_rank_is_found_and_reported_with_its_gap(case: Case) -> None:
    loss = RandomLoss(case)
    y = torch.from_numpy(loss.minimizer)
    for declare in (True, False):
        geometry = Geometry(loss.problem(declare=declare))
        assert int(geometry.rank(y)) == case.rank
        assert float(geometry.spectral_gap(y)) > 1e8


def test_gap_is_the_ratio_of_the_eigenvalues() -> None:
    geometry = Geometry(diagonal(2.0, 1.0, 1e-10, 0.0))
    assert abs(float(geometry.spectral_gap(first(5))) / 1e10 - 1) < 1e-3
    assert int(geometry.rank(first(5))) == 2
    nothing = Geometry(diagonal(0.0, 0.0))
    for function in (nothing.rank, nothing.spectral_gap):
        with pytest.raises(RankError, match="the Hessian is zero"):
            function(first(3))


def test_an_ambiguous_gap_names_the_eigenvalues() -> None:
    geometry = Geometry(diagonal(1.0, 1e-6, 1e-12))
    for function in (geometry.rank, geometry.spectral_gap, geometry.log_pseudo_determinant):
        with pytest.raises(RankError, match=r"ambiguous .*\n.* \[1, 1e-06, 1e-12, "):
            function(first(4))
    with pytest.raises(RankError, match=r"ambiguous .*\n.* largest gap 1e.03 at rank"):
        Geometry(diagonal(1.0, 1e-3, 1e-6, 1e-9, 1e-12)).tangent_projection(first(6), first(6))


@pytest.mark.parametrize(("declared", "right"), [(1, False), (2, True), (3, False)])
def test_a_declared_rank_is_checked(declared: int, right: bool) -> None:
    loss = RandomLoss(Case(dim=5, rank=2, seed=4))
    y = torch.from_numpy(loss.minimizer)
    geometry = Geometry(Problem(loss.torch_loss, 5, NOISE, rank=declared))
    if right:
        assert int(geometry.rank(y)) == 2
        return
    message = rf"declared rank {declared} .*\n.* largest gap is at rank 2"
    for function in (geometry.rank, geometry.spectral_gap, geometry.log_pseudo_determinant):
        with pytest.raises(RankError, match=message):
            function(y)
    with pytest.raises(RankError, match=message):
        geometry.tangent_projection(y, y)


def test_a_maximum_and_mixed_ranks_are_refused() -> None:
    geometry = Geometry(diagonal(1.0, -1.0))
    with pytest.raises(RankError, match="negative eigenvalue"):
        geometry.rank(first(3))

    def crossing(x: Tensor) -> Tensor:
        u = x / x.norm()
        return (u[2] * u[3]) ** 2 + u[1] ** 2

    y = torch.tensor([[0.8, 0, 0.6, 0], [1.0, 0, 0, 0]], dtype=torch.float64)
    crossed = Geometry(Problem(crossing, 4, NOISE))
    assert crossed.rank(y).tolist() == [2, 1]
    with pytest.raises(RankError, match="differs between the points"):
        crossed.tangent_projection(y, y)


def test_points_off_the_manifold_are_refused() -> None:
    loss = RandomLoss(CASES[1])
    geometry = Geometry(loss.problem())
    y = torch.stack([torch.from_numpy(loss.minimizer), *loss.starts(2, 1e-3)])
    with pytest.raises(NotOnManifoldError, match="2 of 3 points; at worst gradient norm"):
        geometry.tangent_projection(y, y)
    with pytest.raises(NotOnManifoldError):
        geometry.log_pseudo_determinant(y)


def test_a_hessian_that_is_not_finite_is_named() -> None:
    problem = Problem(lambda x: (x[1] / x.norm()).abs() ** 1.5, 3, NOISE)
    geometry = Geometry(problem)
    for function in (geometry.rank, geometry.log_pseudo_determinant):
        with pytest.raises(NonFiniteError, match="Hessian is not finite"):
            function(first(3))
    with pytest.raises(NotOnManifoldError):
        geometry.retract(first(3))


@pytest.mark.parametrize("declare", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_retraction_ends_at_rounding_and_agrees_to_second_order(case: Case, declare: bool) -> None:
    """Off Phi by c d^2 at the distance d: by e^2 at y + e v, by e^4 at y + e t with t tangent."""
    loss = RandomLoss(case)
    geometry = Geometry(loss.problem(declare=declare))
    y, v = torch.from_numpy(loss.minimizer), normal(case.dim, seed=2)
    v = v / v.norm()
    steps = torch.tensor([[1e-3], [5e-4], [2.5e-4]], dtype=torch.float64)
    tangent = geometry.tangent_projection(y, v)
    points = torch.cat([y + steps * v, y + 64 * steps * tangent])
    retracted, limits = geometry.retract(points), geometry.limit_map(points)
    assert float(geometry.problem.gradient(retracted).norm(dim=1).max()) < 1e-14
    torch.testing.assert_close(retracted.norm(dim=1), points.norm(dim=1), rtol=1e-14, atol=0)
    gaps = (retracted - limits).norm(dim=1)
    orders = (gaps[:-1] / gaps[1:]).log2()
    assert all(abs(float(order) - 2) < 0.1 for order in orders[:2])
    assert all(abs(float(order) - 4) < 0.1 for order in orders[3:])
    assert geometry.retract(points.reshape(2, 3, -1)).shape == (2, 3, case.dim)
    torch.testing.assert_close(geometry.retract(7.0 * points), 7.0 * retracted)


def test_retraction_says_when_it_does_not_arrive() -> None:
    stiff = RandomLoss(STIFF)
    with pytest.raises(NotOnManifoldError, match="declare rank=M"):
        Geometry(stiff.problem(declare=False)).retract(stiff.starts(1, 0.3))
    with pytest.raises(NotOnManifoldError, match="1 of 2 points; point 1"):
        Geometry(problems.varying_circle(0.9)).retract(
            torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.02, 1.5]], dtype=torch.float64)
        )


def test_retraction_of_a_loss_that_is_not_scale_invariant() -> None:
    problem = Problem(lambda x: 0.25 * (x @ x - 4.0) ** 2, 3, NOISE)
    x = torch.tensor([[1.2, 0.0, 1.5], [1.2, 0.1, -1.6]], dtype=torch.float64)
    y = Geometry(problem).retract(x)
    torch.testing.assert_close(y.norm(dim=1), torch.tensor([2.0, 2.0], dtype=torch.float64))


def test_a_point_retracts_the_same_in_any_batch() -> None:
    """Without a declared rank too, where each point's directions are told apart by itself."""
    loss = RandomLoss(CASES[1])
    geometry = Geometry(loss.problem(declare=False))
    x = torch.cat([loss.starts(3, 1e-3), loss.starts(1, 0.02, seed=8)])
    alone = torch.stack([geometry.retract(point) for point in x])
    torch.testing.assert_close(geometry.retract(x), alone, rtol=0, atol=1e-14)


def constant(x: Tensor) -> Tensor:
    """A loss without a minimum to speak of."""
    return 0.0 * x.sum() + 1.0


def flat(x: Tensor) -> Tensor:
    """A minimum whose Hessian is 0, on a circle."""
    return (x[2] / x.norm()) ** 4


@pytest.mark.parametrize("method", ["dense", "matrix_free"])
@pytest.mark.parametrize("loss", [constant, flat])
@pytest.mark.parametrize("rank", [None, 1])
def test_a_hessian_of_rank_zero_is_refused(loss, method: str, rank: int | None) -> None:
    """In it all directions would be along the manifold, whatever the minimisers are."""
    problem = Problem(loss, 3, NOISE, rank=rank)
    geometry = Geometry(problem, method=method)
    y = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    for call in (
        lambda: geometry.rank(y),
        lambda: geometry.tangent_projection(y, y),
        lambda: geometry.second_derivative(y),
        lambda: solve(DirectionDiffusion(problem, geometry=geometry), y, [0.0, 0.1]),
        lambda: predict_sgd(problem, y, 0.01, 0.05, [10]),
    ):
        with pytest.raises(RankError, match="the Hessian is zero"):
            call()
    if method == "dense" and rank is None:
        assert torch.equal(geometry.limit_map(y), y)


def test_rank_zero_is_not_a_rank_to_declare() -> None:
    with pytest.raises(ArgumentError, match=r"an integer in \[1, 2\]"):
        Problem(constant, 3, NOISE, rank=0)
