"""The test functions on four axes, drawn."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from manifold_sde.drawing import COLORS, axes_of, legend_below, new_figure, plot_band
from manifold_sde.errors import ArgumentError
from manifold_sde.experiments.collapse.comparison import Row, in_per_cent, measure
from manifold_sde.experiments.collapse.network import FUNCTIONS
from manifold_sde.experiments.collapse.simulation import AXES, CollapseData, Ensemble

_LABELS = {
    "steps": "steps $k$",
    "lr_steps": r"$\eta k$",
    "lr_decay_steps": r"$\eta\lambda k$",
    "clock": r"intrinsic clock $u$",
}
_FUNCTION_LABELS = {
    "cosine": "cosine with the start",
    "accuracy": "test accuracy",
    "log_pdet": r"$\log\,\mathrm{pdet}\,H$",
    "trace": r"$\mathrm{tr}\,H$",
    "smallest_group": "smallest share\nof a layer's norm",
}
_BAND = 2.0


def plot_curves(
    data: CollapseData,
    function: str,
    axis: str,
    ax: Axes | None = None,
    *,
    row: Row | None = None,
    **kwargs: Any,
) -> Axes:
    """Plot mean curves of a test function on an axis, and the diffusion's if it is the clock.

    Bands are two standard errors wide on either side. A row of the measure is written into the
    panel, and the end of its common range is marked.

    Raises:
        ArgumentError: If there is no such function or axis.
    """
    if function not in FUNCTIONS or axis not in AXES:
        raise ArgumentError(
            "there is no such panel",
            received=f"{function!r} on {axis!r}",
            expected=f"one of {', '.join(FUNCTIONS)} on one of {', '.join(AXES)}",
            remedy='plot_curves(data, "trace", "clock")',
        )
    ax = axes_of(ax, (4.0, 3.0))
    for index, run in enumerate(data.runs):
        _draw(run, function, axis, ax, {"color": COLORS[index % len(COLORS)], **kwargs})
    if axis == "clock":
        style = {"color": "black", "linestyle": "--", "linewidth": 1.3, "zorder": 5}
        _draw(data.diffusion, function, axis, ax, {**style, **kwargs}, alpha=0.10)
    ax.set(xlim=(0.0, None), xlabel=_LABELS[axis], ylabel=_FUNCTION_LABELS[function])
    if row is not None:
        _annotate(ax, row)
    return ax


def _draw(
    run: Ensemble, function: str, axis: str, ax: Axes, style: dict[str, Any], alpha: float = 0.18
) -> None:
    positions = run.positions(axis)
    where = positions.mean(1) if positions.ndim == 2 else positions
    values = run.values[function]
    mean = values.mean(1)
    error = _BAND * values.std(1, ddof=1) / np.sqrt(values.shape[1])
    plot_band(ax, where, mean, error, {"linewidth": 1.3, **style}, alpha)


def _annotate(ax: Axes, row: Row) -> None:
    """The measure above the panel, and where the range that it looks at ends."""
    result = row.result
    text = "no signal" if np.isnan(result.unexplained) else f"{in_per_cent(result)} % unexplained"
    ax.set_title(text, fontsize="small")
    if row.end < 0.97 * ax.get_xlim()[1]:
        ax.axvline(row.end, color="0.7", linewidth=0.8, linestyle=":", zorder=0)


def plot_collapse(data: CollapseData, rows: list[Row] | None = None, **kwargs: Any) -> Figure:
    """The whole figure: a row for each test function, a column for each axis.

    ``rows`` is the measure, if it is known already.
    """
    rows = measure(data) if rows is None else rows
    found = {(row.function, row.axis): row for row in rows}
    canvas = new_figure((11.0, 11.5), kwargs)
    grid = canvas.subplots(len(FUNCTIONS), len(AXES), sharey="row", sharex="col", squeeze=False)
    panels = list(zip(itertools.product(FUNCTIONS, AXES), grid.flat, strict=True))
    for (function, axis), ax in panels:
        plot_curves(data, function, axis, ax)
        ax.label_outer()
    for panel, ax in panels:
        _annotate(ax, found[panel])
    settings = data.settings
    canvas.suptitle(
        f"SGD on a network ({'-'.join(map(str, settings.widths))}, D = {data.dim}) and "
        f"{settings.n_samples} digits: means over {settings.paths} runs, bands of 2 standard errors"
    )
    handles = []
    for run, color in zip(data.runs, itertools.cycle(COLORS), strict=False):
        label = rf"SGD, $\eta={run.lr:g}$, $\lambda={run.weight_decay:g}$"
        handles.append(Line2D([], [], color=color, label=label))
    label = "diffusion, in its clock $u$"
    handles.append(Line2D([], [], color="black", linestyle="--", label=label))
    legend_below(canvas, handles, min(3, len(handles)))
    return canvas
