r"""The limit theorems where matrices of D x D do not fit: by functionals, over short times.

The directions of SGD are looked at along random unit vectors t of the tangent space at the start,
orthogonal to it, and the norm. Over a clock u in which :math:`\Sigma` does not change,
:math:`\langle t, Y\rangle` has the variance

.. math::

    \|Y\|^2\, u\, t^\top\Sigma(\bar Y_0)\, t

in (8) and (13), at the norm and the clock that these have at constant trace. SGD's weights stand
off the manifold by vectors that are normal to it, which t does not see. So the clock, the time
scale and the noise along the manifold are put to the test; the drift along it is not, nor are laws
in D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from manifold_sde.deadline import shared_property
from manifold_sde.errors import NoiseError
from manifold_sde.geometry.tangent_noise import NO_PART
from manifold_sde.sdes import WeightDecaySDE
from manifold_sde.verification.assumptions.by_products import SizedSurvey
from manifold_sde.verification.assumptions.groups import NO_THEOREM
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.laws import integrators, limits, step_noise
from manifold_sde.verification.laws.engine import (
    Array,
    Extrapolated,
    Runs,
    Tests,
    deviations,
    judged,
    mean_and_error,
)
from manifold_sde.verification.laws.regime import TOLERATED, Rates, Regime, Surroundings
from manifold_sde.verification.result import Design, Result, found
from manifold_sde.verification.subject import Subject

#: Random tangent vectors, and paths of a run.
_VECTORS, _PATHS = 64, 32
#: Paths of an equation that are stepped together: each holds the increments of many steps.
_TOGETHER = 4
#: Steps of the coarse run of the norm are so many times as large.
_COARSE = 2
_WITHOUT_IT = "Theorem 4.4, the law after finitely many steps, applies."
_HOW = "by functionals (projections on random tangent vectors, and the norm)"


class SizedRuns(Runs):
    """Runs of SGD from norm 1, and what is known of the start by products."""

    @property
    def survey(self) -> SizedSurvey:
        """The points that the assumptions are looked at."""
        return SizedSurvey.of(self.subject, self.effort)

    def require_diffusion(self) -> None:
        """Raise where the noise moves nothing.

        Raises:
            NoiseError: If there is no diffusion.
        """
        if self.survey.looks[0].share[0] <= NO_PART:
            raise NoiseError(
                "there is no diffusion along the manifold",
                received="noise without a part along the manifold at the start",
                expected="noise that moves the weights along the manifold of minimisers "
                "(Assumption 5.2)",
                remedy="noise that is left at the minimum, or SphericalNoise as a model",
            )

    @shared_property
    def around(self) -> Surroundings:
        """The sharpness and the trace at the points of the survey; no curvature of Phi."""
        self.require_diffusion()
        looks = self.survey.looks
        traces = [look.trace for look in looks]
        none = self.subject.start.new_zeros(1, 1)
        return Surroundings(
            sharpness=float(self.survey.tops.max()),
            trace=traces[0],
            traces=(min(traces), max(traces)),
            eigenvalues=none + 1.0,
            pull=none,
        )

    @shared_property
    def regime(self) -> Regime:
        """Step sizes, times and rates."""
        return Regime.of(self.around, self.effort)

    @shared_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Unit tangent vectors t (q, D), orthogonal to the start, and t^T Sigma t, (q,)."""
        subject, y = self.subject, self.subject.start
        rows = subject.hessian_range(y).project(subject.normals(130, _VECTORS, len(y)))
        rows = rows - (rows @ y)[:, None] * y
        rows = rows / rows.norm(dim=1, keepdim=True)
        noise, loss = subject.problem.noise, subject.problem.pointwise
        squares = [noise.transposed_product(loss, y, t).square().sum() for t in rows]
        return rows, torch.stack(squares)

    @property
    def paths(self) -> int:
        """Independent runs."""
        return max(_PATHS, self.effort.points * _PATHS // 2)

    @property
    def found(self) -> float:
        """Relative departure of a variance that is found, by so many paths and vectors."""
        numbers = self.paths * min(_VECTORS, self.subject.problem.n_noise)
        quantiles = stats.norm.isf(self.effort.false_alarm / 4) + stats.norm.isf(self.effort.miss)
        return float(quantiles * math.sqrt(2.0 / numbers)) + TOLERATED * self.effort.departure

    def seed(self, use: int) -> int:
        """Seed of a run."""
        return ((self.subject.seed << 8) % 2**63) + use

    def ends(self, rates: Rates, use: int) -> Tensor:
        """Weights of SGD at the last moment, (n, D)."""

        def make() -> Tensor:
            run = self.subject.run_sgd(
                self.subject.problem,
                self.subject.start,
                rates.lr,
                rates.weight_decay,
                [0, rates.counts[-1]],
                n_paths=self.paths,
                seed=self.seed(use),
            )
            last: Tensor = run.ys[-1].clone()  # no part of all that was kept
            return last

        return self.subject.once((self.effort, "ends", rates, use), make)

    def spread(self, states: Tensor) -> Array:
        """Mean over t of the squares of <t, Y> / |Y|, less their means, over t^T Sigma t: (n,)."""
        rows, squares = self.vectors
        along = (states / states.norm(dim=1, keepdim=True)) @ rows.T
        n = len(along)
        along = (along - along.mean(0)) * math.sqrt(n / (n - 1))
        # Vectors to which the noise has no part say nothing.
        seen = squares > NO_PART * squares.max()
        values: Array = (along[:, seen].square() / squares[seen]).mean(1).numpy()
        return values


@dataclass(frozen=True)
class Limit:
    """(8) or (13) at a time, at constant trace, from norm 1.

    Attributes:
        clock: Intrinsic clock u.
        norm: |Y|.
    """

    clock: float
    norm: float

    @classmethod
    def of(cls, ratio: float, time: float, trace: float) -> Limit:
        """At a ratio C and a time t; (13) at T is ratio 1/2."""
        start = math.expm1(4.0 * ratio * time) / (4.0 * ratio) if ratio else time
        grown = 2.0 * trace * start
        fourth = math.exp(-4.0 * ratio * time) * (1.0 + grown)
        return cls(math.log1p(grown) / (2.0 * trace), fourth**0.25)


def _p_value(
    gap: float, error: float, number: int, tolerated: float, rounding: float = 1e-300
) -> float:
    """Two-sided p-value of a mean of so many runs that should be 0, by Student's law."""
    beyond = max(abs(gap) - tolerated, 0.0) / max(error, rounding)
    return float(2.0 * stats.t.sf(beyond, number - 1))


def _of_states(
    runs: SizedRuns, made: Design, label: str, states: Tensor, limit: Limit, scale: float = 1.0
) -> Result:
    """States, divided by a scale, against a limit, in the variance of projections and the norm."""
    ratio, error = mean_and_error(runs.spread(states) / limit.clock)
    norm, wide = mean_and_error(states.norm(dim=1).numpy() / scale)
    tolerated = TOLERATED * runs.effort.departure
    # The norm moves by what noise and decay do in this time, of which a part is tolerated.
    moved = abs(runs.around.trace) * limit.clock + abs(math.log(limit.norm))
    p_values = {
        "variance along the manifold": _p_value(ratio - 1.0, error, len(states), tolerated),
        "norm": _p_value(
            norm - limit.norm, wide, len(states), tolerated * moved, 1e-12 * limit.norm
        ),
    }
    tests = Tests(p_values, made.false_alarm)
    within = bool(tests.p_values[tests.worst] >= 1.0)
    detail = (
        f"{label}, {made.sample_size} runs, {_HOW}: the variance is {ratio:.3f} +- {error:.2g} "
        f"times that of the limit at u = {limit.clock:.2g}, {tolerated:.2g} tolerated; |x| is off "
        f"by {norm - limit.norm:.1g} +- {wide:.1g}, {tolerated * moved:.1g} tolerated; "
        f"p = {tests.p:.2g}. The drift along Gamma is not looked at"
    )
    return judged(tests, made, detail, **deviations(tests.p, made), within_tolerance=within)


def _of_two(runs: SizedRuns, made: Design, label: str, left: Tensor, right: Tensor) -> Result:
    """Two samples of states in the variance of projections of the direction."""
    (a, error), (b, wide) = (mean_and_error(runs.spread(s)) for s in (left, right))
    size, tolerated = 0.5 * (a + b), TOLERATED * runs.effort.departure
    both = math.hypot(error, wide) / size
    p = _p_value((a - b) / size, both, len(left), tolerated)
    tests = Tests({"variance along the manifold": p}, made.false_alarm)
    detail = (
        f"{label}, {made.sample_size} runs each, {_HOW.replace(', and the norm', '')}: the "
        f"variances differ by {(a - b) / size:.2g} +- {both:.2g} of their mean, {tolerated:.2g} "
        f"tolerated; p = {tests.p:.2g}"
    )
    return judged(tests, made, detail, **deviations(tests.p, made), within_tolerance=p >= 1.0)


def _law(
    hypothesis: str,
    test: Callable[[SizedRuns, Design], Result],
    wrong: str,
    what: str = "a clock, a time scale or a variance of the noise along the manifold",
) -> Callable[[Subject, Effort], Result]:
    """The function of a check of a law, which is declared before anything is drawn."""

    def run(subject: Subject, effort: Effort) -> Result:
        runs = SizedRuns.of(subject, effort)
        runs.require_diffusion()
        made = runs.design(hypothesis, f"{what} off by {runs.found:.0%}", runs.paths, runs.found)
        result = test(runs, made)
        return replace(result, design=made, meaning=wrong if result.verdict == "fails" else "")

    return run


def _at_fixed_ratio(runs: SizedRuns, made: Design) -> Result:
    rates = runs.regime.runs[0]
    limit = Limit.of(rates.ratio, rates.times[-1], runs.around.trace)
    label = f"SGD after {rates.counts[-1]} steps against (8) at C = {rates.ratio:.3g}"
    return _of_states(runs, made, label, runs.ends(rates, 110), limit)


def _general(runs: SizedRuns, rates: Rates, count: float) -> tuple[Limit, float]:
    """(13) at tau of a step count, and R."""
    scale = runs.subject.time_scale(rates.lr, rates.weight_decay)
    time = float(np.asarray(scale.tau(count)))
    return Limit.of(0.5, time, runs.around.trace), float(np.asarray(scale.radius(count)))


def _in_general(runs: SizedRuns, made: Design) -> Result:
    rates = runs.regime.runs[1]
    limit, radius = _general(runs, rates, rates.counts[-1])
    label = f"SGD after {rates.counts[-1]} steps, over R, against (13)"
    return _of_states(runs, made, label, runs.ends(rates, 113), limit, radius)


def _sde_in_general(runs: SizedRuns, made: Design) -> Result:
    rates = runs.regime.runs[1].coarser(_COARSE)
    sde = WeightDecaySDE(runs.subject.problem, rates.lr, rates.weight_decay)
    end = float(rates.counts[-1])
    states = runs.subject.solve(
        sde,
        runs.subject.start,
        [0.0, end],
        n_paths=runs.paths,
        method="euler",
        dt=0.5,
        seed=runs.seed(116),
        compile=False,
        chunk_size=_TOGETHER,
    ).ys[-1]
    limit, radius = _general(runs, rates, end)
    return _of_states(runs, made, f"(3) at {end:g}, over R, against (13)", states, limit, radius)


def _without_decay(runs: SizedRuns, made: Design) -> Result:
    rates = runs.regime.runs[0]
    count = round(runs.regime.elapsed[-1] / rates.lr**2)
    free = Rates(rates.lr, 0.0, (count,))
    label = f"SGD with weight decay after {rates.counts[-1]} steps, and without after {count}"
    return _of_two(runs, made, label, runs.ends(rates, 110), runs.ends(free, 119))


def _at_two_rates(runs: SizedRuns, made: Design) -> Result:
    one, other = runs.regime.runs
    scales = [runs.subject.time_scale(r.lr, r.weight_decay) for r in (one, other)]
    time = float(np.asarray(scales[0].tau(one.counts[-1])))
    count = int(np.asarray(scales[1].steps(time * (1.0 + 1e-9))))
    other = replace(other, counts=(count,))
    label = f"SGD after {one.counts[-1]} steps, and at other rates after {count}"
    return _of_two(runs, made, label, runs.ends(one, 110), runs.ends(other, 121))


def _norm_law(runs: SizedRuns, made: Design) -> Result:
    rates = runs.regime.runs[0]
    pair = (rates, rates.coarser(_COARSE))
    states = [runs.ends(r, use) for r, use in zip(pair, (110, 111), strict=True)]
    fine, coarse = (s.norm(dim=1).numpy() ** 4 for s in states)
    low, high = _traces(runs, states[0])
    norm = runs.subject.time_scale(rates.lr, rates.weight_decay).norm
    last = rates.counts[-1]
    bounds = tuple(float(norm(last, 1.0, v)) ** 4 for v in (low, high))
    left = math.exp(-4.0 * rates.lr * rates.weight_decay * last)
    mean = Extrapolated.of(fine, coarse, _COARSE)
    tolerated = TOLERATED * runs.effort.departure * (bounds[1] - left)
    return limits.between(made, rates, mean, (bounds[0], bounds[1]), tolerated)


def _norm_at_rest(runs: SizedRuns, made: Design) -> Result:
    trace = runs.around.trace
    lr = 0.5 * runs.regime.step_size
    rates = Rates(lr, 0.5 * trace * lr, (_COARSE**2 * (runs.effort.steps // _COARSE**2),))
    rest = []
    for r, use in ((rates, 122), (rates.coarser(_COARSE), 123)):
        left = math.exp(-4.0 * r.lr * r.weight_decay * r.counts[0])
        fourth = runs.ends(r, use).norm(dim=1).numpy() ** 4
        rest.append((fourth - left) / (1.0 - left))
    at_rest = runs.subject.time_scale(rates.lr, rates.weight_decay).equilibrium_norm
    bounds = [float(at_rest(v)) ** 4 for v in _traces(runs, runs.ends(rates, 122))]
    mean = Extrapolated.of(rest[0], rest[1], _COARSE)
    tolerated = TOLERATED * runs.effort.departure * bounds[1]
    return limits.between(made, rates, mean, (bounds[0], bounds[1]), tolerated)


def _traces(runs: SizedRuns, states: Tensor) -> tuple[float, float]:
    """The smallest and the largest trace at the ends of runs and around the start."""
    directions = states / states.norm(dim=1, keepdim=True)
    values = [float(runs.subject.problem.noise_trace(z)) for z in directions]
    low, high = min(*values, runs.around.traces[0]), max(*values, runs.around.traces[1])
    middle = 0.5 * (low + high)
    return (middle, middle) if high - low <= 1e-6 * high else (low, high)


# The conditions of a Katzenberger process.


@dataclass(frozen=True)
class _Shrinkage:
    """What the steps of a run left of the weights, (K, n), at its rates."""

    lr: float
    weight_decay: float
    shrinkage: Tensor


def _conditions(
    subject: Subject, effort: Effort, time: Callable[..., integrators.Time], equations: str
) -> Sequence[Result]:
    runs = SizedRuns.of(subject, effort)

    def make() -> _Shrinkage:
        lr, decay = step_noise.LR, step_noise.WEIGHT_DECAY
        step = min(effort.step_size, step_noise.STABILITY / float(runs.survey.tops[0]))
        x = subject.start * math.sqrt(lr / step)
        counts = list(range(step_noise.STEPS + 1))
        run = subject.run_sgd(subject.problem, x, lr, decay, counts, n_paths=2, seed=runs.seed(124))
        before, after = run.ys[:-1], run.ys[1:]
        left = (before * after).sum(-1) / before.square().sum(-1)
        return _Shrinkage(lr, decay, left)

    steps = subject.once((effort, "shrinkage"), make)
    times = [time(subject, f * steps.lr, f * steps.weight_decay) for f in integrators.FACTORS]
    first = integrators.deterministic(equations, times, steps)
    wrong = integrators.WRONG[0] if first.verdict == "fails" else ""
    second = found(
        "undecided",
        "not made at this size: what a step adds to Z is read off by the pseudo-inverse of sigma, "
        "a matrix. The variance of SGD along the manifold is looked at with (8) and (13)",
        name=f"Z of {equations} tends to a Brownian motion",
    )
    return [replace(first, meaning=wrong), second]


def lemma_3_1(subject: Subject, effort: Effort) -> Sequence[Result]:
    """A without bound and B to C t, for (7); Z is undecided."""
    return _conditions(subject, effort, integrators.fixed_ratio_time, "(7)")


def lemma_4_3(subject: Subject, effort: Effort) -> Sequence[Result]:
    """A without bound and B to t / 2, for (15) to (17); Z is undecided."""
    return _conditions(subject, effort, integrators.general_time, "(15) to (17)")


def one_equilibrium(subject: Subject, effort: Effort) -> Result:
    """Where Theorem 5.4 fails, that; otherwise undecided."""
    survey = SizedSurvey.of(subject, effort)
    groups = survey.weight_groups
    if survey.looks[0].share[0] <= NO_PART:
        detail = "the noise has no part along the manifold at the start"
        return found("fails", detail, meaning="This is a deterministic flow and no diffusion.")
    if groups is not None and len(groups) > 1:
        detail = f"{len(groups)} groups of weights can be scaled separately"
        return found("fails", detail, meaning=f"{NO_THEOREM} {_WITHOUT_IT}")
    return found(
        "undecided",
        "not made at this size: the direction forgets its start in a clock of the order of "
        f"1 / tr Sigma = {1.0 / survey.looks[0].trace:.2g}, and stable steps are of size "
        f"{1.0 / float(survey.tops[0]):.1g}; the norm's equilibrium has a row of its own",
    )


FIXED_RATIO = _law(
    "SGD's weights after t / eta^2 steps have the norm and the variance along Gamma of (8) at t",
    _at_fixed_ratio,
    "SGD does not tend to the diffusion (8): the noise that its steps draw is another, or their "
    "learning rate or weight decay.",
)
IN_GENERAL = _law(
    "SGD's weights over R have the norm and the variance along Gamma of (13) at tau",
    _in_general,
    "SGD, divided by R in the time tau, does not tend to (13): noise, rates, R or tau is not what "
    "the theory says.",
)
SDE_IN_GENERAL = _law(
    "the states of (3) over R have the norm and the variance along Gamma of (13) at tau",
    _sde_in_general,
    "The SDE (3), divided by R in the time tau, does not tend to (13): R, tau or sigma is not what "
    "the theory says.",
)
WITHOUT_DECAY = _law(
    "directions of SGD without weight decay, later, have the variance of those with it",
    _without_decay,
    "Weight decay does more here than change time and norm.",
)
TWO_RATES = _law(
    "directions of SGD at two pairs of rates have one variance at the same T",
    _at_two_rates,
    "The directions depend on more than T.",
)
NORM_LAW = _law(
    "the mean of |x_k|^4 is that of (10)", _norm_law, limits.WRONG_NORM, "a variance of the noise"
)
EQUILIBRIUM_NORM = _law(
    "the mean that |x|^4 returns to is eta V / (2 lambda)",
    _norm_at_rest,
    limits.WRONG_NORM,
    "a variance of the noise",
)
