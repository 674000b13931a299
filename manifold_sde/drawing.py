"""What figures share: colours, bands, axes and their refusal."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from manifold_sde.errors import ArgumentError

#: The colours of Okabe and Ito, which the colour-blind tell apart, in the order of first use.
VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY = COLORS = (
    *("#D55E00", "#0072B2", "#009E73"),
    *("#CC79A7", "#E69F00", "#56B4E9"),
)
GREY = "0.45"
#: Colours with dashes and marks that tell curves apart in grey, too.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "linestyle": "-", "marker": "o"},
    {"color": VERMILION, "linestyle": "--", "marker": "s"},
    {"color": GREEN, "linestyle": "-.", "marker": "^"},
    {"color": PURPLE, "linestyle": ":", "marker": "D"},
    {"color": ORANGE, "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": SKY, "linestyle": (0, (1, 3)), "marker": "P"},
)


def axes_of(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes to draw in, or new ones of a size in inches.

    Raises:
        ArgumentError: If it is something else.
    """
    if ax is None:
        return Figure(figsize=size, layout="constrained").subplots()
    if not isinstance(ax, Axes):
        raise ArgumentError(
            "ax is not what can be drawn in",
            received=type(ax).__name__,
            expected="matplotlib axes, or None for new ones",
            remedy="figure, ax = matplotlib.pyplot.subplots()",
        )
    return ax


def plot_band(
    ax: Axes, x: Any, middle: Any, half_width: Any, style: dict[str, Any], alpha: float
) -> None:
    """A curve in a style that names its color, with a band around it."""
    (line,) = ax.plot(x, middle, **style)
    ends = middle - half_width, middle + half_width
    ax.fill_between(x, *ends, color=line.get_color(), alpha=alpha, linewidth=0)


def new_figure(size: tuple[float, float], options: dict[str, Any]) -> Figure:
    """A figure of a size in inches, with options of ``matplotlib.figure.Figure``."""
    return Figure(**{"figsize": size, "layout": "constrained", **options})


def legend_below(canvas: Figure, handles: list[Line2D], columns: int) -> None:
    """Add a legend without a frame below all axes of a figure."""
    canvas.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
