"""What the checks of the assumptions look at: minimisers found, and the Hessian there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from manifold_sde.deadline import shared_property
from manifold_sde.errors import ManifoldSDEError, NotOnManifoldError, RankError
from manifold_sde.geometry.rank import MIN_GAP, gap_ratios
from manifold_sde.scale_invariance import INVARIANCE_TOLERANCE, SOLVED_DIM, scaling_groups
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.result import Picture, Result, Series
from manifold_sde.verification.sampling import random_walk, unit
from manifold_sde.verification.subject import Subject

#: Difference of losses, relative to how they vary over random directions, that counts as none.
_LEVEL = 1e-9
#: Independent starts for each point of the test budget: at most, and in high dimension, where
#: a step of the flow takes an eigendecomposition of that size.
_STARTS, _BY_DIMENSION = 2, 128
#: Fewest starts.
_FEWEST = 8
#: Steps of the walks from the start, and their length in radians.
_STEPS, _STRIDE = 8, 0.3


class Survey:
    """Minimisers found from independent starts and by walks, and the spectrum of H there.

    Where gradient flow from ``x_init`` reaches no manifold, the minimisers are those that are
    found without it.

    Args:
        subject: The system under test.
        effort: The test budget, which says how many points.

    Attributes:
        subject: The system under test, without a start that does not reach the manifold.
        effort: The test budget.
        unreached: The error that the start raised, or ``None``.
        lines: Fewest lines along which derivatives are looked at.
    """

    lines = 8

    def __init__(self, subject: Subject, effort: Effort) -> None:
        self.effort = effort
        self.unreached: ManifoldSDEError | None = None
        if subject.x_init is not None:
            try:
                subject.geometry.limit_map(subject.x_init)
            except ManifoldSDEError as error:
                self.unreached = copy.copy(error)  # without what its frames hold
                subject = replace(subject, x_init=None)
        self.subject = subject

    @classmethod
    def of(cls, subject: Subject, effort: Effort) -> Self:
        """The survey of a system under test, which its checks share."""
        return subject.once((cls, effort), lambda: cls(subject, effort))

    @property
    def start(self) -> Tensor:
        """A unit vector on the manifold, (D,).

        Raises:
            ManifoldSDEError: If there is none.
        """
        return self.subject.start

    @cached_property
    def starts(self) -> Tensor:
        """Independent random directions (n, D)."""
        points, dim = self.effort.points, self.subject.problem.dim
        count = max(min(_STARTS * points, _BY_DIMENSION * points // dim), _FEWEST)
        return unit(self.subject.normals(60, count, dim))

    @shared_property
    def ends(self) -> Tensor:
        """Where gradient flow from the independent starts ends, NaN where it does not: (n, D)."""
        return unit(self.subject.limits(self.starts))

    @property
    def arrived(self) -> Tensor:
        """Those ends, where there is one, (k, D)."""
        return self.ends[torch.isfinite(self.ends).all(1)]

    def above(self, y: Tensor) -> Tensor:
        """How far the loss at points is above that of the start: (n, D) -> (n,).

        In units of how it varies over random directions.
        """
        problem = self.subject.problem
        values = problem.loss(self.starts)
        spread = float(values.max() - values.min())
        rounding = torch.finfo(y.dtype).eps * float(values.abs().max())
        return (problem.loss(y) - problem.loss(self.start)) / max(spread, 1e3 * rounding, 1e-300)

    def on_level(self, y: Tensor) -> Tensor:
        """Which points have the loss of the start: (n, D) -> (n,), false where NaN."""
        finite = torch.isfinite(y).all(1)
        filled = torch.where(finite[:, None], y, self.start)
        return finite & (self.above(filled).abs() <= _LEVEL)

    @cached_property
    def restarts(self) -> Tensor:
        """The ends of independent starts at the loss of the start, (k, D)."""
        return self.ends[self.on_level(self.ends)]

    @shared_property
    def points(self) -> Tensor:
        """Minimisers at the loss of the start: itself, walks from it, independent ones, (n, D).

        Where there is no walking, because the start is no minimiser, it stands alone.
        """
        start, walkers = self.start[None], max(self.effort.points // _STEPS, 1)
        try:
            y = start.repeat(walkers, 1)
            noise = self.subject.normals(61, _STEPS, *y.shape)
            walked = random_walk(self.subject.geometry, y, noise, _STRIDE)
        except (RankError, NotOnManifoldError):
            return start
        walked = walked.flatten(0, 1)
        return torch.cat([start, walked[self.on_level(walked)], self.restarts])

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (n, D), ascending, and eigenvectors (n, D, D) of H at the points."""
        values, vectors = torch.linalg.eigh(self.subject.problem.hessian(self.points))
        return values, vectors

    @cached_property
    def tops(self) -> Tensor:
        """Largest size of an eigenvalue of H at the points, (n,)."""
        return self.spectrum[0].abs().amax(1)

    @cached_property
    def ranks(self) -> Tensor:
        """Rank of H at each point by its largest gap, (n,)."""
        return ranks_of(self.spectrum[0])

    @property
    def rank(self) -> int:
        """Rank of H at the start: the dimension of Gamma is D - M.

        Raises:
            RankError: If the spectrum has no clear gap there, or H is not singular.
        """
        values = self.spectrum[0][0]
        rank = int(self.ranks[0])
        top = values.abs().max()
        gap = float(gap_ratios(values)[rank - 1]) if rank else torch.inf
        if top > 0 and (gap < MIN_GAP[torch.float64] or rank == len(values)):
            raise RankError(
                "the dimension of the manifold cannot be read off the Hessian",
                received=f"a largest ratio of neighbouring eigenvalues of {gap:.2g}",
                expected=f"a gap of at least {MIN_GAP[torch.float64]:.0e}",
                remedy="rank=M with the problem, if it is known",
            )
        return rank

    @property
    def manifold_dim(self) -> int:
        """Dimension D - M - 1 of Gamma_1."""
        return self.subject.problem.dim - self.rank - 1

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...] | None:
        """Groups of coordinates that the loss can be scaled by separately; ``None`` if unknown."""
        problem = self.subject.problem
        invariant = (
            float(problem.scale_invariance_violation()) <= INVARIANCE_TOLERANCE[torch.float64]
        )
        if problem.dim > SOLVED_DIM or not invariant:
            return None
        return scaling_groups(problem.pointwise, self.points[:8])


