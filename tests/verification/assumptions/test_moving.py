"""What the checks are made of, against closed forms and differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from manifold_sde import LeastSquaresProblem, Problem, SamplingNoise, SphericalNoise, problems
from manifold_sde.geometry.tangent_noise import tangent_noise
from manifold_sde.verification import Subject
from manifold_sde.verification.assumptions.connected import separation
from manifold_sde.verification.assumptions.controllability import smallest_noise
from manifold_sde.verification.assumptions.minimisers import curvature
from manifold_sde.verification.assumptions.paths import join, trace_curve
from manifold_sde.verification.assumptions.search import Valued, descend
from manifold_sde.verification.assumptions.smoothness import find_jumps, line_derivatives
from manifold_sde.verification.sampling import along_manifold


def bent_surface() -> Problem:
    """A 2-dimensional Gamma_1 in R^5 of varying curvature, and sampling noise of four tilts."""

    def samples(x: Tensor) -> Tensor:
        u = x / x.norm()
        across = torch.stack(
            [u[3] - 0.3 * u[0] ** 2, (1.0 + 0.4 * u[1]) * (u[4] - 0.5 * u[1] * u[0])]
        )
        tilts = 0.3 * torch.stack([u[0] + 0.3 * u[3], u[1] - u[4] * u[2], 0.7 * u[2], u[0] * u[3]])
        return 0.5 * (across**2).sum() + torch.cat([tilts, -tilts])

    return Problem(samples, 5, SamplingNoise())


@pytest.mark.parametrize("what", ["smallest", "largest", "noise"])
def test_gradients_along_the_manifold_are_those_of_differences(what: str) -> None:
    problem = bent_surface()
    subject = Subject.of(problem)
    y = subject.limits(torch.eye(5, dtype=torch.float64)[:3] + 0.2)
    y = y / y.norm(dim=1, keepdim=True)
    functions: dict[str, Valued] = {
        "smallest": curvature(subject, 2),
        "largest": curvature(subject, 2, largest=True),
        "noise": smallest_noise(problem, 2, (range(5),)),
    }
    function = functions[what]
    direction = along_manifold(subject.geometry, y, subject.normals(99, 3, 5))
    slope = (function(y)[1] * direction).sum(1)
    h = 1e-4
    ahead, behind = (subject.geometry.retract(y + s * h * direction) for s in (1, -1))
    ahead, behind = (p / p.norm(dim=1, keepdim=True) for p in (ahead, behind))
    difference = (function(ahead)[0] - function(behind)[0]) / (2 * h)
    assert float(slope.abs().min()) > 1e-3
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=1e-7)


def test_the_search_finds_the_flattest_point_and_a_zero() -> None:
    """Eigenvalues (1 + a cos)^2 of varying circles: the minimum (1 - a)^2, and 0 at a = 1."""
    subject = Subject.of(problems.varying_circle(0.5))
    start = subject.problem.facts.circle.point(torch.tensor([1.0], dtype=torch.float64))

    def all_of_them(y: Tensor) -> Tensor:
        return torch.ones(len(y), dtype=torch.bool)

    where, value = descend(subject, curvature(subject, 1), start, 40, all_of_them)
    assert float(value) == pytest.approx(0.25, rel=1e-3)
    assert float(where[0, 0]) == pytest.approx(-1.0, abs=1e-3)
    flat = LeastSquaresProblem(
        lambda x: ((1.0 + x[0] / x.norm()) * x[2] / x.norm())[None], 3, SphericalNoise(0.3)
    )
    _, value = descend(Subject.of(flat), curvature(Subject.of(flat), 1), start, 24, all_of_them)
    assert float(value) < 1e-8


def test_a_closed_curve_has_its_length() -> None:
    subject = Subject.of(problems.mixed_noise_circle(height=0.6))
    trace = trace_curve(subject, subject.start)
    assert trace.closed
    # Chords of at most 0.1 on a radius of 0.8 are shorter than their arcs by 7e-4.
    assert trace.length == pytest.approx(2 * math.pi * 0.8, rel=1e-3)
    assert trace.spacing <= 0.1 + 1e-9
    torch.testing.assert_close(
        trace.points[:, 2], torch.full((len(trace.points),), 0.6, dtype=torch.float64)
    )


def test_walks_arrive_on_their_component_and_on_no_other() -> None:
    """Of the two circles at the heights 0 and 0.7."""
    problem = LeastSquaresProblem(
        lambda x: (x[2] / x.norm() * (x[2] / x.norm() - 0.7))[None], 3, SphericalNoise(0.3)
    )
    angles = torch.tensor([0.0, 2.0, 3.1], dtype=torch.float64)
    heights = torch.tensor([0.0, 0.7], dtype=torch.float64)

    def points(height: Tensor) -> Tensor:
        r = (1.0 - height**2).sqrt()
        return torch.stack([r * angles.cos(), r * angles.sin(), height.expand(3)], dim=1)

    low, high = points(heights[0]), points(heights[1])
    subject = Subject.of(problem)
    for circle in (low, high):
        arrived, ends = join(subject, circle[:1].expand(3, 3), circle)
        assert bool(arrived.all())
        torch.testing.assert_close(ends, circle, rtol=0, atol=1e-6)
    arrived, ends = join(subject, low, high)
    assert not bool(arrived.any())
    torch.testing.assert_close(ends, low, rtol=0, atol=1e-6)


def test_derivatives_along_a_line() -> None:
    """The loss sin^2 of an angle, along a circle's tangent: t^2 / (1 + t^2) at (1, 0, t)."""
    problem = problems.great_circle()
    x = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    v = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    expected = torch.tensor([[0.0, 1.0, 0.0, -12.0]], dtype=torch.float64)
    torch.testing.assert_close(line_derivatives(problem, x, v), expected)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_jump_is_found_in_its_order(order: int) -> None:
    """|s|^k, with a sign where k is even, has the first jump in its derivative of order k."""

    def function(x: Tensor) -> Tensor:
        s = x[1] / x.norm()
        power: Tensor = s.abs() ** order if order % 2 else s.abs() * s ** (order - 1)
        return power + (x[0] / x.norm()) ** 2

    # At the kink itself torch takes 0 for the sign; the derivatives there are not looked at.
    x = torch.tensor([[1.0, 0.02, 0.5], [0.3, 0.9, 0.1]], dtype=torch.float64)
    v = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    jumps, places = find_jumps(Problem(function, 3, SphericalNoise(0.3)), x, v)
    assert not bool((jumps[1] > 0).any())
    assert not bool((jumps[0, : order - 1] > 0).any())
    assert float(jumps[0, order - 1]) > 0
    assert abs(float(places[0, order - 1, 1])) < 1e-4


