"""``python -m benchmarks.memory_use PATHS STEPS``: peak memory of a run that keeps observables.

It is a process of its own, whose peak is then that of the run, and prints it in megabytes.
"""

from __future__ import annotations

import contextlib
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from manifold_sde import LimitingDiffusion, problems
from manifold_sde.solvers import solve

STEP = 1.0 / 64.0


def first(y: Tensor) -> Tensor:
    """The first coordinate."""
    return y[:, 0]


def run(n_paths: int, steps: int) -> None:
    """Euler's steps on the great circle, of which the mean of a coordinate is kept."""
    torch.set_num_threads(1)
    problem = problems.great_circle()
    solution = solve(
        LimitingDiffusion(problem),
        problem.minimizer,
        [0.0, steps * STEP],
        n_paths=n_paths,
        method="euler",
        dt=STEP,
        observables={"first": first},
    )
    assert solution.ys.shape[1] == 0


def peak() -> float:
    """Peak memory of this process in megabytes.

    What ``getrusage`` says begins with the memory of the process that started this one; Linux
    knows better.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024.0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (1024.0**2 if sys.platform == "darwin" else 1024.0)


def resident() -> float:
    """Memory that this process has now, in megabytes; on Linux, and 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(x.split()[1]) / 1024.0 for x in lines if x.startswith("VmRSS:")), 0.0)


def forget_peak() -> None:
    """Begin :func:`peak` anew, where Linux can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def measured(n_paths: int, steps: int) -> float:
    """Peak memory of such a run in a process of its own, in megabytes."""
    command = [sys.executable, "-m", "benchmarks.memory_use", str(n_paths), str(steps)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]))
    print(f"{peak():.1f}")
