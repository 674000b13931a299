"""Survivors are not averaged without a word: one rule for everything that averages over paths.

A loss whose minimisers are a strongly waved curve, followed in steps that lose many paths.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manifold_sde import DirectionDiffusion, Geometry, LeastSquaresProblem, SphericalNoise, problems
from manifold_sde.errors import LostPathsError, LostPathsWarning, ManifoldSDEError, NotMixedWarning
from manifold_sde.experiments.simulate.summary import summarize
from manifold_sde.solvers import (
    DirectionSolution,
    Solution,
    extrapolate,
    halving,
    multilevel,
    run_sgd,
    solve,
)

PATHS = 48


def wave(x: Tensor) -> Tensor:
    """The curve z = 0.4 sin 9 angle, on the cone."""
    angle = torch.atan2(x[1], x[0])
    height = x[2] - 0.4 * torch.sin(9.0 * angle) * (x[0] * x[0] + x[1] * x[1]).sqrt()
    return (height / (x * x).sum().sqrt()).reshape(1)


def height(y: Tensor) -> Tensor:
    return y[:, 2].square()


PROBLEM = LeastSquaresProblem(wave, 3, SphericalNoise(0.3), rank=1, name="waved circle")
START = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)


def waved(**options: Any) -> DirectionSolution:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LostPathsWarning)
        found = solve(
            DirectionDiffusion(PROBLEM),
            START,
            [0.0, 0.6, 4.8],
            n_paths=PATHS,
            method="euler",
            dt=0.6,
            compile=False,
            **options,
        )
    assert isinstance(found, DirectionSolution)
    return found


@pytest.fixture(scope="module", autouse=True)
def no_halving() -> Iterator[None]:
    """Steps are not halved here, which would lead all paths home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(halving, "MOST_HALVINGS", 0)
        yield


@pytest.fixture(scope="module")
def run() -> DirectionSolution:
    found = waved()
    assert 4 < found.stats["lost_paths"] < PATHS - 4
    return found


