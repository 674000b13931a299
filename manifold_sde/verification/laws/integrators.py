r"""The three conditions of a Katzenberger process: Lemma 3.1 for (7), Lemma 4.3 for (15) to (17).

B and Z are those of a run of SGD: they are put together from what its steps were seen to shrink and
to add, and not from what they should have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

from manifold_sde.paper import implements
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.laws.engine import Array, Runs, Tests, deviations, judged
from manifold_sde.verification.laws.step_noise import (
    BLOCKS,
    STEPS,
    StepNoise,
    tests_of_steps,
    tests_of_sums,
)
from manifold_sde.verification.result import Design, Picture, Result, Series, found
from manifold_sde.verification.subject import Subject

#: Learning rates at which the deterministic integrators are looked at, in units of the run's.
FACTORS = (1.0, 0.5, 0.25)
#: Order in the learning rate at which A and B count as converging.
_ORDER = 0.75
#: Rounding of what is read off a run.
_ROUNDING = 1e-9
#: Tests of Z.
_TESTS = 7
#: Fewest and most runs of which all steps are kept.
_RUNS = (256, 1024)
#: Interval over which A has to grow.
_INTERVAL = 0.05
#: What it means if A and B, or Z, do not tend to their limits.
WRONG = (
    "The steps of SGD do not shrink the weights by 1 - eta lambda, or R and tau are not (11) and "
    "(12).",
    "The noise of SGD's steps is not that of sigma: its size (batch factor, scale) is another, or "
    "the random numbers of the steps or runs are not independent.",
)
#: Horizons T of the uniform metric beyond which 2^-T is below rounding.
HORIZONS = 53


@implements("Definition 2.9")
def distance_from_line(jumps: Array, values: Array, slope: float) -> float:
    r"""d_U(f, g) of a step function f with f(0) = 0 and the line g(t) = slope t.

    .. math::

        d_U(f, g) = \sum_{T=1}^{\infty} 2^{-T} \min\{1, \sup_{t \in [0, T)} |f(t) - g(t)|\}

    The supremum is taken over both sides of every jump and the end of [0, T).

    Args:
        jumps: Times of the jumps, increasing, (n,).
        values: Values from each of them on, (n,).
        slope: Slope of the line.

    Returns:
        The distance; the tail of T beyond 53, below rounding, is left out.

    Example:
        >>> jumps = np.arange(1.0, 60.0)
        >>> distance_from_line(jumps, jumps, 1.0)  # floor(t) and t: sup is 1 on every [0, T)
        1.0
    """
    before = np.concatenate([[0.0], values[:-1]])
    line = slope * jumps
    gaps = np.maximum.accumulate(np.maximum(np.abs(before - line), np.abs(values - line)))
    total = 0.0
    for horizon in range(1, HORIZONS + 1):
        # Jumps at T itself are outside [0, T), but its left limit is inside.
        index = int(np.searchsorted(jumps, horizon, side="left"))
        inside = float(gaps[index - 1]) if index else 0.0
        last = float(values[index - 1]) if index else 0.0
        supremum = max(inside, abs(last - slope * horizon))
        total += 2.0**-horizon * min(1.0, supremum)
    return total / (1.0 - 2.0**-HORIZONS)


def order(steps: Array, distances: Array) -> float:
    """Slope of log distance in log step, by least squares; infinite where all are 0."""
    if bool((distances <= 1e-14).any()):
        return math.inf
    return float(np.polyfit(np.log(steps), np.log(distances), 1)[0])


@dataclass(frozen=True)
class Integrators:
    """A and B at given rates, as steps in their own time.

    Attributes:
        gradient: Increments of A at the steps.
        decay: Increments of B.
        moments: Times of the steps.
    """

    gradient: Array
    decay: Array
    moments: Array

    def growth(self, interval: float) -> float:
        """Smallest growth of A over an interval of this length, wherever it begins."""
        total = np.concatenate([[0.0], np.cumsum(self.gradient)])
        # The worst intervals begin at a jump, which they do not see.
        ends = np.searchsorted(self.moments, self.moments + interval, side="left")
        inside = ends < len(self.moments)
        begins = np.arange(1, len(self.moments) + 1)
        return float((total[ends[inside]] - total[begins[inside]]).min())

    def distance(self, slope: float) -> float:
        """d_U(B, slope t)."""
        return distance_from_line(self.moments, np.cumsum(self.decay), slope)


@dataclass(frozen=True)
class Time:
    """The time of one equation, at given rates.

    Attributes:
        lr: Learning rate.
        slope: Slope of the line that B tends to.
        steps: Steps up to the last horizon that counts.
        radius: What the weights are divided by after steps (n,).
        moments: The time of these steps (n,).
    """

    lr: float
    slope: float
    steps: int
    radius: Callable[[Any], Any]
    moments: Callable[[Any], Any]


def fixed_ratio_time(subject: Subject, lr: float, weight_decay: float) -> Time:
    """The time eta^2 k of (7), in which B tends to C t and nothing is divided by R."""
    steps = math.ceil(HORIZONS / lr**2)
    return Time(lr, weight_decay / lr, steps, np.ones_like, lambda k: lr**2 * k)


def general_time(subject: Subject, lr: float, weight_decay: float) -> Time:
    """The time tau of (15) to (17), in which B tends to t / 2, and R."""
    scale = subject.time_scale(lr, weight_decay)
    # Where R has settled, T grows by 2 eta lambda a step.
    late = HORIZONS + math.log(2.0 * weight_decay / lr + 2.0)
    steps = math.ceil(late / (2.0 * lr * weight_decay))
    return Time(lr, 0.5, steps, scale.radius, scale.tau)


def integrators(time: Time, shrinkage: float) -> Integrators:
    """A and B in a time, of steps that leave so much of the weights."""
    steps = np.arange(time.steps + 1.0)
    radius = np.asarray(time.radius(steps), dtype=np.float64)
    before, after = radius[:-1], radius[1:]
    gradient: Array = np.divide(time.lr, before * after)
    moments = np.asarray(time.moments(steps[1:]))
    return Integrators(gradient, 1.0 - shrinkage * before / after, moments)


def _design(runs: Runs) -> Design:
    effort = runs.effort
    alpha = effort.false_alarm / _TESTS
    quantiles = stats.norm.isf(alpha / 2) + stats.norm.isf(effort.miss)
    # The quadratic variation of one component over one block has the variance 2.
    n = math.ceil(2.0 * (quantiles / effort.departure) ** 2 / BLOCKS)
    n = min(max(n, _RUNS[0]), _RUNS[1])
    found = quantiles * math.sqrt(2.0 / (n * BLOCKS))
    return runs.design(
        "Z has independent increments with mean 0 and covariance that of its limit, "
        "and no two steps and no two runs have the same noise",
        f"a variance of the noise off by {found:.0%}",
        n,
        found,
    )


@implements("Lemma 3.1", "Equation (7)")
def lemma_3_1(subject: Subject, effort: Effort) -> Sequence[Result]:
    """A without bound, B to C t, Z to a Brownian motion, for (7)."""
    return _results(subject, effort, fixed_ratio_time, "Lemma 3.1", "(7)")


@implements("Lemma 4.3", "Equation (15)", "Equation (16)", "Equation (17)")
def lemma_4_3(subject: Subject, effort: Effort) -> Sequence[Result]:
    """A without bound, B to t / 2, Z to a Brownian motion, for (15) to (17)."""
    return _results(subject, effort, general_time, "Lemma 4.3", "(15) to (17)")


def _results(
    subject: Subject,
    effort: Effort,
    time: Callable[[Subject, float, float], Time],
    statement: str,
    equations: str,
) -> Sequence[Result]:
    made = _design(Runs.of(subject, effort))
    noise = StepNoise.of(subject, effort, made.sample_size)
    times = [time(subject, f * noise.lr, f * noise.weight_decay) for f in FACTORS]
    remark = ("Remark 6.1",) if noise.gaussian else ()
    results = [
        replace(deterministic(equations, times, noise), statements=(statement,)),
        replace(
            _brownian(equations, times[0], noise, made),
            statements=(statement, *remark),
            design=made,
        ),
    ]
    return [
        replace(result, meaning=wrong if result.verdict == "fails" else "")
        for result, wrong in zip(results, WRONG, strict=True)
    ]


def deterministic(equations: str, times: list[Time], noise: Any) -> Result:
    """A grows without bound, B tends to a line.

    Args:
        equations: Whose A and B.
        times: The time at falling rates.
        noise: ``lr``, ``weight_decay`` and ``shrinkage`` of the steps of a run.
    """
    decay = 1.0 - float(noise.shrinkage.mean())
    rates = noise.lr * np.array(FACTORS)
    both = [integrators(t, 1.0 - f**2 * decay) for t, f in zip(times, FACTORS, strict=True)]
    slope = times[0].slope
    growth = np.array([f.growth(_INTERVAL) for f in both])
    distances = np.array([f.distance(slope) for f in both])
    faster, power = -order(rates, growth), order(rates, distances)
    away = float((noise.shrinkage - (1.0 - noise.lr * noise.weight_decay)).abs().max())
    picture = Picture(
        f"B of {equations} and its limit",
        "learning rate eta",
        "distance in the uniform metric",
        (Series(f"order {power:.2f}", rates.tolist(), distances.tolist(), "points"),),
        logx=True,
        logy=True,
    )
    good = min(faster, power) >= _ORDER and away <= _ROUNDING
    return found(
        "holds" if good else "fails",
        f"as eta falls from {rates[0]:.2g} to {rates[-1]:.2g}, A grows by "
        f"{', '.join(f'{g:.3g}' for g in growth)} or more over any interval of {_INTERVAL:g}, like "
        f"eta^-{faster:.2f}, and the uniform distance of B from {slope:.3g} t is "
        f"{', '.join(f'{d:.2g}' for d in distances)}, like eta^{power:.2f}; the steps of SGD "
        f"shrink the weights by eta lambda to {away:.1g}",
        statistic=-min(faster, power) if away <= _ROUNDING else math.inf,
        limit=-_ORDER,
        name=f"A and B of {equations}",
        pictures=(picture,),
    )


def _brownian(equations: str, time: Time, noise: StepNoise, made: Design) -> Result:
    """Z tends to a Brownian motion."""
    radius = np.asarray(time.radius(np.arange(STEPS + 1.0)))
    weights = noise.lr / (radius[:-1] * radius[1:])
    variances = np.diff(np.asarray(time.moments(np.linspace(0.0, STEPS, BLOCKS + 1))))
    sums = noise.blocks(weights, variances).double().numpy()
    tests = Tests(
        {**tests_of_sums(noise, sums, STEPS // BLOCKS), **tests_of_steps(noise)}, made.false_alarm
    )
    jump = float((noise.increments.norm(dim=-1).max(1).values.numpy() * weights).max())
    outside = noise.outside > 1e-6
    law = "a standard Brownian motion" if noise.gaussian else "(I - 11^T/Xi) W"
    detail = (
        f"over {made.sample_size} runs of {STEPS} steps Z has {float((sums**2).mean()):.3f} times "
        f"the variance of {law}; its largest jump is {jump:.2g}, of order eta; p = {tests.p:.2g} "
        f"({_TESTS} tests; the smallest is {tests.worst}: {tests.p_values[tests.worst]:.2g}); "
        f"finds {made.departure}"
    )
    decisive = deviations(tests.p, made)
    if outside:
        detail += f"; {noise.outside:.1g} of the noise is outside the range of sigma"
        decisive["statistic"] = math.inf
    levels = np.linspace(0.01, 0.99, 49)
    normal = stats.norm.ppf(levels).tolist()
    picture = Picture(
        f"Increments of Z of {equations}",
        "quantile of the normal law",
        "quantile of the increments",
        (
            Series("increments", normal, np.quantile(sums, levels).tolist(), "points"),
            Series("", normal, normal),
        ),
    )
    result = judged(tests, made, detail, **decisive, pictures=(picture,))
    name = f"Z of {equations} tends to a Brownian motion"
    return replace(result, name=name, verdict="fails" if outside else result.verdict)


LEMMA_3_1 = Check("integrators of (7)", "statistics", ("Lemma 3.1", "Equation (7)"), lemma_3_1)
LEMMA_4_3 = Check(
    "integrators of (15) to (17)",
    "statistics",
    ("Lemma 4.3", "Equation (15)", "Equation (16)", "Equation (17)"),
    lemma_4_3,
)
