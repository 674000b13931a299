"""The same Brownian paths at several step sizes, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manifold_sde.arguments import integer
from manifold_sde.equations import StochasticEquation
from manifold_sde.errors import ArgumentError
from manifold_sde.solvers.arguments import check_times, require_equation
from manifold_sde.solvers.coupled_path import Coupling
from manifold_sde.solvers.flat_points import warn_of_flat_points
from manifold_sde.solvers.integrate import integrate
from manifold_sde.solvers.moments import Moments, Observable, evaluate
from manifold_sde.solvers.simulation import Simulation


def coupled(
    sde: StochasticEquation,
    y0: Tensor,
    ts: Sequence[float] | Tensor,
    *,
    n_paths: int,
    dt: float,
    **options: Any,
) -> Simulation:
    """The simulation at the largest step.

    Args:
        sde: The equation.
        y0: Start (D,) on the manifold, or one for each path.
        ts: Save times; the first is the start.
        n_paths: Number of paths, 2 or more.
        dt: The largest step.
        **options: Options of :meth:`Simulation.of`.

    Raises:
        ArgumentError, ShapeError: If an argument is out of range.
        NotOnManifoldError, RankError, NoiseError: If the start will not do.
    """
    require_equation(sde)
    check_times(ts)
    count = integer(n_paths)
    if count is None or count < 2:
        raise ArgumentError(
            "an expectation needs several paths",
            received=f"n_paths={n_paths!r}",
            expected="an integer, 2 or more",
            remedy="n_paths=10_000",
        )
    if dt is None:
        raise ArgumentError(
            "dt is not a step",
            received="None",
            expected="the largest step, a positive number",
            remedy="dt=(ts[-1] - ts[0]) / 8",
        )
    return Simulation.of(sde, y0, ts, n_paths=n_paths, dt=dt, **options)


def coupled_values(
    simulation: Simulation,
    function: Observable,
    halvings: tuple[int, ...],
    *,
    mirrored: bool = False,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Values of a function along the paths, at steps that differ by powers of two.

    Args:
        simulation: The simulation at the largest step.
        function: Function of states (n, D) with a value for each, (n, ...).
        halvings: How often its step is halved, for each of the runs.
        mirrored: Whether each value is the mean over the two mirrored Brownian paths of
            :class:`CoupledPath`.

    Returns:
        For each chunk the values (K, n, ...) of each run, and which paths no run lost, (K, n).
    """
    level = simulation.grid.level
    paths = [Coupling(level, m) for m in (False, True)] if mirrored else [None]
    runs = [[replace(simulation.halved(k), coupling=path) for path in paths] for k in halvings]
    for chunk in simulation.chunks():
        found, valid = [], torch.ones((), dtype=torch.bool, device=chunk.start.device)
        for several in runs:
            values = []
            for run in several:
                result = integrate(run, chunk)
                warn_of_flat_points(result.flatness)
                states = result.x.movedim(1, -1)
                pairs = [evaluate("the function", function, x) for x in states]
                values.append(torch.stack([value for value, _ in pairs]))
                valid = valid & torch.stack([alive for _, alive in pairs])
            found.append(values[0] if len(values) == 1 else 0.5 * (values[0] + values[1]))
        yield found, valid


def moments_at(values: Tensor, valid: Tensor) -> Moments:
    """Moments of values (K, n, ...) of the paths that are not lost (K, n)."""
    return Moments.stack([Moments.of(v, kept) for v, kept in zip(values, valid, strict=True)])
