"""Checks of the equilibrium: healthy problems hold, and broken parts are rejected."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import numpy as np
import pytest
import torch

from manifold_sde import CustomNoise, SphericalNoise, problems
from manifold_sde.errors import MissingDependencyError
from manifold_sde.solvers import run_sgd, solve
from manifold_sde.solvers.direction import DirectionSolution
from manifold_sde.solvers.equilibrium import average
from manifold_sde.verification import Effort, Result, Subject, verify
from manifold_sde.verification.ergodicity import CHECKS
from manifold_sde.verification.laws.equilibrium import (
    INDEPENDENCE,
    MIXED_CHAINS,
    ONE_EQUILIBRIUM,
    SGD_AT_REST,
    TIME_AVERAGES,
    diagnostics,
)
from manifold_sde.verification.laws.known_laws import EXACT_LAW, NORM_AT_REST, VOLUME_OF_HESSIAN
from manifold_sde.verification.laws.long_runs import LongRuns, slowest_time
from manifold_sde.verification.sampling import farthest
from manifold_sde.verification.two_sample import total_variation
from tests.verification.ergodic import (
    SMALL,
    borrowing,
    circle_with_varying_trace,
    on_another,
    run,
    two_circles,
    with_drift,
    with_solver,
)

#: Its kernels and what is known of it are shared by the tests.
VARYING = circle_with_varying_trace()
WITHOUT_SGD = [check for check in CHECKS if check.name != SGD_AT_REST.name]


@pytest.mark.paper("Theorem 5.4", "Remark 6.1")
@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(problems.varying_circle(noise_scale=0.5), marks=pytest.mark.thorough),
        problems.great_sphere(),
    ],
    ids=lambda problem: problem.name,
)
def test_healthy_problems_hold(problem: Any) -> None:
    subject = Subject.of(problem)
    found = [result for check in WITHOUT_SGD for result in check(subject, SMALL)]
    assert [result.verdict for result in found] == ["holds"] * 7
    assert all(result.design is not None for result in found if result.name != NORM_AT_REST.name)


@pytest.mark.paper("Theorem 5.4")
@pytest.mark.thorough
def test_a_varying_trace_holds() -> None:
    subject = Subject.of(VARYING)
    assert [run(law, subject).verdict for law in (ONE_EQUILIBRIUM, NORM_AT_REST)] == ["holds"] * 2
    assert VOLUME_OF_HESSIAN(subject, SMALL) == []  # the noise is another one


@pytest.mark.paper("Theorem 5.4")
@pytest.mark.twin(
    "one equilibrium from every start", "a solver that stops at a tenth of the time asked for"
)
def test_runs_that_have_not_mixed_are_rejected() -> None:
    def early(sde: Any, y0: Any, ts: Any, **options: Any) -> Any:
        found = solve(sde, y0, 0.1 * torch.as_tensor(ts), **options)
        return dataclasses.replace(found, ts=torch.as_tensor(ts))

    subject = with_solver(problems.great_circle(0.5), early)
    found = run(ONE_EQUILIBRIUM, subject)
    assert found.verdict == "fails"
    assert "where it started" in found.meaning
    assert found.pictures


def test_a_horizon_that_is_short_is_undecided() -> None:
    subject = Subject.of(problems.great_circle(0.5))
    runs = LongRuns(subject, SMALL, horizon=2.2)
    subject.shared[(LongRuns, SMALL)] = runs
    found = run(ONE_EQUILIBRIUM, subject)
    assert found.verdict != "holds"
    slow = Subject.of(problems.great_circle(0.5))
    slow.shared[(LongRuns, SMALL)] = LongRuns(slow, SMALL, horizon=500.0)
    found = run(ONE_EQUILIBRIUM, slow)
    assert found.verdict == "undecided"
    assert "500 relaxation times" in found.detail


@pytest.mark.twin("one equilibrium from every start", "minimisers of unit norm on two circles")
def test_two_components_are_rejected() -> None:
    subject = Subject.of(two_circles())
    heights = subject.far_apart(3)[:, 2]
    assert float(heights.min()) < 0 < float(heights.max())
    found = run(ONE_EQUILIBRIUM, subject)
    assert found.verdict == "fails"
    assert found.p_value is not None
    assert found.p_value < 1e-10


@pytest.mark.twin("independence of the runs", "a Brownian source that gives all runs one path")
def test_one_path_for_all_runs_is_noticed() -> None:
    def same(sde: Any, y0: Any, ts: Any, **options: Any) -> Any:
        rows, inverse = torch.unique(y0, dim=0, return_inverse=True)
        found = solve(sde, rows, ts, **options)
        return dataclasses.replace(found, ys=found.ys[:, inverse], clock=found.clock[:, inverse])

    subject = with_solver(problems.great_circle(0.5), same)
    found = run(INDEPENDENCE, subject)
    assert found.verdict == "fails"
    assert found.statistic > 100


@pytest.mark.twin(
    "independence of the runs", "a Brownian source whose second half repeats the first"
)
def test_repeated_halves_are_noticed() -> None:
    def repeating(sde: Any, y0: Any, ts: Any, **options: Any) -> Any:
        half = len(y0) // 2
        parts = [solve(sde, part, ts, **options) for part in (y0[:half], y0[half:])]
        ys, clock = (
            torch.cat(values, 1) for values in zip(*((p.ys, p.clock) for p in parts), strict=True)
        )
        return dataclasses.replace(parts[0], ys=ys, clock=clock)

    subject = with_solver(problems.great_circle(0.5), repeating)
    assert run(INDEPENDENCE, subject).verdict == "fails"
    assert run(ONE_EQUILIBRIUM, subject).verdict != "holds"


@pytest.mark.thorough
@pytest.mark.twin(
    "chains that have mixed", "chains that stay on the one of two circles they start on"
)
def test_chains_that_stay_apart_are_not_mixed() -> None:
    pytest.importorskip("arviz_stats")
    subject = Subject.of(two_circles())
    walks = subject.walks  # on one of the circles; the other is its mirror image
    mirrored = walks * walks.new_tensor([1.0, 1.0, -1.0])
    subject.__dict__["walks"] = torch.cat([walks, mirrored], 1)
    found = run(MIXED_CHAINS, subject)
    assert found.verdict == "undecided"
    assert "have not mixed" in found.meaning


def test_missing_arviz_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arviz_stats.base", None)
    with pytest.raises(MissingDependencyError, match="ArviZ"):
        diagnostics()


class Unweighted(DirectionSolution):
    """Chains whose averages are not weighted by the norm's fourth power."""

    def equilibrium(self, function: Any, burn_in: float | None = None) -> Any:
        return average(self, function, None, burn_in)


