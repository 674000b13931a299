"""Several groups of weights that can be scaled separately: directions and norms of the groups.

Gamma_1 is then not compact and Theorem 5.4 does not apply as stated: how the norm is shared among
the groups is a state of its own, d|Y_g|^2 = (-2 c |Y_g|^2 + tr Sigma_gg) dt. The pair of the
directions of the groups, which live on a product of spheres, and of their norms can have an
equilibrium all the same.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from manifold_sde.errors import ClockRangeError
from manifold_sde.sdes import LimitingDiffusion
from manifold_sde.verification.laws.engine import (
    Array,
    Tests,
    judged,
    law,
    mean_and_error,
    mean_p_value,
    means_by_start,
    planned,
)
from manifold_sde.verification.laws.functionals import Functionals
from manifold_sde.verification.laws.long_runs import STARTS, LongRuns, slowest_time
from manifold_sde.verification.result import Design, Picture, Result, found
from manifold_sde.verification.two_sample import compare_laws

#: What one group's norm is multiplied by at the starts, and the others' divided by.
_TILTS = (1.0, 10.0, 0.1)
#: First length of the pilot in time T, its paths, and the most relaxation times of a run.
_PILOT, _PATHS = 16.0, 96
_LONGEST = 64.0
#: Times that a pilot keeps, each of which costs a step.
_MOMENTS = 16
#: Relaxation times of a pilot that tells them.
_PILOTED = 2.5
#: Step in time T: at equilibrium a group's direction has this variance in it.
_STEP = 0.25
#: Part of the effect, relative to a mean of norms, that the start may still have on it: norms can
#: have next to no spread in equilibrium.
_LEFT = 0.05


class GroupRuns:
    """Runs of (13) of several groups of weights.

    Args:
        runs: Runs of the system under test.
    """

    def __init__(self, runs: LongRuns) -> None:
        self.runs = runs
        self.groups = [list(group) for group in runs.degeneracy.groups]
        walked = torch.from_numpy(self.state(runs.subject.walked)[:, : -len(self.groups)])
        self.functionals = Functionals(walked)

    @property
    def tests(self) -> int:
        """Number of tests: of each start against the others, and of the balance of each group."""
        count = len(self.groups)
        return STARTS * (len(self.functionals) + 1 + count) + count

    def state(self, states: Tensor) -> Array:
        """The directions of all groups and their squared norms: (n, D) -> (n, D + G)."""
        squares = [states[:, group].square().sum(1, keepdim=True) for group in self.groups]
        parts = [states[:, g] / s.sqrt() for g, s in zip(self.groups, squares, strict=True)]
        return torch.cat([*parts, *squares], 1).numpy()

    def table(self, states: Tensor) -> Array:
        """The declared functions of the directions, and the squared norms."""
        values, count = self.state(states), len(self.groups)
        return np.concatenate([self.functionals.table(values[:, :-count]), values[:, -count:]], 1)

    @property
    def starts(self) -> Tensor:
        """Starts whose norm is near its equilibrium, and the groups' shares of it are not.

        The first group's norm is multiplied, the others' divided: the loss does not change with
        the norm of a group, so that they are still minimisers.
        """
        starts = self.runs.starts.clone()
        for start, factor in zip(starts, _TILTS, strict=True):
            for i, group in enumerate(self.groups):
                start[group] *= factor if i == 0 else 1.0 / factor
        starts = starts / starts.norm(dim=1, keepdim=True)
        return starts * self.runs.subject.problem.noise_trace(starts)[:, None] ** 0.25

    def solve(self, start: Tensor, end: float, kept: int) -> tuple[Tensor, Tensor]:
        """Paths in the clock of the groups, whose steps need not be short where a norm is small.

        Args:
            start: States (n, D).
            end: Length in time T.
            kept: Number of times that are kept, the start among them.

        Returns:
            Times (K,), and states (K, n, D), NaN where paths are lost.
        """
        times = torch.linspace(0.0, end, kept, dtype=torch.float64)
        subject = self.runs.subject
        found = subject.solve(
            LimitingDiffusion(subject.problem, groups=self.groups),
            start,
            times,
            dt=min(_STEP, self.runs.effort.departure),
            seed=subject.seed * 16 + 5,
            compile=True,
        )
        return times, found.ys

    def relaxation(self) -> float:
        """The slowest autocorrelation time of the functionals, in the time T.

        Raises:
            ClockRangeError: If it is too long for the pilot.
        """
        length, starts = _PILOT, self.starts
        while True:
            rows = torch.arange(_PATHS) % len(starts)
            ys = self.solve(starts[rows], length, _MOMENTS + 1)[1]
            whole = bool(torch.isfinite(ys).all())
            if whole:
                table = np.stack([self.table(y) for y in ys[_MOMENTS // 4 :]])
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


def equilibrium_of_groups(runs: LongRuns, made: Design | None) -> Result:
    """Runs from starts that are far apart in the groups' directions and in their norms."""
    if made is None:
        return found(
            "undecided",
            f"{len(runs.degeneracy.groups)} groups; asked for effort='thorough'",
            meaning="Whether the directions and norms of the groups have an equilibrium takes "
            "minutes to find out, and is left to effort='thorough'.",
        )
    groups = GroupRuns(runs)
    starts, count = groups.starts, len(groups.groups)
    end = groups.relaxation() * runs.needed_relaxations
    n = made.sample_size // STARTS
    times, ys = groups.solve(starts.repeat_interleave(n, 0), end, 9)
    lost = int((~torch.isfinite(ys[-1]).all(1)).sum())
    if lost:
        return found(
            "undecided",
            f"{lost} of {made.sample_size} paths were lost",
            meaning="Smaller steps are needed.",
        )
    ends = groups.state(ys[-1]).reshape(STARTS, n, -1)
    p_values = {}
    for i in range(STARTS):
        these, others = ends[i], np.delete(ends, i, 0).reshape(-1, ends.shape[-1])
        compared = compare_laws(these[:, :-count], others[:, :-count], groups.functionals)
        label = f"start {i + 1} and the others"
        p_values[f"{label}, {compared.worst}"] = compared.p_value
        for g in range(count):
            (mean, error), (other, wide) = (
                mean_and_error(x[:, g - count]) for x in (these, others)
            )
            p_values[f"{label}, norm of group {g + 1}"] = _same(
                mean - other, math.hypot(error, wide), other, runs
            )
    factor = runs.subject.problem.noise_factor(ys[-1])
    for g, group in enumerate(groups.groups):
        # In equilibrium the mean of |Y_g|^2 is that of tr Sigma_gg, at c = 1/2.
        squares = ys[-1][:, group].square().sum(1)
        gained, error = mean_and_error((factor[:, group].square().sum((1, 2)) - squares).numpy())
        p_values[f"balance of group {g + 1}"] = _same(gained, error, float(squares.mean()), runs)
    tests = Tests(p_values, made.false_alarm)
    means = ends[:, :, -count:].mean((0, 1))
    shares = np.stack([groups.state(y)[:, -count] for y in ys])
    return judged(
        tests,
        made,
        f"p = {tests.p:.2g} at T = {end:.3g} for {count} groups; least: {tests.worst}; mean "
        f"squared norms {', '.join(f'{m:.3g}' for m in means)}",
        meaning=""
        if tests.rejected
        else "This is the equilibrium of the directions and the norms of the groups, which "
        "takes the place of Theorem 5.4 here.",
        tests={},
        pictures=(
            Picture(
                "The share of the first group forgets its start",
                "time T of (13)",
                "mean squared norm of group 1",
                means_by_start(times.tolist(), shares, STARTS),
            ),
        ),
    )


def _same(gap: float, error: float, size: float, runs: LongRuns) -> float:
    """P-value of means of squared norms of this size that differ by no more than is left."""
    tolerated = _LEFT * runs.effect * size
    return mean_p_value(gap, error, tolerated=tolerated, rounding=1e-12 * size)


EQUILIBRIUM_OF_GROUPS = law(
    "equilibrium of several groups",
    ("Theorem 5.4",),
    LongRuns,
    planned(
        "directions and norms of the groups have one law at T, from starts that are far apart",
        "a mean that differs by {runs.effect:g} standard deviations",
        lambda runs: STARTS * runs.runs(GroupRuns(runs).tests, 1.5),
        when=lambda runs: runs.effort.long_checks,
    ),
    equilibrium_of_groups,
    "The groups' directions and norms do not come to one law by this time: they depend on the "
    "start, or their norms are not in balance with the noise.",
    applies=lambda runs: runs.degeneracy.noise_rank > 0 and len(runs.degeneracy.groups) > 1,
)
