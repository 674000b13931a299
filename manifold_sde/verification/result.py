"""What a check finds: its verdict, the number behind it, and what that means for the user."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from manifold_sde.errors import ArgumentError
from manifold_sde.paper import STATEMENTS
from manifold_sde.verification.plain_names import PLAIN_NAMES

Verdict = Literal["holds", "fails", "undecided"]

#: The verdicts, from the best to the worst.
VERDICTS: tuple[Verdict, ...] = ("holds", "undecided", "fails")

#: The kinds of checks, in the order of a report, with their headings.
KINDS = {
    "assumption": "Assumptions",
    "property": "Properties",
    "statistics": "Limit theorems and laws",
}


#: With what the detail of a check begins that was not made; and the meaning, for want of time, or
#: the detail, where it was stopped.
NOT_MADE, NO_TIME, STOPPED = "not made", "It needs more than the budget", "stopped before"


@dataclass(frozen=True)
class Design:
    """What a statistical test declares before anything is drawn.

    Attributes:
        hypothesis: The null hypothesis, in words.
        false_alarm: Probability of rejecting it where it is true.
        departure: The smallest departure that is to be found, in words with its size.
        miss: Probability of not finding that departure.
        sample_size: Number of independent runs that follow from these.
        size: The departure as a number, in the units that its words name.
    """

    hypothesis: str
    false_alarm: float
    departure: str
    miss: float
    sample_size: int
    size: float | None = None

    def __post_init__(self) -> None:
        rates = (self.false_alarm, self.miss)
        if not all(0 < rate < 1 for rate in rates) or self.sample_size < 1:
            raise ArgumentError(
                "this is not the design of a test",
                received=f"false_alarm={self.false_alarm!r}, miss={self.miss!r}, "
                f"sample_size={self.sample_size!r}",
                expected="two probabilities, and a positive number of runs",
                remedy="false_alarm=1e-4, miss=0.01",
            )

    def __str__(self) -> str:
        return (
            f"Hypothesis: {self.hypothesis}. False alarms: {self.false_alarm:.2g}. "
            f"To be found: {self.departure}, missed with probability {self.miss:.2g}. "
            f"Runs: {self.sample_size}."
        )


@dataclass(frozen=True)
class Series:
    """A curve, points with errors, or steps of a picture.

    Attributes:
        label: Label.
        x, y: Values (n,) each.
        style: "line", "points", "steps" or "dashed".
        error: Standard errors of y, or ``None``.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: Literal["line", "points", "steps", "dashed"] = "line"
    error: Sequence[float] | None = None


@dataclass(frozen=True)
class Picture:
    """What the plot behind a verdict shows.

    Attributes:
        title: Title.
        xlabel, ylabel: Labels of the axes, with units.
        series: What is drawn.
        logx, logy: Whether the axes are logarithmic.
    """

    title: str
    xlabel: str
    ylabel: str
    series: tuple[Series, ...]
    logx: bool = False
    logy: bool = False


