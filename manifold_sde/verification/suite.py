"""All checks of a problem, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from tqdm import tqdm

from manifold_sde.errors import ManifoldSDEError
from manifold_sde.problem import Problem
from manifold_sde.verification.effort import Effort, effort_of
from manifold_sde.verification.report import Report
from manifold_sde.verification.result import Result
from manifold_sde.verification.subject import Subject


@dataclass(frozen=True)
class Check:
    """A check, or several that share their work.

    Attributes:
        name: Its name; that of its result if it has one.
        kind: "assumption", "property" or "statistics".
        statements: The statements of the paper that it is about.
        run: Function of a subject and an effort that returns the results; none where the check
            does not apply to the problem.
    """

    name: str
    kind: str
    statements: tuple[str, ...]
    run: Callable[[Subject, Effort], Sequence[Result]]

    def __call__(self, subject: Subject, effort: Effort) -> list[Result]:
        """Run it. What cannot be computed is undecided, and says why."""
        begin = time.perf_counter()
        try:
            results = list(self.run(subject, effort))
        except ManifoldSDEError as error:
            detail = f"{error.problem}: {error.received}" if error.received else error.problem
            meaning = f"The check could not be made. {error.remedy}".strip()
            results = [
                Result(
                    self.name,
                    "undecided",
                    detail,
                    statements=self.statements,
                    kind=self.kind,  # type: ignore[arg-type]
                    meaning=meaning,
                )
            ]
        seconds = (time.perf_counter() - begin) / max(len(results), 1)
        return [replace(result, seconds=seconds) for result in results]


def all_checks() -> tuple[Check, ...]:
    """All checks, in the order in which they are made."""
    return ()


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
