"""The derivative of Phi off Gamma: against SciPy, as transposes, and in every transform of torch.

SciPy integrates the variational equation S' = -H(x(t)) S along the flow, or gives differences of
its own Phi; nothing of the toolkit is in either.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from manifold_sde import Geometry, Problem, SphericalNoise, problems
from manifold_sde.errors import DifferentiationError, LimitMapError
from tests.geometry.reference import Case, RandomLoss, relative

CASES = [
    Case(kind="square", dim=5, rank=1, curvature=2.0, seed=2),
    Case(kind="linex", dim=6, rank=4, curvature=1.5, seed=3),
    Case(kind="weighted", dim=5, rank=3, seed=5),
    Case(kind="square", dim=5, rank=3, condition=1e3, seed=2),
]
TOLERANCE = 1e-8


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def assert_derivative(
    jacobian: Callable[[Tensor], Tensor], loss: RandomLoss, x: Tensor, expected: Tensor
) -> None:
    """The Jacobian agrees with SciPy's to 1e-8 and has the two images that are always known."""
    found = jacobian(x)
    assert relative(found, expected) < TOLERANCE
    assert relative(found @ x, loss.limit_map(x.numpy())) < 1e-10
    slope = loss.problem().gradient(x)
    assert float((found @ slope).norm() / slope.norm()) < TOLERANCE


@pytest.mark.paper("Lemma 2.8", "Lemma 2.7")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_jacobian_agrees_with_the_variational_equation(case: Case) -> None:
    loss = RandomLoss(case)
    x = loss.starts(1, 0.4)[0]
    expected = torch.from_numpy(loss.limit_map_jacobian(x.numpy()))
    mode = jacfwd if case is CASES[1] else jacrev
    assert_derivative(mode(Geometry(loss.problem()).limit_map), loss, x, expected)


def test_directional_derivative_agrees_with_differences_of_scipy() -> None:
    loss = RandomLoss(CASES[1])
    x, v = loss.starts(1, 0.4)[0], normal(6, seed=1)
    point, along = x.numpy(), v.numpy()
    h = 2e-3
    sides = [
        loss.limit_map(point + k * h * along) - loss.limit_map(point - k * h * along)
        for k in (1, 2, 3)
    ]
    expected = (45 * sides[0] - 9 * sides[1] + sides[2]) / (60 * h)
    found = jvp(Geometry(loss.problem()).limit_map, (x,), (v,))[1]
    assert relative(found, expected) < TOLERANCE


def test_broken_twins_projections_are_not_the_derivative_off_the_manifold() -> None:
    """P at Phi(x), and the derivative of Newton's retraction by differences."""
    loss = RandomLoss(CASES[1])
    geometry = Geometry(loss.problem())
    x = loss.starts(1, 0.05)[0]
    expected = torch.from_numpy(loss.limit_map_jacobian(x.numpy()))
    identity = torch.eye(6, dtype=torch.float64)

    def projection(z: Tensor) -> Tensor:
        return geometry.tangent_projection(geometry.limit_map(z), identity)

    def newton(z: Tensor) -> Tensor:
        return (
            (geometry.retract(z + 1e-6 * identity) - geometry.retract(z - 1e-6 * identity)).T
        ) / (2e-6)

    assert_derivative(jacrev(geometry.limit_map), loss, x, expected)
    for twin in (projection, newton):
        with pytest.raises(AssertionError):
            assert_derivative(twin, loss, x, expected)


@pytest.mark.parametrize("case", CASES[1:3], ids=str)
def test_forward_and_reverse_mode_are_transposes(case: Case) -> None:
    loss = RandomLoss(case)
    limit_map = Geometry(loss.problem(), rtol=1e-4).limit_map
    x = loss.starts(3, 0.4)
    v, w = normal(3, case.dim, seed=1), normal(3, case.dim, seed=2)
    forward = jvp(limit_map, (x,), (v,))[1]
    backward = vjp(limit_map, x)[1](w)[0]
    torch.testing.assert_close((forward * w).sum(-1), (v * backward).sum(-1), rtol=0, atol=1e-12)


