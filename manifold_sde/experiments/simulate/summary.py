"""The numbers of a predicted law, and their table of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from manifold_sde.experiments.experiment import plain_table
from manifold_sde.geometry import Geometry
from manifold_sde.problem import Problem
from manifold_sde.solvers.lost_paths import check_average, remedy_of
from manifold_sde.solvers.solution import Solution

#: Largest dimension in which log pdet H is computed for the table.
_CHEAP_DIM = 64
#: Most digits behind the point of a mean with its error.
_DIGITS = 5
#: Size of log pdet H that is all rounding.
_ROUNDING = 1e-13
#: Quantiles of the norm that the figure shows.
QUANTILES = (0.05, 0.95)


@dataclass(frozen=True)
class Row:
    """The law at one moment.

    Attributes:
        moment: Step count, or time of the equation.
        clock: Mean of the intrinsic clock u.
        norm: Mean of the norm, and its standard error.
        quantiles: Quantiles of the norm.
        log_pseudo_determinant: Mean of log pdet H at the direction, and its standard error;
            ``None`` in large dimensions.
        spread: 1 - |mean direction|.
        spread_error: Its standard error.
        paths: Number of paths that are not lost.
    """

    moment: float
    clock: float
    norm: tuple[float, float]
    quantiles: tuple[float, float]
    log_pseudo_determinant: tuple[float, float] | None
    spread: float
    spread_error: float
    paths: int


def summarize(problem: Problem, solution: Solution) -> list[Row]:
    """The law at each moment of a solution on the manifold, of paths (K, n, D), or one (K, D).

    Raises:
        LostPathsError: If more than one path in a hundred was lost.
    """
    ys = solution.ys if solution.ys.dim() == 3 else solution.ys[:, None]
    if ys.shape[1] > 1:
        lost = (~torch.isfinite(ys).all(-1)).any(0)
        check_average(
            int(lost.sum()),
            ys.shape[1],
            when=" on the way",
            survivors="the file of the solution holds every path, NaN where it is lost",
            remedy=remedy_of(solution.config),
        )
    clock = solution.clock.reshape(ys.shape[:2])
    norms = _moments(solution, ys.norm(dim=-1)[..., None])
    determinants: list[tuple[float, float]] | None = None
    if problem.dim <= _CHEAP_DIM:
        geometry = Geometry(problem)
        values = ys.new_full(ys.shape[:2], torch.nan)
        good = torch.isfinite(ys).all(-1)
        unit = ys[good] / ys[good].norm(dim=-1, keepdim=True)
        found = geometry.log_pseudo_determinant(unit)
        values[good] = torch.where(found.abs() < _ROUNDING, 0.0, found)
        determinants = _moments(solution, values[..., None])
    rows = []
    for k, y in enumerate(ys):
        good = torch.isfinite(y).all(-1)
        low = high = spread = error = math.nan
        if bool(good.any()):
            size = y[good].norm(dim=-1)
            low, high = np.quantile(size.numpy(), QUANTILES).tolist()
            unit = y[good] / size[:, None]
            mean = unit.mean(0)
            spread = 1.0 - float(mean.norm())
            if len(unit) > 1:
                along = unit @ (mean / mean.norm())
                error = float(along.std()) / len(unit) ** 0.5
        rows.append(
            Row(
                moment=float(solution.ts[k]),
                clock=float(clock[k][good].mean()),
                norm=norms[k],
                quantiles=(low, high),
                log_pseudo_determinant=None if determinants is None else determinants[k],
                spread=spread,
                spread_error=error,
                paths=int(good.sum()),
            )
        )
    return rows


def _moments(solution: Solution, values: Tensor) -> list[tuple[float, float]]:
    """Mean and standard error of values (K, n, 1) over the paths; no error of one path."""
    if values.shape[1] < 2:
        return [(float(v), math.nan) for v in values[:, 0, 0]]
    table = Solution(solution.ts, values, solution.clock, config=solution.config)
    mean, error = table.expectation(lambda v: v[:, 0])
    return list(zip(mean.tolist(), error.tolist(), strict=True))


def law_table(
    title: str, rows: Sequence[Row], first: str, times: Sequence[float] | None = None
) -> Table:
    """Rows as a table; ``first`` says what the moments are, ``times`` are T of (12) at each."""
    table = plain_table(title)
    known = rows[0].log_pseudo_determinant is not None
    heads = [first, *(["T"] if times is not None else []), "clock u", "norm"]
    heads += [*(["log pdet H"] if known else []), "spread", "paths"]
    for name in heads:
        table.add_column(name, justify="right", overflow="fold")
    for k, row in enumerate(rows):
        whole = row.moment == int(row.moment)
        cells = [f"{int(row.moment):,}" if whole else f"{row.moment:.6g}"]
        cells += [f"{times[k]:.4g}"] if times is not None else []
        cells += [f"{row.clock:.4g}", measured(*row.norm)]
        cells += [measured(*row.log_pseudo_determinant)] if row.log_pseudo_determinant else []
        cells += ["-" if row.paths < 2 else f"{row.spread:.4f}", f"{row.paths:,}"]
        table.add_row(*cells)
    return table


def measured(mean: float, error: float) -> str:
    """A mean with its standard error, to two digits of the latter.

    Example:
        >>> measured(0.84123, 0.00147), measured(2.0, 0.0), measured(2.0, float("nan"))
        ('0.8412 ± 0.0015', '2', '2')
    """
    if not error > 1e-12 * abs(mean):
        return f"{mean:.6g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    if digits > _DIGITS:
        return f"{mean:.6g} ± {error:.0e}"
    return f"{mean:.{digits}f} ± {error:.{digits}f}"
