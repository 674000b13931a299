"""All checks of a problem, one after the other."""

from __future__ import annotations

import difflib
import time
from collections.abc import Iterable
from dataclasses import replace

from torch import Tensor
from tqdm import tqdm

from manifold_sde.errors import ArgumentError
from manifold_sde.problem import Problem
from manifold_sde.verification import assumptions, ergodicity, limit_theorems, properties
from manifold_sde.verification.assumptions.scale_invariance import INVARIANCE
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
    checks: Iterable[Check | str] | None = None,
) -> Report:
    """Check on a problem what the theory assumes and what it says.

    Args:
        problem: The problem.
        seed: Seed of all that is drawn.
        effort: "quick" (about a minute for a small problem) or "thorough" (some minutes).
        x_init: Where training starts (D,); by default a minimiser is taken or looked for.
        progress: Whether to show a progress bar.
        checks: The checks to make, or their names; by default all. Where the loss turns out not to
            be scale-invariant, statistics of its noise and law mean nothing, and are not made.

    Returns:
        The report: ``report.passed``, ``report.verdict``, and a result for each check.

    Raises:
        DTypeError, ArgumentError, ShapeError: If an argument cannot be used.
    """
    begin = time.perf_counter()
    amount = effort_of(effort)
    subject = Subject.of(problem, x_init=x_init, seed=seed)
    chosen = all_checks() if checks is None else tuple(_named(check) for check in checks)
    results: list[Result] = []
    with tqdm(chosen, disable=None if progress else True, unit="check") as bar:
        for check in bar:
            bar.set_description(check.name)
            if check.kind == "statistics" and _varies_along_rays(results):
                results.append(check.not_made("the loss is not scale-invariant"))
            else:
                results += check(subject, amount)
    seconds = time.perf_counter() - begin
    return Report(
        repr(subject.problem),
        tuple(results),
        seed=subject.seed,
        effort=amount.name,
        seconds=seconds,
    )


def _varies_along_rays(results: list[Result]) -> bool:
    return any(r.name == INVARIANCE and r.verdict == "fails" for r in results)


def _named(check: Check | str) -> Check:
    """A check, given itself or by its name."""
    if isinstance(check, Check):
        return check
    known = {one.name: one for one in all_checks()}
    if check not in known:
        near = difflib.get_close_matches(str(check), known, 3, 0.3)
        raise ArgumentError(
            "there is no such check",
            received=repr(check),
            expected="a check, or the name of one of verification.suite.all_checks()"
            + (f", such as {', '.join(map(repr, near))}" if near else ""),
            remedy="leave checks out for all of them",
        )
    return known[check]


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
