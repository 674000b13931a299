"""``verify`` on a digits network of 20,000 weights: processor time, and memory over that of J.

``python -m benchmarks.bench_verify SIZE SAMPLES`` is one run in a process of its own, whose peak
memory is then that of the checks; it prints what it found as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from benchmarks.memory_use import forget_peak, peak, resident
from benchmarks.network_problems import network
from benchmarks.rows import Row
from manifold_sde.verification import verify
from manifold_sde.verification.assumptions import CHECKS

TITLE = "Verification of a network by products, one thread"
PEERS: tuple[str, ...] = ()
#: Minutes that it may take, and memory over that of J.
MINUTES, MEMORY = 10.0, 3.0


@dataclass(frozen=True)
class Measured:
    """What one run of ``verify`` took and found.

    Attributes:
        minutes: Processor time.
        memory: Peak memory beyond that before it, over that of J.
        jacobian: Memory of J in MB.
        verdicts: Numbers of rows that hold, that fail and that are undecided.
        late: Rows that the budget left out.
        failed: Names of the rows that fail.
    """

    minutes: float
    memory: float
    jacobian: float
    verdicts: tuple[int, int, int]
    late: int
    failed: tuple[str, ...]


def run(size: str, samples: int, *, assumptions: bool = False) -> Measured:
    """Verify a network in this process, quick form."""
    torch.set_num_threads(1)
    problem, y = network(size, samples)
    jacobian = problem.pointwise.n_residuals * problem.dim * 8 / 2**20
    before = resident()
    forget_peak()
    start = time.process_time()
    report = verify(problem, x_init=y, progress=False, checks=CHECKS if assumptions else None)
    minutes = (time.process_time() - start) / 60.0
    found = [result.verdict for result in report]
    late = [r for r in report if "takes more than" in r.detail or "would take" in r.detail]
    return Measured(
        minutes=minutes,
        memory=(peak() - before) / jacobian,
        jacobian=jacobian,
        verdicts=(found.count("holds"), found.count("fails"), found.count("undecided")),
        late=len(late) if report.partial else 0,
        failed=tuple(r.name for r in report if r.verdict == "fails"),
    )


def measured(size: str, samples: int, *, assumptions: bool = False) -> Measured:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_verify", size, str(samples)]
    command += ["assumptions"] if assumptions else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    values = json.loads(done.stdout)
    return Measured(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks.

    Args:
        quick: A small network and the assumptions alone: it shows that everything runs.
    """
    size, samples = ("1k", 5) if quick else ("20k", 100)
    found = measured(size, samples, assumptions=quick)
    holds, fails, undecided = found.verdicts
    note = (
        f"quick form, digits network of {size}, {10 * samples} constraints; {holds} hold, {fails} "
        f"fail, {undecided} undecided, of which the budget left out {found.late}"
    )
    minutes, memory = found.minutes, found.memory
    return [
        Row("verify, quick", minutes, MINUTES, "limit", "min", minutes / MINUTES, 1.0, note),
        Row(
            "its peak memory",
            memory * found.jacobian,
            found.jacobian,
            "J itself",
            "MB",
            memory,
            None if quick else MEMORY,
            "beyond what the process has before",
        ),
    ]


if __name__ == "__main__":
    result = run(sys.argv[1], int(sys.argv[2]), assumptions="assumptions" in sys.argv)
    print(json.dumps(dataclasses.asdict(result)))