AVERAGES: dict[str, Callable[[DirectionSolution], Any]] = {
    "expectation": lambda run: run.expectation(height),
    "moments of SGD": lambda run: run.at(ratio=0.5, times=[0.1, 0.95]).expectation(height),
    "equilibrium": lambda run: run.equilibrium(height),
    "observables": lambda run: waved(observables={"height": height}),
    "extrapolate": lambda run: extrapolate(
        DirectionDiffusion(PROBLEM),
        START,
        [0.0, 2.4],
        height,
        n_paths=PATHS,
        dt=0.6,
        method="euler",
        compile=False,
    ),
    "multilevel": lambda run: multilevel(
        DirectionDiffusion(PROBLEM), START, 2.4, height, tolerance=0.1, dt=1.2, compile=False
    ),
    "summary of the command": lambda run: summarize(PROBLEM, run),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_nothing_averages_survivors(name: str, run: DirectionSolution) -> None:
    """Where more than one in a hundred is lost; paths that are there have their way out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LostPathsWarning)
        with pytest.raises(LostPathsError, match="paths lost") as caught:
            AVERAGES[name](run)
    error = caught.value
    assert error.lost > 0.01 * error.paths
    assert "not a random sample" in error.expected
    assert "For the survivors" in error.remedy
    if name in ("expectation", "observables", "extrapolate", "equilibrium"):
        assert error.partial is not None


def test_the_survivors_are_there_all_the_same(run: DirectionSolution) -> None:
    """In the error, and among the states: the means that used to be returned."""
    alive = torch.isfinite(run.ys[-1]).all(-1)
    assert 2 < int(alive.sum()) < PATHS - 4
    mean = height(run.ys[-1, alive]).mean()
    with pytest.raises(LostPathsError) as caught:
        run.expectation(height)
    torch.testing.assert_close(caught.value.partial[0][-1], mean, rtol=1e-12, atol=0.0)
    assert caught.value.lost == run.stats["lost_paths"]
    with pytest.raises(LostPathsError) as caught:
        waved(observables={"height": height})
    observed: Solution = caught.value.partial
    torch.testing.assert_close(observed.observed["height"][0][-1], mean, rtol=1e-12, atol=0.0)
    assert observed.stats["lost_at_times"][-1] == caught.value.lost


def states(lost: dict[int, int], paths: int = 200, antithetic: bool = False) -> Solution:
    """Three times of normal states, with so many paths lost from a time on."""
    generator = torch.Generator().manual_seed(1)
    ys = torch.randn(3, paths, 2, generator=generator, dtype=torch.float64)
    for time, count in lost.items():
        ys[time:, :count] = torch.nan
    config = {"antithetic": antithetic}
    return Solution(torch.arange(3.0), ys, torch.zeros(3, paths), config=config)


def first(y: Tensor) -> Tensor:
    return y[:, 0]


def test_up_to_one_in_a_hundred_is_a_warning() -> None:
    few = states({1: 2})
    with pytest.warns(LostPathsWarning, match="2 of 200 paths lost by 1"):
        mean, _ = few.expectation(first)
    torch.testing.assert_close(mean[-1], few.ys[-1, 2:, 0].mean())
    with pytest.warns((LostPathsWarning, NotMixedWarning)) as told:
        few.equilibrium(first, burn_in=0.0)
    assert any("2 of 200 paths lost between 0 and 2" in str(w.message) for w in told)
    with pytest.raises(LostPathsError, match="3 of 200"):
        states({1: 3}).expectation(first)


def test_paths_that_are_lost_later_do_not_count() -> None:
    run = states({1: 2, 2: 60})
    with pytest.raises(LostPathsError, match="60 of 200 paths lost by 2"):
        run.expectation(first)
    with pytest.warns(LostPathsWarning, match="2 of 200"):
        mean, _ = run.expectation(first, until=1.5)
    assert mean.shape == (2,)
    mean, error = run.expectation(first, until=0)
    assert float(mean.abs()) < 5.0 * float(error)
    for until in (-1.0, "1", True):
        with pytest.raises(ManifoldSDEError, match="until is not a time"):
            run.expectation(first, until=until)  # type: ignore[arg-type]


def test_moments_before_the_loss_can_be_asked_for(run: DirectionSolution) -> None:
    """``at`` steps the paths again: what is lost after its times is not lost there."""
    early = run.at(ratio=0.5, times=[1e-4])
    assert early.stats["lost_paths"] == 0
    mean, error = early.expectation(height)
    assert float(mean[0]) < 0.01
    assert float(error[0]) > 0.0


def test_moments_of_a_path_that_is_lost_before_are_nan(run: DirectionSolution) -> None:
    """Not the last state before it was lost, as they once were."""
    with pytest.warns(LostPathsWarning, match="of 48 paths were lost"):
        found = run.at(ratio=0.5, times=[0.1, 0.95])
    lost = torch.isnan(found.ys[-1]).any(-1)
    assert found.stats["lost_paths"] == int(lost.sum()) > 2
    torch.testing.assert_close(torch.isnan(found.clock[-1]), lost)
    # Those that are not lost at the end of the run are not lost on the way to it.
    assert not bool((lost & torch.isfinite(run.ys[-1]).all(-1)).any())


def test_runs_of_sgd_that_blow_up_are_no_survivors() -> None:
    problem = problems.great_circle()
    run = run_sgd(problem, problem.minimizer, 0.01, 0.05, [10, 20], n_paths=30)
    ys = run.ys.clone()
    ys[1, :4] = torch.inf
    blown = dataclasses.replace(run, ys=ys)
    with pytest.raises(LostPathsError, match="4 of 30") as caught:
        blown.expectation(first)
    assert "learning rate" in caught.value.remedy
    with pytest.warns(LostPathsWarning, match="4 of 30 paths have a state"):
        limits = blown.limit(Geometry(problem))
    with pytest.raises(LostPathsError, match="4 of 30"):
        limits.expectation(first)


def test_multilevel_warns_of_few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two of some thousand paths: the estimate is returned, with its count and a warning."""
    from manifold_sde.solvers import multilevel_estimate

    whole = multilevel_estimate.coupled_values
    spoiled: list[int] = []

    def losing(simulation: Any, *arguments: Any, **options: Any) -> Any:
        for values, valid in whole(simulation, *arguments, **options):
            if simulation.first_path == 0:
                valid[-1, :2] = False
                spoiled.append(2)
            yield values, valid

    monkeypatch.setattr(multilevel_estimate, "coupled_values", losing)
    problem = problems.great_circle(noise_scale=0.6)
    with pytest.warns(LostPathsWarning, match="2 of "):
        found = multilevel(
            DirectionDiffusion(problem), problem.minimizer, 1.0, first, tolerance=0.05, dt=0.5
        )
    assert found.lost == sum(spoiled) == 2
