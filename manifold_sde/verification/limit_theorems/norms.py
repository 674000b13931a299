r"""The norm of SGD's weights: its law (10), and where it comes to rest.

Where V = tr Sigma is constant on the unit sphere, :math:`\|x_k\|^4` follows (10) and tends to
:math:`\eta V / 2\lambda`; where it varies, it lies between the values for the extremes of V.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from manifold_sde.paper import implements
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.limit_theorems.regime import TOLERATED
from manifold_sde.verification.limit_theorems.simulations import Simulations
from manifold_sde.verification.result import Design, Picture, Result, Series, Verdict
from manifold_sde.verification.subject import Subject
from manifold_sde.verification.two_sample import runs_for_mean

#: Norms at the start of the runs that look for the equilibrium, in units of its own.
_AROUND = (0.8, 1.2)
#: Factor of the steps of the coarse runs.
_COARSE = 2
_FEWEST = 128
_EXTREMES = 64
#: Relative standard deviation of the noise of a step, at most, for the design.
_SPREAD = 1.5


@dataclass(frozen=True)
class _Mean:
    """A mean that is extrapolated to small steps, against bounds."""

    value: float
    error: float
    low: float
    high: float
    tolerance: float

    @property
    def p_value(self) -> float:
        """Two-sided, of a mean between the bounds, give or take what is tolerated."""
        beyond = max(self.low - self.value, self.value - self.high, 0.0)
        beyond = max(beyond - self.tolerance, 0.0)
        rounding = 1e-9 * max(abs(self.low), abs(self.high), 1e-300)
        return float(min(1.0, 2.0 * stats.norm.sf(beyond / max(self.error, rounding))))

    @property
    def plain_p_value(self) -> float:
        """The same against one bound, if nothing is tolerated."""
        return float(2.0 * stats.norm.sf(abs(self.value - self.low) / self.error))


def _extrapolated(fine: Tensor, coarse: Tensor, factor: int) -> tuple[float, float]:
    first, second = factor / (factor - 1.0), 1.0 / (factor - 1.0)
    value = first * float(fine.mean()) - second * float(coarse.mean())
    error = math.hypot(
        first * float(fine.std()) / math.sqrt(len(fine)),
        second * float(coarse.std()) / math.sqrt(len(coarse)),
    )
    return value, error


def _traces(simulations: Simulations, samples: Tensor) -> tuple[float, float]:
    """Smallest and largest V at directions (n, D) that were seen, and around the start."""
    few = samples[:: max(1, len(samples) // _EXTREMES)]
    values = simulations.subject.problem.noise_trace(few / few.norm(dim=-1, keepdim=True))
    low, high = simulations.around.traces
    low, high = min(low, float(values.min())), max(high, float(values.max()))
    middle = 0.5 * (low + high)
    return (middle, middle) if high - low <= 1e-6 * high else (low, high)


@implements("Equation (10)")
def norm_law(subject: Subject, effort: Effort) -> Sequence[Result]:
    """|x_k|^4 of SGD against (10)."""
    simulations = Simulations.of(subject, effort)
    regime = simulations.regime
    rates = regime.runs[0]
    constant = simulations.around.constant_trace
    bound = "is that of (10)" if constant else "lies between those of (10) for the extremes of V"
    made = _design(
        effort,
        f"the mean of |x_k|^4 after {rates.counts[-1]} steps {bound}, as eta goes to 0",
        simulations.runs,
    )
    c = regime.coarseness
    runs = [(rates, 110, 1), (rates.coarser(c), 111, c)]
    powers = [simulations.sgd_norms(r, use) ** 4 for r, use, _ in runs]
    value, error = _extrapolated(powers[0][-1], powers[1][-1], c)
    phi = simulations.sgd(rates, 110).reshape(-1, subject.problem.dim)
    low, high = _traces(simulations, phi)
    norm = subject.time_scale(rates.lr, rates.weight_decay).norm
    bounds = [float(norm(rates.counts[-1], 1.0, v)) ** 4 for v in (low, high)]
    moved = effort.departure * (
        bounds[1] - math.exp(-4.0 * rates.lr * rates.weight_decay * rates.counts[-1])
    )
    found = _Mean(value, error, bounds[0], bounds[1], TOLERATED * moved)
    curves = tuple(
        Series(
            f"(10) at V = {v:.3g}",
            [0, *rates.counts],
            [1.0, *(float(norm(k, 1.0, v)) ** 4 for k in rates.counts)],
        )
        for v in sorted({low, high})
    )
    points = Series(
        "SGD",
        list(rates.counts),
        powers[0].mean(1).tolist(),
        "points",
        (powers[0].std(1) / math.sqrt(simulations.runs)).tolist(),
    )
    picture = Picture("Norm of SGD's weights", "steps k", "mean of |x|^4", (*curves, points))
    return [_result(NORM_LAW, found, made, picture, rates.lr, rates.weight_decay)]


def equilibrium_norm(subject: Subject, effort: Effort) -> Sequence[Result]:
    r"""Where |x|^4 comes to rest: (|x_k|^4 - e^{-4 eta lambda k} |x_0|^4) / (1 - e^{...}).

    By (10) that is eta V / 2 lambda after any number of steps: no run has to be in equilibrium.
    """
    simulations = Simulations.of(subject, effort)
    around, step = simulations.around, simulations.regime.step_size
    # At norm 1 in equilibrium, and on a grid of steps that the coarse run has too.
    decay_ratio = 0.5 * around.trace
    lr = step * min(_AROUND) ** 2
    count = _COARSE**2 * max(
        8, min(effort.steps, round(1.0 / (4.0 * decay_ratio * lr**2))) // _COARSE**2
    )
    left = math.exp(-4.0 * decay_ratio * lr**2 * count)
    # One run has the noise of its steps, which the division by 1 - e^{-4 eta lambda k} blows up.
    spread = _SPREAD * 2.0 * around.trace * lr**2 * math.sqrt(count) / (1.0 - left)
    effect = (1.0 - TOLERATED) * effort.departure / (math.sqrt(5.0) * max(spread, 1e-3))
    runs = max(_FEWEST, runs_for_mean(effect, effort.false_alarm, effort.miss, samples=1))
    runs = 2 * (min(runs, effort.runs) // 2)
    bound = "eta V / (2 lambda)" + ("" if around.constant_trace else " for the extremes of V")
    made = _design(effort, f"the mean that |x|^4 returns to is {bound}, as eta goes to 0", runs)
    starts = subject.start * torch.tensor(_AROUND, dtype=torch.float64).repeat(runs // 2)[:, None]
    rest, seen = [], []
    for factor, use in ((1, 122), (_COARSE, 123)):
        run = subject.run_sgd(
            subject.problem,
            starts,
            factor * lr,
            factor * decay_ratio * lr,
            count // factor**2,
            seed=simulations.seed(use),
        )
        fourth = run.ys[-1].norm(dim=-1) ** 4
        rest.append((fourth - left * starts.norm(dim=-1) ** 4) / (1.0 - left))
        seen.append(simulations.limits(run.ys[-1]))
    value, error = _extrapolated(rest[0], rest[1], _COARSE)
    low, high = _traces(simulations, seen[0])
    at_rest: Callable[[float], float] = subject.time_scale(lr, decay_ratio * lr).equilibrium_norm
    bounds = [float(at_rest(v)) ** 4 for v in (low, high)]
    tolerance = TOLERATED * effort.departure * bounds[1]
    found = _Mean(value, error, bounds[0], bounds[1], tolerance)
    mean = [float(r.mean()) for r in rest]
    errors = [float(r.std()) / math.sqrt(runs) for r in rest]
    picture = Picture(
        "The norm that weight decay and noise lead to",
        "eta / |x|^2",
        "|x|^4 at rest",
        (
            Series("SGD", [lr, _COARSE * lr], mean, "points", errors),
            *(Series(f"{b:.3g}", [0.0, _COARSE * lr], [b, b]) for b in sorted(set(bounds))),
        ),
    )
    return [_result(EQUILIBRIUM_NORM, found, made, picture, lr, decay_ratio * lr)]


def _design(effort: Effort, hypothesis: str, runs: int) -> Design:
    return Design(
        hypothesis=hypothesis,
        false_alarm=effort.false_alarm,
        departure=f"a variance of the noise, or a weight decay, off by {effort.departure:.0%}",
        miss=effort.miss,
        sample_size=runs,
        size=effort.departure,
    )


def _result(
    check: Check, found: _Mean, made: Design, picture: Picture, lr: float, decay: float
) -> Result:
    p_value = found.p_value
    verdict: Verdict = "fails" if p_value < made.false_alarm else "holds"
    between = f"{found.low:.4g}"
    if found.high > found.low:
        between = f"between {found.low:.4g} and {found.high:.4g}"
    return Result(
        check.name,
        verdict,
        f"|x|^4 is {found.value:.4g} +- {found.error:.1g} over {made.sample_size} runs at eta = "
        f"{lr:.2g}, lambda = {decay:.2g}, extrapolated; (10) says {between}, of which "
        f"{found.tolerance:.1g} is tolerated" + ("" if p_value >= 1.0 else f": p = {p_value:.2g}"),
        statistic=float(stats.norm.isf(max(p_value, 1e-300) / 2.0)),
        limit=float(stats.norm.isf(made.false_alarm / 2.0)),
        p_value=p_value,
        statements=check.statements,
        kind="statistics",
        meaning=""
        if verdict == "holds"
        else "The norm of SGD's weights is not that of (10): the noise has another trace than the "
        "problem says, or the steps another learning rate or weight decay.",
        design=made,
        tests={"E |x|^4": found.plain_p_value} if found.low == found.high else {},
        pictures=(picture,),
        within_tolerance=p_value >= 1.0,
    )


NORM_LAW = Check("norm of SGD's weights", "statistics", ("Equation (10)",), norm_law)
EQUILIBRIUM_NORM = Check(
    "equilibrium norm of SGD's weights", "statistics", ("Equation (10)",), equilibrium_norm
)
CHECKS = (NORM_LAW, EQUILIBRIUM_NORM)
