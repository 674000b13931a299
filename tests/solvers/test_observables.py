"""Runs that keep statistics and not paths: the statistics are those of the paths not kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from manifold_sde import DirectionDiffusion, LimitingDiffusion, WeightDecaySDE, problems
from manifold_sde.errors import ArgumentError, LostPathsError, LostPathsWarning
from manifold_sde.solvers import Solution, halving, solve
from manifold_sde.solvers.integrate import integrate
from manifold_sde.solvers.simulation import Simulation
from manifold_sde.verification.statistics import detectable_variance_ratio, variance_ratio

FUNCTIONS = {
    "first": lambda y: y[:, 0],
    "products": lambda y: y[:, :, None] * y[:, None, :],
    "positive": lambda y: y[:, 1] > 0,
}
FALSE_ALARM = 1e-4


def sgd_like(**options: Any) -> Solution:
    problem = problems.great_circle(noise_scale=1.0)
    sde = WeightDecaySDE(problem, lr=0.1, weight_decay=0.1)
    times = [0.0, 2.5, 6.0]
    return solve(sde, problem.minimizer, times, compile=False, chunk_size=6, **options)


def direction(**options: Any) -> Solution:
    problem = problems.mixed_noise_circle()
    sde = DirectionDiffusion(problem)
    times = [0.0, 0.2, 0.4]
    return solve(
        sde,
        problem.minimizer,
        times,
        method="euler",
        dt=0.2,
        compile=False,
        chunk_size=6,
        **options,
    )


def limit(**options: Any) -> Solution:
    problem = problems.great_circle()
    sde = LimitingDiffusion(problem)
    return solve(sde, problem.minimizer, [0.0, 0.3], dt=0.3, compile=False, chunk_size=6, **options)


def numpy_statistics(solution: Solution, name: str, pairs: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error from kept paths, by NumPy; lost paths (or pairs) left out."""
    means, errors = [], []
    for states in solution.ys.numpy():
        values = FUNCTIONS[name](torch.from_numpy(states)).double().numpy()
        values[np.isnan(states).any(-1)] = np.nan
        if pairs:
            values = 0.5 * (values[0::2] + values[1::2])
        values = values[~np.isnan(values.reshape(len(values), -1)).any(-1)]
        means.append(values.mean(0))
        errors.append(values.std(0, ddof=1) / np.sqrt(len(values)))
    return np.stack(means), np.stack(errors)


@pytest.mark.parametrize("run", [sgd_like, direction, limit])
@pytest.mark.parametrize("pairs", [False, True])
def test_observables_are_the_statistics_of_the_kept_paths(run, pairs: bool) -> None:
    """Three chunks, the last of them shorter; the same seed."""
    kept = run(n_paths=16, seed=4, antithetic=pairs)
    observed = run(n_paths=16, seed=4, antithetic=pairs, observables=FUNCTIONS)
    assert kept.ys.shape[1] == 16
    assert observed.ys.shape == (len(kept.ts), 0, 3)
    assert observed.clock.shape == (len(kept.ts), 0)
    for name, function in FUNCTIONS.items():
        mean, error = numpy_statistics(kept, name, pairs)
        for found in (observed.observed[name], kept.expectation(function)):
            np.testing.assert_allclose(found[0], mean, rtol=0, atol=1e-14)
            np.testing.assert_allclose(found[1], error, rtol=0, atol=1e-14)
    assert float(observed.observed["products"][1][-1].max()) > 1e-3, "nothing moved"


