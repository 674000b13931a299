"""Several groups of weights: laws, norms and equilibrium from starts whose ratios are far apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from manifold_sde import (
    DirectionDiffusion,
    Geometry,
    GroupDirectionDiffusion,
    LimitingDiffusion,
    Problem,
    SphericalNoise,
    TimeScale,
    problems,
)
from manifold_sde.errors import (
    ArgumentError,
    CheckpointError,
    ManifoldSDEError,
    NoiseError,
    ScaleInvarianceError,
)
from manifold_sde.networks import InvariantGroups
from manifold_sde.networks.groups import WeightGroup
from manifold_sde.solvers import DirectionSolution, predict_sgd, run_sgd, solve
from manifold_sde.solvers.solution_plots import time_label
from manifold_sde.verification.exact import CircleDiffusion
from tests.solvers.groups import (
    GROUPS,
    SCALES,
    TILTS,
    circles,
    common_norm_mean,
    cosine,
    known_mean,
    torus,
    torus_start,
)

LEVEL = 1e-4
RATIOS = (1.0, 100.0, 0.01)
TORUS = torus()
#: V_g of the torus.
TRACES = torch.tensor([2.0 * scale**2 for scale in SCALES], dtype=torch.float64)


def fourth_powers(y: Tensor) -> Tensor:
    """The fourth powers of the groups' norms: (..., 6) -> (..., 2)."""
    return torch.stack([y[..., g].norm(dim=-1) ** 4 for g in GROUPS], -1)


def z_scores(values: Tensor, expected: float | list[float]) -> np.ndarray:
    """Deviations of means over the first dimension, in standard errors."""
    x = values.numpy()
    score: np.ndarray = (x.mean(0) - expected) / (x.std(0, ddof=1) / len(x) ** 0.5)
    return score


# The norms, path by path: q_g = V_g / 2c + (q_g(0) - V_g / 2c) e^{-4ct} where V_g is constant.


@pytest.mark.parametrize("ratio", RATIOS)
def test_norms_of_the_groups_obey_their_equations_on_every_path(ratio: float) -> None:
    start = torus_start(ratio)
    times = torch.tensor([0.5, 2.0], dtype=torch.float64)
    decay = torch.exp(-2.0 * times)[:, None, None]
    expected = TRACES + (fourth_powers(start) - TRACES) * decay
    errors = []
    for dt in (0.1, 0.05):
        run = solve(
            LimitingDiffusion(TORUS), start, [0.0, *times.tolist()], n_paths=4, dt=dt, compile=True
        )
        errors.append(float((fourth_powers(run.ys[1:]) / expected - 1.0).abs().max()))
        assert "  clock s  up to" in repr(run)
    # The scheme is of order two.
    assert 3.0 * errors[1] < errors[0] < 5e-3, errors


def test_one_simulation_answers_for_every_ratio_norm_and_schedule(tmp_path: Path) -> None:
    start = torus_start(30.0)
    sde = GroupDirectionDiffusion(TORUS)
    assert torch.equal(torch.tensor(sde.groups), torch.arange(6).reshape(2, 3))
    found = solve(sde, start, torch.linspace(0, 16, 9), n_paths=3, dt=0.1, compile=True)
    assert isinstance(found, DirectionSolution)
    at = found.at(ratio=2.0, times=[0.3, 0.6], norm=1.5)
    settled = TRACES / 4.0
    for y, t in zip(at.ys, (0.3, 0.6), strict=True):
        expected = settled + (1.5**4 * fourth_powers(start) - settled) * np.exp(-8.0 * t)
        torch.testing.assert_close(fourth_powers(y), expected.expand(3, 2), rtol=2e-3, atol=0.0)
    # SGD: q_g(0) + 2 V_g t_0, shrunk.
    scale = TimeScale(0.1, 0.02)
    steps = [100, 400]
    sgd = found.at_steps(0.1, 0.02, steps, norm=1.5)
    t0 = torch.tensor([scale.accumulated(k) for k in steps])[:, None, None]
    shrunk = torch.tensor([scale.shrinkage(k) for k in steps])[:, None, None] ** 4
    expected = (1.5**4 * fourth_powers(start) + 2.0 * TRACES * t0) * shrunk
    torch.testing.assert_close(fourth_powers(sgd.ys), expected.expand(2, 3, 2), rtol=2e-3, atol=0.0)
    # What is shown names the clock, in which the others are not.
    assert all("  clock s  up to" in repr(solution) for solution in (found, at, sgd))
    assert time_label(found.config) == "clock $s$ of the groups"
    plain = solve(DirectionDiffusion(TORUS), torus_start(1.0), [0.0, 0.1], dt=0.1, compile=True)
    assert "  clock u  up to" in repr(plain)
    # What is loaded goes on as what was kept, and in no other clock.
    found.save(tmp_path / "run.npz")
    again = DirectionSolution.load(tmp_path / "run.npz", sde=GroupDirectionDiffusion(TORUS))
    assert torch.equal(again.at(ratio=2.0, times=[0.3, 0.6], norm=1.5).ys, at.ys)
    with pytest.raises(CheckpointError, match="in another clock"):
        DirectionSolution.load(tmp_path / "run.npz", sde=DirectionDiffusion(TORUS))


