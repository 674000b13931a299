"""Flows by products where the rank is not known, from starts where the loss is not convex.

The truth is the dense route, of another method and code, or where the loss ends. Each case has the
fault that it found as its twin.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from manifold_sde import Geometry, Problem, SphericalNoise, errors
from manifold_sde.geometry import matrix_free_flow, matrix_free_route
from manifold_sde.geometry.gradient_flow import precision

DIM, RANK = 30, 10
GENERATOR = torch.Generator().manual_seed(0)
A = torch.randn(RANK, DIM, dtype=torch.float64, generator=GENERATOR)
ASIDE = torch.randn(DIM, dtype=torch.float64, generator=GENERATOR)
ASIDE = ASIDE / ASIDE.norm()
TOP = torch.linalg.svd(A)[2][0]
FIRST = torch.eye(DIM, dtype=torch.float64)[0]
STIFFNESS = torch.logspace(0, -5, RANK, dtype=torch.float64)


def of(function: Callable[[Tensor], Tensor]) -> Problem:
    def loss(x: Tensor) -> Tensor:
        return function(x / (x * x).sum().sqrt())

    return Problem(loss, DIM, SphericalNoise(0.1))


def limits(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    dense, free = (Geometry(problem, method).limit_map(x) for method in ("dense", "matrix_free"))
    return dense, free


@pytest.mark.parametrize("distance", [0.3, 1e-3])
def test_starts_next_to_a_maximum(distance: float) -> None:
    """No positive eigenvalue stands out there: steps of no time scale at all were collapsed."""
    problem = of(lambda y: 0.5 * y[:3].square().sum())
    dense, free = limits(problem, FIRST + distance * ASIDE)
    torch.testing.assert_close(dense, free, rtol=0, atol=1e-9)
    assert float(problem.loss(free)) < 1e-20


def test_directions_of_small_curvature_come_to_rest_too(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = of(lambda y: (STIFFNESS * (1.0 - torch.cos(2.0 * (A @ y)))).sum())
    dense, free = limits(problem, ASIDE)
    torch.testing.assert_close(dense, free, rtol=0, atol=1e-9)
    assert int(Geometry(problem, "matrix_free").rank(free)) == RANK
    rest_too_soon(monkeypatch)
    with pytest.raises(errors.LimitMapError, match="not on the manifold"):
        Geometry(problem, "matrix_free").limit_map(ASIDE)


def rest_too_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    small = precision(torch.float64)
    lax = type(small)(**{**vars(small), "creeping": 100.0 * small.creeping})
    monkeypatch.setattr(matrix_free_flow, "precision", lambda _: lax)


WELLS = A / A.norm(dim=1, keepdim=True)


def wells(y: Tensor) -> Tensor:
    return (1.0 - torch.exp(-30.0 * (WELLS @ y).square())).sum()


@pytest.mark.thorough
def test_a_flow_over_a_plateau_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for a minimum of another rank, without an error."""
    problem, x = of(wells), TOP + 0.03 * start(0)
    dense, free = limits(problem, x)
    torch.testing.assert_close(dense, free, rtol=0, atol=1e-9)
    assert float(problem.loss(free)) < 1e-20
    rest_too_soon(monkeypatch)
    twin = Geometry(problem, "matrix_free")
    monkeypatch.setattr(matrix_free_route, "precision", lambda _: NO_LIMIT)
    assert float(problem.loss(twin.limit_map(x))) > 0.9


class NO_LIMIT:
    kernel = 1.0


def start(seed: int) -> Tensor:
    x = torch.randn(DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x / x.norm()


def test_the_end_on_a_plateau_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, x = of(wells), TOP + 1e-3 * start(0)
    for method, what in (("dense", "degenerate"), ("matrix_free", "degenerate, or the flow ended")):
        with pytest.raises(errors.LimitMapError, match=what):
            Geometry(problem, method).limit_map(x)
    monkeypatch.setattr(matrix_free_route, "precision", lambda _: NO_LIMIT)
    assert float(problem.loss(Geometry(problem, "matrix_free").limit_map(x))) > 0.9


def test_a_minimum_that_is_one_ray_has_all_but_one_direction() -> None:
    """Its rank is D - 1, where Lanczos cannot go: no gap was seen."""
    problem = of(lambda y: (1.0 - torch.cos(3.0 * (A @ y))).sum())
    dense, free = limits(problem, TOP + 0.3 * start(0))
    torch.testing.assert_close(dense, free, rtol=0, atol=1e-9)
    assert int(Geometry(problem, "matrix_free").rank(free)) == DIM - 1
    known = Problem(problem.pointwise, DIM, SphericalNoise(0.1), rank=DIM - 1)
    assert int(Geometry(known, "matrix_free").rank(free)) == DIM - 1