def test_statistics_of_survivors_are_in_the_error_that_refuses_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step so large that some paths end too far from the manifold, and is not halved."""
    monkeypatch.setattr(halving, "MOST_HALVINGS", 0)
    problem = problems.mixed_noise_circle()
    arguments: Any = (DirectionDiffusion(problem), problem.minimizer, [0.0, 20.0, 40.0])
    options: Any = {"n_paths": 30, "method": "euler", "dt": 20.0, "compile": False, "chunk_size": 8}
    with pytest.warns(LostPathsWarning):
        kept = solve(*arguments, **options)
    with pytest.raises(LostPathsError) as caught:
        solve(*arguments, **options, observables=FUNCTIONS)
    observed = caught.value.partial
    lost = torch.isnan(kept.ys).any(-1).sum(1)
    assert 0 < int(lost[1]) < int(lost[2]) < 28, "choose another step"
    assert observed.stats["lost_at_times"] == lost.tolist()
    assert observed.stats["lost_paths"] == kept.stats["lost_paths"] == int(lost[-1])
    for name in FUNCTIONS:
        mean, error = numpy_statistics(kept, name, pairs=False)
        np.testing.assert_allclose(observed.observed[name][0], mean, rtol=0, atol=1e-14)
        np.testing.assert_allclose(observed.observed[name][1], error, rtol=0, atol=1e-14)


def divide_in_place(y: torch.Tensor) -> torch.Tensor:
    return y.div_(y.norm(dim=1, keepdim=True) * 2.0)[:, 0]


def test_an_observable_that_works_in_place_changes_nothing_else() -> None:
    """Not the other observables, and not the states of a solution."""
    changing = {"changing": divide_in_place, "first": FUNCTIONS["first"]}
    observed = limit(n_paths=8, observables=changing)
    kept = limit(n_paths=8)
    before = kept.ys.clone()
    found = kept.expectation(divide_in_place)
    assert torch.equal(kept.ys, before)
    torch.testing.assert_close(found[0], observed.observed["changing"][0], rtol=1e-14, atol=0.0)
    torch.testing.assert_close(
        observed.observed["first"][0], kept.ys[:, :, 0].mean(1), rtol=1e-14, atol=0.0
    )
    run = Solution(torch.arange(40.0), torch.randn(40, 30, 3), torch.zeros(40, 30))
    before = run.ys.clone()
    run.equilibrium(divide_in_place)
    assert torch.equal(run.ys, before)
    # The twin: had it been given the states themselves, they would be others now.
    divide_in_place(run.ys[0])
    assert not torch.equal(run.ys, before)


def fails(y: torch.Tensor) -> torch.Tensor:
    raise ZeroDivisionError("by a norm")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: limit(n_paths=4, observables={"a": FUNCTIONS["first"], "b": fails}), "'b'"),
        (lambda: limit(n_paths=4).expectation(fails), "the function"),
        (lambda: limit(n_paths=40).equilibrium(fails), "f raises"),
    ],
)
def test_an_observable_that_raises_is_named(call: Any, name: str) -> None:
    with pytest.raises(ArgumentError, match=name) as caught:
        call()
    assert "ZeroDivisionError: by a norm" in caught.value.received
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_one_path_has_no_standard_error() -> None:
    one = sgd_like(observables={"first": FUNCTIONS["first"]})
    kept = sgd_like()
    mean, error = one.observed["first"]
    assert torch.equal(mean, kept.ys[:, 0])
    assert torch.isnan(error).all()


@pytest.mark.parametrize("name", ["even", "odd"])
def test_standard_errors_of_antithetic_paths_are_true(name: str) -> None:
    """The spread of 200 independent means of 50 pairs against the standard error stated.

    False alarm 1e-4; at 200 means a variance that is 1.67 times the one stated, or 0.56 times, is
    found with probability 0.99. The twin, which takes the paths of a pair for independent, states
    half the variance where they are alike (even functions) and many times it where they are
    opposite.
    """
    low, high = detectable_variance_ratio(200, FALSE_ALARM, 0.01)
    assert 0.5 < low < 1 < high < 2
    problem = problems.great_circle()
    run = solve(
        DirectionDiffusion(problem),
        problem.minimizer,
        [0.0, 2.0],
        n_paths=20_000,
        chunk_size=20_000,
        method="euler",
        dt=0.5,
        antithetic=True,
        compile=False,
    )
    column = {"even": 0, "odd": 1}[name]
    blocks = run.ys[-1, :, column].reshape(200, 100)
    means = blocks.mean(1)

    def stated(pairs: bool) -> float:
        config = {**run.config, "antithetic": pairs}
        errors = [
            Solution(run.ts[-1:], part[None], torch.zeros(1, len(part)), config=config).expectation(
                lambda y: y[:, column]
            )[1]
            for part in run.ys[-1].reshape(200, 100, 3)
        ]
        return float(torch.cat(errors).square().mean())

    deviations = means - means.mean()
    assert variance_ratio(deviations, stated(pairs=True)).p_value > FALSE_ALARM
    assert variance_ratio(deviations, stated(pairs=False)).p_value < FALSE_ALARM


def test_a_chunk_gives_back_no_path() -> None:
    """What leaves a chunk, and so all that a run keeps, does not grow with steps or paths."""
    problem = problems.great_circle()
    sizes = set()
    for n_paths, last in ((4, 2.0), (64, 2.0), (64, 8.0)):
        simulation = Simulation.of(
            WeightDecaySDE(problem, 0.1, 0.1),
            problem.minimizer,
            [0.0, last],
            n_paths=n_paths,
            method="euler",
            observables=FUNCTIONS,
            compile=False,
            chunk_size=64,
        )
        (chunk,) = simulation.chunks()
        outcome = integrate(simulation, chunk)
        assert outcome.steps == last
        assert all(value.numel() == 0 for value in outcome.arrays().values())
        kept = [outcome.lost, *outcome.arrays().values()]
        for moments in outcome.moments.values():
            kept += [moments.count, moments.mean, moments.squares]
        sizes.add(sum(tensor.untyped_storage().nbytes() for tensor in kept))
    # Two times, for each function a count, and mean and squares of 1, 9 and 1 numbers; the lost.
    assert sizes == {8 * 2 * (3 + 2 * (1 + 9 + 1) + 1)}


def test_paths_that_were_not_kept_cannot_be_asked_for() -> None:
    observed = direction(n_paths=4, observables={"first": FUNCTIONS["first"]})
    for call in (
        lambda: observed.expectation(FUNCTIONS["first"]),
        lambda: observed.equilibrium(FUNCTIONS["first"]),
        lambda: observed.at(ratio=0.5, times=[0.1]),
        lambda: observed.at_steps(0.01, 0.05, 10),
    ):
        with pytest.raises(ArgumentError, match="the paths were not kept") as caught:
            call()
        assert "'first'" in str(caught.value)
        assert "solution.observed" in str(caught.value)


def test_repr_says_what_was_observed() -> None:
    observed = direction(n_paths=4, observables={"first": FUNCTIONS["first"]})
    assert repr(observed).startswith(
        "DirectionSolution(observed 'first' over 4 paths, 3 times from 0 to 0.4, dim=3)"
    )
