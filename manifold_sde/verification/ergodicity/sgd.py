"""Theorem 5.5, its second half: SGD itself beyond mixing has the law pi, wherever it started."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from manifold_sde.deadline import shared_property
from manifold_sde.errors import ClockRangeError
from manifold_sde.paper import implements
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.ergodicity.runs import ErgodicRuns
from manifold_sde.verification.result import Design, Result, Verdict
from manifold_sde.verification.statistics import holm
from manifold_sde.verification.subject import Subject
from manifold_sde.verification.two_sample import compare_laws

Array = NDArray[np.float64]

NAME = "SGD in equilibrium"
_STATEMENTS = ("Theorem 5.5", "Conjecture 1.1", "Theorem 1.2")
#: eta lambda_max(H) / |x|^2 of the smaller step, in units of ``effort.step_size``, and the largest
#: eta / |x|^2 of it. Only this ratio matters for how far SGD is from its limit.
_STIFFNESS, _LARGEST = 20.0, 0.15
#: Most steps of SGD, by departure: so many / departure.
_BUDGET = 750.0
#: Shift of a mean that is to be found, in units of what the other checks find; and the part of the
#: change between the two steps that is allowed to be left after extrapolation.
_EFFECT, _LEFT = 1.5, 0.25
#: Change between the two steps, in units of the effect, from which extrapolation is not believed.
_TOO_FAR = 1.0


@dataclass(frozen=True, eq=False)
class SgdRuns:
    """Runs of SGD with one step size, from two starts that are far apart, beyond mixing.

    The rates are those at which norm 1 is in equilibrium, where the trace is its mean.

    Attributes:
        runs: The runs of the diffusion.
        step: eta / |x|^2 at norm 1.
        n_paths: Paths from each start.
    """

    runs: ErgodicRuns
    step: float
    n_paths: int

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rate and weight decay."""
        return self.step, 0.5 * self.step * float(self.runs.traces.mean())

    @cached_property
    def steps(self) -> int:
        """Steps of SGD at the time at which the diffusion has mixed, tau^{-1}(T)."""
        end = self.runs.end + 0.5 * abs(math.log(float(self.runs.traces.mean())))
        return int(self.runs.subject.time_scale(*self.rates).steps(end))

    @shared_property
    def states(self) -> tuple[Array, Array]:
        """Directions of Phi(x) (2, n, D), and |x|^2 / R^2 (2, n), at the end."""
        subject = self.runs.subject
        starts = self.runs.starts[:2].repeat_interleave(self.n_paths, 0)
        run = subject.run_sgd(
            subject.problem,
            starts,
            *self.rates,
            [0, self.steps],
            seed=self.runs.seed("sgd"),
            compile=self.steps * len(starts) > 2e7,
        )
        radius = float(subject.time_scale(*self.rates).radius(self.steps))
        x = run.ys[-1]
        limits = subject.limits(x)
        directions = (limits / limits.norm(dim=1, keepdim=True)).numpy()
        squares = x.square().sum(1).numpy() / radius**2
        return directions.reshape(2, -1, x.shape[1]), squares.reshape(2, -1)

    @cached_property
    def table(self) -> Array:
        """Values of the declared functions, and |x|^2 / R^2, (2 n, m + 1)."""
        directions, squares = self.states
        flat = directions.reshape(-1, directions.shape[-1])
        return np.concatenate([self.runs.functionals.table(flat), squares.reshape(-1, 1)], 1)


