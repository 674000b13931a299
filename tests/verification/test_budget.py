"""The budget of a verification: what fits is made, the rest says how long it would take."""

from __future__ import annotations

import dataclasses
import io
import math
import re
import time
from typing import Any

import pytest

from manifold_sde import problems
from manifold_sde.deadline import consult
from manifold_sde.errors import ArgumentError, ClockRangeError
from manifold_sde.progress import Progress
from manifold_sde.solvers import solve
from manifold_sde.verification import Effort, Result, Subject, suite, verify
from manifold_sde.verification.assumptions.scale_invariance import INVARIANCE
from manifold_sde.verification.check import Check
from manifold_sde.verification.laws.long_runs import LongRuns
from manifold_sde.verification.report import Report, Rows
from tests.verification.ergodic import SMALL

PROBLEM = problems.great_circle()


def check(name: str, run: Any) -> Check:
    def results(subject: Subject, effort: Effort) -> list[Result]:
        run()
        return [Result(name, "holds", "all is well")]

    return Check(name, "property", (), results)


def busy(seconds: float) -> None:
    """Work that asks on the way."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        consult()


def steps(number: int) -> None:
    """A loop that knows how long it is: 100 steps a second."""
    with Progress(False, "", total=number) as bar:
        for _ in range(number):
            busy(0.01)
            bar.update()


def stop() -> None:
    raise KeyboardInterrupt


def test_cheap_checks_come_first_and_long_ones_are_undecided() -> None:
    told: list[str] = []
    begin = time.thread_time()
    report = verify(
        PROBLEM,
        budget=3.0,
        progress=lambda result: told.append(result.name),
        checks=[
            check("endless", lambda: busy(1e9)),
            check("long", lambda: steps(6000)),
            check("later", lambda: busy(0.4)),
            check("cheap", lambda: None),
        ],
    )
    assert time.thread_time() - begin < 3.2
    assert [result.name for result in report] == ["endless", "long", "later", "cheap"]
    assert [result.verdict for result in report] == ["undecided", "undecided", "holds", "holds"]
    assert told == ["cheap", "later", "endless", "long"]
    assert "takes more than" in report["endless"].detail
    assert re.search(r"would take about (5|6|7)\d s", report["long"].detail)
    assert (report.partial, report.passed) == ("budget", True)
    assert "NOT made: 2 checks" in report.conclusion
    assert "(--budget)" in report.conclusion
    assert "budget=15, say (--budget 15)" in report["long"].meaning
    assert report.to_dict()["partial"] == "budget"


def test_only_what_time_left_out_is_counted_as_such() -> None:
    """Other checks that were not made say so in rows of their own."""

    def left_out(name: str, detail: str, meaning: str = "") -> Result:
        return Result(name, "undecided", detail, statements=("Theorem 4.4",), meaning=meaning)

    late = left_out("late", "not made: it takes more than 6 s", "It needs more than the budget of")
    small = dataclasses.replace(left_out("small", "not made at this size"), statements=())
    varies = left_out("varies", "not made: the loss is not scale-invariant")
    stopped = left_out("stopped", "not made: stopped before it was done")
    report = Report("a problem", (late, small, varies, stopped), partial="budget")
    assert "NOT made: 2 checks, of Theorem 4.4; the budget was not enough" in report.conclusion


@pytest.mark.parametrize("violation", [0.1, 1e-3])
def test_a_loss_that_is_not_scale_invariant_leaves_little_time_for_the_rest(
    violation: float,
) -> None:
    """The twin, off by what eps of a normalisation is, leaves all of it."""
    first = Check(
        INVARIANCE,
        "assumption",
        (),
        lambda *_: Result(INVARIANCE, "fails", "off", statistic=violation, limit=1e-9),
    )
    begin = time.thread_time()
    rest = [check("endless", lambda: busy(1e9)), check("cheap", lambda: None)]
    report = verify(PROBLEM, budget=2.0, checks=[first, *rest])
    spent = time.thread_time() - begin
    assert [result.verdict for result in report] == ["fails", "undecided", "holds"]
    meaning = report["endless"].meaning
    if violation > 0.01:
        assert spent < 0.6
        assert "budget of 0.2 s for the rest where a loss is not scale-invariant" in meaning
        assert "budget=10 (--budget 10)" in meaning
    else:
        assert spent > 1.5
        assert "budget of 2 s" in meaning


def test_without_a_budget_all_is_made_in_order() -> None:
    told: list[str] = []
    report = verify(
        PROBLEM,
        budget=math.inf,
        progress=lambda result: told.append(result.name),
        checks=[check("later", lambda: steps(40)), check("cheap", lambda: None)],
    )
    assert told == ["later", "cheap"]
    assert (report.verdict, report.partial) == ("holds", "")


def test_no_time_at_all_is_said() -> None:
    report = verify(
        PROBLEM, budget=1e-9, checks=[check("one", lambda: None), check("two", lambda: None)]
    )
    assert {result.detail for result in report} == {"not made: no time was left for it"}


def test_an_interrupt_gives_the_report_of_what_is_done() -> None:
    report = verify(
        PROBLEM,
        checks=[
            check("one", lambda: None),
            check("two", stop),
            check("three", lambda: pytest.fail("this is not to be made")),
        ],
    )
    assert [result.verdict for result in report] == ["holds", "undecided", "undecided"]
    assert "stopped before it was done" in report["three"].detail
    assert report.partial == "interrupt"
    assert "it was stopped" in report.conclusion


def test_the_numbers_do_not_depend_on_the_budget() -> None:
    """Those of the checks that are made, in whatever order."""
    names = {
        "cone of minimisers",
        "degrees of the derivatives",
        "Phi fixes the manifold and keeps the norm",
        "SGD at a fixed ratio tends to (8)",
    }
    chosen = [check for check in suite.all_checks() if check.name in names]

    def made(budget: float, *others: Check) -> dict[str, Result]:
        report = verify(PROBLEM, budget=budget, checks=[*others, *chosen])
        found = [dataclasses.replace(r, seconds=0.0) for r in report if "not made" not in r.detail]
        return {result.name: result for result in found}

    whole, cut = made(math.inf), made(3.0, check("endless", lambda: busy(1e9)))
    assert len(whole) == len(names)
    assert cut
    assert all(cut[name] == whole[name] for name in cut)


@pytest.mark.parametrize("budget", [0, -1.0, math.nan, True, "60"])
def test_what_is_no_budget(budget: Any) -> None:
    with pytest.raises(ArgumentError, match="not a time"):
        verify(PROBLEM, budget=budget)


def test_rows_are_written_as_they_arrive(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    rows = Rows(file, "A report")
    rows(Result("Euler", "holds", "defect 1e-16", kind="property"))
    assert file.getvalue() == "A report\n\nProperties\n  ok    Euler\n"
    rows(Result("flat", "fails", "it is not", kind="assumption"))
    assert file.getvalue().endswith("\n\nAssumptions\n  FAILS flat\n          it is not\n")
    verify(PROBLEM, progress=True, checks=[check("one", lambda: None)])
    shown = capsys.readouterr()
    assert "  ok    one" in shown.err
    assert shown.out == ""


def test_chains_that_lose_paths_are_given_up_once_and_early() -> None:
    """Each halving of the step is tried on the beginning alone, and no check tries it again."""
    asked: list[float] = []

    def losing(sde: Any, y0: Any, ts: Any, **options: Any) -> Any:
        asked.append(float(ts[-1]) / options["dt"])
        found = solve(sde, y0, ts, **options)
        return dataclasses.replace(found, stats={**found.stats, "lost_paths": 1})

    subject = dataclasses.replace(Subject.of(problems.great_sphere(5)), solve=losing)
    runs = LongRuns(subject, SMALL)
    runs.__dict__["law"] = None
    for _ in range(3):
        with pytest.raises(ClockRangeError, match="out of the reach"):
            assert runs.relaxation
    # 80 steps, and twice as many up to the most that are allowed: the first four of them.
    assert 3 <= len(asked) <= 5
    assert asked == pytest.approx([4.0] * len(asked))