@pytest.mark.paper("Lemma 2.8")
def test_derivative_on_the_manifold_is_the_projection() -> None:
    loss = RandomLoss(CASES[2])
    geometry = Geometry(loss.problem())
    y = geometry.limit_map(1.3 * loss.starts(3))
    v = normal(3, 5)
    expected = geometry.tangent_projection(y, v)
    forward, backward = jvp(geometry.limit_map, (y,), (v,))[1], vjp(geometry.limit_map, y)[1](v)[0]
    torch.testing.assert_close(forward, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(backward, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(jvp(geometry.limit_map, (y,), (y,))[1], y, rtol=1e-14, atol=1e-14)


def test_every_transform_of_torch_gives_the_same() -> None:
    f = Geometry(problems.varying_circle(0.5), rtol=1e-2).limit_map  # few steps
    x, v, w = (normal(2, 3, seed=s) for s in (1, 2, 3))
    x[:, 2] *= 0.01
    jacobian = torch.stack([jacrev(f)(point) for point in x])
    forward = (jacobian @ v[..., None])[..., 0]
    backward = (jacobian.mT @ w[..., None])[..., 0]
    leaf = x.clone().requires_grad_()
    f(leaf).backward(w)
    assert leaf.grad is not None
    single = x[0].clone().requires_grad_()
    f(single).backward(w[0])
    assert single.grad is not None
    found = {
        "jacfwd": (torch.stack([jacfwd(f)(point) for point in x]), jacobian),
        "vmap of jacrev": (vmap(jacrev(f))(x), jacobian),
        "vmap of jacfwd": (vmap(jacfwd(f))(x), jacobian),
        "jacobian of a batch": (jacrev(lambda z: f(z).sum(0))(x).transpose(0, 1), jacobian),
        "jvp": (jvp(f, (x,), (v,))[1], forward),
        "jvp at one point": (jvp(f, (x[0],), (v[0],))[1], forward[0]),
        "vmap of jvp": (vmap(lambda a, b: jvp(f, (a,), (b,))[1])(x, v), forward),
        "vmap of tangents": (vmap(lambda b: jvp(f, (x[0],), (b,))[1])(v), v @ jacobian[0].T),
        "vjp": (vjp(f, x)[1](w)[0], backward),
        "vmap of cotangents": (vmap(vjp(f, x[0])[1])(w)[0], w @ jacobian[0]),
        "grad": (grad(lambda z: (f(z) * w).sum())(x), backward),
        "grad of vmap": (grad(lambda z: (vmap(f)(z) * w).sum())(x), backward),
        "grad at one point": (grad(lambda z: f(z) @ w[0])(x[0]), backward[0]),
        "backward": (leaf.grad, backward),
        "backward at one point": (single.grad, backward[0]),
        "autograd.functional": (torch.autograd.functional.jacobian(f, x[0]), jacobian[0]),
        "vmap": (vmap(f)(x), f(x)),
        "vmap over columns": (vmap(f, in_dims=1, out_dims=1)(x.T), f(x).T),
        "vmap of vmap": (vmap(vmap(f))(x[None]), f(x)[None]),
    }
    for name, (value, expected) in found.items():
        torch.testing.assert_close(
            value, expected, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: n + m
        )


def test_limit_map_differentiates_inside_a_function() -> None:
    """A chain rule through Phi: the gradient of |Phi(A z) - b|^2."""
    f = Geometry(problems.great_circle()).limit_map
    matrix, target, z = normal(3, 3, seed=4), normal(3, seed=5), normal(3, seed=6)

    def closed(point: Tensor) -> Tensor:
        x = matrix @ point
        flat = x * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
        return (flat * x.norm() / flat.norm() - target).square().sum()

    found = grad(lambda point: (f(matrix @ point) - target).square().sum())(z)
    torch.testing.assert_close(found, grad(closed)(z), rtol=1e-9, atol=1e-9)


def test_single_precision() -> None:
    loss = RandomLoss(CASES[2])
    limit_map = Geometry(loss.problem()).limit_map
    x = loss.starts(2, 0.3)
    found = vmap(jacrev(limit_map))(x.float())
    assert found.dtype == torch.float32
    assert relative(found.double(), vmap(jacrev(limit_map))(x)) < 2e-4


def test_a_loss_that_is_not_scale_invariant() -> None:
    """L = (|x|^2 - 4)^2 / 4: Phi(x) = 2 x / |x|, whose derivative is known."""
    f = Geometry(Problem(lambda x: 0.25 * (x @ x - 4.0) ** 2, 3, SphericalNoise(0.3))).limit_map
    x = torch.tensor([0.3, 0.0, 0.4], dtype=torch.float64)
    u = x / 0.5
    expected = 4.0 * (torch.eye(3, dtype=torch.float64) - torch.outer(u, u))
    torch.testing.assert_close(jacrev(f)(x), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(jacfwd(f)(x), expected, rtol=1e-8, atol=1e-8)


def test_second_derivatives_by_autograd_are_refused() -> None:
    f = Geometry(problems.great_circle(), rtol=1e-2).limit_map
    x = normal(3)
    for attempt in (
        lambda: hessian(lambda z: f(z)[0])(x),
        lambda: jacrev(jacrev(f))(x),
        lambda: jvp(lambda z: jvp(f, (z,), (x,))[1], (x,), (x,)),
    ):
        with pytest.raises(DifferentiationError, match="second_derivative"):
            attempt()


def test_points_that_fail_are_refused_in_the_derivative_too() -> None:
    f = Geometry(problems.great_circle()).limit_map
    pole = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    with pytest.raises(LimitMapError, match="saddle"):
        jacrev(f)(pole)
    with pytest.raises(LimitMapError, match="saddle"):
        jvp(f, (pole,), (pole,))


def test_derivative_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = RandomLoss(CASES[2])
    f = Geometry(loss.problem(), rtol=1e-3).limit_map
    x, v = loss.starts(5), normal(5, 5)
    expected = jvp(f, (x,), (v,))[1]
    monkeypatch.setattr("manifold_sde.geometry.gradient_flow._MATRIX_ENTRIES", 1300)
    torch.testing.assert_close(jvp(f, (x,), (v,))[1], expected, rtol=1e-13, atol=1e-13)


def test_reference_jacobian_agrees_with_differences() -> None:
    """The variational equation of the reference against differences of its Phi."""
    loss = RandomLoss(CASES[0])
    x = loss.starts(1, 0.4)[0].numpy()
    h, basis = 1e-3, np.eye(5)
    columns = [
        (
            8 * (loss.limit_map(x + h * e) - loss.limit_map(x - h * e))
            - (loss.limit_map(x + 2 * h * e) - loss.limit_map(x - 2 * h * e))
        )
        / (12 * h)
        for e in basis
    ]
    assert relative(np.transpose(columns)[None], loss.limit_map_jacobian(x)[None]) < 1e-8
