"""Phi against SciPy's stiff solvers, and the properties that Definition 2.6 and Lemma 2.7 state.

Problems in closed form serve where one is known. What is not Phi, the nearest point and Newton's
retraction, is held to the same assertion and has to fail it.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from manifold_sde import Geometry, LeastSquaresProblem, Problem, SphericalNoise, problems
from tests.geometry.reference import Case, RandomLoss, relative

CASES = [
    Case(kind="square", dim=6, rank=3, seed=1),
    Case(kind="square", dim=5, rank=1, curvature=3.0, seed=2),
    Case(kind="linex", dim=6, rank=4, curvature=2.0, seed=3),
    Case(kind="cauchy", dim=10, rank=8, seed=1),
    Case(kind="weighted", dim=6, rank=3, seed=5),
    Case(kind="square", dim=10, rank=8, condition=1e4, seed=2),
    Case(kind="linex", dim=10, rank=5, condition=1e3, seed=1),
]
TOLERANCE = 1e-8


def assert_is_limit_map(candidate: Callable[[Tensor], Tensor], loss: RandomLoss, x: Tensor) -> None:
    """The candidate agrees with SciPy's gradient flow to 1e-8 of the norm."""
    expected = np.stack([loss.limit_map(point) for point in x.numpy()])
    assert relative(candidate(x), expected) < TOLERANCE


