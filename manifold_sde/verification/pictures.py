"""The plots behind the verdicts."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from manifold_sde.arguments import kind_of
from manifold_sde.errors import DTypeError
from manifold_sde.verification.result import Picture, Series

#: Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SIZE = (5.2, 3.3)


def plot_picture(picture: Picture, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw what is behind a verdict.

    Args:
        picture: The picture, of ``result.pictures``.
        ax: Axes to draw in; by default new ones.
        **kwargs: Passed on to each of the curves.

    Returns:
        The axes.

    Raises:
        DTypeError: If it is no picture.
    """
    if not isinstance(picture, Picture):
        raise DTypeError(
            "this is not a picture",
            received=kind_of(picture),
            expected="a Picture, as results of verify hold",
            remedy="plot_picture(result.pictures[0])",
        )
    ax = ax or Figure(figsize=_SIZE, layout="constrained").subplots()
    for number, series in enumerate(picture.series):
        _draw(ax, series, {"color": _COLOURS[number % len(_COLOURS)], **kwargs})
    ax.set_title(picture.title, fontsize="medium")
    ax.set_xlabel(picture.xlabel)
    ax.set_ylabel(picture.ylabel)
    if picture.logx:
        ax.set_xscale("log")
    if picture.logy:
        ax.set_yscale("log")
    if any(series.label for series in picture.series):
        ax.legend(frameon=False, fontsize="small")
    return ax


def _draw(ax: Axes, series: Series, style: dict[str, Any]) -> None:
    style = {"label": series.label or None, **style}
    x, y = list(series.x), list(series.y)
    if series.error is not None:
        form = "o" if series.style == "points" else "-"
        ax.errorbar(x, y, yerr=list(series.error), fmt=form, markersize=4, capsize=3, **style)
    elif series.style == "points":
        ax.plot(x, y, "o", markersize=4, **style)
    elif series.style == "steps":
        ax.step(x, y, where="mid", **style)
    else:
        ax.plot(x, y, "--" if series.style == "dashed" else "-", **style)
