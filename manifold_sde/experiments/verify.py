"""The command ``manifold-sde verify``."""

from __future__ import annotations

from pathlib import Path

from manifold_sde.experiments.files import check_output, read_array
from manifold_sde.experiments.loading import load_problem
from manifold_sde.verification import Report, check_assumptions
from manifold_sde.verification.suite import verify


def verify_problem(
    target: str, effort: str, seed: int, x0: Path | None, assumptions: bool, output: Path
) -> Report:
    """Verify a problem of a file, and write the report.

    Args:
        target: "FILE.py:NAME".
        effort: "quick" or "thorough".
        seed: Seed of all that is drawn.
        x0: File of the weights where training starts, or ``None``.
        assumptions: Whether to check the assumptions alone.
        output: The page to write; the numbers are written beside it.

    Returns:
        The report.

    Raises:
        ArgumentError: If something cannot be used.
    """
    check_output(output, ".html", "results/verify.html")
    problem = load_problem(target)
    x_init = None if x0 is None else read_array(x0)
    make = check_assumptions if assumptions else verify
    report = make(problem, x_init=x_init, seed=seed, effort=effort, progress=True)
    report.save(output)
    report.save(output.with_suffix(".json"))
    return report
