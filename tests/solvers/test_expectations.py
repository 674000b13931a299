"""Extrapolation and the multilevel estimator against the exact law on the circle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from manifold_sde import DirectionDiffusion, problems
from manifold_sde.errors import ArgumentError
from manifold_sde.solvers import extrapolate, multilevel
from manifold_sde.solvers.multilevel_estimate import MultilevelEstimate
from manifold_sde.verification.exact import CircleDiffusion, SphereLaw

CLOCK = 3.0
#: Deviations in standard errors: false alarm 6e-5 for a two-sided test.
LIMIT = 4.0

PROBLEM = problems.varying_circle(noise_scale=0.6)


def exact() -> float:
    return float(CircleDiffusion.reversible(PROBLEM).expectation(np.cos, CLOCK))


def first(y: Tensor) -> Tensor:
    return y[:, 0]


def direction() -> DirectionDiffusion:
    return DirectionDiffusion(PROBLEM, "stratonovich")


def found(method: str, dt: float, **options: Any) -> Any:
    return extrapolate(
        direction(),
        PROBLEM.minimizer,
        [0.0, CLOCK],
        first,
        n_paths=16384,
        dt=dt,
        method=method,
        **options,
    )


def test_extrapolation_takes_the_bias_away() -> None:
    """Midpoint at steps of 1/2 and 1/4: the bias of the larger is six of its standard errors."""
    one = found("midpoint", 0.5)
    mean, error = float(one.mean[-1]), float(one.standard_error[-1])
    assert abs(mean - exact()) < LIMIT * error
    # What it must find: the larger step alone, and the weights of another order.
    assert abs(float(one.coarse[-1]) - exact()) > LIMIT * error
    # The step that is halved again differs by what was predicted, up to terms of higher order.
    bias, bias_error = float(one.bias[-1]), float(one.bias_error[-1])
    assert bias < -LIMIT * bias_error
    actual = exact() - float(one.fine[-1])
    assert abs(actual - bias) < LIMIT * error
    assert one.order == 1
    assert one.lost == 0


def test_split_is_extrapolated_by_its_own_order() -> None:
    one = found("auto", 1.0)
    assert one.order == 2
    assert abs(float(one.mean[-1]) - exact()) < LIMIT * float(one.standard_error[-1])
    # Of second order, half a step leaves little: the tolerance of the sampling is not reached.
    assert abs(float(one.bias[-1])) < 0.01


def test_extrapolation_does_not_depend_on_the_chunks() -> None:
    options: dict[str, Any] = {"n_paths": 40, "dt": 0.5, "method": "heun"}
    arguments = (direction(), PROBLEM.minimizer, [0.0, 1.0], lambda y: y[:, :2])
    whole, parts = (extrapolate(*arguments, chunk_size=size, **options) for size in (40, 7))
    assert whole.mean.shape == (2, 2)
    torch.testing.assert_close(whole.mean, parts.mean, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(whole.standard_error, parts.standard_error, rtol=1e-9, atol=1e-14)


@pytest.fixture(scope="module")
def estimate() -> MultilevelEstimate:
    return multilevel(
        direction(),
        PROBLEM.minimizer,
        CLOCK,
        first,
        tolerance=0.012,
        dt=0.5,
        method="heun",
        seed=1,
    )


def test_multilevel_meets_its_tolerance(estimate: MultilevelEstimate) -> None:
    assert float(estimate.bias) <= 0.004
    assert float(estimate.standard_error**2 + estimate.bias**2) ** 0.5 <= 0.012
    apart = abs(float(estimate.mean) - exact())
    assert apart < LIMIT * float(estimate.standard_error) + 2.0 * float(estimate.bias)
    # Fewer and fewer paths of smaller and smaller variance.
    counts = [level.paths for level in estimate.levels]
    assert counts[0] > 4 * counts[-1]
    assert counts == sorted(counts, reverse=True)
    variances = [float(level.variance) for level in estimate.levels]
    assert variances[-1] < 0.1 * variances[0]
    # What all these paths would cost at the smallest step.
    smallest = estimate.levels[-1].steps / 3.0
    single = float(estimate.levels[0].variance) / (0.012 / 2**0.5) ** 2 * smallest
    assert estimate.steps < 0.75 * single


def test_multilevel_without_its_corrections_misses(estimate: MultilevelEstimate) -> None:
    """The broken twin is the first level alone: its bias is many standard errors."""
    alone = estimate.levels[0]
    error = float((alone.variance / alone.paths).sqrt())
    assert abs(float(alone.mean) - exact()) > LIMIT * error + 2.0 * float(estimate.bias)


def test_multilevel_where_the_noise_does_not_commute() -> None:
    """A second moment on the 2-sphere, whose law is known, by all schemes, to 0.004."""
    problem = problems.great_sphere(4, noise_scale=0.6)
    law = SphereLaw.of(problem)
    assert law.dimension == 2

    def square(y: Tensor) -> Tensor:
        return (y[:, 0] + 0.5 * y[:, 1]).square()

    # E y_0^2 = 1/3 + 2/3 exp(-3 s^2 u), and the other coordinates share the rest.
    first = 1.0 / 3.0 + 2.0 / 3.0 * np.exp(-law.rate(2) * 2.0)
    want = first + 0.25 * (1.0 - first) / 2.0
    for method in ("weak2", "heun", "midpoint"):
        got = multilevel(
            DirectionDiffusion(problem),
            problem.minimizer,
            2.0,
            square,
            tolerance=4e-3,
            dt=2.0,
            method=method,
            seed=3,
        )
        error = LIMIT * float(got.standard_error) + 2.0 * float(got.bias)
        assert abs(float(got.mean) - want) < error < 0.02
        alone = got.levels[0]
        assert abs(float(alone.mean) - want) > error


def test_multilevel_prints_its_levels(estimate: MultilevelEstimate) -> None:
    table = str(replace(estimate, levels=estimate.levels[:2])).splitlines()
    assert len(table) == 4
    assert max(map(len, table)) <= 80
    assert table[-1].startswith(f"{float(estimate.mean):.6g} +- ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "euler"}, "not close to each other"),
        ({"tolerance": 0.0}, "tolerance is not an error"),
        ({"dt": None}, "dt is not a step"),
        ({"tolerance": 1e-9, "max_paths": 10_000}, "out of reach"),
    ],
)
def test_bad_input_to_multilevel(options: dict[str, Any], message: str) -> None:
    arguments = {"tolerance": 0.1, "dt": 0.5, **options}
    with pytest.raises(ArgumentError, match=message):
        multilevel(direction(), PROBLEM.minimizer, 1.0, first, **arguments)


def test_bad_input_to_extrapolation() -> None:
    arguments = (direction(), PROBLEM.minimizer, [0.0, 1.0], first)
    with pytest.raises(ArgumentError, match="needs several paths"):
        extrapolate(*arguments, n_paths=1, dt=0.5)
    with pytest.raises(ArgumentError, match="there is no such method"):
        extrapolate(*arguments, n_paths=4, dt=0.5, method="milstein")
