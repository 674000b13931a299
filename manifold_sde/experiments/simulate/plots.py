"""The predicted law drawn: norm and spread of the direction, with SGD beside them.

Both panels draw the rows of the law, and those of SGD if there are any, in ``ax``, by default in
new axes, and return it; keyword arguments go to ``plot``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from manifold_sde.drawing import BLUE, VERMILION, axes_of, new_figure
from manifold_sde.experiments.simulate.summary import QUANTILES, Row

_LAW, _SGD = BLUE, VERMILION
_BARS: dict[str, Any] = {"fmt": "-o", "markersize": 3.5, "capsize": 3, "linewidth": 1.2}


def plot_norm(
    law: Sequence[Row], sgd: Sequence[Row] = (), ax: Axes | None = None, **kwargs: Any
) -> Axes:
    """Mean and quantiles of the norm."""
    ax = axes_of(ax, (5.0, 3.6))
    x = [row.moment for row in law]
    low, high = zip(*(row.quantiles for row in law), strict=True)
    several = law[-1].paths > 1
    if several:
        label = f"{100 * (QUANTILES[1] - QUANTILES[0]):.0f} % of the paths"
        ax.fill_between(x, low, high, color=_LAW, alpha=0.2, linewidth=0, label=label)
    options = {**_BARS, "color": _LAW, "label": "mean, predicted" if several else "predicted"}
    errors = [row.norm[1] for row in law] if several else None
    ax.errorbar(x, [row.norm[0] for row in law], errors, **{**options, **kwargs})
    if sgd:
        at = [row.moment for row in sgd]
        mean = np.array([row.norm[0] for row in sgd])
        ends = np.array([row.quantiles for row in sgd]).T
        # A mean can lie outside the quantiles by rounding where all norms are equal.
        sizes = np.maximum(0.0, [mean - ends[0], ends[1] - mean])
        style: dict[str, Any] = {"fmt": "s", "markersize": 4, "capsize": 3, "linewidth": 1}
        ax.errorbar(at, mean, yerr=sizes, color=_SGD, label="SGD, likewise", **style)
    ax.set_ylabel(r"norm of the weights, $\|x\|$")
    ax.legend(frameon=False)
    return ax


def plot_spread(
    law: Sequence[Row], sgd: Sequence[Row] = (), ax: Axes | None = None, **kwargs: Any
) -> Axes:
    """Spread of the direction, 1 - |mean direction|: 0 for one point, 1 for the whole sphere.

    Bars are a standard error over the paths.
    """
    ax = axes_of(ax, (5.0, 3.6))
    options = {**_BARS, "color": _LAW, "label": "predicted, ± a standard error", **kwargs}
    _points(ax, law, options)
    if sgd:
        _points(ax, sgd, {**_BARS, "fmt": "s", "color": _SGD, "label": "SGD, likewise"})
    ax.legend(frameon=False)
    ax.set_ylim(bottom=0.0)
    ax.set_ylabel(r"spread of the direction, $1-|E\,\bar{x}|$")
    return ax


def _points(ax: Axes, rows: Sequence[Row], options: dict[str, Any]) -> None:
    x, y, error = zip(*((r.moment, r.spread, r.spread_error) for r in rows), strict=True)
    ax.errorbar(x, y, error, **options)


def plot_law(law: Sequence[Row], sgd: Sequence[Row], title: str, xlabel: str) -> Figure:
    """Norm and spread beside each other; the spread only where there are several paths.

    ``xlabel`` says what the moments are.
    """
    several = law[-1].paths > 1
    panels = 2 if several else 1
    figure = new_figure((5.0 * panels, 3.8), {})
    axes = figure.subplots(1, panels, squeeze=False)[0]
    plot_norm(law, sgd, axes[0])
    if several:
        plot_spread(law, sgd, axes[1])
    for ax in axes:
        ax.set_xlabel(xlabel)
        ax.margins(x=0.02)
    figure.suptitle(title, fontsize="medium")
    return figure
