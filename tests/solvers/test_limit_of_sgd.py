"""SGD and its prediction speak of the same thing: Phi of the weights, and not the weights.

From a start off the manifold, at a moment when SGD has not yet come near it. On the great circle
Phi keeps the longitude and the norm, so that the law of Phi(x_k) is known: the longitude of the
limit is normal with the variance s^2 u.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from manifold_sde import (
    Geometry,
    Problem,
    SamplingNoise,
    SphericalNoise,
    TimeScale,
    WeightDecaySDE,
    problems,
)
from manifold_sde.errors import LimitMapError, LostPathsWarning
from manifold_sde.networks import WeightNorm
from manifold_sde.noise import Noise
from manifold_sde.solvers import Solution, predict_sgd, run_sgd, solve

PROBLEM = problems.great_circle(noise_scale=0.3)
START = torch.tensor([0.8, 0.0, 0.6], dtype=torch.float64)
RATES = (0.01, 0.05)
STEPS = [300]
PATHS = 400
#: Standard errors of one of four comparisons: false alarms of 2.5e-4 in all.
LIMIT = 4.0


def features(x: Tensor) -> Tensor:
    """Cosine to the start, and the cosine and sine of the longitude."""
    direction = x / x.norm(dim=1, keepdim=True)
    return torch.stack([direction @ START, direction[:, 0], direction[:, 1]], 1)


def scores(one: Solution, other: Solution) -> Tensor:
    (a, error_a), (b, error_b) = one.expectation(features), other.expectation(features)
    return ((a - b) / (error_a.square() + error_b.square()).sqrt())[-1]


@pytest.fixture(scope="module")
def sgd() -> Solution:
    return run_sgd(PROBLEM, START, *RATES, STEPS, n_paths=PATHS, seed=1)


@pytest.fixture(scope="module")
def predicted() -> Solution:
    return predict_sgd(PROBLEM, START, *RATES, STEPS, n_paths=PATHS, seed=2, compile=False)


@pytest.mark.paper("Theorem 4.4")
def test_the_limit_of_sgd_has_the_predicted_law(sgd: Solution, predicted: Solution) -> None:
    limit = sgd.limit(Geometry(PROBLEM))
    assert float(scores(limit, predicted).abs().max()) < LIMIT
    clock = float(TimeScale(*RATES).clock(STEPS[-1], 2 * 0.3**2, 1.0))
    mean, error = limit.expectation(features)
    assert abs(float(mean[-1, 1]) - math.exp(-0.045 * clock)) < LIMIT * float(error[-1, 1])
    # Not the weights: the comparison as it suggests itself.
    assert float(scores(sgd, predicted).abs().max()) > 2.5 * LIMIT


def test_the_limit_keeps_times_norms_and_clocks(sgd: Solution) -> None:
    limit = sgd.limit(Geometry(PROBLEM))
    assert torch.equal(limit.ts, sgd.ts)
    assert torch.equal(limit.clock, sgd.clock)
    torch.testing.assert_close(limit.norms, sgd.norms, rtol=1e-12, atol=0.0)
    assert float(limit.ys[..., 2].abs().max()) < 1e-12
    assert limit.stats["lost_paths"] == 0
    exact = PROBLEM.facts.limit_map(sgd.ys)
    torch.testing.assert_close(limit.ys, exact, rtol=0.0, atol=1e-10)
    single = run_sgd(PROBLEM, START, *RATES, [0, 5]).limit(Geometry(PROBLEM))
    assert single.ys.shape == (2, 3)


def test_states_without_a_limit_are_refused(sgd: Solution) -> None:
    everywhere = Solution(sgd.ts, torch.full_like(sgd.ys, torch.nan), sgd.clock)
    with pytest.raises(LimitMapError, match="no state has a limit"):
        everywhere.limit(Geometry(PROBLEM))


def test_a_start_on_a_saddle_asks_for_another_start() -> None:
    pole = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    run = run_sgd(PROBLEM, pole, *RATES, [0, 200], n_paths=4)
    with pytest.warns(LostPathsWarning, match="another start") as caught:
        run.limit(Geometry(PROBLEM))
    assert "stalled on a saddle" in str(caught[0].message)
    assert "learning rate" not in str(caught[0].message)
    with pytest.raises(LimitMapError, match="another start"):
        run_sgd(PROBLEM, pole, *RATES, [0], n_paths=4).limit(Geometry(PROBLEM))


def test_a_start_off_the_manifold_is_said(sgd: Solution, predicted: Solution) -> None:
    assert predicted.stats["start_moved"] == pytest.approx(math.sqrt(0.4))
    for shown in (repr(predicted), predicted._repr_html_()):
        assert "0.632 away at norm 1 (SGD goes there first)" in " ".join(shown.split())
    on = predict_sgd(PROBLEM, PROBLEM.minimizer, *RATES, STEPS, n_paths=2, compile=False)
    assert "start_moved" not in on.stats
    assert "goes there first" not in repr(on) + repr(sgd)


NONE = "clock u  none, as the loss is not scale-invariant"


def test_a_loss_without_scale_invariance_has_no_clock(sgd: Solution) -> None:
    off = Problem(lambda x: 0.5 * (x[2] / x.norm()) ** 2 + 0.1 * x @ x, 3, SphericalNoise(0.1))
    run = run_sgd(off, START, *RATES, [0, 5], n_paths=2)
    assert 0.1 < run.stats["radial_gradient"] <= 1.0
    assert NONE in repr(run)
    assert "radial_gradient" not in sgd.stats
    assert "clock u  up to" in repr(sgd)
    continuous = solve(WeightDecaySDE(off, *RATES), START, [0, 1], n_paths=2, compile=False)
    assert continuous.stats["radial_gradient"] == run.stats["radial_gradient"]
    assert NONE in repr(continuous)


@pytest.mark.parametrize(
    ("layers", "least"),
    [
        ((WeightNorm(nn.Linear(5, 3, bias=False)),), None),
        ((nn.Linear(5, 3, bias=False), nn.LayerNorm(3, elementwise_affine=False)), 1e-8),
        ((nn.Linear(5, 3),), 0.01),
    ],
    ids=["without", "eps", "last layer"],
)
@pytest.mark.parametrize("noise", [SphericalNoise(0.1), SamplingNoise()], ids=["whole", "sampled"])
def test_a_network_without_scale_invariance_has_no_clock(
    layers: tuple[nn.Module, ...], least: float | None, noise: Noise
) -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(12, 5), torch.randn(12, 3)
    module = nn.Sequential(*layers)
    problem = Problem.from_module(module, nn.MSELoss(), inputs, targets, noise)
    run = run_sgd(problem, problem.vector(), *RATES, [0, 2])
    if least is None:
        assert "radial_gradient" not in run.stats
        assert "clock u  up to" in repr(run)
    else:
        assert least < run.stats["radial_gradient"] < 1.0
        assert NONE in repr(run)
