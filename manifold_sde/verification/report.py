"""The report of a verification: a table to read, and the same as data."""

from __future__ import annotations

import html
import json
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from tqdm import tqdm

from manifold_sde.errors import ArgumentError, printable
from manifold_sde.solvers.archive import versions
from manifold_sde.training.report import AuditReport
from manifold_sde.verification.result import (
    KINDS,
    NO_TIME,
    NOT_MADE,
    STOPPED,
    VERDICTS,
    Result,
    Verdict,
    worst,
)
from manifold_sde.writing import plain, write_form

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Why a report is not whole; empty where it is.
Partial = Literal["", "budget", "interrupt"]

_WIDTH = 80
_MARKS = {"holds": "ok", "fails": "FAILS", "undecided": "?"}


@dataclass(frozen=True, repr=False)
class Report:
    """Outcome of all checks of a problem; iterates over its results.

    Attributes:
        problem: The problem, in words.
        results: The results.
        title: What the report is.
        seed: Seed of all that was drawn.
        effort: Name of the test budget, or empty.
        seconds: Time that it took.
        partial: "budget" or "interrupt" where checks were not made for want of time or because of
            Ctrl-C; they are undecided.

    Example:
        >>> from manifold_sde.verification.result import Result
        >>> report = Report("a toy", (Result("Euler", "holds", "defect 1e-16"),))
        >>> report.passed, report.verdict, [result.name for result in report]
        (True, 'holds', ['Euler'])
    """

    problem: str
    results: tuple[Result, ...]
    title: str = "Verification"
    seed: int = 0
    effort: str = ""
    seconds: float = 0.0
    partial: Partial = ""

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of all: "holds", "undecided" or "fails"."""
        return worst([result.verdict for result in self.results])

    @property
    def passed(self) -> bool:
        """Whether no check failed. What is undecided does not count as failed."""
        return self.verdict != "fails"

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, name: str) -> Result:
        """The result of a check, by its name.

        Raises:
            ArgumentError: If there is none of this name.
        """
        found = next((r for r in self.results if name in (r.name, r.plain_name)), None)
        if found is None:
            raise ArgumentError(
                "the report has no check of this name",
                received=repr(name),
                expected=", ".join(repr(result.name) for result in self.results),
                remedy="[result.name for result in report]",
            )
        return found

    @property
    def false_alarm(self) -> float:
        """Bound of the probability that any statistical check fails where all is true."""
        return sum(result.design.false_alarm for result in self.results if result.design)

    @property
    def summary(self) -> str:
        """How many checks hold, are undecided and fail."""
        count = Counter(result.verdict for result in self.results)
        words = {"holds": "hold", "fails": "fail"}
        parts = [
            f"{count[v]} {v if count[v] == 1 else words.get(v, v)}" for v in VERDICTS if count[v]
        ]
        return f"{len(self.results)} checks: {', '.join(parts) or 'none applies'}"

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return printable("\n".join([self.head, *_wrapped(f"{self.summary}."), *self._failures()]))

    def _failures(self) -> list[str]:
        failed = [result for result in self.results if result.verdict == "fails"]
        return [f"  FAILS {result.name}  {result.number}".rstrip() for result in failed]

    def _repr_html_(self) -> str:
        head, body = self.head.partition("\n")[0], []
        for result in self.results:
            mark = _MARKS[result.verdict]
            name = f"{result.plain_name} [{', '.join(result.statements)}] {result.reach}".rstrip()
            cells = (mark, name, result.number, result.detail if mark != "ok" else "")
            style = "text-align:left" + (";font-weight:bold" if mark == "FAILS" else "")
            row = "".join(f'<td style="{style}">{html.escape(cell)}</td>' for cell in cells)
            body.append(f"<tr>{row}</tr>")
        return (
            f"<div><strong>{html.escape(head)}</strong><table>{''.join(body)}</table>"
            f"<p>{html.escape(self.summary)}. {html.escape(self.conclusion)}</p></div>"
        )

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Axes:
        """Draw the number of each check over what it is compared with; beyond 1 it fails.

        Args:
            ax: Axes to draw in; by default new ones.
            **kwargs: Passed on to each of the marks.

        Returns:
            The axes; ``.figure.savefig("report.png")`` writes them.
        """
        from manifold_sde.verification.pictures import plot_results  # it loads matplotlib

        return plot_results(self.results, ax, **kwargs)

    def text(self, *, full: bool = False) -> str:
        """The report in 80 columns.

        Args:
            full: Whether checks that hold have their details too, and not their number alone.
        """
        lines = [self.head]
        for kind, heading in KINDS.items():
            results = [result for result in self.results if result.kind == kind]
            if results:
                lines += ["", heading]
                lines += [line for result in results for line in _lines(result, full)]
        return printable("\n".join([*lines, "", self.foot]))

    @property
    def head(self) -> str:
        """What is above the rows, in 80 columns."""
        how = [f"effort {self.effort}"] if self.effort else []
        how += [f"seed {self.seed}"]
        how += [f"{self.seconds:.0f} s"] if self.seconds else []
        about = ", ".join(how)
        return printable("\n".join([*_wrapped(f"{self.title}: {self.problem}"), f"({about})"]))

    @property
    def foot(self) -> str:
        """What the rows come to, in 80 columns."""
        return printable("\n".join([*_wrapped(f"{self.summary}."), *_wrapped(self.conclusion)]))

    @property
    def conclusion(self) -> str:
        """What the verdicts come to, in words."""
        why = {
            "budget": "the budget was not enough: budget= (--budget) takes more seconds",
            "interrupt": "it was stopped",
        }
        words = self._verdicts_in_words()
        if not self.partial:
            return words
        ended = f"{NOT_MADE}: {STOPPED}"
        left = [
            r for r in self.results if r.meaning.startswith(NO_TIME) or r.detail.startswith(ended)
        ]
        what = dict.fromkeys(s for r in left for s in r.statements if s.startswith("Theorem"))
        of = f", of {', '.join(what)}" if what else ""
        count = f"{len(left)} check{'s' * (len(left) != 1)}{of}"
        return f"{words} NOT made: {count}; {why[self.partial]}."

    def _verdicts_in_words(self) -> str:
        failed = [result for result in self.results if result.verdict == "fails"]
        if failed:
            what = "an assumption" if failed[0].kind == "assumption" else "a check"
            return f"The theory does not hold as it stands: {what} fails ({failed[0].name})."
        rate = self.false_alarm
        alarms = f" A report like this has a false alarm with probability {rate:.1g}."
        return "Nothing speaks against the theory here." + (alarms if rate else "")

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, without the pictures."""
        return {
            "title": self.title,
            "problem": self.problem,
            "verdict": self.verdict,
            "passed": self.passed,
            "effort": self.effort,
            "seed": self.seed,
            "seconds": self.seconds,
            "partial": self.partial,
            "versions": versions(),
            "results": [result.to_dict() for result in self.results],
        }

    def to_json(self) -> str:
        """The same as JSON, which knows no NaN (null) and no infinity ("Infinity")."""
        return json.dumps(
            plain(self.to_dict(), named=True), indent=2, ensure_ascii=False, allow_nan=False
        )

    def to_html(self, audit: AuditReport | None = None) -> str:
        """A self-contained page with the plots behind the verdicts.

        Args:
            audit: The audit of a run on the problem, which becomes a section of the page.
        """
        from manifold_sde.verification.page import page  # it loads matplotlib

        how = [self.effort and f"effort {self.effort}", f"seed {self.seed}"]
        how += [f"{self.seconds:.0f} s", self.summary]
        title = f"{self.title}: {self.problem}"
        sections = [] if audit is None else [audit.section()]
        return page(title, how, self.verdict, self.conclusion, self.results, sections)

    def save(self, path: str | Path, *, audit: AuditReport | None = None) -> None:
        """Write the report to a file, whose ending says in which form.

        Args:
            path: A file that ends in .html, .json or .txt.
            audit: The audit of a run on the problem, a section of the page.

        Raises:
            ArgumentError: If it has another ending.
            WriteError: If the file cannot be written; what stood there before is as it was.
        """
        write_form(
            path,
            {
                ".html": lambda: self.to_html(audit),
                ".json": self.to_json,
                ".txt": self.__str__,
            },
        )