def test_separations() -> None:
    """Two rows of points at a distance of 1, with links of 0.25."""
    row = torch.arange(8, dtype=torch.float64)[:, None] * torch.tensor([[0.25, 0.0]])
    points = torch.cat([row, row + torch.tensor([0.1, 1.0])])
    gap, link = separation(points, torch.arange(16).numpy() // 8)
    assert gap == pytest.approx(math.hypot(0.1, 1.0))
    assert link == pytest.approx(0.25)


def test_tangent_noise_in_pieces_and_with_few_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.great_sphere(4)
    y = torch.eye(4, dtype=torch.float64)[:3]
    values, t, w = tangent_noise(problem, y, 1, (range(4),))
    torch.testing.assert_close(values, torch.full((3, 2), 0.3, dtype=torch.float64))
    moved = (problem.noise_factor(y) @ w[..., None])[..., 0]
    torch.testing.assert_close((t * moved).sum(1), values[:, -1])
    monkeypatch.setattr("manifold_sde.geometry.tangent_noise._ENTRIES", 1)
    torch.testing.assert_close(tangent_noise(problem, y, 1, (range(4),))[0], values)

    def samples(x: Tensor) -> Tensor:
        u = x / x.norm()
        return 0.5 * u[3] ** 2 + torch.stack([u[0], -u[0]])

    few = Problem(samples, 4, SamplingNoise())
    values = tangent_noise(few, y[1:2], 1, (range(4),))[0]
    torch.testing.assert_close(values, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
