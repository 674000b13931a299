r"""Two ways to one law over short times: the comparison of their samples of paths.

Each side is one run, or a run of SGD and one at steps that are c times as large, from which the
error of first order is taken away: :math:`(c\,m(\varepsilon) - m(c\varepsilon))/(c - 1)` for the
mean m of a functional. What is left, and what the energy distance sees at the smaller steps, is
tolerated up to a fourth of the departure that is to be found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from manifold_sde.verification.check import Check
from manifold_sde.verification.laws.engine import (
    Array,
    Extrapolated,
    Tests,
    deviations,
    judged,
    law,
    mean_p_value,
    means,
)
from manifold_sde.verification.laws.functionals import PathFunctional
from manifold_sde.verification.laws.regime import TOLERATED
from manifold_sde.verification.laws.short_runs import ShortRuns
from manifold_sde.verification.result import Design, Picture, Result
from manifold_sde.verification.two_sample import energy_test

#: Standard errors by which the dependence on the step size has to be sure.
_SURE = 3.0


@dataclass(frozen=True)
class Side:
    """One way to the law; nothing is drawn before its states are used.

    Attributes:
        label: What it is.
        fine: Draws the states (K, n, D).
        coarse: Draws states at larger steps; ``None`` where nothing is extrapolated.
        factor: How many times as large these are.
    """

    label: str
    fine: Callable[[], Tensor]
    coarse: Callable[[], Tensor] | None = None
    factor: int = 1

    @property
    def share(self) -> float:
        """Variance of its mean of a functional, in units of the functional's over n."""
        c = self.factor
        return 1.0 if self.coarse is None else (c**2 + 1.0) / (c - 1.0) ** 2

    def mean(self, start: Tensor, functional: PathFunctional) -> Extrapolated:
        """The mean of a functional, extrapolated."""
        coarse = None if self.coarse is None else functional.compute(start, self.coarse())
        return Extrapolated.of(functional.compute(start, self.fine()), coarse, self.factor)


@dataclass(frozen=True)
class Comparison:
    """Two sides that have one law.

    Attributes:
        hypothesis: The hypothesis, in words.
        left: One side.
        right: The other.
        norms: Whether norms are compared too.
        exact: Whether both sides have the law up to the solver's error, and nothing is tolerated
            but that of the norm, whose spread can be 0.
        until: The last moment.
    """

    hypothesis: str
    left: Side
    right: Side
    norms: bool = True
    exact: bool = False
    until: str = ""

    @property
    def shares(self) -> tuple[float, float]:
        """Variances of the means of the two sides, in units of one functional's over n."""
        return self.left.share, self.right.share


def compare(
    name: str,
    statements: tuple[str, ...],
    sides: Callable[[ShortRuns], Comparison],
    wrong: str,
) -> Check:
    """The check of a law that two sides have in common.

    Args:
        name: Its name.
        statements: Statements of the paper that it is about.
        sides: Function of the runs that returns the two sides.
        wrong: What it means if the laws differ.
    """

    def design(runs: ShortRuns) -> Design:
        comparison = sides(runs)
        departure = runs.departure(comparison.shares)
        what = f"a clock (time scale) off by {departure:.0%}"
        return runs.design(comparison.hypothesis, what, runs.runs, departure)

    def test(runs: ShortRuns, made: Design) -> Result:
        return _compared(name, runs, made, sides(runs))

    return law(name, statements, ShortRuns, design, test, wrong)


@dataclass(frozen=True)
class _Difference:
    """The difference of the two sides in a functional."""

    name: str
    left: Extrapolated
    right: Extrapolated
    tolerance: float

    @property
    def value(self) -> float:
        return float(self.left.value - self.right.value)

    @property
    def error(self) -> float:
        return math.hypot(self.left.error, self.right.error)

    @property
    def p_value(self) -> float:
        rounding = 1e-9 * max(abs(self.left.value), abs(self.right.value), 1e-3)
        return mean_p_value(self.value, self.error, tolerated=self.tolerance, rounding=rounding)

    @property
    def spreads(self) -> bool:
        """Whether the difference is that of samples, and not the solver's error alone."""
        return self.error > 0.0 and self.error > 1e-2 * self.tolerance

    @property
    def stepping(self) -> bool:
        """Whether SGD's error is larger than the departure: it cannot be extrapolated away."""
        return any(
            abs(side.gap) - _SURE * side.gap_error > self.tolerance / TOLERATED
            for side in (self.left, self.right)
        )


