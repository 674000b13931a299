r"""The limit theorems: SGD and its SDE against the diffusions, and what weight decay does.

Where V = tr Sigma is constant on the unit sphere, :math:`\|x_k\|^4` follows (10) and tends to
:math:`\eta V / 2\lambda`; where it varies, it lies between the values for the extremes of V.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde.paper import implements
from manifold_sde.verification.laws.comparison import Comparison, Side, compare
from manifold_sde.verification.laws.engine import (
    Extrapolated,
    deviations,
    law,
    mean_and_error,
    mean_p_value,
    means,
)
from manifold_sde.verification.laws.regime import TOLERATED, Rates
from manifold_sde.verification.laws.short_runs import ShortRuns
from manifold_sde.verification.result import Design, Picture, Result, Series, found
from manifold_sde.verification.two_sample import runs_for_mean

#: Factors of the steps of the two runs of the SDE (3), which costs more than SGD.
_OF_SDE = (2, 4)
#: Norms at the start of the runs that look for the equilibrium, in units of its own.
_AROUND = (0.8, 1.2)
#: Factor of the steps of the coarse ones of these runs, and their fewest number.
_COARSE, _FEWEST = 2, 128
#: Directions of which the largest and smallest trace are taken.
_EXTREMES = 64
#: Relative standard deviation of the noise of a step, at most, for the design.
_SPREAD = 1.5


def _of_sgd(runs: ShortRuns, label: str, fine: Rates, coarse: Rates, use: int) -> Side:
    return Side(
        label,
        partial(runs.sgd, fine, use),
        partial(runs.sgd, coarse, use + 1),
        runs.regime.coarseness,
    )


@implements("Theorem 3.2")
def sgd_at_fixed_ratio(runs: ShortRuns) -> Comparison:
    """SGD after t / eta^2 steps at lambda = C eta, against (8) at t."""
    rates = runs.regime.runs[0]
    return Comparison(
        f"Phi of SGD's weights after t / eta^2 steps at lambda / eta = {rates.ratio:.3g} has the "
        f"law of (8) at t up to {rates.times[-1]:.3g}, as eta goes to 0",
        _of_sgd(runs, "SGD", rates, rates.coarser(runs.regime.coarseness), 110),
        Side("diffusion (8)", lambda: runs.at_ratio(rates.ratio, rates.times, 112)),
        until=f"t = {rates.times[-1]:.3g}",
    )


@implements("Theorem 4.4")
def sgd_in_general(runs: ShortRuns) -> Comparison:
    """SGD after floor(tau^{-1}(T)) steps, divided by R, against (13) at T."""
    rates = runs.at_general_times(runs.regime.runs[1])
    coarser = runs.at_general_times(rates.coarser(runs.regime.coarseness))

    def rescaled(rates: Rates, use: int) -> Tensor:
        scale = runs.subject.time_scale(rates.lr, rates.weight_decay)
        return _divided(runs.sgd(rates, use), scale, rates.counts)

    return Comparison(
        f"Phi of SGD's weights after floor(tau^-1(T)) steps, divided by R, has the law of (13) at "
        f"T up to {runs.general_times[-1]:.3g}, as eta lambda goes to 0 (eta = {rates.lr:.2g}, "
        f"lambda = {rates.weight_decay:.2g})",
        Side(
            "SGD",
            partial(rescaled, rates, 113),
            partial(rescaled, coarser, 114),
            runs.regime.coarseness,
        ),
        Side("diffusion (13)", runs.limiting),
        until=f"T = {runs.general_times[-1]:.3g}",
    )


@implements("Theorem 4.1")
def sde_in_general(runs: ShortRuns) -> Comparison:
    """The SDE (3) at tau^{-1}(T), divided by R, against (13) at T."""
    times = runs.general_times
    first, second = (runs.regime.runs[1].coarser(c) for c in _OF_SDE)

    def rescaled(rates: Rates, use: int) -> Tensor:
        scale = runs.subject.time_scale(rates.lr, rates.weight_decay)
        moments = tuple(float(t) for t in scale.tau_inverse(np.array(times)))
        return _divided(runs.continuous(rates, moments, use), scale, moments)

    return Comparison(
        "Phi of the SDE (3) at tau^-1(T), divided by R, has the law of (13) at T up to "
        f"{times[-1]:.3g}, as eta lambda goes to 0 (eta = {first.lr:.2g}, "
        f"lambda = {first.weight_decay:.2g})",
        Side(
            "SDE (3)",
            partial(rescaled, first, 116),
            partial(rescaled, second, 117),
            _OF_SDE[1] // _OF_SDE[0],
        ),
        Side("diffusion (13)", runs.limiting),
        until=f"T = {times[-1]:.3g}",
    )


def _divided(states: Tensor, scale: Any, moments: tuple[float, ...]) -> Tensor:
    """States (K, n, D) divided by R at their moments."""
    return states / states.new_tensor([float(scale.radius(t)) for t in moments])[:, None, None]


@implements("Theorem 3.2")
def diffusions_at_two_ratios(runs: ShortRuns) -> Comparison:
    """Y_C(t) against Y_0((e^{4Ct} - 1) / 4C) e^{-Ct}, each solved in its own time."""
    rates = runs.regime.runs[0]

    def shrunk() -> Tensor:
        free = runs.at_ratio(0.0, runs.regime.elapsed, 118)
        left = [math.exp(-rates.ratio * t) for t in rates.times]
        return free * free.new_tensor(left)[:, None, None]

    return Comparison(
        f"Y_C(t) and Y_0((e^(4Ct) - 1) / 4C) e^(-Ct) have one law at C = {rates.ratio:.3g}, "
        f"t up to {rates.times[-1]:.3g}",
        Side("Y_C", lambda: runs.at_ratio(rates.ratio, rates.times, 112)),
        Side("Y_0 with its time changed", shrunk),
        exact=True,
        until=f"t = {rates.times[-1]:.3g}",
    )


@implements("Remark 3.3")
def sgd_without_weight_decay(runs: ShortRuns) -> Comparison:
    """SGD at lambda = 0, exponentially later, against SGD with weight decay."""
    regime = runs.regime
    rates, c = regime.runs[0], regime.coarseness
    counts = tuple(round(t / rates.lr**2) for t in regime.elapsed)
    free = Rates(rates.lr, 0.0, counts)
    coarse = Rates(c * rates.lr, 0.0, tuple(max(1, round(k / c**2)) for k in counts))
    later = f"SGD without, {counts[-1] / rates.counts[-1]:.2f} times the steps"
    return Comparison(
        "the directions of SGD without weight decay after (e^(4Ct) - 1) / 4C / eta^2 = "
        f"{counts[-1]} steps have the law of those with it after t / eta^2 = {rates.counts[-1]}",
        _of_sgd(runs, "SGD with weight decay", rates, rates.coarser(c), 110),
        _of_sgd(runs, later, free, coarse, 119),
        norms=False,
        until=f"t = {rates.times[-1]:.3g}",
    )


@implements("Theorem 5.5")
def sgd_at_two_rates(runs: ShortRuns) -> Comparison:
    """SGD at two pairs of rates, each at its own steps for the same T."""
    pairs = [runs.at_general_times(rates) for rates in runs.regime.runs]
    shown = " and ".join(
        f"{r.counts[-1]} steps at eta = {r.lr:.2g}, lambda = {r.weight_decay:.2g}" for r in pairs
    )
    sides = []
    for rates, use in zip(pairs, (110, 113), strict=True):
        coarser = runs.at_general_times(rates.coarser(runs.regime.coarseness))
        sides.append(_of_sgd(runs, f"SGD at eta = {rates.lr:.2g}", rates, coarser, use))
    return Comparison(
        f"the directions of SGD have one law after {shown}, both at "
        f"T = {runs.general_times[-1]:.3g}",
        sides[0],
        sides[1],
        norms=False,
        until=f"T = {runs.general_times[-1]:.3g}",
    )


#: What a mean of |x|^4 is said to be, the number of runs, and the rates of those at small steps.
_Norms = tuple[str, int, Rates]


def _short(runs: ShortRuns) -> _Norms:
    rates = runs.regime.runs[0]
    constant = runs.around.constant_trace
    bound = "is that of (10)" if constant else "lies between those of (10) for the extremes of V"
    mean = f"the mean of |x_k|^4 after {rates.counts[-1]} steps {bound}, as eta goes to 0"
    return mean, runs.runs, rates


def _at_rest(runs: ShortRuns) -> _Norms:
    """At norm 1 in equilibrium, and on a grid of steps that the coarse run has too."""
    around, effort = runs.around, runs.effort
    ratio = 0.5 * around.trace
    lr = runs.regime.step_size * min(_AROUND) ** 2
    count = _COARSE**2 * max(8, min(effort.steps, round(1.0 / (4.0 * ratio * lr**2))) // _COARSE**2)
    # One run has the noise of its steps, which the division by 1 - e^{-4 eta lambda k} blows up.
    left = math.exp(-4.0 * ratio * lr**2 * count)
    spread = _SPREAD * 2.0 * around.trace * lr**2 * math.sqrt(count) / (1.0 - left)
    effect = (1.0 - TOLERATED) * effort.departure / (math.sqrt(5.0) * max(spread, 1e-3))
    needed = max(_FEWEST, runs_for_mean(effect, effort.false_alarm, effort.miss, samples=1))
    bound = "eta V / (2 lambda)" + ("" if around.constant_trace else " for the extremes of V")
    mean = f"the mean that |x|^4 returns to is {bound}, as eta goes to 0"
    return mean, 2 * (min(needed, effort.runs) // 2), Rates(lr, ratio * lr, (count,))


@implements("Equation (10)")
def norm_law(runs: ShortRuns, made: Design) -> Result:
    """|x_k|^4 of SGD against (10)."""
    rates, c = runs.regime.runs[0], runs.regime.coarseness
    fine, coarse = (
        runs.sgd_norms(r, use).numpy() ** 4 for r, use in ((rates, 110), (rates.coarser(c), 111))
    )
    low, high = _traces(runs, runs.sgd(rates, 110).reshape(-1, runs.subject.problem.dim))
    norm = runs.subject.time_scale(rates.lr, rates.weight_decay).norm

    def fourth(count: int, trace: float) -> float:
        return float(norm(count, 1.0, trace)) ** 4

    last = rates.counts[-1]
    bounds = fourth(last, low), fourth(last, high)
    left = math.exp(-4.0 * rates.lr * rates.weight_decay * last)
    curves = (
        Series(
            f"(10) at V = {v:.3g}",
            [0, *rates.counts],
            [1.0, *(fourth(k, v) for k in rates.counts)],
        )
        for v in sorted({low, high})
    )
    return between(
        made,
        rates,
        Extrapolated.of(fine[-1], coarse[-1], c),
        bounds,
        TOLERATED * runs.effort.departure * (bounds[1] - left),
        Picture(
            "Norm of SGD's weights",
            "steps k",
            "mean of |x|^4",
            (*curves, means("SGD", rates.counts, fine)),
        ),
    )


def equilibrium_norm(runs: ShortRuns, made: Design) -> Result:
    r"""Where |x|^4 comes to rest: (|x_k|^4 - e^{-4 eta lambda k} |x_0|^4) / (1 - e^{...}).

    By (10) that is eta V / 2 lambda after any number of steps: no run has to be in equilibrium.
    """
    subject, n = runs.subject, made.sample_size
    _, _, rates = _at_rest(runs)
    lr, decay, count = rates.lr, rates.weight_decay, rates.counts[0]
    left = math.exp(-4.0 * lr * decay * count)
    starts = subject.start * torch.tensor(_AROUND, dtype=torch.float64).repeat(n // 2)[:, None]
    rest, seen = [], []
    for factor, use in ((1, 122), (_COARSE, 123)):
        x = subject.run_sgd(
            subject.problem,
            starts,
            factor * lr,
            factor * decay,
            count // factor**2,
            seed=runs.seed(use),
        ).ys[-1]
        fourth = x.norm(dim=-1) ** 4
        rest.append(((fourth - left * starts.norm(dim=-1) ** 4) / (1.0 - left)).numpy())
        seen.append(runs.limits(x))
    at_rest = subject.time_scale(lr, decay).equilibrium_norm
    low, high = (float(at_rest(v)) ** 4 for v in _traces(runs, seen[0]))
    points = [mean_and_error(r) for r in rest]
    steps = [lr, _COARSE * lr]
    picture = Picture(
        "The norm that weight decay and noise lead to",
        "eta / |x|^2",
        "|x|^4 at rest",
        (
            Series("SGD", steps, [m for m, _ in points], "points", [e for _, e in points]),
            *(Series(f"{b:.3g}", [0.0, _COARSE * lr], [b, b]) for b in sorted({low, high})),
        ),
    )
    mean = Extrapolated.of(rest[0], rest[1], _COARSE)
    tolerated = TOLERATED * runs.effort.departure * high
    return between(made, rates, mean, (low, high), tolerated, picture)


def _traces(runs: ShortRuns, samples: Tensor) -> tuple[float, float]:
    """Smallest and largest V at directions (n, D) that were seen, and around the start."""
    few = samples[:: max(1, len(samples) // _EXTREMES)]
    values = runs.subject.problem.noise_trace(few / few.norm(dim=-1, keepdim=True))
    low, high = runs.around.traces
    low, high = min(low, float(values.min())), max(high, float(values.max()))
    middle = 0.5 * (low + high)
    return (middle, middle) if high - low <= 1e-6 * high else (low, high)


def between(
    made: Design,
    rates: Rates,
    mean: Extrapolated,
    bounds: tuple[float, float],
    tolerated: float,
    picture: Picture | None = None,
) -> Result:
    """A mean of |x|^4 between two bounds, give or take what is tolerated."""
    (low, high), value, error = bounds, float(mean.value), float(mean.error)
    beyond = max(low - value, value - high, 0.0)
    rounding = 1e-9 * max(abs(low), abs(high), 1e-300)
    p = mean_p_value(beyond, error, tolerated=tolerated, rounding=rounding)
    between = f"{low:.4g}" if high <= low else f"between {low:.4g} and {high:.4g}"
    return found(
        "fails" if p < made.false_alarm else "holds",
        f"|x|^4 is {value:.4g} +- {error:.1g} over {made.sample_size} runs at eta = "
        f"{rates.lr:.2g}, lambda = {rates.weight_decay:.2g}, extrapolated; (10) says {between}, "
        f"of which {tolerated:.1g} is tolerated" + ("" if p >= 1.0 else f": p = {p:.2g}"),
        **deviations(p, made),
        p_value=p,
        tests={"E |x|^4": mean_p_value(value - low, error)} if low == high else {},
        pictures=() if picture is None else (picture,),
        within_tolerance=p >= 1.0,
    )


def _design(of: Callable[[ShortRuns], _Norms]) -> Callable[[ShortRuns], Design]:
    def design(runs: ShortRuns) -> Design:
        (hypothesis, n, _), size = of(runs), runs.effort.departure
        what = f"a variance of the noise, or a weight decay, off by {size:.0%}"
        return runs.design(hypothesis, what, n, size)

    return design


#: What it means that the norm is another.
WRONG_NORM = (
    "The norm of SGD's weights is not that of (10): the noise has another trace than the problem "
    "says, or the steps another learning rate or weight decay."
)

SGD_AT_FIXED_RATIO = compare(
    "SGD at a fixed ratio tends to (8)",
    ("Theorem 3.2", "Equation (8)"),
    sgd_at_fixed_ratio,
    "SGD does not tend to the diffusion (8): the noise that its steps draw, or Phi, its second "
    "derivative or sigma in the drift of (8), is not that of this problem.",
)
SGD_IN_GENERAL = compare(
    "SGD in the time tau tends to (13)",
    ("Theorem 4.4", "Equation (11)", "Equation (12)", "Equation (13)"),
    sgd_in_general,
    "SGD, divided by R in the time tau, does not tend to (13): the noise, the weight decay or the "
    "learning rate of the steps, R or tau is not what the theory says.",
)
SDE_IN_GENERAL = compare(
    "the SDE of SGD in the time tau tends to (13)",
    ("Theorem 4.1", "Equation (3)", "Equation (13)"),
    sde_in_general,
    "The SDE (3), divided by R in the time tau, does not tend to (13): R, tau, sigma, or Phi and "
    "its second derivative is not what the theory says.",
)
DIFFUSIONS_AT_TWO_RATIOS = compare(
    "weight decay changes time and norm of (8)",
    ("Theorem 3.2", "Equation (8)"),
    diffusions_at_two_ratios,
    "The diffusions at two ratios are not one process with time and norm changed: the noise is "
    "not (-1)-homogeneous, or (8) is not solved rightly at one of them.",
)
SGD_WITHOUT_WEIGHT_DECAY = compare(
    "SGD without weight decay comes later",
    ("Remark 3.3",),
    sgd_without_weight_decay,
    "Weight decay does more here than change time and norm: the loss or the noise is not "
    "scale-invariant, or the steps do not decay as they say.",
)
SGD_AT_TWO_RATES = compare(
    "SGD at two pairs of rates has one law",
    ("Theorem 5.5",),
    sgd_at_two_rates,
    "The directions depend on more than T: the time scale, the learning rate or the weight decay "
    "is not what the steps have.",
)
NORM_LAW = law(
    "norm of SGD's weights",
    ("Equation (10)",),
    ShortRuns,
    _design(_short),
    norm_law,
    WRONG_NORM,
)
EQUILIBRIUM_NORM = law(
    "equilibrium norm of SGD's weights",
    ("Equation (10)",),
    ShortRuns,
    _design(_at_rest),
    equilibrium_norm,
    WRONG_NORM,
)