def averages(subject: Subject, effort: Effort) -> tuple[Result, Result]:
    """Of chains that are weighted, and of the same chains without the weights."""
    right = run(TIME_AVERAGES, subject, effort)
    runs = LongRuns.of(subject, effort)
    fields = {f.name: getattr(runs.chains, f.name) for f in dataclasses.fields(runs.chains)}
    runs.__dict__["_chains"] = Unweighted(**fields), runs.relaxation
    return right, run(TIME_AVERAGES, subject, effort)


@pytest.mark.thorough
@pytest.mark.twin("time averages under the equilibrium", "averages without the weight |Y|^4")
def test_averages_without_weights_are_rejected() -> None:
    right, wrong = averages(Subject.of(VARYING), Effort("small", points=8, departure=0.2))
    assert (right.verdict, wrong.verdict) == ("holds", "fails")
    assert "norm's fourth power" in wrong.meaning


@pytest.mark.thorough
@pytest.mark.paper("Theorem 5.4")
@pytest.mark.twin(
    "time averages under the equilibrium", "averages without the weight |Y|^4, at TV .08 from pi"
)
def test_averages_without_weights_on_the_circle_with_mixed_noise() -> None:
    subject = Subject.of(problems.mixed_noise_circle())
    right, wrong = averages(subject, Effort("fine", points=8, departure=0.08))
    assert (right.verdict, wrong.verdict) == ("holds", "fails")


@pytest.fixture(scope="module")
def curved() -> Subject:
    return Subject.of(problems.varying_circle(noise_scale=0.5))


@pytest.mark.paper("Remark 6.1")
@pytest.mark.twin("equilibrium and the volume of the Hessian", "the drift of d2Phi dropped")
@pytest.mark.twin(
    "equilibrium and the volume of the Hessian", "the drift of d2Phi of the other sign"
)
@pytest.mark.parametrize("factor", [0.0, pytest.param(-1.0, marks=pytest.mark.thorough)])
def test_a_wrong_drift_has_another_equilibrium(factor: float, curved: Subject) -> None:
    wrong = with_solver(curved.problem, on_another(with_drift(factor, 0.5)))
    found = run(VOLUME_OF_HESSIAN, borrowing(wrong, curved))
    assert found.verdict == "fails", found.detail


@pytest.mark.thorough
@pytest.mark.twin("equilibrium and the volume of the Hessian", "half of the drift of d2Phi")
def test_half_of_the_drift_has_another_equilibrium(curved: Subject) -> None:
    effort = Effort("small", points=8, departure=0.15)
    wrong, right = (
        borrowing(with_solver(curved.problem, on_another(with_drift(f, 0.5))), curved, effort)
        for f in (0.5, 1.0)
    )
    found = run(VOLUME_OF_HESSIAN, wrong, effort)
    assert found.verdict == "fails", found.detail
    assert run(VOLUME_OF_HESSIAN, right, effort).verdict == "holds"


@pytest.mark.paper("Equation (10)")
@pytest.mark.twin("norm in equilibrium", "noise that is larger by a twentieth, of constant trace")
def test_larger_noise_shows_in_the_norm() -> None:
    problem = problems.great_circle(0.5)
    wrong = on_another(problem.with_noise(SphericalNoise(0.525)))
    found = run(NORM_AT_REST, with_solver(problem, wrong))
    assert found.verdict == "fails"
    assert found.statistic == pytest.approx(1.05**2 - 1.0, rel=1e-2)


