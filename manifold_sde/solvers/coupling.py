"""The same Brownian paths at several step sizes, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from manifold_sde import rng
from manifold_sde.arguments import integer
from manifold_sde.equations import StochasticEquation
from manifold_sde.errors import ArgumentError
from manifold_sde.solvers.chunk import run_chunk
from manifold_sde.solvers.march import Grid
from manifold_sde.solvers.moments import Moments, Observable, evaluate
from manifold_sde.solvers.run import Request, Run
from manifold_sde.solvers.simulation import (
    check_chunks,
    check_starts,
    check_step,
    check_times,
    choose,
    require_equation,
    require_start,
)


def request_of(
    sde: StochasticEquation,
    y0: Tensor,
    ts: Sequence[float] | Tensor,
    n_paths: int,
    dt: float,
    method: str,
    *,
    seed: int,
    compile: bool | str,
    chunk_size: int,
) -> Request:
    """What is to be run at the largest step.

    Raises:
        ArgumentError, ShapeError: If an argument is out of range.
        NotOnManifoldError, RankError, NoiseError: If the start will not do.
    """
    require_equation(sde)
    times = check_times(ts)
    count = integer(n_paths)
    if count is None or count < 2:
        raise ArgumentError(
            "an expectation needs several paths",
            received=f"n_paths={n_paths!r}",
            expected="an integer, 2 or more",
            remedy="n_paths=10_000",
        )
    start, n, _ = check_starts(sde, y0, count)
    rng.seed_key(seed)
    name, equation = choose(sde, method)
    require_start(sde, equation, start)
    step = check_step(dt, times)
    if step is None:
        raise ArgumentError(
            "dt is not a step",
            received="None",
            expected="the largest step, a positive number",
            remedy="dt=(ts[-1] - ts[0]) / 8",
        )
    return Request(
        sde=sde,
        equation=equation,
        method=name,
        start=start,
        n_paths=n,
        times=times,
        dt=step,
        seed=int(seed),
        compile=compile,
        chunk_size=check_chunks(chunk_size, n, False),
    )


def coupled_values(
    request: Request, function: Observable, halvings: tuple[int, ...]
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Values of a function along the paths, at steps that differ by powers of two.

    Args:
        request: What is run, at its own step.
        function: Function of states (n, D) with a value for each, (n, ...).
        halvings: How often its step is halved, for each of the runs.

    Returns:
        For each chunk the values (K, n, ...) of each run, and which paths no run lost, (K, n).
    """
    grid = Run(request).grid
    runs = [
        Run(request, Grid(grid.start, grid.h * 2.0**-k, grid.level + k, grid.cell))
        for k in halvings
    ]
    for tasks in zip(*(run.tasks() for run in runs), strict=True):
        found, valid = [], None
        for run, task in zip(runs, tasks, strict=True):
            states = run_chunk(run.plan, task).x.movedim(1, -1)
            pairs = [evaluate("the function", function, x) for x in states]
            found.append(torch.stack([values for values, _ in pairs]))
            kept = torch.stack([alive for _, alive in pairs])
            valid = kept if valid is None else valid & kept
        assert valid is not None
        yield found, valid


def moments_at(values: Tensor, valid: Tensor) -> Moments:
    """Moments of values (K, n, ...) of the paths that are not lost (K, n)."""
    return Moments.stack([Moments.of(v, kept) for v, kept in zip(values, valid, strict=True)])
