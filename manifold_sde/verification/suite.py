"""All checks of a problem, one after the other."""

from __future__ import annotations

import difflib
import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from torch import Tensor

from manifold_sde.arguments import real
from manifold_sde.deadline import OutOfTimeError
from manifold_sde.errors import ArgumentError
from manifold_sde.problem import Problem
from manifold_sde.progress import Progress, duration, quiet
from manifold_sde.verification import assumptions, at_size, laws, properties
from manifold_sde.verification.assumptions.scale_invariance import INVARIANCE
from manifold_sde.verification.check import Check
from manifold_sde.verification.effort import Effort, effort_of
from manifold_sde.verification.plain_names import PLAIN_NAMES
from manifold_sde.verification.report import Partial, Report, Rows
from manifold_sde.verification.result import NO_TIME, STOPPED, Result
from manifold_sde.verification.subject import Subject

#: How many times as much of the budget a check may take in the next rounds.
_LONGER = 4.0
_MORE_TIME = NO_TIME + " of {:.0f} s: budget={:.0f}, say (--budget {:.0f})."
_OF_THE_REST = (
    NO_TIME
    + " of {:.2g} s for the rest where a loss is not scale-invariant, which comes first; or "
    "budget={:.0f} (--budget {:.0f})."
)
#: How much larger a budget is named.
_LARGER = 5.0
#: Violation of scale invariance beyond which the rest says little of the run, and what share of the
#: time that is left then a check may take: eps of a normalisation is less.
_BROKEN, _BROKEN_SHARE = 2e-2, 1.0 / 3.0


def all_checks() -> tuple[Check, ...]:
    """All checks, in the order in which they are made."""
    return (
        *assumptions.CHECKS,
        *properties.CHECKS,
        *laws.LIMIT_THEOREMS,
        *laws.EQUILIBRIUM,
    )


