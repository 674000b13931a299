"""``predict_sgd``: the law after given steps, from (13), against the direction and closed forms.

``at_steps``, with which it has to agree path by path, is compared with SGD itself in
``test_prediction_of_sgd.py``.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from manifold_sde import DirectionDiffusion, Geometry, SamplingNoise, TimeScale, problems
from manifold_sde.errors import (
    ArgumentError,
    ClockRangeError,
    NoiseError,
    StepSizeWarning,
)
from manifold_sde.solvers import DirectionSolution, Solution, predict_sgd, prediction, solve
from manifold_sde.solvers.clock import clock_at

DECAYS = {"constant": 0.05, "schedule": lambda k: 0.05 if k < 200 else 0.01}


def falling(step: int) -> float:
    return 0.03 if step < 150 else 0.01


@pytest.mark.paper("Theorem 4.4")
@pytest.mark.parametrize("kind", list(DECAYS))
def test_it_is_the_direction_at_steps(kind: str) -> None:
    """By (13) and Theorem 3.2 the same numbers as by the clock of each path, on the same paths."""
    problem = problems.mixed_noise_circle()
    lr = falling if kind == "schedule" else 0.02
    steps, norm = [0, 100, 300], 1.1
    found = predict_sgd(problem, norm * problem.minimizer, lr, DECAYS[kind], steps, n_paths=6)
    run = solve(DirectionDiffusion(problem), problem.minimizer, [0.0, 1.0], n_paths=6)
    assert isinstance(run, DirectionSolution)
    wanted = run.at_steps(lr, DECAYS[kind], steps, norm=norm)
    torch.testing.assert_close(found.ys, wanted.ys, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(found.clock, wanted.clock, rtol=1e-12, atol=1e-13)
    assert torch.equal(found.ts, wanted.ts)
    assert found.config.get("ratio") == wanted.config.get("ratio")
    # Without the factor e^{T/2} of Theorem 3.2 the norm is another one.
    T = torch.as_tensor(TimeScale(lr, DECAYS[kind]).discrete_time(steps))
    broken = found.ys * torch.exp(-0.5 * T)[:, None, None]
    assert float((broken - wanted.ys)[-1].norm(dim=-1).min()) > 0.02


@pytest.mark.paper("Equation (10)")
def test_norm_at_constant_trace_is_the_closed_form() -> None:
    problem = problems.great_circle(noise_scale=0.3)
    steps = [10, 300, 2000]
    found = predict_sgd(problem, 0.8 * problem.minimizer, 0.02, 0.05, steps, n_paths=3, dt=0.5)
    kept = torch.tensor(TimeScale(0.02, 0.05).log_shrinkage(steps))
    gained = torch.tensor(TimeScale(0.02, 0.05).log_accumulated(steps))
    fourth = torch.exp(4 * kept) * 0.8**4 + 2 * 0.18 * torch.exp(gained + 4 * kept)
    wanted = fourth.pow(0.25)[:, None].expand(-1, 3)
    torch.testing.assert_close(found.norms, wanted, rtol=1e-9, atol=0.0)


@pytest.mark.paper("Theorem 4.4")
def test_it_starts_where_gradient_flow_ends() -> None:
    """From a start off the manifold: Phi of it, of the same norm, and not the nearest point."""
    problem = problems.varying_circle(amplitude=0.8)
    x0 = torch.tensor([0.5, 0.6, 0.9], dtype=torch.float64)
    found = predict_sgd(problem, x0, 0.01, 0.05, [0, 10], n_paths=2)
    limit = Geometry(problem).limit_map(x0)
    torch.testing.assert_close(found.ys[0], limit.expand(2, -1), rtol=0.0, atol=1e-12)
    flat = torch.tensor([0.5, 0.6, 0.0], dtype=torch.float64)
    nearest = x0.norm() * flat / flat.norm()
    assert float((found.ys[0, 0] - nearest).norm()) > 0.05


def test_what_cannot_be_predicted_is_refused() -> None:
    problem = problems.great_circle()
    with pytest.raises(ArgumentError, match="no step to predict"):
        predict_sgd(problem, problem.minimizer, 0.01, 0.05, [0])
    with pytest.raises(ArgumentError, match="step counts"):
        predict_sgd(problem, problem.minimizer, 0.01, 0.05, [5, 1])
    with pytest.warns(StepSizeWarning, match="unstable"):
        predict_sgd(problem, 0.1 * problem.minimizer, 0.1, 0.05, [1])
    silent = problems.normalized_linear().with_noise(SamplingNoise(1))
    with pytest.raises(NoiseError, match="vanishes"):
        predict_sgd(silent, silent.minimizer, 0.1, 0.1, [1])


@pytest.mark.parametrize("trace", [0.0, 1e-9, 0.3, 40.0])
def test_clock_at_constant_trace(trace: float) -> None:
    """Inverse of E(u) = (e^{2Vu} - 1) / 2V, without overflow, as TimeScale has it."""
    clock = torch.tensor([1e-9, 0.1, 2.0, 1e3], dtype=torch.float64)
    z = 2.0 * trace * clock
    log_elapsed = clock.log() + torch.where(
        z > 0, z + torch.log(-torch.expm1(-z) / z.clamp(min=1e-300)), 0.0 * z
    )
    found = clock_at(log_elapsed, torch.tensor(trace, dtype=torch.float64))
    torch.testing.assert_close(found, clock, rtol=1e-7, atol=1e-16)
    scale = TimeScale(0.02, 0.0)
    wanted = torch.tensor(scale.clock(500, trace, 1.2))
    elapsed = torch.tensor(500 * 0.02**2 / 1.2**4, dtype=torch.float64)
    found = clock_at(elapsed.log(), torch.tensor(trace, dtype=torch.float64))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0.0)


def test_a_run_that_is_too_short_says_how_far_to_go() -> None:
    """Also where the trace varies; what it says is enough, and not much too far."""
    problem = problems.mixed_noise_circle()
    sde, needed = DirectionDiffusion(problem), 0.5

    def run() -> DirectionSolution:
        found = solve(sde, problem.minimizer, [0.0, needed], n_paths=8, dt=0.125)
        assert isinstance(found, DirectionSolution)
        return found

    for _ in range(2):
        with pytest.raises(ClockRangeError) as caught:
            run().at_steps(0.02, 0.02, [1500])
        assert caught.value.needed is not None
        assert caught.value.needed > needed
        needed = caught.value.needed
        with contextlib.suppress(ClockRangeError):
            law = run().at_steps(0.02, 0.02, [1500])
            break
    assert 0.6 * needed < float(law.clock.max()) < needed


def test_where_every_path_is_lost_the_start_says_how_large_steps_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solved = prediction.weights_of_limit

    def lost(*arguments: Any, **options: Any) -> Solution:
        run = solved(*arguments, **options)
        return replace(run, ys=torch.full_like(run.ys, torch.nan))

    problem = problems.great_circle()
    call = (problem, problem.minimizer, 0.01, 0.05, [10])
    kept = predict_sgd(*call, n_paths=2)
    monkeypatch.setattr(prediction, "weights_of_limit", lost)
    found = predict_sgd(*call, n_paths=2).stats
    assert found == pytest.approx(kept.stats, rel=0.05)
