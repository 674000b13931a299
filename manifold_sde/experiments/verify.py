"""The command ``manifold-sde verify``."""

from __future__ import annotations

import sys
from pathlib import Path

from manifold_sde.experiments.files import output_of, read_array
from manifold_sde.experiments.loading import load_problem
from manifold_sde.verification import Report, check_assumptions
from manifold_sde.verification.report import Rows
from manifold_sde.verification.suite import verify


def verify_problem(
    target: str,
    effort: str,
    seed: int,
    budget: float | None,
    x0: Path | None,
    assumptions: bool,
    output: Path | None,
) -> Report:
    """Verify a problem of a file, print the rows as they arrive, and write the report.

    Args:
        target: "FILE.py:NAME".
        effort: "quick" or "thorough".
        seed: Seed of all that is drawn.
        budget: Seconds for all checks, or ``None`` for those of the effort.
        x0: File of the weights where training starts, or ``None``.
        assumptions: Whether to check the assumptions alone.
        output: The page to write, or ``None`` for one with the problem's name; the numbers are
            written beside it.

    Returns:
        The report.

    Raises:
        ArgumentError: If something cannot be used.
    """
    problem = load_problem(target)
    page = output_of(output, "verify", target, ".html")
    x_init = None if x0 is None else read_array(x0)
    make = check_assumptions if assumptions else verify
    title = "Assumptions" if assumptions else "Verification"
    rows = Rows(sys.stdout, Report(repr(problem), (), title, seed, effort).head)
    report = make(problem, x_init=x_init, seed=seed, effort=effort, budget=budget, progress=rows)
    report.save(page)
    report.save(page.with_suffix(".json"))
    print(f"\n{report.foot}\n\nWith the plots behind the verdicts: {page}")
    return report
