"""All checks of a problem, one after the other."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor
from tqdm import tqdm

from manifold_sde.problem import Problem
from manifold_sde.verification import assumptions, ergodicity, limit_theorems, properties
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort, effort_of
from manifold_sde.verification.report import Report
from manifold_sde.verification.result import Result
from manifold_sde.verification.subject import Subject


def all_checks() -> tuple[Check, ...]:
    """All checks, in the order in which they are made."""
    return (
        *assumptions.CHECKS,
        *properties.CHECKS,
        *limit_theorems.CHECKS,
        *ergodicity.CHECKS,
    )


def verify(
    problem: Problem | Subject,
    *,
    seed: int = 0,
    effort: str | Effort = "quick",
    x_init: Tensor | None = None,
    progress: bool = False,
    checks: Iterable[Check] | None = None,
) -> Report:
    """Check on a problem what the theory assumes and what it says.

    Args:
        problem: The problem.
        seed: Seed of all that is drawn.
        effort: "quick" (about a minute for a small problem) or "thorough" (some minutes).
        x_init: Where training starts (D,); by default a minimiser is taken or looked for.
        progress: Whether to show a progress bar.
        checks: The checks to make; by default all.

    Returns:
        The report: ``report.passed``, ``report.verdict``, and a result for each check.

    Raises:
        DTypeError, ArgumentError, ShapeError: If an argument cannot be used.
    """
    begin = time.perf_counter()
    amount = effort_of(effort)
    subject = Subject.of(problem, x_init=x_init, seed=seed)
    chosen = tuple(all_checks() if checks is None else checks)
    results: list[Result] = []
    with tqdm(chosen, disable=not progress, unit="check") as bar:
        for check in bar:
            bar.set_description(check.name)
            results += check(subject, amount)
    seconds = time.perf_counter() - begin
    return Report(
        repr(subject.problem),
        tuple(results),
        seed=subject.seed,
        effort=amount.name,
        seconds=seconds,
    )


def check_assumptions(
    problem: Problem | Subject,
    x_init: Tensor | None = None,
    *,
    seed: int = 0,
    effort: str | Effort = "quick",
    progress: bool = False,
) -> Report:
    """Check whether a problem has what the theory assumes: which assumption fails, and where.

    A problem that lacks it is reported, never refused; what cannot be looked at then is undecided.

    Args:
        problem: The problem.
        x_init: Where training starts (D,). The manifold is then that of Phi(x_init), and it is
            looked at whether a ball around x_init flows to it. By default a minimiser is taken
            that the problem knows, or looked for.
        seed: Seed of all that is drawn.
        effort: "quick" or "thorough".
        progress: Whether to show a progress bar.

    Returns:
        The report, with a verdict on each of Assumptions 2.1, 2.3, 5.1, 5.2 and 5.3, on the noise
        and on the start.

    Raises:
        DTypeError, ArgumentError, ShapeError: If an argument cannot be used.

    Source: Assumptions 2.1, 2.3, 5.1, 5.2 and 5.3.
    """
    report = verify(
        problem,
        seed=seed,
        effort=effort,
        x_init=x_init,
        progress=progress,
        checks=assumptions.CHECKS,
    )
    return replace(report, title="Assumptions")