def verify(
    problem: Problem | Subject,
    *,
    seed: int = 0,
    effort: str | Effort = "quick",
    budget: float | None = None,
    x_init: Tensor | None = None,
    progress: bool | Callable[[Result], object] | None = None,
    checks: Iterable[Check | str] | None = None,
) -> Report:
    """Check on a problem what the theory assumes and what it says.

    Checks that do not fit into the budget are undecided, and say how long they would take; what
    takes longer is made later. The budget decides whether a check is made, and never its numbers.
    Ctrl-C ends the verification with the report of what is done. Both set ``report.partial``.

    Args:
        problem: The problem.
        seed: Seed of all that is drawn.
        effort: "quick" (about a minute for a small problem) or "thorough" (some minutes).
        budget: Seconds of processor time for all checks; by default those of the effort: 60 for
            "quick", ten times as many above 1000 dimensions, and as many as it takes (``math.inf``)
            for "thorough".
        x_init: Where training starts (D,); by default a minimiser is taken or looked for.
        progress: Whether to show a progress bar, and the rows of the report as they arrive; or
            what is called with each result. By default the bar alone, on a terminal or in a
            notebook.
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
    chosen = all_checks() if checks is None else _chosen(checks)
    if subject.by_products:
        amount, chosen = amount.at_size(), tuple(map(at_size.by_products, chosen))
    seconds = _check_budget(amount.budget if budget is None else budget)
    tell = progress if callable(progress) else Rows(sys.stderr) if progress else lambda _: None
    shown = False if progress is False else None  # where a person looks on
    # Some checks take no time and some most of it: what is known is what they take at most.
    most = f"at most {duration(seconds)} of processor time" if seconds < math.inf else "no budget"
    shape = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, " + most + "]"
    bar = Progress(shown, "checks", even=False, total=len(chosen), bar_format=shape)
    with bar, quiet():
        suite = _Suite(subject, amount, seconds, tell, bar)
        results, partial = suite.run(chosen)
    return Report(
        repr(subject.problem),
        results,
        seed=subject.seed,
        effort=amount.name,
        seconds=time.perf_counter() - begin,
        partial=partial,
    )


def _check_budget(budget: object) -> float:
    seconds = real(budget)
    if seconds > 0:
        return seconds
    raise ArgumentError(
        "the budget is not a time",
        received=repr(budget),
        expected="a positive number of seconds, or math.inf",
        remedy="leave budget out for that of the effort",
    )


class _Suite:
    """One call of :func:`verify`: rounds of checks, in each of which they may take longer.

    Args:
        subject: The system under test.
        effort: The test budget.
        budget: Seconds for all checks.
        tell: Called with each result.
        bar: The progress bar.
    """

    def __init__(
        self,
        subject: Subject,
        effort: Effort,
        budget: float,
        tell: Callable[[Result], object],
        bar: Progress,
    ) -> None:
        self.subject = subject
        self.effort = effort
        self.tell = tell
        self.bar = bar
        self._budget = budget
        self._end = time.thread_time() + budget
        #: Seconds that a check may take in the first round, and all together if the loss is broken.
        self._first = effort.first_share * budget
        self._broken = False
        self._found: dict[Check, list[Result]] = {}

    def run(self, checks: tuple[Check, ...]) -> tuple[tuple[Result, ...], Partial]:
        """The results of all checks, in their order, and why some were not made."""
        partial: Partial = ""
        late: dict[Check, OutOfTimeError] = {}
        try:
            late = self._rounds(checks)
        except KeyboardInterrupt:
            partial = "interrupt"
        for check in checks:
            if check in late:
                partial = "budget"
                why = f"it {late[check]}" if late[check].seconds else "no time was left for it"
                more, given = (
                    (_OF_THE_REST, self._first) if self._broken else (_MORE_TIME, self._budget)
                )
                budgets = given, *2 * (_LARGER * self._budget,)
                self._keep(check, [check.not_made(why, more.format(*budgets))])
            elif check not in self._found:  # nobody waits for a row of it
                self._found[check] = [check.not_made(f"{STOPPED} it was done")]
        return tuple(result for check in checks for result in self._found[check]), partial

    def _rounds(self, checks: tuple[Check, ...]) -> dict[Check, OutOfTimeError]:
        """Make checks, the longer ones in later rounds; what is left takes too long."""
        share = self._first
        late: dict[Check, OutOfTimeError] = {}
        waiting = list(checks)
        while waiting:
            last = share >= self._left
            # In the last round all are tried: what one has simulated the others need not.
            for check in waiting:
                if last or check not in late or late[check].seconds <= share:
                    self._make(check, share, late)
            if last:
                break
            waiting = sorted(late, key=lambda check: late[check].seconds)
            share *= _LONGER
        return late

    def _make(self, check: Check, share: float, late: dict[Check, OutOfTimeError]) -> None:
        self.bar.set_description(check.name)
        if check.kind == "statistics" and self._varies_along_rays():
            found = [check.not_made("the loss is not scale-invariant")]
        elif not self._left:
            late.setdefault(check, OutOfTimeError(0.0, estimated=False))
            return
        else:
            try:
                most = self._left * (_BROKEN_SHARE if self._broken else 1.0)
                found = check(self.subject, self.effort, min(share, most))
            except OutOfTimeError as error:
                # Its frames would keep what was under way in memory.
                late[check] = OutOfTimeError(error.seconds, error.estimated)
                return
        late.pop(check, None)
        self._keep(check, found)

    @property
    def _left(self) -> float:
        """Seconds that are left."""
        return max(0.0, self._end - time.thread_time())

    def _keep(self, check: Check, results: list[Result]) -> None:
        self._found[check] = results
        for result in results:
            self.tell(result)
            if result.name == INVARIANCE and (result.statistic or 0.0) > _BROKEN:
                self._broken = True
                self._end = min(self._end, time.thread_time() + self._first)
        self.bar.update()

    def _varies_along_rays(self) -> bool:
        results = (result for found in self._found.values() for result in found)
        return any(r.name == INVARIANCE and r.verdict == "fails" for r in results)


def _chosen(checks: object) -> tuple[Check, ...]:
    """The checks to make, at least one."""
    if isinstance(checks, (str, Check)):
        return (_named(checks),)
    chosen = tuple(map(_named, checks)) if isinstance(checks, Iterable) else ()
    if not chosen:
        raise ArgumentError(
            "there is no check to make",
            received=repr(checks),
            expected="one check or more, or their names: a report without one would pass",
            remedy="leave checks out for all of them",
        )
    return chosen


def _named(check: Check | str) -> Check:
    """A check, given itself or by its name."""
    if isinstance(check, Check):
        return check
    known = {one.name: one for one in all_checks()}
    known |= {plain: known[name] for name, plain in PLAIN_NAMES.items() if name in known}
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
    budget: float | None = None,
    progress: bool | Callable[[Result], object] | None = None,
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
        budget: Seconds of processor time, as in :func:`verify`.
        progress: Whether to show how it goes on, as in :func:`verify`.

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
        budget=budget,
        x_init=x_init,
        progress=progress,
        checks=assumptions.CHECKS,
    )
    return replace(report, title="Assumptions")
