"""The derivative of Phi off Gamma by products: against the dense route, and differences of Phi.

The dense route is held against SciPy in ``test_limit_map_derivative.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from manifold_sde import Geometry, Problem, SphericalNoise, problems
from manifold_sde.errors import DifferentiationError, LimitMapError
from manifold_sde.geometry import matrix_free_derivative, matrix_free_route
from manifold_sde.networks import NormalizedMLP
from tests.geometry.reference import relative
from tests.geometry.test_matrix_free import CASES, minimizer
from tests.largest_tensor import Largest
from tests.networks.test_cross_entropy import attained

#: What the derivative may be off: the limit itself is within 1e-10.
TOLERANCE = 1e-9


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def off(problem: Problem, size: float = 0.3) -> Tensor:
    """A point off the manifold: at a distance of about size from a minimiser."""
    if problem.network is not None:
        return problem.vector()
    return minimizer(problem) + size * normal(problem.dim, seed=5) / problem.dim**0.5


MADE: dict[str, Callable[[], Problem]] = {
    name: CASES[name] for name in ("section 6.1", "outputs", "not interpolating", "mixed noise")
} | {"classes": functools.partial(attained, "soft")}


#: Those of few flows' steps; the others are thorough.
QUICK = ("not interpolating", "mixed noise")


@functools.cache
def jacobian_by_matrices(name: str) -> Tensor:
    problem = MADE[name]()
    return jacrev(Geometry(problem, "dense").limit_map)(off(problem))


def assert_derivative(found: Tensor, expected: Tensor) -> None:
    assert relative(found, expected) < TOLERANCE


@pytest.mark.paper("Lemma 2.8")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.thorough) for n in MADE],
)
def test_the_derivative_is_that_of_the_dense_route(name: str) -> None:
    problem, expected = MADE[name](), jacobian_by_matrices(name)
    geometry, x = Geometry(problem, "matrix_free"), off(problem)
    v, w = normal(problem.dim, seed=1), normal(problem.dim, seed=2)
    y, forward = jvp(geometry.limit_map, (x,), (v,))
    backward = vjp(geometry.limit_map, x)[1](w)[0]
    assert_derivative(forward, expected @ v)
    assert_derivative(backward, w @ expected)
    apart = float((forward @ w - v @ backward).abs() / (v.norm() * w.norm()))
    assert apart < 1e-11  # the transpose, nearer than either is to the truth
    # The twin: the projection at the end of the flow, which is the derivative on Gamma alone.
    with pytest.raises(AssertionError):
        assert_derivative(geometry.tangent_projection(y, v), expected @ v)
    with pytest.raises(AssertionError):
        assert_derivative(geometry.tangent_projection(y, w), w @ expected)


def test_differences_of_phi() -> None:
    """A network with 1,060 weights, which is matrix-free by itself; with the twins."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(2, 50, dtype=torch.float64, generator=generator)
    targets = torch.eye(4, dtype=torch.float64)[:2]
    module = NormalizedMLP((50, 21, 4), seed=3).double()
    problem = Problem.from_module(module, nn.MSELoss(), inputs, targets, SphericalNoise(0.03))
    geometry, x = Geometry(problem), problem.vector()
    assert geometry.method == "matrix_free"
    v = normal(problem.dim, seed=1) / problem.dim**0.5 * x.norm()
    y, found = jvp(geometry.limit_map, (x,), (v,))
    h = 3e-4
    points = [geometry.limit_map(x + k * h * v) for k in (1, -1, 2, -2)]
    expected = (8 * (points[0] - points[1]) - (points[2] - points[3])) / (12 * h)
    assert relative(found, expected) < 1e-8
    assert relative(geometry.tangent_projection(y, v), expected) > 1e-3


def test_the_derivative_on_the_manifold_is_the_projection() -> None:
    problem = CASES["outputs"]()
    geometry = Geometry(problem, "matrix_free")
    y = geometry.limit_map(off(problem))
    v = normal(problem.dim, seed=1)
    expected = geometry.tangent_projection(y, v)
    torch.testing.assert_close(jvp(geometry.limit_map, (y,), (v,))[1], expected)
    torch.testing.assert_close(vjp(geometry.limit_map, y)[1](v)[0], expected)


def test_every_transform_of_torch_gives_the_same() -> None:
    f = Geometry(problems.varying_circle(0.5), "matrix_free", rtol=1e-2).limit_map
    x, v, w = (normal(2, 3, seed=s) for s in (1, 2, 3))
    x[:, 2] *= 0.01
    jacobian = vmap(jacrev(f))(x)
    forward, backward = (jacobian @ v[..., None])[..., 0], (jacobian.mT @ w[..., None])[..., 0]
    leaf = x.clone().requires_grad_()
    f(leaf).backward(w)
    assert leaf.grad is not None
    found = {
        "jacfwd": (jacfwd(f)(x[0]), jacobian[0]),
        "vmap of jvp": (vmap(lambda a, b: jvp(f, (a,), (b,))[1])(x, v), forward),
        "vmap of cotangents": (vmap(vjp(f, x[0])[1])(w)[0], w @ jacobian[0]),
        "grad of vmap": (grad(lambda z: (vmap(f)(z) * w).sum())(x), backward),
        "backward": (leaf.grad, backward),
    }
    for name, (value, expected) in found.items():
        torch.testing.assert_close(
            value, expected, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: n + m
        )


