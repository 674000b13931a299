"""Several groups of weights that can be scaled separately: directions and norms of the groups.

Gamma_1 is then not compact and Theorem 5.4 does not apply as stated: how the norm is shared among
the groups is a state of its own, d|Y_g|^2 = (-2 c |Y_g|^2 + tr Sigma_gg) dt. The pair of the
directions of the groups, which live on a product of spheres, and of their norms can have an
equilibrium all the same.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from manifold_sde.errors import ClockRangeError
from manifold_sde.sdes import LimitingDiffusion
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.ergodicity.functionals import Functionals
from manifold_sde.verification.ergodicity.relaxation import slowest_time
from manifold_sde.verification.ergodicity.runs import ErgodicRuns
from manifold_sde.verification.result import Design, Picture, Result, Series, Verdict
from manifold_sde.verification.statistics import holm
from manifold_sde.verification.subject import Subject
from manifold_sde.verification.two_sample import compare_laws

Array = NDArray[np.float64]

NAME = "equilibrium of several groups"
#: What one group's norm is multiplied by at the starts, and the others' divided by.
_TILTS = (1.0, 1.3, 0.75)
#: First length of the pilot in time T, its paths, and the most relaxation times of a run.
_PILOT, _PATHS = 16.0, 96
_LONGEST = 64.0
#: Times that a pilot keeps, each of which costs a step.
_MOMENTS = 16
#: Relaxation times of a pilot that tells them.
_PILOTED = 2.5
#: Largest variance of a group's direction in a step, in squared radians and in each dimension, for
#: this share of the paths, and longest step.
_VARIANCE, _SHARE, _LONGEST_STEP = 0.25, 0.95, 0.25
#: Time T after which the norms of the starts have settled enough for longer steps, and time at the
#: end that is solved with a scheme of order two: four times that in which norms settle.
_FIRST, _LAST = 1.0, 2.0


class GroupState:
    """Directions and squared norms of the groups, as numbers that can be compared.

    Args:
        groups: The groups of coordinates.
    """

    def __init__(self, groups: tuple[tuple[int, ...], ...]) -> None:
        self.groups = [list(group) for group in groups]

    def __call__(self, states: Tensor) -> Array:
        """The directions of all groups and their squared norms: (n, D) -> (n, D + G)."""
        parts, squares = [], []
        for group in self.groups:
            part = states[:, group]
            squares.append(part.square().sum(1, keepdim=True))
            parts.append(part / squares[-1].sqrt())
        return torch.cat([*parts, *squares], 1).numpy()

    def tilted(self, y: Tensor, factor: float) -> Tensor:
        """A point of the cone with the first group's norm multiplied, the others' divided by it.

        The loss does not change with the norm of a group, so that it is still a minimiser.
        """
        tilted = y.clone()
        for i, group in enumerate(self.groups):
            tilted[..., group] *= factor if i == 0 else 1.0 / factor
        return tilted


def check_groups(subject: Subject, effort: Effort) -> list[Result]:
    """Runs from starts that are far apart in the groups' directions and in their norms."""
    runs = ErgodicRuns.of(subject, effort)
    degeneracy = runs.degeneracy
    if degeneracy.noise_rank == 0 or len(degeneracy.groups) < 2:
        return []
    if not effort.long_checks:
        return [_not_asked(len(degeneracy.groups))]
    state = GroupState(degeneracy.groups)
    starts = torch.cat(
        [state.tilted(start[None], tilt) for start, tilt in zip(runs.starts, _TILTS, strict=True)]
    )
    # The norm is near its equilibrium, the groups' shares of it are not.
    directions = starts / starts.norm(dim=1, keepdim=True)
    starts = directions * subject.problem.noise_trace(directions)[:, None] ** 0.25
    functionals = _functionals(subject, state)
    count = len(state.groups)
    tests = len(starts) * (len(functionals) + 1 + count) + count
    n = runs.runs(tests, 1.5)
    design = Design(
        "directions and norms of the groups have one law at T, from starts that are far apart",
        effort.false_alarm,
        f"a mean that differs by {runs.effect:g} standard deviations",
        effort.miss,
        len(starts) * n,
    )
    relaxation = _relaxation(runs, starts, state, functionals)
    end = relaxation * math.log(2.0 * math.sqrt(2.0) / (0.1 * runs.effect)) + _LAST
    solution = _run(runs, state, starts.repeat_interleave(n, 0), end, 9, _LAST)
    if solution.lost:
        return [_lost(solution, design)]
    ends = state(solution.ys[-1]).reshape(len(starts), n, -1)
    p_values = {}
    for i in range(len(starts)):
        others = np.delete(ends, i, 0).reshape(-1, ends.shape[-1])
        found = compare_laws(ends[i, :, :-count], others[:, :-count], functionals)
        p_values[f"start {i + 1} and the others, {found.worst}"] = found.p_value
        for g in range(count):
            name = f"start {i + 1} and the others, norm of group {g + 1}"
            p_values[name] = _same_mean(ends[i, :, g - count], others[:, g - count], runs.effect)
    p_values |= _balance(subject, solution.ys[-1], state, runs.effect)
    p = float(holm(list(p_values.values())).min())
    worst = min(p_values, key=lambda name: p_values[name])
    verdict: Verdict = "holds" if p > effort.false_alarm else "fails"
    means = ends[:, :, -len(state.groups) :].mean((0, 1))
    return [
        Result(
            NAME,
            verdict,
            f"p = {p:.2g} at T = {end:.3g} for {len(state.groups)} groups; least: {worst}; mean "
            f"squared norms {', '.join(f'{m:.3g}' for m in means)}",
            statistic=1.0 - p,
            limit=1.0 - effort.false_alarm,
            p_value=p,
            statements=("Theorem 5.4",),
            kind="statistics",
            meaning="This is the equilibrium of the directions and the norms of the groups, which "
            "takes the place of Theorem 5.4 here."
            if verdict == "holds"
            else "The groups' directions and norms do not come to one law by this time: they "
            "depend on the start, or their norms are not in balance with the noise.",
            design=design,
            pictures=(_picture(solution, state, len(starts)),),
        )
    ]