def test_with_one_group_it_is_the_direction_in_the_intrinsic_clock() -> None:
    """But for the unit of the clock, V at the start."""
    problem = problems.mixed_noise_circle()
    circle = problem.facts.circle
    y = circle.point(torch.tensor([0.0, 1.0, 2.5], dtype=torch.float64))
    plain, grouped = DirectionDiffusion(problem), GroupDirectionDiffusion(problem)
    for sde in (plain, grouped):
        sde.require_on_manifold(y)
    unit, t = float(problem.noise_trace(y[0])), torch.tensor(0.0)
    w = torch.randn(3, problem.n_noise, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(grouped.f(t, y) * unit, plain.f(t, y))
    torch.testing.assert_close(grouped.g_prod(t, y, w) * unit**0.5, plain.g_prod(t, y, w))
    torch.testing.assert_close(grouped.g(t, y) * unit**0.5, plain.g(t, y))
    torch.testing.assert_close(grouped.noise_trace(y.T) * unit, plain.noise_trace(y.T))


def test_walks_keep_the_equations_of_the_norms_and_need_no_matrices() -> None:
    start = torus_start(10.0)
    t0 = 0.5 * (np.exp(2.0) - 1.0)
    expected = (fourth_powers(start) + 2.0 * TRACES * t0) * np.exp(-2.0)
    errors = []
    for dt in (0.1, 0.05):
        run = solve(
            GroupDirectionDiffusion(TORUS), start, torch.linspace(0, 12, 3), n_paths=2, dt=dt,
            method="walk", compile=True,
        )  # fmt: skip
        assert isinstance(run, DirectionSolution)
        q = fourth_powers(run.at(ratio=0.5, times=[1.0]).ys[0])
        assert float((q[0] / q[1] - 1.0).abs().max()) < 1e-9  # the noise does not show
        errors.append(float((q[0] / expected - 1.0).abs().max()))
    assert errors[1] < 0.6 * errors[0] < 0.03, errors  # "walk" is of order one
    dense, products = (
        solve(
            GroupDirectionDiffusion(TORUS, geometry=geometry), start, [0.0, 0.2], n_paths=2,
            dt=0.1, method="walk", compile=False,
        ).ys
        for geometry in (Geometry(TORUS, "dense"), Geometry(TORUS, "matrix_free"))
    )  # fmt: skip
    torch.testing.assert_close(products, dense)


# The laws at finite times, against Fourier and Chebyshev.


@pytest.fixture(scope="module")
def laws() -> list[CircleDiffusion]:
    return [CircleDiffusion.of(problems.mixed_noise_circle(tilt=tilt)) for tilt in TILTS]


@pytest.mark.thorough
@pytest.mark.paper("Theorem 4.4")
def test_each_group_has_its_own_law_at_finite_times(laws: list[CircleDiffusion]) -> None:
    """Side by side the groups are independent, and each has the law of a problem of its own."""
    problem, point = circles(), problems.mixed_noise_circle().minimizer
    start = torch.cat([10.0 * point, point])
    start = start / start.norm()
    run = predict_sgd(problem, start, 0.02, 0.1, [300], n_paths=1500, seed=3, dt=0.1)
    T = float(TimeScale(0.02, 0.1).discrete_time(300))
    shrinkage = float(TimeScale(0.02, 0.1).shrinkage(300)) * np.exp(0.5 * T)
    scores, mistaken = [], []
    for group, law in zip(GROUPS, laws, strict=True):
        y = run.ys[0][:, group]
        angle = torch.atan2(y[:, 1], y[:, 0])
        values = torch.stack([angle.cos(), angle.sin(), (y.norm(dim=1) / shrinkage) ** 4], 1)
        for own, found in ((float(start[group].norm()), scores), (1.0, mistaken)):
            joint = law.at(T, norm=own)
            functions = (
                lambda a, r: np.cos(a) + 0.0 * r,
                lambda a, r: np.sin(a) + 0.0 * r,
                lambda a, r: r**4 + 0.0 * a,
            )
            found.append(z_scores(values, [joint.expectation(f) for f in functions]))
    threshold = stats.norm.isf(LEVEL / 12)
    assert np.abs(scores).max() < threshold, scores
    # The broken twin: one common norm for all groups.
    assert np.abs(mistaken[1]).max() > 2.0 * threshold, mistaken


# The equilibrium, from starts that are far apart, against a closed form.


@pytest.mark.slow
@pytest.mark.paper("Theorem 5.4")
@pytest.mark.parametrize("ratio", RATIOS)
def test_one_equilibrium_from_ratios_that_are_far_apart(ratio: float) -> None:
    """The relaxation time is 2 in T; the paths are 8 of them and more from their start."""
    times = [0.0, *np.linspace(16.0, 30.0, 8)]
    run = solve(
        LimitingDiffusion(TORUS), torus_start(ratio), times, n_paths=300, seed=6, dt=0.4,
        compile=True,
    )  # fmt: skip
    means = cosine(run.ys[1:]).mean(0)
    threshold = stats.norm.isf(LEVEL / 2)
    assert abs(z_scores(means, known_mean())) < threshold
    # The broken twin: one common norm for all groups.
    assert abs(z_scores(means, common_norm_mean())) > threshold + stats.norm.isf(0.01)


@pytest.mark.slow
@pytest.mark.paper("Theorem 5.4")
def test_the_equilibrium_in_time_from_the_clock_of_the_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the broken twin, in which the ratios of the norms stay where they were at the start."""
    sde = GroupDirectionDiffusion(TORUS)
    assert cosine(sde.balanced(torus_start(7.0))) == pytest.approx(1.0)
    shares = sde.norms(sde.balanced(torus_start(7.0)))
    torch.testing.assert_close(shares[0] / shares[1], (TRACES[0] / TRACES[1]) ** 0.25)

    def mean(start: Tensor) -> tuple[float, float]:
        times = torch.linspace(0.0, 96.0, 25)
        run = solve(GroupDirectionDiffusion(TORUS), start, times, n_paths=200, seed=4, dt=0.4)
        found = run.equilibrium(cosine, burn_in=24.0)
        return float(found.mean), float(found.standard_error)

    threshold = stats.norm.isf(LEVEL / 2)
    value, error = mean(torus_start(100.0))
    assert abs(value - known_mean()) < threshold * error, (value, error, known_mean())

    drift = GroupDirectionDiffusion.drift

    def frozen(self: GroupDirectionDiffusion, x: Tensor, basis: Tensor) -> Tensor:
        moved = drift(self, x, basis)
        for group in map(list, self.groups):
            y = x[group]
            moved[group] -= y * (y * moved[group]).sum(0) / y.square().sum(0)
        return moved

    monkeypatch.setattr(GroupDirectionDiffusion, "drift", frozen)
    value, error = mean(torus_start(1.0))
    assert abs(value - known_mean()) > 2.0 * threshold * error, (value, error)
    assert abs(value - common_norm_mean()) < threshold * error, (value, error, common_norm_mean())


@pytest.mark.thorough
@pytest.mark.paper("Theorem 5.4", "Theorem 5.5")
def test_sgd_comes_to_the_equilibrium_of_the_groups() -> None:
    """SGD itself, at two step sizes, extrapolated to step size 0, after 6 relaxation times.

    The step eta / |x_g|^2 of the first group is 0.05 and 0.1; the second's is four times smaller.
    """
    means, errors = [], []
    for size, paths in ((0.05, 3000), (0.1, 2000)):
        product = 0.5 * size**2 * float(TRACES[0])
        lr = (2.0 * product) ** 0.5  # so that weight_decay is lr / 2, and |x_g|^4 = V_g at the end
        steps = int(12.0 / (2.0 * product))
        starts = torch.cat([torus_start(r).expand(paths // 2, -1) for r in (10.0, 0.1)])
        x = run_sgd(TORUS, starts, lr, 0.5 * lr, [0, steps], seed=5).ys[-1]
        values = cosine(Geometry(TORUS).limit_map(x))
        means.append(float(values.mean()))
        errors.append(float(values.std()) / paths**0.5)
    extrapolated = 2.0 * means[0] - means[1]
    error = float(np.hypot(2.0 * errors[0], errors[1]))
    threshold = stats.norm.isf(LEVEL / 2) * error
    assert abs(extrapolated - known_mean()) < threshold, (means, errors, known_mean())
    # The broken twin: one common norm for all groups.
    assert abs(extrapolated - common_norm_mean()) > threshold, (means, errors, common_norm_mean())


# What is refused.


@pytest.mark.parametrize(
    ("problem", "groups", "error", "message"),
    [
        (TORUS.with_noise(SphericalNoise(0.1)), None, NoiseError, "moves the norms"),
        (TORUS, [[0, 1, 2]], ArgumentError, "each of the indices 0 to 5 in one group"),
        (TORUS, [[0, 1, 2], [3, 4, 5, 5]], ArgumentError, "not the groups"),
        (TORUS, "x", ArgumentError, "not the groups"),
        (TORUS, 3, ArgumentError, "not the groups"),
        (TORUS, [[0, 1], [2], [3, 4, 5]], ScaleInvarianceError, "scaled by each of these groups"),
    ],
)
def test_what_are_no_groups_is_refused(
    problem: Problem, groups: object, error: type[ManifoldSDEError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        GroupDirectionDiffusion(problem, groups=groups)  # type: ignore[arg-type]
    assert caught.value.remedy


def test_groups_of_large_problems_are_to_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manifold_sde.group_sdes.SOLVED_DIM", 5)
    with pytest.raises(ArgumentError, match="at most 5"):
        GroupDirectionDiffusion(TORUS)
    named = InvariantGroups(tuple(WeightGroup(str(g), (g,)) for g in GROUPS))
    assert GroupDirectionDiffusion(TORUS, groups=named).groups == ((0, 1, 2), (3, 4, 5))