def _compared(name: str, runs: ShortRuns, made: Design, sides: Comparison) -> Result:
    start, left, right = runs.subject.start, sides.left, sides.right
    scale = runs.departure(sides.shares) / runs.effort.departure
    differences = {}
    for f in runs.functionals:
        if sides.norms or not f.of_norm:
            felt = max(f.effect, runs.effect * f.spread)
            tolerated = 0.0 if sides.exact and not f.of_norm else TOLERATED * scale * felt
            means_of = left.mean(start, f), right.mean(start, f)
            differences[f.name] = _Difference(f.name, *means_of, tolerated)
    seed = runs.subject.seed % 2**32
    a, b = _directions(left.fine()), _directions(right.fine())
    plain = float(energy_test(a, b, seed=seed).p_value)
    omnibus = plain
    if not sides.exact:
        tolerance = _directions(runs.pilot[0]), _directions(runs.pilot[2])
        omnibus = float(energy_test(a, b, seed=seed, tolerated=tolerance).p_value)
    tests = Tests(
        {"energy distance": omnibus, **{f.name: f.p_value for f in differences.values()}},
        made.false_alarm,
    )
    within = bool(tests.p_values[tests.worst] >= 1.0)
    detail = f"{left.label} and {right.label}, {made.sample_size} runs each: "
    if within:
        detail += f"all {len(tests.p_values)} tests within what is tolerated"
    else:
        detail += f"p = {tests.p:.2g} ({len(tests.p_values)} tests; the smallest is {tests.worst}"
        if tests.worst in differences:
            d = differences[tests.worst]
            detail += f": {d.value:.2g} +- {d.error:.2g}"
            detail += f", of which {d.tolerance:.2g} is tolerated" if d.tolerance else ""
        detail += ")"
    stepping = [f.name for f in differences.values() if f.stepping]
    undecided = ""
    if tests.rejected and stepping:
        undecided = (
            f"SGD is too far from its limit at eta / |x|^2 = {runs.regime.step_size:.2g} "
            f"to tell: {', '.join(stepping)} changes with the step size by more than the "
            "departure. An effort with a smaller step_size decides."
        )
    plains = {f.name: mean_p_value(f.value, f.error) for f in differences.values() if f.spreads}
    return judged(
        tests,
        made,
        f"{detail}; finds {made.departure}",
        undecided=undecided,
        **deviations(tests.p, made),
        tests={"energy distance": plain, **plains},
        pictures=(_picture(name, start, left, right),),
        within_tolerance=within,
        reach=f"{sides.until}, way {_way(start, right.fine()):.2g}",
    )


def _way(start: Tensor, states: Tensor) -> float:
    """Root mean square distance of the last directions from the start."""
    last = states[-1]
    way = last / last.norm(dim=-1, keepdim=True) - start
    return float(way.square().sum(-1).mean().sqrt())


def _directions(states: Tensor) -> Array:
    last = states[-1]
    directions: Array = (last / last.norm(dim=-1, keepdim=True)).double().numpy()
    return directions


def _picture(name: str, start: Tensor, left: Side, right: Side) -> Picture:
    """Mean square of the way from the start, at the moments."""
    series = []
    for side, style in ((left, "points"), (right, "line")):
        drawn = [(side.label, side.fine())]
        if side.coarse is not None:
            drawn.append((f"{side.label}, {side.factor} times the step", side.coarse()))
        for label, states in drawn:
            moved = (states / states.norm(dim=-1, keepdim=True) - start).square().sum(-1)
            series.append(means(label, range(1, len(moved) + 1), moved, style))
    return Picture(
        f"{name}: way on the unit sphere",
        "moment",
        "mean square distance from the start",
        tuple(series),
    )