def assumption(
    name: str,
    statements: tuple[str, ...],
    look: Callable[[Survey], Result | Sequence[Result] | None],
) -> Check:
    """The check of an assumption.

    Args:
        name: Its name.
        statements: Statements of the paper that it is about.
        look: Function of the survey that returns the result or results, or ``None`` where the
            check does not apply.
    """

    def run(subject: Subject, effort: Effort) -> Result | Sequence[Result] | None:
        return look(Survey.of(subject, effort))

    return Check(name, "assumption", statements, run)


def ranks_of(values: Tensor) -> Tensor:
    """Rank of symmetric matrices by the largest gap of their eigenvalues: (n, D) -> (n,)."""
    ranks = gap_ratios(values).argmax(-1) + 1
    return torch.where(values.abs().amax(-1) == 0, torch.zeros_like(ranks), ranks)


def extremes(title: str, ylabel: str, values: Tensor) -> Picture:
    """The largest and the smallest over points of positive values (n, k), in falling order."""
    places = [float(k + 1) for k in range(values.shape[1])]
    values = values.clamp(min=1e-300)
    series = (
        Series("largest over the points", places, values.amax(0).tolist(), "points"),
        Series("smallest over the points", places, values.amin(0).tolist(), "line"),
    )
    return Picture(title, "number", ylabel, series, logy=True)


def show_point(y: Tensor, most: int = 4) -> str:
    """A point in a few characters.

    Example:
        >>> show_point(torch.tensor([0.25, -1.0, 0.0]))
        '(0.25, -1, 0)'
    """
    shown = [f"{round(float(value), 3):g}" for value in y[:most]]
    more = [f"... ({len(y)})"] if len(y) > most else []
    return f"({', '.join(shown + more)})".replace("-0,", "0,").replace("-0)", "0)")
