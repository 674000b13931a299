r"""SGD and the SDE (3) approach the law of (13) as the learning rate falls.

With eps = eta / |x|^2 the difference in an expectation is b_1 eps + b_2 eps^2 + ..., and eps goes
like sqrt(eta lambda). At a fixed ratio of the rates that is like eta: 2 D(eta) - D(2 eta), in which
the first term cancels, is 0 up to the second order, and the slope of log |D| in log eta is 1. At a
fixed weight decay the slope is 1/2.

Differences are judged at 4 standard errors: false alarms below 1e-4, where the terms left out are
below one of them. At the size of the quick tests a clock is found (miss rate 0.02) that is wrong by
the factor 0.5 or 2; the thorough ones find 10 per cent for SGD (miss rate below 1e-6).
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from manifold_sde import Geometry, TimeScale, WeightDecaySDE, problems
from manifold_sde.solvers import run_sgd, solve
from manifold_sde.verification.exact import CircleDiffusion
from tests.solvers import exponential_circle as circle

#: Means of the observable, with their standard errors and times T.
Means = list[tuple[float, float, float]]
#: Differences from the law, with their standard errors.
Differences = list[tuple[float, float]]
Z = 4.0
RATES = (0.08, 0.04)
QUICK = 16384
LARGE = 1 << 19


@functools.cache
def of_sgd(lr: float, n_paths: int, *, decay: float | None = None) -> tuple[float, float, float]:
    """Mean over SGD after floor(tau^{-1}(T)) steps, of Phi of the weights; and their time.

    The time is that of whole steps, as ``solution.at_steps`` has it: that of (12) up to
    O(eta lambda), which is of second order here.
    """
    weight_decay = circle.RATIO * lr if decay is None else decay
    scale = TimeScale(lr, weight_decay)
    steps = scale.steps(circle.TIME)
    run = run_sgd(
        circle.problem(),
        circle.START,
        lr,
        weight_decay,
        steps,
        n_paths=n_paths,
        seed=round(1000 * lr),
        compile=n_paths > QUICK,
    )
    return *circle.sampled(run.ys[-1]), float(scale.discrete_time(steps))


@functools.cache
def of_sde(lr: float, n_paths: int) -> tuple[float, float, float]:
    """Mean over the SDE (3) at tau^{-1}(T), of Phi of the weights."""
    weight_decay = circle.RATIO * lr
    end = float(TimeScale(lr, weight_decay).tau_inverse(circle.TIME))
    run = solve(
        WeightDecaySDE(circle.problem(), lr, weight_decay, "stratonovich"),
        circle.START,
        [0.0, end],
        n_paths=n_paths,
        method="heun",
        dt=0.5,
        seed=round(1000 * lr),
        compile=n_paths > QUICK,
    )
    return *circle.sampled(run.ys[-1]), circle.TIME


def differences(means: Means, factor: float = 1.0) -> Differences:
    """Differences from the law of (13) at these times, multiplied by a factor."""
    law = circle.law()
    return [
        (mean - circle.expectation(law.at(factor * time, circle.ANGLE)), error)
        for mean, error, time in means
    ]


def extrapolated(
    rates: tuple[float, ...], found: Differences, power: float = 1.0
) -> tuple[float, float]:
    """Difference at rate 0, with its standard error: Richardson's extrapolation.

    A polynomial in that power of the rate goes through all differences.
    """
    nodes = np.array(rates) ** power
    weights = [np.prod([b / (b - a) for b in nodes if b != a]) for a in nodes]
    value = sum(w * d for w, (d, _) in zip(weights, found, strict=True))
    error = math.hypot(*(w * e for w, (_, e) in zip(weights, found, strict=True)))
    return float(value), error


def slope(rates: tuple[float, ...], found: Differences) -> tuple[float, float]:
    """Weighted least-squares slope of log |D| in log eta, with its standard error."""
    x = np.log(rates)
    y = np.log([abs(d) for d, _ in found])
    weight = np.array([(d / e) ** 2 for d, e in found])
    away = x - np.average(x, weights=weight)
    total = float((weight * away**2).sum())
    return float((weight * away * y).sum()) / total, 1.0 / math.sqrt(total)


def test_phi_of_the_test_problem_is_that_of_gradient_flow() -> None:
    x = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x[:, 2] *= 0.4
    found = Geometry(circle.problem()).limit_map(x)
    torch.testing.assert_close(circle.limit_map(x), found, rtol=0.0, atol=1e-8)


def test_law_of_the_test_problem_is_that_of_differences_of_phi() -> None:
    def curve(theta: np.ndarray) -> np.ndarray:
        return np.stack([np.cos(theta), np.sin(theta), 0.0 * theta], axis=-1)

    def phi(x: np.ndarray) -> np.ndarray:
        return circle.limit_map(torch.from_numpy(np.asarray(x))).numpy()

    measured = CircleDiffusion.of(circle.problem(), curve, limit_map=phi)
    np.testing.assert_allclose(measured.drift, circle.law().drift, atol=1e-6)
    np.testing.assert_allclose(measured.variance, circle.law().variance, atol=1e-6)


@pytest.mark.paper("Theorem 4.4")
def test_sgd_tends_to_the_limit() -> None:
    """The difference is there at a large rate, and is gone in the limit."""
    large = differences([of_sgd(0.16, QUICK)])[0]
    assert abs(large[0]) > Z * large[1]
    found = differences([of_sgd(lr, QUICK) for lr in RATES])
    value, error = extrapolated(RATES, found)
    assert abs(value) <= Z * error, found


@pytest.mark.paper("Theorem 4.1")
def test_the_sde_of_sgd_tends_to_the_limit() -> None:
    """Its curvature in the rate leaves 0.013 here, less than half of a standard error."""
    value, error = extrapolated(RATES, differences([of_sde(lr, QUICK // 4) for lr in RATES]))
    assert abs(value) <= Z * error


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_another_time_is_not_that_of_the_limit(factor: float) -> None:
    """Broken twin: with a clock that is wrong by a factor the difference stays."""
    for run, n_paths in ((of_sgd, QUICK), (of_sde, QUICK // 4)):
        found = differences([run(lr, n_paths) for lr in RATES], factor)
        value, error = extrapolated(RATES, found)
        assert abs(value) > Z * error, run


def shown_differences() -> list[float]:
    """The row of docs/solve.md, at the rates 0.16, 0.08, 0.04 and 0.02."""
    page = (Path(__file__).parents[2] / "docs" / "solve.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| $\\Phi(x)$ of SGD"))
    return [float(cell) for cell in row.split("|")[2:-1]]


@pytest.mark.thorough
@pytest.mark.compile
@pytest.mark.paper("Theorem 4.4")
def test_rate_of_sgd_at_a_fixed_ratio() -> None:
    """O(sqrt(eta lambda)) is O(eta) here."""
    rates = (0.08, 0.04, 0.02)
    means = [of_sgd(lr, LARGE) for lr in rates]
    found = differences(means)
    for (value, error), shown in zip(found, shown_differences()[1:], strict=True):
        assert abs(value - shown) <= Z * math.hypot(error, error) + 5e-4, found
    rate, rate_error = slope(rates, found)
    assert abs(rate - 1.0) <= Z * rate_error, (rate, rate_error, found)
    value, error = extrapolated(rates[1:], found[1:])
    assert abs(value) <= Z * error, found
    for factor in (0.9, 1.1):
        wrong = differences(means, factor)
        value, error = extrapolated(rates[1:], wrong[1:])
        assert abs(value) > Z * error, (factor, wrong)


@pytest.mark.thorough
@pytest.mark.compile
@pytest.mark.paper("Theorem 4.4")
def test_rate_of_sgd_at_a_fixed_weight_decay() -> None:
    """O(sqrt(eta lambda)) is O(sqrt(eta)) here."""
    rates = (0.04, 0.02, 0.01)
    found = differences([of_sgd(lr, LARGE, decay=0.2) for lr in rates])
    rate, rate_error = slope(rates, found)
    assert abs(rate - 0.5) <= Z * rate_error, (rate, rate_error, found)
    value, error = extrapolated(rates[1:], found[1:], 0.5)
    assert abs(value) <= Z * error, found


@pytest.mark.thorough
@pytest.mark.compile
@pytest.mark.paper("Theorem 4.1")
def test_the_sde_of_sgd_tends_to_the_limit_with_its_curvature() -> None:
    """The differences are -0.030, -0.039, -0.026 (2.6e5 paths): the curvature is not small."""
    rates = (0.16, 0.08, 0.04)
    means = [of_sde(lr, LARGE // 4) for lr in rates]
    value, error = extrapolated(rates, differences(means))
    assert abs(value) <= Z * error
    for factor in (0.75, 1.33):
        value, error = extrapolated(rates, differences(means, factor))
        assert abs(value) > Z * error, factor


@pytest.mark.thorough
@pytest.mark.compile
@pytest.mark.paper("Theorem 4.4")
def test_sampling_noise_with_everything_tends_to_the_limit() -> None:
    """Mixed term, varying trace, columns that vary; Phi by gradient flow."""
    problem = problems.mixed_noise_circle(tilt=1.0)
    facts = problem.facts
    assert facts is not None
    start = facts.circle.point(torch.tensor(1.0, dtype=torch.float64))
    law = CircleDiffusion.of(problem)
    functions = [lambda t, k=k, g=g: g(k * t) for k in (1, 2) for g in (np.cos, np.sin)]
    joint = law.at(circle.TIME, float(facts.circle.angle(start))).angle
    wanted = np.array([joint.expectation(f) for f in functions])
    geometry = Geometry(problem, compile=True)
    means, errors = [], []
    for lr in (0.04, 0.02):
        steps = TimeScale(lr, circle.RATIO * lr).steps(circle.TIME)
        run = run_sgd(
            problem,
            start,
            lr,
            circle.RATIO * lr,
            steps,
            n_paths=1 << 17,
            seed=round(1000 * lr),
            compile=True,
        )
        weights = torch.cat([geometry.limit_map(x) for x in run.ys[-1].split(4096)])
        values = np.stack([f(facts.circle.angle(weights).numpy()) for f in functions])
        means.append(values.mean(1))
        errors.append(values.std(1, ddof=1) / math.sqrt(values.shape[1]))
    difference = 2.0 * means[1] - means[0] - wanted
    error = np.hypot(2.0 * errors[1], errors[0])
    assert (np.abs(difference) <= Z * error).all(), (difference, error)
