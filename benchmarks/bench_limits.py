"""What users wait for, against the limits that the project sets: wall time on two cores."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time

from benchmarks.rows import Row, one_thread
from manifold_sde import problems
from manifold_sde.verification import verify
from manifold_sde.verification.assumptions import CHECKS

TITLE = "Verification and figures, wall time: minutes"
PEERS: tuple[str, ...] = ()
#: Minutes that each may take.
VERIFY = {"quick": 1.0, "thorough": 10.0}
FIGURE = {"quick": 2.0, "full": 15.0}


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks.

    Args:
        quick: The assumptions and a figure of few epochs alone: it shows that everything runs.
    """
    if quick:
        few = ("--runs", "1", "--epochs", "2", "--decays", "2", "--decay-epochs", "1")
        return [_verified("quick", assumptions=True), _figure("quick", *few)]
    found = [_verified(effort) for effort in VERIFY]
    return [*found, *(_figure(form) for form in FIGURE)]


def _verified(effort: str, *, assumptions: bool = False) -> Row:
    problem = problems.normalized_linear()
    with one_thread():
        begin = time.monotonic()
        report = verify(problem, effort=effort, checks=CHECKS if assumptions else None)
        minutes = (time.monotonic() - begin) / 60.0
    assert report.passed, str(report)
    note = f"normalized_linear(), one process: {report.summary}"
    return _row(f"verify, {effort}", minutes, VERIFY[effort], note)


def _figure(form: str, *options: str) -> Row:
    command = [sys.executable, "-m", "manifold_sde", "figure", "1", "--restart", *options]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.monotonic()
        full = ["--full"] if form == "full" else []
        subprocess.run([*command, *full, "--out", folder], check=True, capture_output=True)
        minutes = (time.monotonic() - begin) / 60.0
    return _row(f"figure 1, {form}", minutes, FIGURE[form], "with all runs; figure 3 shares them")


def _row(name: str, minutes: float, limit: float, note: str) -> Row:
    return Row(name, minutes, limit, "limit", "min", minutes / limit, 1.0, note)
