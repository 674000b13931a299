"""Curves traced numerically, the reversible law, and which exact law applies."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from manifold_sde import CustomNoise, Geometry, Problem, SphericalNoise, problems
from manifold_sde.errors import ArgumentError, DTypeError, NotOnManifoldError
from manifold_sde.geometry import minimizers
from manifold_sde.geometry.minimizers import find_minimizer
from manifold_sde.verification import exact
from manifold_sde.verification.exact import applicable, gaps
from tests.verification.ergodic import circle_with_varying_trace


def unknown(problem: Problem) -> Problem:
    """The same problem, that knows a minimiser and nothing else."""
    made = problem.with_noise(problem.noise)
    made.facts = replace(problem.facts, circle=None, limit_map=None, log_pseudo_determinant=None)
    return made


@pytest.fixture(scope="module")
def traced() -> exact.TracedCurve:
    problem = problems.mixed_noise_circle()
    x = problem.minimizer + torch.tensor([0.0, 1e-6, 2e-6], dtype=torch.float64)
    return exact.TracedCurve.of(problem, 3.0 * x)


def test_the_traced_curve_is_the_circle(traced: exact.TracedCurve) -> None:
    circle = problems.mixed_noise_circle().facts.circle
    assert traced.length == pytest.approx(2 * math.pi * 0.8, abs=1e-8)
    angles = torch.linspace(-3.1, 3.1, 50, dtype=torch.float64)
    points = traced.point(angles)
    assert float((circle.point(circle.angle(points)) - points).abs().max()) < 1e-10
    turned = circle.angle(points) - angles
    turned = torch.remainder(turned - turned[0] + math.pi, 2 * math.pi) - math.pi
    assert float(turned.abs().max()) < 1e-7  # by arc length, in the same direction
    away = points + 1e-3 * torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    assert float((traced.angle(5.0 * away) - angles).abs().max()) < 1e-8
    assert traced.point(angles.reshape(2, 25)).shape == (2, 25, 3)
    whole = torch.tensor([1, 2])
    assert torch.equal(traced.point(whole), traced.point(whole.double()))
    assert traced.point(whole).to(whole.dtype).double().norm(dim=1).max() < 0.5  # cut to integers


@pytest.mark.thorough
def test_a_curve_that_is_no_circle() -> None:
    """u_3 = 0.3 u_1^2: the length by quadrature along the longitude."""
    problem = Problem(
        lambda x: 0.5 * (x[2] / x.norm() - 0.3 * (x[0] / x.norm()) ** 2) ** 2,
        3,
        SphericalNoise(0.3),
        rank=1,
    )
    start = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    curve = exact.TracedCurve.of(problem, start)
    longitude = 2 * np.pi * np.arange(4096) / 4096
    height = np.zeros_like(longitude)
    for _ in range(60):
        height = 0.3 * (1 - height**2) * np.cos(longitude) ** 2
    flat = np.sqrt(1 - height**2)
    points = np.stack([flat * np.cos(longitude), flat * np.sin(longitude), height], 1)
    spectrum = np.fft.rfft(points, axis=0) * 1j * np.arange(2049)[:, None]
    speed = np.linalg.norm(np.fft.irfft(spectrum, 4096, axis=0), axis=1)
    assert curve.length == pytest.approx(2 * np.pi * speed.mean(), rel=1e-9)
    law = exact.law_of(problem, start)
    assert isinstance(law, exact.CircleDiffusion)
    chart = exact.curve_of(problem, start)
    reversible = exact.ReversibleLaw.of(
        problem, lambda a: chart.point(torch.from_numpy(a)).numpy(), dimension=1
    )
    # Two ways to pi: the spectral solution of the generator, and its density.
    assert reversible.periodic.total_variation(law.equilibrium) < 1e-6


def test_curves_that_cannot_be_traced() -> None:
    sphere = problems.great_sphere()
    with pytest.raises(ArgumentError, match="not a curve"):
        exact.TracedCurve.of(sphere, sphere.minimizer)
    problem = problems.varying_circle()
    with pytest.raises(NotOnManifoldError, match="does not start on the manifold"):
        exact.TracedCurve.of(problem, torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64))
    with pytest.raises(ArgumentError, match="start must be one point"):
        exact.TracedCurve.of(problem, torch.ones(2, 3, dtype=torch.float64))


def flat(x: torch.Tensor) -> torch.Tensor:
    return torch.eye(4, dtype=x.dtype)[:, :2] / x.norm()


def test_each_problem_has_its_law() -> None:
    assert isinstance(exact.law_of(problems.normalized_linear()), exact.AngleLaw)
    assert isinstance(exact.law_of(problems.great_sphere()), exact.SphereLaw)
    known = exact.law_of(problems.varying_circle())
    assert isinstance(known, exact.CircleDiffusion)
    with pytest.raises(ArgumentError, match="no exact law") as caught:
        exact.law_of(problems.great_sphere(noise=CustomNoise(flat)))
    for name in ("AngleLaw", "SphereLaw", "CircleDiffusion"):
        assert name in str(caught.value)


def test_a_minimiser_is_found_as_describe_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(lambda x: (x[2] / x.norm()) ** 2, 3, SphericalNoise(0.3))
    monkeypatch.setattr(gaps, "_galerkin", lambda problem, y, *_: y)
    y = exact.spectral_gap(problem, method="galerkin")
    assert isinstance(y, torch.Tensor)
    assert torch.allclose(y, find_minimizer(Geometry(problem)))
    assert float(problem.loss(y)) < 1e-24
    monkeypatch.setattr(applicable, "TracedCurve", SimpleNamespace(of=lambda problem, y: y))
    assert torch.equal(exact.curve_of(problem), find_minimizer(Geometry(problem)))
    monkeypatch.setattr(minimizers, "_TRIES", 2)
    degenerate = Problem(lambda x: (x[2] / x.norm()) ** 4, 3, SphericalNoise(0.3))
    with pytest.raises(ArgumentError, match="no minimiser of"):
        exact.spectral_gap(degenerate)


def test_the_law_on_a_traced_curve_is_that_on_the_circle() -> None:
    problem = unknown(problems.varying_circle())
    law = exact.law_of(problem)
    assert isinstance(law, exact.CircleDiffusion)
    assert law.spectral_gap == pytest.approx(
        exact.CircleDiffusion.reversible(problems.varying_circle()).spectral_gap, rel=1e-6
    )


@pytest.mark.paper("Remark 6.1")
def test_the_reversible_law_on_curves_and_surfaces() -> None:
    a = 0.5
    law = exact.ReversibleLaw.of(problems.varying_circle(a))
    known = (math.sqrt(1 - a**2) - 1) / a  # E cos under 1 / (1 + a cos)
    assert law.expectation(lambda y: y[:, 0]) == pytest.approx(known, abs=1e-9)
    circle = problems.varying_circle(a).facts.circle
    computed = exact.ReversibleLaw.of(
        unknown(problems.varying_circle(a)),
        lambda angles: circle.point(torch.from_numpy(angles)).numpy(),
        log_pseudo_determinant=None,
    )
    assert computed.periodic.total_variation(law.periodic) < 1e-8
    sphere = exact.ReversibleLaw.of(problems.great_sphere())
    assert sphere.expectation(lambda y: y[:, 0] ** 4) == pytest.approx(1 / 5, abs=1e-12)
    # Latitudes of pdet H = (1 + z / 2)^2: E z under 1 / (1 + z / 2) on [-1, 1].
    weighted = exact.ReversibleLaw.of(
        problems.great_sphere(),
        lambda n: np.concatenate([n, np.zeros((len(n), 1))], 1),
        log_pseudo_determinant=lambda y: 2.0 * torch.log1p(0.5 * y[:, 2]),
    )
    expected = 2.0 / math.log(3.0) - 2.0
    assert weighted.expectation(lambda y: y[:, 2]) == pytest.approx(expected, abs=1e-10)


def test_what_has_no_density_is_refused() -> None:
    with pytest.raises(ArgumentError, match="noise of \\(18\\)"):
        exact.ReversibleLaw.of(problems.mixed_noise_circle())
    with pytest.raises(ArgumentError, match="curves and surfaces"):
        exact.ReversibleLaw.of(problems.great_sphere(6))
    with pytest.raises(ArgumentError, match="circle of minimisers is not known"):
        exact.ReversibleLaw.of(unknown(problems.varying_circle()))


def test_convergence_tells_when_nodes_are_too_few() -> None:
    problem = circle_with_varying_trace()
    phi = problem.facts.limit_map

    def limit_map(x: np.ndarray) -> np.ndarray:
        return np.asarray(phi(torch.from_numpy(x)))

    few, many = (exact.convergence(problem, nodes=n, limit_map=limit_map) for n in (9, 33))
    assert many.nodes == (33, 65)
    assert many.largest < 1e-8
    assert 1e-7 < few.equilibrium < 0.1


def test_what_is_known_of_the_curve_does_not_excuse_the_start() -> None:
    problem = problems.varying_circle()
    for wrong in (torch.ones(2, 3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)):
        for function in (exact.curve_of, exact.law_of):
            with pytest.raises(ArgumentError, match="start"):
                function(problem, wrong)
    with pytest.raises(DTypeError, match="start is not numbers"):
        exact.curve_of(problem, "x")  # type: ignore[arg-type]


def test_the_reversible_law_needs_the_circle_where_phi_alone_is_known() -> None:
    problem = problems.great_circle()
    problem.facts = replace(problem.facts, circle=None)
    with pytest.raises(ArgumentError, match="circle of minimisers is not known"):
        exact.ReversibleLaw.of(problem)
