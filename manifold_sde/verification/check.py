"""A check: what it is about, and the function that makes it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from manifold_sde.deadline import Deadline
from manifold_sde.errors import ManifoldSDEError
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.result import NOT_MADE, Result
from manifold_sde.verification.subject import Subject


@dataclass(frozen=True)
class Check:
    """A check, or several that share their work.

    Attributes:
        name: Its name; that of its result if it has one.
        kind: "assumption", "property" or "statistics".
        statements: The statements of the paper that it is about.
        run: Function of the system under test and the test budget that returns the result or the
            results; none where the check does not apply to the problem. What they do not say of
            name, statements and kind is that of the check.
    """

    name: str
    kind: Literal["assumption", "property", "statistics"]
    statements: tuple[str, ...]
    run: Callable[[Subject, Effort], Sequence[Result] | Result | None]

    def __call__(self, subject: Subject, effort: Effort, seconds: float = math.inf) -> list[Result]:
        """Run it. What cannot be computed is undecided, and says why.

        Args:
            subject: The system under test.
            effort: The test budget.
            seconds: Processor time that it may take. The results do not depend on it, but for
                whether there are any.

        Raises:
            OutOfTimeError: If it would take longer; it says how long, as far as that can be seen.
        """
        begin = time.perf_counter()
        try:
            with Deadline(seconds):
                seen = self.run(subject, effort)
            results = [seen] if isinstance(seen, Result) else list(seen or ())
        except ManifoldSDEError as error:
            detail = f"{error.problem}: {error.received}" if error.received else error.problem
            way_out = f" Way out: {error.remedy}." if error.remedy else ""
            results = [self._stopped(detail, f"The check could not be made.{way_out}")]
        except Exception as error:
            # One check that breaks must not take the others' results with it.
            lines = str(error).splitlines() or [""]
            results = [
                self._stopped(
                    f"stopped by {type(error).__name__}: {lines[0][:200]}",
                    "The check broke: a fault of the loss or of the toolkit, and no finding.",
                )
            ]
        seconds = (time.perf_counter() - begin) / max(len(results), 1)
        return [
            replace(
                result,
                name=result.name or self.name,
                statements=result.statements or self.statements,
                kind=self.kind,
                seconds=seconds,
            )
            for result in results
        ]

    def not_made(self, why: str, meaning: str = "") -> Result:
        """The result where it is not made."""
        return self._stopped(f"{NOT_MADE}: {why}", meaning)

    def _stopped(self, detail: str, meaning: str) -> Result:
        return Result(
            self.name,
            "undecided",
            detail,
            statements=self.statements,
            kind=self.kind,
            meaning=meaning,
        )