@implements("Theorem 5.5", "Conjecture 1.1")
def check_sgd(subject: Subject, effort: Effort) -> list[Result]:
    """Run SGD at two step sizes, and extrapolate its means to step size 0."""
    runs = ErgodicRuns.of(subject, effort)
    if not runs.is_regular:
        return []
    names = [*runs.functionals, "|x|^2"]
    # The extrapolated mean 2 m(e) - m(2 e) of n and 4 n runs has the variance 4.25 / n.
    effect = _EFFECT * runs.effect
    n = math.ceil(runs.runs(len(names) + 1, (4.25 + 1.0) / _EFFECT**2) / 2)
    design = Design(
        "SGD beyond mixing has the law of the diffusion, from two starts that are far apart",
        effort.false_alarm,
        f"a mean that differs by {effect:g} standard deviations",
        effort.miss,
        2 * n,
    )
    top = float(torch.linalg.eigvalsh(subject.problem.hessian(runs.starts)).max())
    step = min(_STIFFNESS * effort.step_size / top, _LARGEST)
    fine, coarse = SgdRuns(runs, step, n), SgdRuns(runs, 2.0 * step, 4 * n)
    most = _BUDGET / effort.departure
    if fine.steps > most:
        raise ClockRangeError(
            "SGD to its equilibrium is out of the reach of this effort",
            received=f"{fine.steps} steps at eta / |x|^2 = {step:.3g}",
            expected=f"at most {most:.0f}",
            remedy='effort="thorough"; the law at finite times does not need it',
        )
    ends = runs.functionals.table(np.concatenate(list(runs.end_directions())))
    ends = np.concatenate([ends, runs.ends.norms[-1].numpy()[:, None] ** 2], 1)
    if not (np.isfinite(fine.table).all() and np.isfinite(coarse.table).all()):
        return [_unusable(design)]
    directions = fine.states[0]
    uniqueness = compare_laws(directions[0], directions[1], runs.functionals)
    p_values, z, change = _extrapolated(fine.table, coarse.table, ends)
    p = float(holm([uniqueness.p_value, *p_values]).min())
    worst = int(np.argmax(np.abs(z)))
    detail = (
        f"p = {p:.2g} after {fine.steps} and {coarse.steps} steps at eta / |x|^2 = {step:.2g} and "
        f"{2 * step:.2g}; between the two starts p = {uniqueness.p_value:.2g}; from the diffusion "
        f"at most {abs(z[worst]):.1f} standard errors ({names[worst]})"
    )
    verdict: Verdict = "holds"
    meaning = ""
    if p <= effort.false_alarm:
        verdict, meaning = (
            "fails",
            "SGD does not come to the equilibrium of the diffusion: another noise, other rates, or "
            "step sizes that are too large for the limit.",
        )
    elif float(change.max()) > _TOO_FAR * effect:
        verdict, meaning = (
            "undecided",
            f"Means change by up to {change.max():.2g} standard deviations between the two step "
            "sizes: SGD is too far from its limit to be extrapolated. Smaller steps are needed.",
        )
    return [
        Result(
            NAME,
            verdict,
            detail,
            statistic=1.0 - p,
            limit=1.0 - effort.false_alarm,
            p_value=p,
            statements=_STATEMENTS,
            kind="statistics",
            meaning=meaning,
            design=design,
            tests=dict(uniqueness.p_values),
        )
    ]


def _extrapolated(fine: Array, coarse: Array, ends: Array) -> tuple[list[float], Array, Array]:
    """P-values, deviations in standard errors, and changes between the steps: (m,) each.

    What extrapolation leaves is of second order. A quarter of the change between the two step
    sizes is allowed for: m(2e) - m(e) = c_1 e + 3 c_2 e^2, of which 2 c_2 e^2 is left.
    """
    means = [sample.mean(0) for sample in (fine, coarse, ends)]
    errors = [sample.var(0, ddof=1) / len(sample) for sample in (fine, coarse, ends)]
    # In units in which the diffusion's mean and spread are of order 1.
    size = np.maximum(ends.std(0, ddof=1), np.array([0.0] * (ends.shape[1] - 1) + [means[2][-1]]))
    difference = 2.0 * means[0] - means[1] - means[2]
    error = np.sqrt(4.0 * errors[0] + errors[1] + errors[2])
    change = np.abs(means[1] - means[0]) / size
    known = np.maximum(change - 2.0 * np.sqrt(errors[0] + errors[1]) / size, 0.0)
    left = np.maximum(np.abs(difference) - _LEFT * known * size, 0.0)
    z = np.sign(difference) * left / np.maximum(error, 1e-12 * size)
    p_values = 2.0 * stats.norm.sf(np.abs(z))
    return [min(float(p), 1.0) for p in p_values], z, known


def _unusable(design: Design) -> Result:
    return Result(
        NAME,
        "undecided",
        "some runs of SGD blew up, or left the attraction set",
        statements=_STATEMENTS,
        kind="statistics",
        meaning="The step sizes are too large for this loss.",
        design=design,
    )


CHECKS = (Check(NAME, "statistics", _STATEMENTS, check_sgd),)
