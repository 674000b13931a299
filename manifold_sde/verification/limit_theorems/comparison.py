r"""Two ways to one law: the comparison of their samples, with its design and its result.

Each side is one run, or a run of SGD and one at steps that are c times as large, from which the
error of first order is taken away: :math:`(c\,m(\varepsilon) - m(c\varepsilon))/(c - 1)` for the
mean m of a functional. What is left, and what the energy distance sees at the smaller steps, is
tolerated up to a fourth of the departure that is to be found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from manifold_sde.verification.limit_theorems.functionals import Array, Functional
from manifold_sde.verification.limit_theorems.regime import TOLERATED
from manifold_sde.verification.limit_theorems.simulations import Simulations
from manifold_sde.verification.result import Design, Picture, Result, Series, Verdict
from manifold_sde.verification.statistics import holm
from manifold_sde.verification.two_sample import energy_test

#: Standard errors by which the dependence on the step size has to be sure.
_SURE = 3.0


@dataclass(frozen=True)
class Side:
    """One way to the law.

    Attributes:
        label: What it is.
        fine: States (K, n, D).
        coarse: States at larger steps, or ``None``.
        factor: How many times as large these are.
    """

    label: str
    fine: Tensor
    coarse: Tensor | None = None
    factor: int = 1

    @property
    def weights(self) -> tuple[float, float]:
        """Of the two runs in the extrapolated mean."""
        if self.coarse is None:
            return 1.0, 0.0
        return self.factor / (self.factor - 1.0), -1.0 / (self.factor - 1.0)

    def mean(self, start: Tensor, functional: Functional) -> tuple[float, float, float, float]:
        """Extrapolated mean and standard error; the error at the fine steps, and its own."""
        values = functional.compute(start, self.fine)
        mean, variance = float(values.mean()), _variance(values)
        if self.coarse is None:
            return mean, math.sqrt(variance), 0.0, 0.0
        coarse = functional.compute(start, self.coarse)
        first, second = self.weights
        error = math.sqrt(first**2 * variance + second**2 * _variance(coarse))
        gap = (float(coarse.mean()) - mean) / (self.factor - 1.0)
        gap_error = math.sqrt(variance + _variance(coarse)) / (self.factor - 1.0)
        return first * mean + second * float(coarse.mean()), error, gap, gap_error


def _variance(values: Array) -> float:
    return float(values.var(ddof=1)) / len(values)


def shares_of(sides: int, coarse: tuple[int, ...]) -> tuple[float, ...]:
    """Variance of the mean of each side, in units of one functional's over n.

    Args:
        sides: Sides that are one run.
        coarse: Factors of the steps of the sides that are extrapolated.
    """
    return (1.0,) * sides + tuple((c**2 + 1.0) / (c - 1.0) ** 2 for c in coarse)


def design(simulations: Simulations, hypothesis: str, shares: tuple[float, ...]) -> Design:
    """The design of a comparison, before its runs are made."""
    departure = simulations.departure(shares)
    return Design(
        hypothesis=hypothesis,
        false_alarm=simulations.effort.false_alarm,
        departure=f"a clock (time scale) off by {departure:.0%}",
        miss=simulations.effort.miss,
        sample_size=simulations.runs,
        size=departure,
    )


@dataclass(frozen=True)
class _Found:
    """A functional's difference."""

    name: str
    difference: float
    error: float
    tolerance: float
    p_value: float
    stepping: bool

    @property
    def spreads(self) -> bool:
        """Whether the difference is that of samples, and not the solver's error alone."""
        return self.error > 0.0 and self.error > 1e-2 * self.tolerance

    @property
    def plain_p_value(self) -> float:
        """The p-value if nothing is tolerated."""
        return float(2.0 * stats.norm.sf(abs(self.difference) / self.error))


def _difference(
    start: Tensor, left: Side, right: Side, functional: Functional, tolerance: float
) -> _Found:
    a, a_error, a_gap, a_gap_error = left.mean(start, functional)
    b, b_error, b_gap, b_gap_error = right.mean(start, functional)
    difference, error = a - b, math.hypot(a_error, b_error)
    rounding = 1e-9 * max(abs(a), abs(b), 1e-3)
    beyond = max(abs(difference) - tolerance, 0.0)
    p_value = float(2.0 * stats.norm.sf(beyond / max(error, rounding)))
    # An error of SGD that is larger than the departure itself cannot be extrapolated away.
    stepping = any(
        abs(gap) - _SURE * gap_error > tolerance / TOLERATED
        for gap, gap_error in ((a_gap, a_gap_error), (b_gap, b_gap_error))
    )
    return _Found(functional.name, difference, error, tolerance, p_value, stepping)