class Rows:
    """Writes rows of a report as they arrive, each kind of checks under its heading.

    Args:
        file: Where to.
        head: What is written above the first.
    """

    def __init__(self, file: IO[str], head: str = "") -> None:
        self._file = file
        self._head = head
        self._kind = ""

    def __call__(self, result: Result) -> None:
        """Write the row of a result; a progress bar makes room."""
        lines = _lines(result, full=False)
        if result.kind != self._kind:
            lines = ["", KINDS[result.kind], *lines]
        if not self._kind and self._head:
            lines = [self._head, *lines]
        self._kind = result.kind
        tqdm.write("\n".join(lines), file=self._file)
        self._file.flush()


def _lines(result: Result, full: bool) -> Sequence[str]:
    number = result.number
    about = f" [{', '.join(_short(name) for name in result.statements)}]"
    name = result.plain_name + (about if result.statements else "")
    name += f", {result.reach}" if result.reach else ""
    width = _WIDTH - len(number) - 2
    head = textwrap.wrap(
        name, width, initial_indent=f"  {_MARKS[result.verdict]:<6}", subsequent_indent=" " * 8
    )
    head[0] = f"{head[0]:<{width}}  {number}".rstrip()
    said = [result.detail, result.meaning] if full or result.verdict != "holds" else []
    return [*head, *(line for text in said if text for line in _wrapped(text, 10))]


def _short(statement: str) -> str:
    return statement.replace("Equation ", "").replace("Assumption ", "A")


def _wrapped(text: str, indent: int = 0) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)
