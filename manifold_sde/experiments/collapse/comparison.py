"""What the curves say: which axis collapses them, and how far SGD is from the diffusion."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from rich.table import Table
from scipy.special import ndtri

from manifold_sde.experiments.collapse.curve_statistics import (
    Collapse,
    Distance,
    collapse,
    common_grid,
    distance,
    on_grid,
)
from manifold_sde.experiments.collapse.network import FUNCTIONS
from manifold_sde.experiments.collapse.simulation import AXES, CollapseData
from manifold_sde.experiments.experiment import Array, plain_table

#: The axes in words.
AXIS_NAMES = {"steps": "k", "lr_steps": "ηk", "lr_decay_steps": "ηλk", "clock": "u"}
#: Positions of the common grid.
_POINTS = 40
#: Standard errors above which one axis counts as better than another.
_SEEN = 3.0
#: Probability that the differences from the diffusion, all together, are said to be seen where
#: there are none.
FALSE_ALARM = 0.01


@dataclass(frozen=True)
class Row:
    """One test function on one axis.

    Attributes:
        function, axis: Which.
        end: Where the common range of the axis ends.
        result: The measure.
    """

    function: str
    axis: str
    end: float
    result: Collapse


@dataclass(frozen=True)
class DistanceRow:
    """One test function of SGD at one pair of rates, against the diffusion, on the clock.

    Attributes:
        function: Which.
        lr, weight_decay: The rates.
        largest_step: Largest eta / |x|^2 of the run.
        result: The distance.
    """

    function: str
    lr: float
    weight_decay: float
    largest_step: float
    result: Distance


class _Placed(Protocol):
    """Paths whose snapshots have positions on axes."""

    @property
    def values(self) -> Mapping[str, Array]:
        """Test functions by name, (K, n) each."""

    def positions(self, axis: str) -> Array:
        """Positions on an axis, (K,) or (K, n)."""


def curves_on(
    runs: Sequence[_Placed], function: str, axis: str, points: int = _POINTS
) -> tuple[Array, list[Array]]:
    """The paths of each ensemble on a common grid of an axis: (G,), and (n, G) each."""
    positions = [run.positions(axis) for run in runs]
    grid = common_grid(positions, points)
    return grid, [
        on_grid(where, run.values[function], grid)
        for where, run in zip(positions, runs, strict=True)
    ]


def measure(data: CollapseData) -> list[Row]:
    """The measure of the collapse, for each test function on each axis."""
    return measure_runs(data.runs, FUNCTIONS, AXES)


def measure_runs(
    runs: Sequence[_Placed], functions: Iterable[str], axes: Iterable[str], **options: int
) -> list[Row]:
    """The measure of these functions of these runs, on these axes, with its options."""
    rows = []
    for function, axis in itertools.product(functions, axes):
        grid, curves = curves_on(runs, function, axis)
        rows.append(Row(function, axis, float(grid[-1]), collapse(curves, **options)))
    return rows


def distances(data: CollapseData) -> list[DistanceRow]:
    """How far SGD is from the diffusion on the clock, for each function and pair of rates."""
    rows = []
    for function in FUNCTIONS:
        _, curves = curves_on((*data.runs, data.diffusion), function, "clock")
        for run, paths in zip(data.runs, curves, strict=False):
            assert run.lr is not None
            assert run.weight_decay is not None
            result = distance(paths, curves[-1])
            rows.append(DistanceRow(function, run.lr, run.weight_decay, run.largest_step, result))
    return rows


def flat(rows: Sequence[Row | DistanceRow]) -> list[dict[str, Any]]:
    """Rows for a table, with the fields of their results."""
    return [
        {name: v for name, v in vars(row).items() if name != "result"} | vars(row.result)
        for row in rows
    ]


def verdicts(data: CollapseData, rows: Sequence[Row], apart: Sequence[DistanceRow]) -> list[str]:
    """What was found, in words and numbers; of the numbers alone, not of the theory."""
    sentences = [_verdict(function, rows) for function in FUNCTIONS]
    sentences.append(_against_diffusion(apart))
    sentences.append(_accuracy(data))
    return [sentence for sentence in sentences if sentence]


def _verdict(function: str, rows: Sequence[Row]) -> str:
    found = {row.axis: row.result for row in rows if row.function == function}
    usable = {a: r for a, r in found.items() if not math.isnan(r.unexplained)}
    if not usable:
        return f"{FUNCTIONS[function]}: does not move beyond its noise."
    best = min(usable, key=lambda axis: usable[axis].unexplained)
    rivals = [
        axis
        for axis in usable
        if axis != best
        and usable[axis].unexplained - usable[best].unexplained
        < _SEEN * math.hypot(usable[axis].standard_error, usable[best].standard_error)
    ]
    text = f"{FUNCTIONS[function]}: "
    if rivals:
        names = ", ".join(AXIS_NAMES[axis] for axis in (best, *rivals))
        text += f"too noisy to tell {names} apart by {_SEEN:g} standard errors; best is "
    else:
        text += "collapses best on "
    p = usable[best].p_value
    left = "no more than chance makes" if p > FALSE_ALARM else "more than chance makes"
    unexplained = f"{in_per_cent(usable[best])} % unexplained"
    return f"{text}{AXIS_NAMES[best]}, {unexplained}, {left} (p = {p:.2g})."


def in_per_cent(result: Collapse) -> str:
    """What is unexplained with its standard error, with the digits that the error allows.

    Example:
        >>> in_per_cent(Collapse(0.2543, 0.0031, 0.5, 1.0, 4.0))
        '25.4 ± 0.3'
    """
    error = 100.0 * result.standard_error
    digits = 1 if not 0.0 < error < 0.1 else min(3, math.ceil(-math.log10(error)))
    value = 100.0 * result.unexplained
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _against_diffusion(apart: Sequence[DistanceRow]) -> str:
    usable = [row for row in apart if math.isfinite(row.result.z)]
    if not usable:
        return ""
    limit = _critical(len(usable))
    beyond = [row for row in usable if abs(row.result.z) > limit]
    worst = max(usable, key=lambda row: abs(row.result.z))
    text = (
        f"SGD against the diffusion, {len(usable)} comparisons of means over u: root mean square "
        f"{float(np.sqrt(np.mean([row.result.z**2 for row in usable]))):.1f} standard errors "
        f"(1 is chance), at most {abs(worst.result.z):.1f} ({FUNCTIONS[worst.function]}, "
        f"η = {worst.lr:g}, λ = {worst.weight_decay:g})"
    )
    if beyond:
        return f"{text}; {len(beyond)} beyond {limit:.1f}, which is more than chance makes."
    return f"{text}; none beyond {limit:.1f}, so no difference was found."


def _critical(comparisons: int) -> float:
    """Standard errors that none of so many comparisons exceeds by chance."""
    return float(-ndtri(FALSE_ALARM / (2 * comparisons)))


def _accuracy(data: CollapseData) -> str:
    errors: dict[str, float] = {}
    for run in data.runs:
        for name, value in run.limit_errors.items():
            errors[name] = max(errors.get(name, 0.0), value)
    stability = max(run.stability for run in data.runs)
    away = max(float(run.distances.mean(1).max()) for run in data.runs)
    text = (
        f"η/|x|² times the largest eigenvalue of H reaches {stability:.2g} (2 is unstable), and "
        f"SGD is {away:.1%} of its norm away from Γ"
    )
    if errors:
        shown = ", ".join(f"{FUNCTIONS[name]} {value:.2g}" for name, value in errors.items())
        text += f"; largest error of the points on Γ against Φ at the runs checked: {shown}"
    moved = sum(run.by_limit_map for run in data.runs)
    if moved:
        text += f"; {moved} points needed the limit map"
    if data.diffusion.lost:
        text += f"; {data.diffusion.lost} paths of the diffusion were lost and are left out"
    return text + "."


def collapse_table(rows: Sequence[Row]) -> Table:
    """The measure as a table of 80 columns."""
    table = plain_table(
        "Unexplained: per cent of the curves' variation that is between the curves",
        "0 is a collapse onto one curve; what chance adds is subtracted",
        "± standard error by bootstrap over paths",
        "smallest share: of the norm of the weights, that one of the layers has",
        "chance: p-value that all runs have one law on the axis u",
    )
    table.add_column("test function", no_wrap=True)
    for name in (*AXIS_NAMES.values(), "chance"):
        table.add_column(name, justify="right", no_wrap=True)
    for function, words in FUNCTIONS.items():
        found = {row.axis: row.result for row in rows if row.function == function}
        cells = []
        for axis in AXES:
            lost = math.isnan(found[axis].unexplained)
            cells.append("no signal" if lost else in_per_cent(found[axis]).replace(" ", ""))
        p = found["clock"].p_value
        shown = "-" if math.isnan(p) else f"{p:.2g}"
        table.add_row(words.removesuffix(" of a layer's norm"), *cells, shown)
    return table