@pytest.mark.thorough
@pytest.mark.twin("norm in equilibrium", "noise that is larger by a twentieth, of varying trace")
def test_larger_noise_of_varying_trace_shows_in_the_norm() -> None:
    problem = VARYING
    factor = problem.noise.factor
    larger = problem.with_noise(CustomNoise(lambda x: 1.05 * factor(problem.pointwise, x)))
    effort = Effort("small", points=8, departure=0.15)
    found = run(NORM_AT_REST, with_solver(problem, on_another(larger)), effort)
    assert found.verdict == "fails", found.detail


@pytest.mark.thorough
@pytest.mark.paper("Equation (13)")
@pytest.mark.twin("laws of the direction against the exact law", "noise larger by a fifth")
def test_larger_noise_shows_in_the_law() -> None:
    problem = problems.great_circle(0.5)
    wrong = with_solver(problem, on_another(problem.with_noise(SphericalNoise(0.65))))
    effort = Effort("small", points=8, departure=0.15)
    assert run(EXACT_LAW, wrong, effort).verdict == "fails"
    assert run(EXACT_LAW, Subject.of(problem), effort).verdict == "holds"


@pytest.mark.paper("Theorem 5.5", "Conjecture 1.1", "Theorem 1.2")
@pytest.mark.twin("SGD in equilibrium", "a weight decay that is off by a twentieth")
def test_sgd_comes_to_the_equilibrium_and_another_weight_decay_shows() -> None:
    def other(problem: Any, x0: Any, lr: float, weight_decay: float, *args: Any, **options: Any):
        return run_sgd(problem, x0, lr, 1.05 * weight_decay, *args, **options)

    effort = SMALL
    subject = Subject.of(problems.great_sphere(10))
    right = run(SGD_AT_REST, subject, effort)
    assert right.verdict == "holds", right.detail
    wrong = borrowing(dataclasses.replace(subject, run_sgd=other), subject, effort)
    for name in ("ends", "starts"):
        value = LongRuns.of(subject, effort).__dict__[name]
        LongRuns.of(wrong, effort).__dict__[name] = value
    found = run(SGD_AT_REST, wrong, effort)
    assert found.verdict == "fails", found.detail
    assert "|x|^2" in found.detail


@pytest.mark.twin("one equilibrium from every start", "label noise: a flow, and no diffusion")
def test_no_diffusion_is_said() -> None:
    report = verify(problems.label_noise_circle(), checks=CHECKS)
    assert [result.name for result in report] == [ONE_EQUILIBRIUM.name]
    assert report[ONE_EQUILIBRIUM.name].verdict == "fails"
    assert "deterministic flow" in report[ONE_EQUILIBRIUM.name].meaning


def test_distance_without_bias() -> None:
    """500 pairs of equal laws: no positive mean; a known distance is found."""
    rng = np.random.default_rng(0)
    grid = np.exp(2j * np.pi * np.arange(400) / 400)
    circle = torch.from_numpy(np.stack([grid.real, grid.imag], 1))
    centers = farthest(circle, 16).numpy()

    def sample(n: int, amplitude: float) -> np.ndarray:
        # Density (1 + amplitude cos theta) / 2 pi, whose distance from uniform is amplitude / pi.
        angles = rng.uniform(-np.pi, np.pi, 4 * n)
        kept = rng.uniform(size=4 * n) * (1 + amplitude) < 1 + amplitude * np.cos(angles)
        angles = angles[kept][:n]
        return np.stack([np.cos(angles), np.sin(angles)], 1)

    found = [total_variation(sample(300, 0.0), sample(300, 0.0), centers) for _ in range(500)]
    values, errors = np.array(found).T
    assert abs(values.mean()) < 4.0 * values.std() / np.sqrt(500)
    assert errors.mean() == pytest.approx(values.std(), rel=0.25)
    value, error = total_variation(sample(20_000, 0.8), sample(20_000, 0.0), centers)
    assert value == pytest.approx(0.8 / np.pi, abs=5 * error + 0.01)


def test_slowest_time_of_known_chains() -> None:
    """Autoregressive chains of relaxation times 1, 3 and 10."""
    rng = np.random.default_rng(1)
    times, spacing = np.array([1.0, 3.0, 10.0]), 0.5
    decay = np.exp(-spacing / times)
    x = rng.normal(size=(64, 3))
    kept = []
    for _ in range(400):
        x = decay * x + np.sqrt(1 - decay**2) * rng.normal(size=x.shape)
        kept.append(x)
    assert slowest_time(np.stack(kept), spacing) == pytest.approx(10.0, rel=0.25)


def test_relaxation_from_chains_is_that_of_the_exact_law() -> None:
    problem = problems.great_sphere(5)
    subject = Subject.of(problem)
    runs = LongRuns(subject, SMALL)
    exact = runs.relaxation.clock
    blind = LongRuns(subject, SMALL)
    blind.__dict__["law"] = None
    # The largest of several estimates: rather too long than too short.
    assert 0.75 * exact < blind.relaxation.clock < 2.0 * exact
    assert "autocorrelation" in blind.relaxation.source