@pytest.mark.paper("Definition 2.6")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_limit_map_agrees_with_lsoda(case: Case) -> None:
    loss = RandomLoss(case)
    assert_is_limit_map(Geometry(loss.problem()).limit_map, loss, loss.starts(3, 0.5))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Random losses: every kind, dimension and rank from 1 to D - 2."""
    dim = draw(st.integers(3, 7))
    return Case(
        dim=dim,
        rank=draw(st.integers(1, dim - 2)),
        kind=draw(st.sampled_from(["square", "linex", "cauchy", "weighted"])),
        curvature=draw(st.floats(0.0, 2.0)),
        seed=draw(st.integers(0, 2**16)),
    )


@given(case=cases())
@settings(max_examples=6)
def test_limit_map_agrees_with_lsoda_on_random_losses(case: Case) -> None:
    loss = RandomLoss(case)
    x = loss.starts(2, 0.2)
    ends = [loss.limit_map(point) for point in x.numpy()]
    assume(max(float(np.abs(loss.residuals(end)).max()) for end in ends) < 1e-9)  # inside U
    assert relative(Geometry(loss.problem()).limit_map(x), np.stack(ends)) < TOLERANCE


@pytest.mark.parametrize("method", ["Radau", "BDF"])
def test_limit_map_agrees_with_other_stiff_solvers(method: str) -> None:
    loss = RandomLoss(CASES[0])
    x = loss.starts(1, 0.5)
    expected = loss.limit_map(x[0].numpy(), method, rtol=1e-12)
    assert relative(Geometry(loss.problem()).limit_map(x), expected[None]) < TOLERANCE


def test_limit_map_without_a_declared_rank() -> None:
    loss = RandomLoss(CASES[5])
    x = loss.starts(2)
    undeclared = Geometry(loss.problem(declare=False)).limit_map(x)
    torch.testing.assert_close(undeclared, Geometry(loss.problem()).limit_map(x))


@pytest.mark.parametrize("rtol", [1e-5, 1e-12])
def test_limit_map_keeps_what_rtol_promises(rtol: float) -> None:
    loss = RandomLoss(CASES[2])
    x = loss.starts(3, 0.5)
    expected = np.stack([loss.limit_map(point) for point in x.numpy()])
    found = Geometry(loss.problem(), rtol=rtol).limit_map(x)
    assert relative(found, expected) < max(rtol, 1e-11)


@pytest.mark.paper("Definition 2.6")
def test_broken_twins_nearest_point_and_newton_are_not_the_limit_map() -> None:
    loss = RandomLoss(CASES[0])
    x = loss.starts(2, 0.1)
    geometry = Geometry(loss.problem())

    def nearest(z: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([loss.nearest(point) for point in z.numpy()]))

    assert_is_limit_map(geometry.limit_map, loss, x)
    for twin in (geometry.retract, nearest):
        with pytest.raises(AssertionError):
            assert_is_limit_map(twin, loss, x)


def test_nearest_point_differs_at_second_order_where_normal_noise_matters() -> None:
    """Along Gamma, Phi(y + e n) is off the nearest point y by -e^2 w'/(2 w), w = 1 + a cos theta.

    It is half the third term of the second derivative, -P T[L^{-1}(n n^T)]; where the curvature is
    constant it is 0. Newton's retraction is off by another multiple of e^2.
    """
    normal = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    y = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    along = torch.tensor([-0.8, 0.6, 0.0], dtype=torch.float64)
    steps = torch.tensor([[0.02], [0.01], [0.005]], dtype=torch.float64)
    x = y + steps * normal
    varying, constant = Geometry(problems.varying_circle(0.5)), Geometry(problems.great_circle())
    expected = 0.5 * 0.5 * 0.8 / (1 + 0.5 * 0.6)
    gaps = (varying.limit_map(x) @ along) / steps[:, 0] ** 2
    torch.testing.assert_close(gaps, torch.full_like(gaps, expected), rtol=1e-3, atol=0)
    gaps = (varying.retract(x) @ along) / steps[:, 0] ** 2
    assert float((gaps - expected).abs().min()) > 0.1
    torch.testing.assert_close(constant.limit_map(x) @ along, 0 * gaps, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "problem",
    [problems.great_circle(), problems.great_sphere(5), problems.normalized_linear(seed=3)],
    ids=str,
)
def test_limit_map_agrees_with_closed_forms(problem: Problem) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(5, problem.dim, dtype=torch.float64, generator=generator)
    x = 3.0 * problem.minimizer + noise
    expected = problem.facts.limit_map(x)
    assert relative(Geometry(problem).limit_map(x), expected) < 1e-9


@pytest.mark.paper("Lemma 2.7")
@given(
    scale=st.floats(1e-6, 1e6),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=5)
def test_limit_map_is_homogeneous_and_keeps_the_norm(scale: float, seed: int) -> None:
    loss = RandomLoss(Case(dim=5, rank=2, seed=seed % 4, kind="linex"))
    geometry = Geometry(loss.problem())
    x = loss.starts(2, 0.2, seed)
    y = geometry.limit_map(torch.cat([x, scale * x]))
    torch.testing.assert_close(y[2:] / scale, y[:2], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y[:2].norm(dim=1), x.norm(dim=1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_limit_map_at_norms_whose_squares_are_out_of_range(scale: float) -> None:
    geometry = Geometry(problems.great_circle())
    x = torch.tensor([3.0, 4.0, 12.0], dtype=torch.float64)
    expected = torch.tensor([7.8, 10.4, 0.0], dtype=torch.float64)
    torch.testing.assert_close(geometry.limit_map(scale * x) / scale, expected)


@pytest.mark.paper("Lemma 2.7")
def test_limit_map_is_a_projection_constant_along_the_flow() -> None:
    """Phi(Phi(x)) = Phi(x), and every point of a trajectory of the flow has the same limit."""
    loss = RandomLoss(CASES[4])
    geometry = Geometry(loss.problem())
    x = loss.starts(1, 0.5)[0]
    path = [x]
    for _ in range(3):
        z = path[-1]
        for _ in range(400):  # Runge-Kutta steps of gradient flow
            k1 = loss.force(z.numpy())
            k2 = loss.force(z.numpy() + 0.0025 * k1)
            k3 = loss.force(z.numpy() + 0.0025 * k2)
            k4 = loss.force(z.numpy() + 0.005 * k3)
            z = z + torch.from_numpy(0.005 * (k1 + 2 * k2 + 2 * k3 + k4) / 6)
        path.append(z)
    limits = geometry.limit_map(torch.stack(path))
    assert relative(limits, limits[:1].expand(4, -1)) < 1e-8
    assert relative(geometry.limit_map(limits), limits) < 1e-13
    assert float(loss.problem().gradient(limits).norm(dim=1).max()) < 1e-14


def test_shapes_batches_and_points_on_the_manifold() -> None:
    loss = RandomLoss(CASES[0])
    geometry = Geometry(loss.problem())
    x = loss.starts(6).reshape(2, 3, 6)
    y = geometry.limit_map(x)
    assert y.shape == x.shape
    assert geometry.limit_map(x[0, 0]).shape == (6,)
    assert geometry.limit_map(x[:0]).shape == (0, 3, 6)
    assert geometry.limit_map(x[0, 0].expand(4, 6)).shape == (4, 6)
    torch.testing.assert_close(geometry.limit_map(y), y, rtol=1e-14, atol=1e-14)


def test_a_point_does_not_depend_on_its_batch() -> None:
    """The same to rounding alone, among points near and far, and beside one that is stiff."""
    loss = RandomLoss(Case(kind="cauchy", dim=6, rank=3, seed=4))
    geometry = Geometry(loss.problem())
    x = torch.cat([loss.starts(2, 1e-4), loss.starts(2, 0.2), loss.starts(2, 0.6, seed=9)])
    together = geometry.limit_map(x)
    alone = torch.stack([geometry.limit_map(point) for point in x])
    torch.testing.assert_close(together, alone, rtol=1e-13, atol=1e-13)


def test_points_of_different_rank_do_not_disturb_each_other() -> None:
    """L has a minimum of rank 1 and one of rank 2; without a declared rank both are limits."""

    def loss(x: Tensor) -> Tensor:
        u = x / x.norm()
        return u[2] ** 2 * (u[2] ** 2 - 0.5) ** 2 + torch.relu(u[2] - 0.4) ** 4 * u[3] ** 2

    x = torch.tensor([[1.0, 0.2, 0.1, 0.3], [0.5, 0.2, 1.5, 0.05]], dtype=torch.float64)
    y = Geometry(Problem(loss, 4, SphericalNoise(0.3))).limit_map(x)
    assert abs(float(y[0, 2])) < 1e-12
    assert abs(float(y[1, 3])) < 1e-12


def test_single_precision() -> None:
    loss = RandomLoss(CASES[0])
    geometry = Geometry(loss.problem())
    x = loss.starts(4)
    y = geometry.limit_map(x.float())
    assert y.dtype == torch.float32
    assert relative(y.double(), geometry.limit_map(x)) < 1e-5


def test_a_loss_that_is_not_scale_invariant() -> None:
    """The flow is followed as it is: the norm is not kept."""
    problem = Problem(lambda x: 0.25 * (x @ x - 4.0) ** 2, 3, SphericalNoise(0.3))
    x = torch.tensor([[0.3, 0.0, 0.4], [3.0, 0.0, -4.0]], dtype=torch.float64)
    expected = torch.tensor([[1.2, 0.0, 1.6], [1.2, 0.0, -1.6]], dtype=torch.float64)
    torch.testing.assert_close(Geometry(problem).limit_map(x), expected)


def test_a_constant_loss_stays_where_it_is() -> None:
    problem = Problem(lambda x: 0.0 * x[0], 3, SphericalNoise(0.3))
    x = torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(Geometry(problem).limit_map(x), x)


def test_meta_tensors_give_shapes() -> None:
    geometry = Geometry(problems.great_circle())
    x = torch.empty(4, 2, 3, dtype=torch.float64, device="meta")
    assert geometry.limit_map(x).shape == (4, 2, 3)
    assert geometry.retract(x).device.type == "meta"
    assert geometry.tangent_projection(x, x[:1]).shape == (4, 2, 3)
    sigma = torch.empty(3, 3, dtype=torch.float64, device="meta")
    assert geometry.second_derivative(x, sigma).shape == (4, 2, 3)


def test_steps_are_few() -> None:
    """At the default accuracy: the cost that the documentation states, with room to spare."""
    calls = {"gradient": 0}
    loss = RandomLoss(CASES[0])

    def counted(x: Tensor) -> Tensor:
        calls["gradient"] += 1
        return loss.torch_residuals(x)

    problem = LeastSquaresProblem(counted, 6, SphericalNoise(0.3), rank=3)
    calls["gradient"] = 0
    Geometry(problem).limit_map(loss.starts(16, 0.5))
    assert calls["gradient"] < 300


def at_threads(function: Callable[[], Tensor], threads: int) -> Tensor:
    """What a function gives with this many threads of torch."""
    torch.set_num_threads(threads)
    try:
        return function()
    finally:
        torch.set_num_threads(1)


@pytest.fixture(scope="module")
def large() -> tuple[Geometry, Tensor]:
    """A problem of 200 dimensions, whose matrices torch cuts for several threads."""
    problem = problems.normalized_linear(dim=200, n_samples=150, seed=3)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, dtype=torch.float64, generator=generator)
    return Geometry(problem), problem.minimizer + 0.01 * noise


def test_the_limit_does_not_depend_on_the_number_of_threads(large) -> None:
    geometry, x = large
    one, two = (at_threads(lambda: geometry.limit_map(x), k) for k in (1, 2))
    assert torch.equal(one, two)


@pytest.mark.thorough
def test_broken_twin_as_many_threads_as_there_are(large) -> None:
    geometry, x = large
    one, two = (at_threads(lambda: geometry._route.limit_map(x[None]), k) for k in (1, 2))
    assert not torch.equal(one, two)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
