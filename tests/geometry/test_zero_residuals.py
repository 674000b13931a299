"""Least squares with zero residuals: where the route holds, and how it comes back from afar."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_sde import (
    DirectionDiffusion,
    LabelNoise,
    LeastSquaresProblem,
    LimitingDiffusion,
    Problem,
    SphericalNoise,
    problems,
)
from manifold_sde.geometry.dense import DenseSpace
from manifold_sde.geometry.elimination import (
    complement,
    dual_rows,
    project_on_kernel,
    shortest_solution,
)
from manifold_sde.geometry.least_squares import has_zero_residuals
from manifold_sde.geometry.retraction import retract


def bent(noise_scale: float = 0.4, offset: float = 0.0) -> LeastSquaresProblem:
    """Three residuals in R^7 that bend; with an offset they cannot all vanish."""
    matrix = torch.from_numpy(np.random.default_rng(5).standard_normal((3, 7)))

    def residuals(x: Tensor) -> Tensor:
        u = x / x.norm()
        bend = torch.stack([u[0] * u[1], u[2] ** 2 - u[3], torch.sin(u[4]) * u[5]])
        both = matrix.to(x) @ u + bend
        if not offset:
            return both
        return torch.cat([both + offset, both[:1] - offset])

    return LeastSquaresProblem(residuals, 7, SphericalNoise(noise_scale), rank=3)


def on_manifold(problem: Problem, n: int = 5) -> Tensor:
    """Unit vectors (n, D) on the manifold, from random points."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, problem.dim, generator=generator, dtype=torch.float64)
    if problem.facts is not None and problem.facts.limit_map is not None:
        y = problem.facts.limit_map(x)
    else:
        y = torch.stack([_zero(problem, v) for v in x])
    return y / y.norm(dim=1, keepdim=True)


def _zero(problem: Problem, x: Tensor) -> Tensor:
    assert isinstance(problem, LeastSquaresProblem)
    for _ in range(60):
        step = torch.linalg.lstsq(problem.jacobian(x), problem.residuals(x)[:, None]).solution
        x = x - step[:, 0]
        x = x / x.norm()
    return x


@pytest.mark.parametrize("calculus", ["ito", "stratonovich"])
def test_the_retraction_arrives_from_afar_at_the_same_norm(calculus: str) -> None:
    problem = problems.normalized_linear()
    sde = LimitingDiffusion(problem, calculus)
    sde.require_on_manifold(problem.minimizer)
    space = sde.space
    circle = problem.facts.circle
    angles = torch.linspace(0.0, 6.0, 9, dtype=torch.float64)
    y, tangent = circle.point(angles), circle.point(angles + torch.pi / 2) - circle.center
    tangent = tangent / tangent.norm(dim=1, keepdim=True)
    # A radian of the circle: seven standard deviations of a step of 1/32.
    x = 2.0 * (y + circle.radius * tangent).T.contiguous()
    with torch.no_grad():
        landed, basis, arrived = retract(space, x, space.reference_basis(y.T.contiguous()))
    assert bool(arrived.all())
    assert float(problem.residuals(landed.T).norm(dim=1).max()) < 1e-14
    torch.testing.assert_close(landed.norm(dim=0), x.norm(dim=0), rtol=1e-14, atol=0.0)
    if calculus == "ito":
        inner = torch.einsum("idn,imn->dmn", basis, basis)
        torch.testing.assert_close(
            inner, torch.eye(2).double()[..., None].expand_as(inner), rtol=0.0, atol=1e-13
        )
        rows = problem.jacobian(landed.T / 2.0)
        assert float((rows @ basis.movedim(-1, 0)).abs().max()) < 1e-12
    far = x + 3.0 * problem.inputs.sum(0)[:, None]
    with torch.no_grad():
        landed, _, arrived = retract(space, far, basis, 0)
    assert bool(torch.isnan(landed[:, ~arrived]).all())
    assert int(arrived.sum()) < len(arrived)


def test_where_the_residuals_do_not_vanish_the_general_route_is_taken() -> None:
    fitted = bent()
    assert has_zero_residuals(fitted, on_manifold(fitted), 3)
    # A point that is only near the manifold will do.
    assert has_zero_residuals(fitted, on_manifold(fitted) + 1e-5, 3)
    assert not has_zero_residuals(fitted, on_manifold(fitted), 2)
    conflicting = bent(offset=0.05)
    x = on_manifold(fitted)
    assert not has_zero_residuals(conflicting, x, 4)
    scalar = problems.mixed_noise_circle()
    assert not has_zero_residuals(scalar, scalar.minimizer[None], 1)
    labelled = problems.varying_circle(noise=LabelNoise(0.1))
    sde = DirectionDiffusion(labelled)
    sde.require_on_manifold(labelled.minimizer)
    assert isinstance(sde.space, DenseSpace)


@pytest.mark.parametrize("count", [1, 4, 40])
def test_elimination_of_rows_against_lapack(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, 45, generator=generator, dtype=torch.float64)
    side = torch.randn(count, generator=generator, dtype=torch.float64)
    v = torch.randn(45, generator=generator, dtype=torch.float64)
    inverse = torch.linalg.pinv(rows)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(shortest_solution(rows, side), inverse @ side, **close)
    torch.testing.assert_close(project_on_kernel(rows, v), v - inverse @ (rows @ v), **close)
    orthonormal, dual = dual_rows(rows)
    torch.testing.assert_close(dual, inverse.T, **close)
    near = torch.linalg.svd(rows)[2][count:].T + 1e-2
    basis = complement(orthonormal, near)
    torch.testing.assert_close(basis.T @ basis, torch.eye(45 - count).double(), **close)
    assert float((rows @ basis).abs().max()) < 1e-11
