r"""The three conditions of a Katzenberger process: Lemma 3.1 for (7), Lemma 4.3 for (15) to (17).

B and Z are those of a run of SGD: they are put together from what its steps were seen to shrink and
to add, and not from what they should have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from manifold_sde.paper import implements
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.limit_theorems.brownian_limit import tests_of_steps, tests_of_sums
from manifold_sde.verification.limit_theorems.functionals import Array
from manifold_sde.verification.limit_theorems.noise_of_steps import BLOCKS, STEPS, StepNoise
from manifold_sde.verification.limit_theorems.uniform_metric import (
    HORIZONS,
    distance_from_line,
    order,
)
from manifold_sde.verification.result import Design, Picture, Result, Series
from manifold_sde.verification.statistics import holm
from manifold_sde.verification.subject import Subject

#: Learning rates at which the deterministic integrators are looked at, in units of the run's.
_FACTORS = (1.0, 0.5, 0.25)
#: Order in the learning rate from which on A and B count as converging.
_ORDER = 0.75
#: Rounding of what is read off a run.
_ROUNDING = 1e-9
#: Tests of Z.
_TESTS = 7
#: Fewest and most runs of which all steps are kept.
_RUNS = (256, 1024)
#: Interval over which A has to grow.
_INTERVAL = 0.05


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


def at_fixed_ratio(lr: float, shrinkage: float) -> Integrators:
    """A and B of (7) in the time eta^2 k, up to the last horizon that counts."""
    count = math.ceil(HORIZONS / lr**2)
    ones = np.ones(count)
    moments: Array = np.multiply(lr**2, np.arange(1.0, count + 1.0))
    return Integrators(lr * ones, (1.0 - shrinkage) * ones, moments)


def in_general(subject: Subject, lr: float, weight_decay: float, shrinkage: float) -> Integrators:
    """A and B of (15) and (16) in the time tau."""
    scale = subject.time_scale(lr, weight_decay)
    # Where R has settled, T grows by 2 eta lambda a step.
    late = HORIZONS + math.log(2.0 * weight_decay / lr + 2.0)
    count = math.ceil(late / (2.0 * lr * weight_decay))
    steps = np.arange(count + 1.0)
    radius: Array = np.asarray(scale.radius(steps), dtype=np.float64)
    before, after = radius[:-1], radius[1:]
    ratio = before / after
    gradient: Array = np.divide(lr, before * after)
    return Integrators(
        gradient,
        1.0 - shrinkage * ratio,
        np.asarray(scale.tau(steps[1:])),
    )


@implements("Lemma 3.1", "Equation (7)")
def lemma_3_1(subject: Subject, effort: Effort) -> Sequence[Result]:
    """A without bound, B to C t, Z to a Brownian motion, for (7)."""
    made, noise = _drawn(subject, effort)
    lr = noise.lr
    ratio = noise.weight_decay / lr

    def deterministic(factor: float, decay: float) -> Integrators:
        return at_fixed_ratio(factor * lr, 1.0 - factor**2 * decay)

    weights = np.full(STEPS, lr)
    variances = np.full(BLOCKS, lr**2 * STEPS / BLOCKS)
    return _results("(7)", LEMMA_3_1, noise, made, deterministic, ratio, weights, variances)


@implements("Lemma 4.3", "Equation (15)", "Equation (16)", "Equation (17)")
def lemma_4_3(subject: Subject, effort: Effort) -> Sequence[Result]:
    """A without bound, B to t / 2, Z to a Brownian motion, for (15) to (17)."""
    made, noise = _drawn(subject, effort)
    lr, weight_decay = noise.lr, noise.weight_decay
    scale = subject.time_scale(lr, weight_decay)

    def deterministic(factor: float, decay: float) -> Integrators:
        rates = factor * lr, factor * weight_decay
        return in_general(subject, *rates, 1.0 - factor**2 * decay)

    radius = np.asarray(scale.radius(np.arange(STEPS + 1.0)))
    weights = lr / (radius[:-1] * radius[1:])
    ends: Array = np.asarray(scale.tau(np.linspace(0.0, STEPS, BLOCKS + 1)))
    return _results(
        "(15) to (17)", LEMMA_4_3, noise, made, deterministic, 0.5, weights, np.diff(ends)
    )


def _drawn(subject: Subject, effort: Effort) -> tuple[Design, StepNoise]:
    """The design, and then the run."""
    alpha = effort.false_alarm / _TESTS
    quantiles = stats.norm.isf(alpha / 2) + stats.norm.isf(effort.miss)
    # The quadratic variation of one component over one block has the variance 2.
    runs = math.ceil(2.0 * (quantiles / effort.departure) ** 2 / BLOCKS)
    low, high = _RUNS
    runs = min(max(runs, low), high)
    found = quantiles * math.sqrt(2.0 / (runs * BLOCKS))
    made = Design(
        hypothesis="Z has independent increments with mean 0 and covariance that of its limit, "
        "and no two steps and no two runs have the same noise",
        false_alarm=effort.false_alarm,
        departure=f"a variance of the noise off by {found:.0%}",
        miss=effort.miss,
        sample_size=runs,
        size=found,
    )
    return made, StepNoise.of(subject, effort, runs)


def _results(
    equations: str,
    check: Check,
    noise: StepNoise,
    made: Design,
    deterministic: Callable[[float, float], Integrators],
    slope: float,
    weights: Array,
    variances: Array,
) -> Sequence[Result]:
    decay = 1.0 - float(noise.shrinkage.mean())
    found = [deterministic(factor, decay) for factor in _FACTORS]
    rates = noise.lr * np.array(_FACTORS)
    return [
        _deterministic(equations, check, noise, rates, found, slope),
        _brownian(equations, check, noise, made, weights, variances),
    ]


def _deterministic(
    equations: str,
    check: Check,
    noise: StepNoise,
    rates: Array,
    found: list[Integrators],
    slope: float,
) -> Result:
    growth = np.array([f.growth(_INTERVAL) for f in found])
    faster = -order(rates, growth)
    distances = np.array([f.distance(slope) for f in found])
    power = order(rates, distances)
    away = float((noise.shrinkage - (1.0 - noise.lr * noise.weight_decay)).abs().max())
    holds = min(faster, power) >= _ORDER and away <= _ROUNDING
    picture = Picture(
        f"B of {equations} and its limit",
        "learning rate eta",
        "distance in the uniform metric",
        (Series(f"order {power:.2f}", rates.tolist(), distances.tolist(), "points"),),
        logx=True,
        logy=True,
    )
    return Result(
        f"A and B of {equations}",
        "holds" if holds else "fails",
        f"as eta falls from {rates[0]:.2g} to {rates[-1]:.2g}, A grows by "
        f"{', '.join(f'{g:.3g}' for g in growth)} or more over any interval of {_INTERVAL:g}, like "
        f"eta^-{faster:.2f}, and the uniform distance of B from {slope:.3g} t is "
        f"{', '.join(f'{d:.2g}' for d in distances)}, like eta^{power:.2f}; the steps of SGD "
        f"shrink the weights by eta lambda to {away:.1g}",
        statistic=-min(faster, power) if away <= _ROUNDING else math.inf,
        limit=-_ORDER,
        statements=check.statements[:1],
        kind="statistics",
        meaning=""
        if holds
        else "The steps of SGD do not shrink the weights by 1 - eta lambda, or R and tau are not "
        "(11) and (12).",
        pictures=(picture,),
    )


def _brownian(
    equations: str,
    check: Check,
    noise: StepNoise,
    made: Design,
    weights: Array,
    variances: Array,
) -> Result:
    sums = noise.blocks(weights, variances).double().numpy()
    p_values = {**tests_of_sums(noise, sums, STEPS // BLOCKS), **tests_of_steps(noise)}
    together = holm(list(p_values.values()))
    p_value = float(together.min())
    worst = min(p_values, key=lambda name: p_values[name])
    jump = float((noise.increments.norm(dim=-1).max(1).values.numpy() * weights).max())
    outside = noise.outside > 1e-6
    fails = p_value < made.false_alarm or outside
    law = "a standard Brownian motion" if noise.gaussian else "(I - 11^T/Xi) W"
    variance = float((sums**2).mean())
    detail = (
        f"over {made.sample_size} runs of {STEPS} steps Z has {variance:.3f} times the variance of "
        f"{law}; its largest jump is {jump:.2g}, of order eta; p = {p_value:.2g} ({_TESTS} tests; "
        f"the smallest is {worst}: {p_values[worst]:.2g}); finds {made.departure}"
    )
    if outside:
        detail += f"; {noise.outside:.1g} of the noise is outside the range of sigma"
    limit = float(stats.norm.isf(made.false_alarm / 2.0))
    statistic = float(stats.norm.isf(max(p_value, 1e-300) / 2.0))
    return Result(
        f"Z of {equations} tends to a Brownian motion",
        "fails" if fails else "holds",
        detail,
        statistic=math.inf if outside else statistic,
        limit=limit,
        p_value=p_value,
        statements=(*check.statements[:1], *(("Remark 6.1",) if noise.gaussian else ())),
        kind="statistics",
        meaning=""
        if not fails
        else "The noise of SGD's steps is not that of sigma: its size (batch factor, scale) is "
        "another, or the random numbers of the steps or runs are not independent.",
        design=made,
        tests=p_values,
        pictures=(_quantiles(equations, sums),),
    )


def _quantiles(equations: str, sums: Array) -> Picture:
    levels = np.linspace(0.01, 0.99, 49)
    normal = stats.norm.ppf(levels)
    return Picture(
        f"Increments of Z of {equations}",
        "quantile of the normal law",
        "quantile of the increments",
        (
            Series("increments", normal.tolist(), np.quantile(sums, levels).tolist(), "points"),
            Series("", normal.tolist(), normal.tolist()),
        ),
    )


LEMMA_3_1 = Check("integrators of (7)", "statistics", ("Lemma 3.1", "Equation (7)"), lemma_3_1)
LEMMA_4_3 = Check(
    "integrators of (15) to (17)",
    "statistics",
    ("Lemma 4.3", "Equation (15)", "Equation (16)", "Equation (17)"),
    lemma_4_3,
)
CHECKS = (LEMMA_3_1, LEMMA_4_3)