def test_a_loss_that_is_not_scale_invariant() -> None:
    """L = (|x|^2 - 4)^2 / 4: Phi(x) = 2 x / |x|, whose derivative is known."""
    problem = Problem(lambda x: 0.25 * (x @ x - 4.0) ** 2, 3, SphericalNoise(0.3))
    f = Geometry(problem, "matrix_free").limit_map
    x = torch.tensor([0.9, 0.0, 1.2], dtype=torch.float64)
    u = x / 1.5
    expected = 4.0 / 3.0 * (torch.eye(3, dtype=torch.float64) - torch.outer(u, u))
    torch.testing.assert_close(jacrev(f)(x), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(jacfwd(f)(x), expected, rtol=1e-8, atol=1e-8)


def test_single_precision() -> None:
    problem = CASES["outputs"]()
    x = off(problem).float()
    found = vjp(Geometry(problem, "matrix_free").limit_map, x)[1](torch.ones_like(x))[0]
    assert found.dtype == torch.float32
    assert relative(found.double(), jacobian_by_matrices("outputs").sum(0)) < 1e-3


def test_vectors_in_pieces_and_steps_that_are_not_kept_give_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem, x, v = problems.varying_circle(0.5), normal(3, seed=1), normal(4, 3, seed=3)
    flow, flows = matrix_free_route.flow_to_limit, []
    monkeypatch.setattr(
        matrix_free_route, "flow_to_limit", lambda *a, **k: flows.append(1) or flow(*a, **k)
    )

    def along(memory: str) -> Tensor:
        f = Geometry(problem, "matrix_free", rtol=1e-2, memory=memory).limit_map
        found: Tensor = vmap(vjp(f, x)[1])(v)[0]
        return found

    whole = along("1 GiB")
    assert len(flows) == 1
    torch.testing.assert_close(along("100 B"), whole, rtol=1e-9, atol=1e-9)
    assert len(flows) == 3


def test_nothing_of_the_size_of_a_matrix_is_made() -> None:
    module = NormalizedMLP((40, 15, 4), seed=3).double()
    problem = Problem.from_module(
        module, nn.MSELoss(), normal(1, 40), torch.eye(4)[:1].double(), SphericalNoise(0.03)
    )
    assert problem.dim > 500

    x = problem.vector().requires_grad_()
    y = Geometry(problem, "matrix_free", rtol=1e-4).limit_map(x)
    with Largest() as seen:
        y[0].backward()
    most = 5 * (matrix_free_derivative._MOST + 1) * problem.dim
    assert 0 < seen.most <= most < problem.dim**2
    assert x.grad is not None


def test_second_derivatives_are_refused() -> None:
    f = Geometry(problems.great_circle(), "matrix_free", rtol=1e-2).limit_map
    with pytest.raises(DifferentiationError, match="second_derivative"):
        jacrev(jacrev(f))(normal(3))


def test_points_that_fail_are_refused_in_the_derivative_too() -> None:
    problem = CASES["outputs"]()
    x = torch.stack([minimizer(problem), off(problem)])
    f = Geometry(problem, "matrix_free", max_steps=2).limit_map
    with pytest.raises(LimitMapError, match="not settled") as caught:
        jvp(f, (x,), (x,))
    assert caught.value.failed.tolist() == [False, True]
    assert torch.allclose(caught.value.partial[0], x[0])


def test_an_equation_that_is_not_solved_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = CASES["outputs"]()
    monkeypatch.setattr(matrix_free_derivative, "_MOST", 2)
    with pytest.raises(DifferentiationError, match="closer to Gamma"):
        jvp(Geometry(problem, "matrix_free").limit_map, (off(problem),), (off(problem),))


def test_linear_systems_side_by_side() -> None:
    """Three of them, one of which is zero, and one that is solved at once."""
    matrices = torch.eye(6, dtype=torch.float64) + 0.3 * normal(3, 6, 6)
    right = normal(3, 6, seed=1)
    right[1] = 0.0
    matrices[2] = 2.0 * torch.eye(6)
    found, left, rounds = matrix_free_derivative.gmres(
        lambda v: (matrices @ v[..., None])[..., 0], right, 1e-12, 10
    )
    expected = torch.linalg.solve(matrices, right)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert rounds == 6
    assert bool((left <= 1e-12).all())