def compare(
    simulations: Simulations,
    name: str,
    statements: tuple[str, ...],
    made: Design,
    left: Side,
    right: Side,
    shares: tuple[float, ...],
    *,
    norms: bool,
    wrong: str,
    exact: bool = False,
) -> Result:
    """Compare two samples of paths.

    Args:
        simulations: Where they come from.
        name: Name of the check.
        statements: What it is about.
        made: The design.
        left: One side.
        right: The other.
        shares: Variances of the means of the two sides, as in the design.
        norms: Whether norms are compared too.
        wrong: What it means if the laws differ.
        exact: Whether both sides have the law up to the solver's error, and nothing is tolerated
            but that of the norm, whose spread can be 0.

    Returns:
        The result.
    """
    start = simulations.subject.start
    scale = simulations.departure(shares) / simulations.effort.departure
    found = []
    for functional in simulations.functionals:
        if norms or not functional.of_norm:
            felt = max(functional.effect, simulations.effect * functional.spread)
            share = 0.0 if exact and not functional.of_norm else TOLERATED
            found.append(_difference(start, left, right, functional, share * scale * felt))
    pilot = simulations.pilot
    a, b = _directions(left.fine), _directions(right.fine)
    tolerated = None if exact else (_directions(pilot[0]), _directions(pilot[2]))
    seed = simulations.subject.seed % 2**32
    omnibus = float(energy_test(a, b, seed=seed, tolerated=tolerated).p_value)
    names = ["energy distance", *(f.name for f in found)]
    plain = omnibus if exact else float(energy_test(a, b, seed=seed).p_value)
    tests = {names[0]: plain, **{f.name: f.plain_p_value for f in found if f.spreads}}
    p_values = np.array([omnibus, *(f.p_value for f in found)])
    p_value = float(holm(p_values.tolist()).min())
    worst = int(p_values.argmin())
    within = bool(p_values[worst] >= 1.0)
    rejected = p_value < made.false_alarm
    stepping = [f.name for f in found if f.stepping]
    verdict: Verdict = "holds" if not rejected else "undecided" if stepping else "fails"
    meaning = ""
    if verdict == "fails":
        meaning = wrong
    elif verdict == "undecided":
        meaning = (
            f"SGD is too far from its limit at eta / |x|^2 = {simulations.regime.step_size:.2g} "
            f"to tell: {', '.join(stepping)} changes with the step size by more than the "
            "departure. An effort with a smaller step_size decides."
        )
    return Result(
        name,
        verdict,
        _detail(left, right, names, worst, found, p_value, made, within),
        statistic=float(stats.norm.isf(max(p_value, 1e-300) / 2.0)),
        limit=float(stats.norm.isf(made.false_alarm / 2.0)),
        p_value=p_value,
        statements=statements,
        kind="statistics",
        meaning=meaning,
        design=made,
        tests=tests,
        pictures=(_picture(name, start, left, right),),
        within_tolerance=within,
    )


def _detail(
    left: Side,
    right: Side,
    names: list[str],
    worst: int,
    found: list[_Found],
    p_value: float,
    made: Design,
    within: bool,
) -> str:
    text = f"{left.label} and {right.label}, {made.sample_size} runs each: "
    if within:
        return f"{text}all {len(names)} tests within what is tolerated; finds {made.departure}"
    text += f"p = {p_value:.2g} ({len(names)} tests; the smallest is {names[worst]}"
    if worst:
        f = found[worst - 1]
        text += f": {f.difference:.2g} +- {f.error:.2g}"
        text += f", of which {f.tolerance:.2g} is tolerated" if f.tolerance else ""
    return f"{text}); finds {made.departure}"


def _directions(states: Tensor) -> Array:
    last = states[-1]
    directions: Array = (last / last.norm(dim=-1, keepdim=True)).double().numpy()
    return directions


def _picture(name: str, start: Tensor, left: Side, right: Side) -> Picture:
    """Mean square of the way from the start, at the moments."""
    series = []
    for side in (left, right):
        runs = [(side.label, side.fine)]
        if side.coarse is not None:
            runs.append((f"{side.label}, {side.factor} times the step", side.coarse))
        for label, states in runs:
            moved = (states / states.norm(dim=-1, keepdim=True) - start).square().sum(-1)
            mean, error = moved.mean(1), moved.std(1) / math.sqrt(moved.shape[1])
            x = torch.arange(1, len(mean) + 1).tolist()
            points = "points" if side is left else "line"
            series.append(
                Series(label, x, mean.tolist(), points, error.tolist())  # type: ignore[arg-type]
            )
    return Picture(
        f"{name}: way on the unit sphere",
        "moment",
        "mean square distance from the start",
        tuple(series),
    )
