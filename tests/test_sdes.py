"""The stochastic differential equations as objects: forms, identities, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchsde
from torch import Tensor

from manifold_sde import (
    CustomNoise,
    DirectionDiffusion,
    FixedRatioDiffusion,
    Geometry,
    LimitingDiffusion,
    Problem,
    SamplingNoise,
    WeightDecaySDE,
    problems,
)
from manifold_sde.equations import ManifoldEquation
from manifold_sde.errors import ArgumentError, NoiseError, NotOnManifoldError
from manifold_sde.scale_invariance import noise_violations
from manifold_sde.solvers import BrownianPath, predict_sgd, run_sgd, solve

ZERO = torch.zeros(())


def on_circle(problem: Problem, count: int = 7) -> Tensor:
    angles = torch.linspace(0.3, 6.0, count, dtype=torch.float64)
    points: Tensor = problem.facts.circle.point(angles)
    return points


@pytest.mark.paper("Equation (3)", "Equation (19)")
def test_coefficients_of_sgd_with_weight_decay() -> None:
    problem = problems.varying_circle()
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sde = WeightDecaySDE(problem, 0.1, 0.05)
    expected = -0.1 * (problem.gradient(x) + 0.05 * x)
    torch.testing.assert_close(sde.f(ZERO, x), expected)
    torch.testing.assert_close(sde.g(ZERO, x), 0.1 * problem.noise_factor(x))
    torch.testing.assert_close(sde.g_prod(ZERO, x, w), 0.1 * problem.noise_product(x, w))
    # The Stratonovich drift differs by the derivative of the columns along themselves.
    step = 1e-5
    columns = sde.g(ZERO, x)
    correction = torch.zeros_like(x)
    for j in range(3):
        v = columns[:, :, j]
        ahead, behind = (sde.g(ZERO, x + s * step * v)[:, :, j] for s in (1, -1))
        correction += (ahead - behind) / (2 * step)
    found = sde.f(ZERO, x) - sde.with_calculus("stratonovich").f(ZERO, x)
    torch.testing.assert_close(found, 0.5 * correction, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("make", [problems.varying_circle, problems.mixed_noise_circle])
@pytest.mark.paper("Equation (8)", "Equation (13)")
def test_ito_and_stratonovich_drifts_differ_by_the_noise(make) -> None:
    """By differences of P sigma along Gamma: nothing of the drifts enters."""
    problem = make()
    y = on_circle(problem)
    ito = LimitingDiffusion(problem)
    factor = ito.g(ZERO, y)
    step = 1e-4
    correction = torch.zeros_like(y)
    for j in range(factor.shape[-1]):
        v = factor[:, :, j]
        moved = [y + s * step * v for s in (1, -1)]
        ahead, behind = (ito.g(ZERO, z)[:, :, j] for z in moved)
        correction += (ahead - behind) / (2 * step)
    found = ito.f(ZERO, y) - ito.with_calculus("stratonovich").f(ZERO, y)
    scale = float(correction.abs().max())
    # Off the manifold the extension of P is not unique, but tangent columns feel it to first
    # order along Gamma alone.
    torch.testing.assert_close(found, 0.5 * correction, rtol=0.0, atol=1e-6 * scale)


@pytest.mark.parametrize("make", [problems.varying_circle, problems.mixed_noise_circle])
def test_stratonovich_drift_is_tangent_and_its_radial_part_is_half_the_trace(make) -> None:
    problem = make()
    y = on_circle(problem)
    drift = FixedRatioDiffusion(problem, 0.3, "stratonovich").f(ZERO, y)
    radial = (drift * y).sum(-1)
    torch.testing.assert_close(radial + 0.3, 0.5 * problem.noise_trace(y))
    circle = problem.facts.circle
    tangent = torch.linalg.svd(torch.cat([circle.basis.sum(0, keepdim=True), y[:1]]))[0]
    assert tangent.shape == (2, 2)
    direction = DirectionDiffusion(problem, "stratonovich").f(ZERO, y)
    assert float((direction * y).sum(-1).abs().max()) < 1e-14
    assert float(direction[:, 2].abs().max()) < 1e-12  # the circle is at constant height


def test_drift_of_any_noise_is_that_of_the_geometry() -> None:
    problem = problems.mixed_noise_circle()
    sde = FixedRatioDiffusion(problem, 0.7)
    y = 1.7 * on_circle(problem)
    expected = 0.5 * sde.geometry.second_derivative(y) - 0.7 * y
    torch.testing.assert_close(sde.f(ZERO, y), expected)


@pytest.mark.parametrize("equation", [LimitingDiffusion, DirectionDiffusion])
@pytest.mark.parametrize(
    ("calculus", "method"),
    [("ito", "euler"), ("stratonovich", "midpoint"), ("stratonovich", "heun")],
)
def test_torchsde_integrates_it(equation, calculus: str, method: str) -> None:
    problem = problems.varying_circle()
    sde: ManifoldEquation = equation(problem, calculus)
    start = on_circle(problem, 3)
    brownian = BrownianPath(0, 3, 3)
    times = torch.tensor([0.0, 0.25], dtype=torch.float64)
    found = torchsde.sdeint(sde, start, times, bm=brownian, dt=2.0**-7, method=method)
    ours = solve(sde, start, times, method="heun" if calculus != "ito" else "euler", dt=2.0**-7)
    # torchsde steps in the whole space; the paths are the same to the strong order, which is 1/2
    # for Euler and 1 for the others here. A path moves by about 0.15.
    tolerance = 2e-2 if method == "euler" else 3e-3
    torch.testing.assert_close(found[-1], ours.ys[-1], rtol=0.0, atol=tolerance)


def test_the_start_may_have_any_norm() -> None:
    """The norm follows its equation from there: (10), as the trace is constant."""
    problem = problems.great_circle(noise_scale=0.3)
    found = solve(LimitingDiffusion(problem), 1.3 * problem.minimizer, [0.0, 0.1], dt=0.05)
    trace = 2 * 0.3**2
    wanted = (trace + (1.3**4 - trace) * math.exp(-0.2)) ** 0.25
    assert float(found.norms[1]) == pytest.approx(wanted, rel=1e-12)


def test_interpolation_is_refused() -> None:
    def loss(x: Tensor) -> Tensor:
        u = x / x.norm()
        return 0.5 * torch.stack([u[2] ** 2, 2.0 * u[2] ** 2])

    problem = Problem(loss, 3, SamplingNoise())
    y = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)
    with pytest.raises(NoiseError, match="vanishes on the manifold"):
        solve(LimitingDiffusion(problem), y, [0.0, 1.0])


def test_what_cannot_be_solved_is_refused() -> None:
    problem = problems.varying_circle()
    y = problem.minimizer
    sde = LimitingDiffusion(problem)
    with pytest.raises(NotOnManifoldError):
        solve(sde, torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64), [0.0, 1.0])
    with pytest.raises(NotOnManifoldError, match="norm 1"):
        solve(DirectionDiffusion(problem), 2.0 * y, [0.0, 1.0])
    with pytest.raises(ArgumentError, match="no such method"):
        solve(sde, y, [0.0, 1.0], method="milstein")
    with pytest.raises(ArgumentError, match="does not integrate the form"):
        solve(sde, y, [0.0, 1.0], method="heun")
    for times in ([0.0], [1.0, 0.0], [0.0, float("nan")]):
        with pytest.raises(ArgumentError, match="ts are not times"):
            solve(sde, y, times)
    for dt in (0.0, -1.0, float("nan"), "small"):
        with pytest.raises(ArgumentError, match="dt is not a step"):
            solve(sde, y, [0.0, 1.0], dt=dt)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="calculus"):
        LimitingDiffusion(problem, "backward")


@pytest.mark.parametrize("size", [1e-200, 1e-160, 1e-80, 1e80, 1e160, 1e200])
@pytest.mark.parametrize(
    "make",
    [
        DirectionDiffusion,
        LimitingDiffusion,
        lambda p: DirectionDiffusion(p, geometry=Geometry(p, method="matrix_free")),
        lambda p: WeightDecaySDE(p, 0.01, 0.05),
    ],
)
def test_norms_whose_powers_are_out_of_range_are_refused(make, size: float) -> None:
    """At 1e-160 four digits of the square are left, and at 1e-200 none."""
    problem = problems.mixed_noise_circle()
    sde = make(problem)
    y = size * problem.minimizer[None]
    v = torch.ones(1, problem.n_noise, dtype=torch.float64)
    calls = [
        lambda: sde.f(0.0, y),
        lambda: sde.g_prod(0.0, y, v),
        lambda: sde.f_and_g_prod(0.0, y, v),
        lambda: solve(sde, y[0], [0.0, 0.1]),
        lambda: run_sgd(problem, y[0], 0.01, 0.05, 1),
        lambda: predict_sgd(problem, y[0], 0.01, 0.05, 1),
    ]
    if getattr(sde, "geometry", None) is None or sde.geometry.products is None:
        calls.append(lambda: sde.g(0.0, y))
    for call in calls:
        with pytest.raises(ArgumentError, match="norm whose powers are out of the range"):
            call()


@pytest.mark.parametrize("size", [1e-70, 1e70])
def test_norms_in_range_have_coefficients_of_their_degree(size: float) -> None:
    problem = problems.mixed_noise_circle()
    y = problem.minimizer[None]
    direction = DirectionDiffusion(problem)
    torch.testing.assert_close(direction.f(0.0, size * y), direction.f(0.0, y))
    limit = LimitingDiffusion(problem)
    moved = limit.g(0.0, size * y) * size
    torch.testing.assert_close(moved, limit.g(0.0, y))
    assert bool((limit.f(0.0, math.nan * y)).isnan().all())


def test_states_that_are_all_lost_have_coefficients_that_are_lost() -> None:
    """The first that an equation of declared rank sees."""
    problem = problems.varying_circle()
    lost = torch.full((2, 3), torch.nan, dtype=torch.float64)
    sde = DirectionDiffusion(problem, "stratonovich")
    assert bool(sde.f(ZERO, lost).isnan().all())
    assert bool(sde.g_prod(ZERO, lost, torch.ones_like(lost)).isnan().all())
    y = on_circle(problem, 2)
    torch.testing.assert_close(
        sde.f(ZERO, torch.cat([y, lost]))[:2],
        DirectionDiffusion(problem, "stratonovich").f(ZERO, y),
    )


def test_the_noise_of_a_problem_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network it takes seconds; another noise, and other points, are measured anew."""
    measured = []

    def counted(*arguments: Any) -> dict[str, float]:
        measured.append(arguments)
        return noise_violations(*arguments)

    monkeypatch.setattr("manifold_sde.problem.noise_violations", counted)
    problem = problems.great_circle()
    LimitingDiffusion(problem).with_calculus("stratonovich")
    LimitingDiffusion(problem)
    problem.noise_violations().clear()
    assert (len(measured), len(problem.noise_violations())) == (1, 2)
    problem.noise_violations(problem.minimizer)
    assert len(measured) == 2
    with pytest.raises(NoiseError):
        LimitingDiffusion(problem.with_noise(CustomNoise(lambda x: x[:, None])))
    assert len(measured) == 3
