"""The engine of all comparisons: a law is declared, its runs are drawn once, tests decide.

A declaration says what the theory states, which runs it takes, the design that is fixed before
anything is drawn, how the runs are tested, and what it means if the tests reject it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from manifold_sde.deadline import shared_property
from manifold_sde.errors import NoiseError
from manifold_sde.geometry.tangent_noise import Degeneracy
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.result import Design, Result, Series, Verdict, found
from manifold_sde.verification.statistics import holm
from manifold_sde.verification.subject import Subject

Array = NDArray[np.float64]


class Runs:
    """Runs of a system under test, each of which is drawn when it is first used.

    Args:
        subject: The system under test.
        effort: The test budget.
    """

    def __init__(self, subject: Subject, effort: Effort) -> None:
        self.subject = subject
        self.effort = effort

    @classmethod
    def of(cls, subject: Subject, effort: Effort) -> Self:
        """Those of a system at a budget, which all laws share."""
        return subject.once((cls, effort), lambda: cls(subject, effort))

    @shared_property
    def degeneracy(self) -> Degeneracy:
        """How many directions the noise reaches at the start."""
        return Degeneracy.of(self.subject.problem, self.subject.start)

    def require_diffusion(self) -> None:
        """Raise where the noise moves nothing.

        Raises:
            NoiseError: If there is no diffusion.
        """
        if self.degeneracy.noise_rank == 0:
            raise NoiseError(
                "there is no diffusion along the manifold",
                received="noise without a part along the manifold",
                expected="noise that moves the weights along the manifold of minimisers "
                "(Assumption 5.2)",
                remedy=str(self.degeneracy.statement),
            )

    @property
    def is_regular(self) -> bool:
        """Whether the laws that take these runs apply to the problem."""
        return True

    def design(
        self, hypothesis: str, departure: str, runs: int, size: float | None = None
    ) -> Design:
        """A design with the error rates of the budget."""
        return Design(hypothesis, self.effort.false_alarm, departure, self.effort.miss, runs, size)


def planned(
    hypothesis: str,
    departure: str | Callable[[Any], str],
    runs: Callable[[Any], int],
    size: Callable[[Any], float] | None = None,
    *,
    when: Callable[[Any], bool] = lambda runs: True,
) -> Callable[[Any], Design | None]:
    """The design of a law as a function of its runs.

    Args:
        hypothesis: The hypothesis, in words.
        departure: What is to be found, in words, with ``{runs}`` and ``{size}`` to be filled in, or
            a function of the runs.
        runs: Number of independent runs.
        size: The departure as a number, in the units that its words name.
        when: Whether there is a design; none where nothing is random.
    """

    def design(made: Any) -> Design | None:
        if not when(made):
            return None
        amount = None if size is None else size(made)
        words = departure if isinstance(departure, str) else departure(made)
        return made.design(hypothesis, words.format(runs=made, size=amount), runs(made), amount)

    return design


class Tests:
    """Single tests of one hypothesis, and what they say together.

    Attributes:
        p_values: The p-values by name, before Holm's correction.
        p: Holm's p-value of all of them.
        worst: Name of the test with the smallest p-value.
        rejected: Whether the hypothesis is rejected.

    Args:
        p_values: The p-values by name.
        false_alarm: Probability of rejecting a true hypothesis.
    """

    __test__ = False  # not a test case of pytest

    def __init__(self, p_values: Mapping[str, float], false_alarm: float) -> None:
        self.p_values = dict(p_values)
        self.p = float(holm(list(p_values.values())).min())
        self.worst = min(p_values, key=lambda name: p_values[name])
        self.rejected = self.p <= false_alarm


def deviations(p_value: float, design: Design) -> dict[str, Any]:
    """Statistic and limit as deviations of a normal law that have these two-sided p-values."""
    return {
        "statistic": float(stats.norm.isf(max(p_value, 1e-300) / 2.0)),
        "limit": float(stats.norm.isf(design.false_alarm / 2.0)),
    }


def judged(
    tested: Tests, design: Design, detail: str, *, undecided: str = "", **others: Any
) -> Result:
    """The result of tests; the statistic is 1 - p where no other is given.

    Args:
        tested: The tests.
        design: The design.
        detail: The numbers, in a sentence.
        undecided: Why they cannot tell; empty where they can.
        **others: What is not as in other results.
    """
    made: dict[str, Any] = {
        "statistic": 1.0 - tested.p,
        "limit": 1.0 - design.false_alarm,
        "p_value": tested.p,
        "tests": tested.p_values,
        "meaning": undecided,
    }
    verdict: Verdict = "fails" if tested.rejected else "holds"
    return found("undecided" if undecided else verdict, detail, **{**made, **others})


def law(
    name: str,
    statements: tuple[str, ...],
    runs: Any,
    design: Callable[[Any], Design | None],
    test: Callable[[Any, Any], Result],
    wrong: str,
    *,
    applies: Callable[[Any], bool] = lambda runs: runs.is_regular,
) -> Check:
    """The check of a law.

    Args:
        name: Its name.
        statements: Statements of the paper that it is about.
        runs: Class of the runs that it takes, which are shared by all laws that take them.
        design: Function of the runs that returns the design, before anything is drawn; ``None``
            where nothing is random.
        test: Function of the runs and the design that draws, tests and returns the result.
        wrong: What it means if the law is rejected.
        applies: Whether there is a result, of these runs.
    """

    def run(subject: Subject, effort: Effort) -> Result | None:
        made = runs.of(subject, effort)
        if not applies(made):
            return None
        declared = design(made)
        result = test(made, declared)
        said = wrong if result.verdict == "fails" else ""
        return replace(result, design=declared, meaning=result.meaning or said)

    return Check(name, "statistics", statements, run)


def mean_p_value(
    gap: float, error: float, *, tolerated: float = 0.0, rounding: float = 1e-300
) -> float:
    """Two-sided p-value of a mean that should be 0.

    Args:
        gap: The mean.
        error: Its standard error.
        tolerated: Size of it that is no departure.
        rounding: Least error that is taken for one.
    """
    return float(2.0 * stats.norm.sf(max(abs(gap) - tolerated, 0.0) / max(error, rounding)))


def mean_and_error(values: Array) -> tuple[float, float]:
    """Mean of independent values (n,), and its standard error."""
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))


@dataclass(frozen=True)
class Extrapolated:
    """Means of functionals at step size 0, from two step sizes.

    Attributes:
        value: The means (...).
        error: Their standard errors.
        gap: The error of first order that the means at the smaller steps have.
        gap_error: Its standard error.
    """

    value: Any
    error: Any
    gap: Any
    gap_error: Any

    @classmethod
    def of(cls, fine: Array, coarse: Array | None = None, factor: float = 1.0) -> Extrapolated:
        r"""From independent values (n, ...) at steps h and c h: (c m(h) - m(c h)) / (c - 1).

        Args:
            fine: Values at the smaller steps.
            coarse: Values at the larger steps; ``None`` where nothing is extrapolated.
            factor: The factor c.
        """
        mean, variance = fine.mean(0), fine.var(0, ddof=1) / len(fine)
        if coarse is None:
            return cls(mean, np.sqrt(variance), 0.0, 0.0)
        first, second = factor / (factor - 1.0), 1.0 / (factor - 1.0)
        other, wide = coarse.mean(0), coarse.var(0, ddof=1) / len(coarse)
        return cls(
            first * mean - second * other,
            np.sqrt(first**2 * variance + second**2 * wide),
            second * (other - mean),
            second * np.sqrt(variance + wide),
        )


# Pictures.


def means(label: str, x: Sequence[float], values: ArrayLike, style: Any = "points") -> Series:
    """Means over runs, with their standard errors, of values (K, n) at K points."""
    table = np.asarray(values, dtype=np.float64)
    errors = table.std(1, ddof=1) / math.sqrt(table.shape[1])
    return Series(label, list(x), table.mean(1).tolist(), style, errors.tolist())


def means_by_start(times: Sequence[float], values: ArrayLike, starts: int) -> tuple[Series, ...]:
    """Means at K times over the runs of each start, of values (K, starts n)."""
    table = np.asarray(values, dtype=np.float64).reshape(len(times), starts, -1)
    return tuple(means(f"start {i + 1}", times, table[:, i]) for i in range(starts))


def densities(
    label: str, angles: Array, density: Callable[[Array], Array], bins: int
) -> tuple[Series, Series]:
    """A density on the circle, and the histogram of angles."""
    fine = np.linspace(-math.pi, math.pi, 121)
    edges = np.linspace(-math.pi, math.pi, bins + 1)
    counts = np.histogram(angles, edges)[0]
    unit = len(angles) * (edges[1] - edges[0])
    middles = 0.5 * (edges[1:] + edges[:-1])
    return (
        Series(label, fine.tolist(), density(fine).tolist()),
        Series(
            "runs",
            middles.tolist(),
            (counts / unit).tolist(),
            "points",
            (np.sqrt(counts) / unit).tolist(),
        ),
    )