@dataclass(frozen=True)
class Result:
    """Outcome of one check.

    Attributes:
        name: Name of the check, a few words.
        verdict: "holds", "fails", or "undecided" where the check cannot tell.
        detail: The numbers behind the verdict, in a sentence.
        statistic: The number that decides.
        limit: What it is compared with: the verdict is "fails" where the statistic is larger. A
            number with a lower bound stands here with its sign turned, and so does the bound.
        p_value: Probability under the hypothesis of a statistic as extreme, or ``None`` where the
            check is not statistical.
        statements: The statements of the paper that it is about, as in
            :data:`manifold_sde.paper.STATEMENTS`.
        kind: "assumption", "property" or "statistics".
        meaning: What the verdict means for the user; empty where all is well.
        design: Of a statistical test, what was declared before anything was drawn.
        tests: P-values of its single tests, before they are corrected for their number and without
            what is tolerated: uniform under the hypothesis.
        pictures: Plots behind the verdict.
        reach: How far it looked, such as "T = 2, way 0.4"; empty where that says nothing.
        within_tolerance: Whether the p-value is 1 because each difference is smaller than what is
            tolerated of it.
        seconds: Time that it took.
    """

    name: str
    verdict: Verdict
    detail: str
    statistic: float = math.nan
    limit: float = math.nan
    p_value: float | None = None
    statements: tuple[str, ...] = ()
    kind: Literal["assumption", "property", "statistics"] = "property"
    meaning: str = ""
    design: Design | None = None
    tests: Mapping[str, float] = field(default_factory=dict, repr=False)
    pictures: tuple[Picture, ...] = field(default=(), repr=False)
    reach: str = ""
    within_tolerance: bool = False
    seconds: float = 0.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.statements if name not in STATEMENTS]
        if self.verdict not in VERDICTS or unknown:
            raise ArgumentError(
                "this is not the result of a check",
                received=f"verdict={self.verdict!r}, statements={self.statements!r}",
                expected=f"one of {', '.join(VERDICTS)}, and statements of the paper",
                remedy="see manifold_sde.paper.STATEMENTS",
            )

    @property
    def plain_name(self) -> str:
        """The name in plain words, which need no number of the paper's.

        Example:
            >>> Result("SGD in the time tau tends to (13)", "holds", "").plain_name
            "SGD's direction after T against the limiting law"
        """
        return PLAIN_NAMES.get(self.name, self.name)

    @property
    def number(self) -> str:
        """The number that decided beside what it was compared with, or the p-value."""
        if self.within_tolerance:
            return "within tolerance"
        if self.p_value is not None:
            return f"p = {self.p_value:.2g}"
        if math.isnan(self.statistic):
            return ""
        if math.isnan(self.limit):
            return f"{self.statistic:.2g}"
        sign, relations = (-1.0, ("<", ">=")) if self.limit < 0 else (1.0, (">", "<="))
        relation = relations[self.statistic <= self.limit]
        return f"{sign * self.statistic + 0.0:.2g} {relation} {sign * self.limit + 0.0:.2g}"

    @property
    def distance(self) -> float:
        """The number over what it is compared with: above 1 it fails; NaN where there is none.

        Of a number with a lower bound it is the bound over the number.

        Example:
            >>> Result("a defect", "holds", "", statistic=1e-9, limit=1e-8).distance
            0.1
            >>> Result("a gap", "fails", "", statistic=-5.0, limit=-10.0).distance
            2.0
        """
        if math.isnan(self.statistic) or math.isnan(self.limit):
            return math.nan
        above, below = abs(self.statistic), abs(self.limit)
        if self.limit < 0.0:
            above, below = below, abs(min(self.statistic, 0.0))
        if below == 0.0:
            return math.inf if above > 0.0 else 0.0
        return above / below

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data, without the pictures."""
        design = None if self.design is None else vars(self.design).copy()
        plain = {
            name: value
            for name, value in vars(self).items()
            if name not in ("design", "pictures", "statements", "tests")
        }
        for name in ("statistic", "limit"):
            plain[name] = None if math.isnan(plain[name]) else plain[name]
        return {
            **plain,
            "plain_name": self.plain_name,
            "statements": list(self.statements),
            "design": design,
            "tests": dict(self.tests),
        }


def found(
    verdict: Verdict,
    detail: str,
    statistic: float = math.nan,
    limit: float = math.nan,
    meaning: str = "",
    *,
    name: str = "",
    **others: Any,
) -> Result:
    """A result to which its check gives its kind, and its name and statements if it has none."""
    return Result(name, verdict, detail, statistic, limit, meaning=meaning, **others)


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The worst of some verdicts; "holds" where there is none.

    >>> worst(["holds", "fails", "undecided"])
    'fails'
    """
    return max(verdicts, key=VERDICTS.index, default="holds")