def _functionals(subject: Subject, state: GroupState) -> Functionals:
    """Components of the groups' directions."""
    walked = state(subject.walks[len(subject.walks) // 3 :].flatten(0, 1))
    return Functionals(torch.from_numpy(walked[:, : -len(state.groups)]))


@dataclass(frozen=True)
class Paths:
    """Paths of (13).

    Attributes:
        ts: Times (K,).
        ys: States (K, n, D), NaN where lost.
    """

    ts: Tensor
    ys: Tensor

    @property
    def lost(self) -> int:
        """Number of paths that were lost."""
        return int((~torch.isfinite(self.ys[-1]).all(1)).sum())


def _run(
    runs: ErgodicRuns, state: GroupState, start: Tensor, end: float, kept: int, last: float = 0.0
) -> Paths:
    """Paths in short steps at first, and then in steps for norms that have settled.

    Euler's scheme, at a fifth of the cost of one of order two: all starts have the same step, so
    that its bias does not tell them apart. What is compared with the equation itself needs
    ``last`` at the end.

    Args:
        runs: The simulations.
        state: The groups.
        start: States (n, D).
        end: Length in time T.
        kept: Number of times that are kept, the start among them.
        last: Time at the end that is solved with the scheme of order two.
    """
    times = torch.linspace(0.0, end, kept, dtype=torch.float64)
    first = min(_FIRST, 0.5 * end)
    marks = [0.0, first, *([end - last] if first < end - last < end else []), end]
    ts, ys = [times[:1]], [start[None]]
    for part, (a, b) in enumerate(itertools.pairwise(marks)):
        here = ys[-1][-1]
        alive = torch.isfinite(here).all(1)
        ends = torch.tensor([a, b], dtype=torch.float64)
        inside = times[(times > a) & (times < b)]
        asked = torch.cat([ends[:1], inside, ends[1:]])
        exact = b == end and last > 0.0
        longest = min(_LONGEST_STEP, runs.effort.departure) if exact else _LONGEST_STEP
        found = runs.subject.solve(
            LimitingDiffusion(runs.subject.problem, calculus="stratonovich" if exact else "ito"),
            here[alive],
            asked,
            method="weak2" if exact else "euler",
            dt=_step(runs, state, here[alive], longest),
            seed=runs.subject.seed * 16 + 5 + part,
            compile=False,
        )
        moved = torch.full((len(asked), *start.shape), math.nan, dtype=start.dtype)
        moved[:, alive] = found.ys
        ts.append(asked[1:])
        ys.append(moved[1:])
    every = torch.cat(ts)
    chosen = torch.searchsorted(every, times)
    return Paths(every[chosen], torch.cat(ys)[chosen])


def _step(runs: ErgodicRuns, state: GroupState, y: Tensor, longest: float) -> float:
    """Step in time T in which the groups' directions move by half a radian or less."""
    factor = runs.subject.problem.noise_factor(y)
    rates = [
        factor[:, group].square().sum((1, 2)) / y[:, group].square().sum(1) / max(len(group) - 1, 1)
        for group in state.groups
    ]
    fastest = torch.stack(rates).amax(0).quantile(_SHARE)
    return min(_VARIANCE / float(fastest), longest)


def _relaxation(
    runs: ErgodicRuns,
    starts: Tensor,
    state: GroupState,
    functionals: Functionals,
) -> float:
    """The slowest autocorrelation time of the functionals, in the time T.

    Raises:
        ClockRangeError: If it is too long for the pilot.
    """
    length = _PILOT
    while True:
        rows = torch.arange(_PATHS) % len(starts)
        solution = _run(runs, state, starts[rows], length, _MOMENTS + 1)
        late = [state(y[torch.isfinite(y).all(1)]) for y in solution.ys[_MOMENTS // 4 :]]
        whole = bool(torch.isfinite(solution.ys).all())
        if whole:
            count = len(state.groups)
            table = np.stack(
                [np.concatenate([functionals.table(y[:, :-count]), y[:, -count:]], 1) for y in late]
            )
            found = max(slowest_time(table, length / _MOMENTS), 0.5)
            if found <= length / _PILOTED:
                return found
        if 2.0 * length > _LONGEST or not whole:
            raise ClockRangeError(
                "the equilibrium of the groups is out of reach",
                received=f"a relaxation time of more than {length / _PILOTED:.3g} in T"
                if whole
                else "paths that were lost",
                expected=f"at most {_LONGEST / _PILOTED:g}",
                remedy="the law at finite times does not need it",
            )
        length *= 2.0


def _same_mean(a: Array, b: Array, effect: float) -> float:
    """P-value of equal means of a squared norm, up to what is left of the start.

    Norms can have next to no spread in equilibrium. A twentieth of the departure that is to be
    found, relative to the mean itself, counts as what the start still does.
    """
    gap = abs(float(a.mean() - b.mean())) - 0.05 * effect * float(b.mean())
    error = math.sqrt(float(a.var(ddof=1)) / len(a) + float(b.var(ddof=1)) / len(b))
    return float(2.0 * stats.norm.sf(max(gap, 0.0) / max(error, 1e-12 * float(b.mean()))))


def _balance(
    subject: Subject, states: Tensor, state: GroupState, effect: float
) -> dict[str, float]:
    """In equilibrium the mean of |Y_g|^2 is that of tr Sigma_gg, at c = 1/2."""
    factor = subject.problem.noise_factor(states)
    p_values = {}
    for i, group in enumerate(state.groups):
        gained = factor[:, group].square().sum((1, 2)) - states[:, group].square().sum(1)
        values = gained.numpy()
        error = float(values.std(ddof=1)) / math.sqrt(len(values))
        size = float(states[:, group].square().sum(1).mean())
        gap = max(abs(float(values.mean())) - 0.05 * effect * size, 0.0)
        p_values[f"balance of group {i + 1}"] = float(
            2.0 * stats.norm.sf(gap / max(error, 1e-12 * size))
        )
    return p_values


def _not_asked(groups: int) -> Result:
    return Result(
        NAME,
        "undecided",
        f"{groups} groups; asked for effort='thorough'",
        statements=("Theorem 5.4",),
        kind="statistics",
        meaning="Whether the directions and norms of the groups have an equilibrium takes minutes "
        "to find out, and is left to effort='thorough'.",
    )


def _lost(solution: Paths, design: Design) -> Result:
    return Result(
        NAME,
        "undecided",
        f"{solution.lost} of {solution.ys.shape[1]} paths were lost",
        statements=("Theorem 5.4",),
        kind="statistics",
        meaning="Where a group's norm is small its noise is large: smaller steps are needed.",
        design=design,
    )


def _picture(solution: Paths, state: GroupState, starts: int) -> Picture:
    times = solution.ts.tolist()
    squares = np.stack([state(y)[:, -len(state.groups)] for y in solution.ys])
    by_start = squares.reshape(len(times), starts, -1)
    return Picture(
        "The share of the first group forgets its start",
        "time T of (13)",
        "mean squared norm of group 1",
        tuple(
            Series(
                f"start {i + 1}",
                times,
                by_start[:, i].mean(1).tolist(),
                "points",
                (by_start[:, i].std(1) / math.sqrt(by_start.shape[2])).tolist(),
            )
            for i in range(starts)
        ),
    )


CHECKS = (Check(NAME, "statistics", ("Theorem 5.4",), check_groups),)
