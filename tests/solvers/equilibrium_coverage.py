"""How often intervals of averages under pi hold the exact mean, by the length of the run.

``python -m tests.solvers.equilibrium_coverage`` prints the table of docs/solve.md: 200 runs of 100
paths from one start, at a quarter, 1, 4 and 16 relaxation times, on problems with exact laws. It
takes some minutes of processor time a problem.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manifold_sde import DirectionDiffusion, Problem, problems
from manifold_sde.errors import NotMixedWarning
from manifold_sde.solvers import DirectionSolution, Solution, solve
from manifold_sde.solvers.equilibrium import Extent, average
from manifold_sde.verification.exact import CircleDiffusion, SphereLaw

RUNS = 200
PATHS = 100
#: Lengths of the runs, in relaxation times.
LENGTHS = (0.25, 1.0, 4.0, 16.0)
#: Times that are kept of each run, the start among them.
KEPT = 17
#: Steps of a relaxation time, and paths that are stepped together.
_STEPS = 16
_CHUNK = 2000


def cosine(y: Tensor) -> Tensor:
    """The first component of the direction."""
    return y[:, 0] / y.norm(dim=1)


@dataclass(frozen=True)
class Case:
    """A problem whose equilibrium is known.

    Attributes:
        problem: The problem.
        relaxation: Its relaxation time, in the clock.
        exact: Mean of ``cosine`` under the equilibrium.
    """

    problem: Problem
    relaxation: float
    exact: float


def _circle(problem: Problem) -> Case:
    law = CircleDiffusion.of(problem)
    circle = problem.facts.circle
    scale = math.sqrt(1.0 - float(circle.center.square().sum()))
    return Case(problem, law.relaxation_time, scale * law.equilibrium.moment(1).real)


def _sphere(problem: Problem) -> Case:
    return Case(problem, 1.0 / SphereLaw.of(problem).rate(1), 0.0)


CASES: dict[str, Callable[[], Case]] = {
    "great circle": lambda: _sphere(problems.great_circle()),
    "varying curvature": lambda: _circle(problems.varying_circle()),
    "great sphere": lambda: _sphere(problems.great_sphere()),
}


@dataclass(frozen=True)
class Coverage:
    """What the runs of one length did.

    Attributes:
        length: The length, in relaxation times.
        covered: Share of the intervals that hold the exact mean.
        without_bias: The same of intervals made of the standard error alone: the broken twin.
        warned: Share of the runs that were warned of.
        width: Median width of the intervals, over that of the standard error alone.
    """

    length: float
    covered: float
    without_bias: float
    warned: float
    width: float


def coverage(
    runs: list[Solution], length: float, exact: float, extent: Extent = lambda _: None
) -> Coverage:
    """Look at the interval of each run.

    Args:
        runs: The runs.
        length: Their length, in relaxation times.
        exact: What the intervals are to hold.
        extent: Range of a function over the manifold.
    """
    rows = []
    for run in runs:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = average(run, cosine, run._equilibrium_weights(None), None, extent)
        assert all(issubclass(warning.category, NotMixedWarning) for warning in told)
        twin = dataclasses.replace(found, bias=torch.zeros_like(found.bias))
        ends = [[float(end) for end in one.interval()] for one in (found, twin)]
        inside = [low <= exact <= high for low, high in ends]
        rows.append([*inside, len(told) > 0, np.diff(ends[0])[0] / np.diff(ends[1])[0]])
    table = np.array(rows, dtype=float)
    return Coverage(length, *table[:, :3].mean(0).tolist(), float(np.median(table[:, 3])))


def part(run: DirectionSolution, times: Tensor, paths: slice) -> DirectionSolution:
    """Some of the times and paths of a run."""
    rows = torch.searchsorted(run.ts, times * (1.0 - 1e-12))
    names = {f.name for f in dataclasses.fields(run)} - {"ts", "stats", "config", "observed"}
    names -= {"plan", "origin"}
    return dataclasses.replace(
        run, ts=run.ts[rows], **{name: getattr(run, name)[rows][:, paths] for name in names}
    )


def measure(case: Case, runs: int = RUNS, lengths: tuple[float, ...] = LENGTHS) -> list[Coverage]:
    """Simulate a case once, for all runs and lengths, and look at the intervals."""
    times = [
        torch.linspace(0.0, length * case.relaxation, KEPT, dtype=torch.float64)
        for length in lengths
    ]
    whole = solve(
        DirectionDiffusion(case.problem),
        case.problem.minimizer,
        torch.cat(times).unique(),
        n_paths=runs * PATHS,
        dt=case.relaxation / _STEPS,
        seed=12,
        chunk_size=_CHUNK,
        compile=False,
    )
    assert isinstance(whole, DirectionSolution)
    assert whole.stats["lost_paths"] == 0
    known = whole._extent(cosine)  # the same for all parts
    places = [slice(first, first + PATHS) for first in range(0, runs * PATHS, PATHS)]
    return [
        coverage([part(whole, ts, place) for place in places], length, case.exact, lambda _: known)
        for length, ts in zip(lengths, times, strict=True)
    ]


def main() -> None:
    """Print the table."""
    print("| problem | length | covered | standard error alone | warned | width |")
    print("|---|---|---|---|---|---|")
    for name, make in CASES.items():
        for row in measure(make()):
            print(
                f"| {name} | {row.length:g} | {row.covered:.1%} | {row.without_bias:.1%} | "
                f"{row.warned:.1%} | {row.width:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
