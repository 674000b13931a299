"""The plots behind the verdicts."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from manifold_sde.arguments import kind_of
from manifold_sde.drawing import BLUE, COLORS, GREY, ORANGE, VERMILION, axes_of
from manifold_sde.errors import DTypeError
from manifold_sde.verification.result import Picture, Result, Series

_COLOURS = (*COLORS, "#000000")
_SIZE = (5.2, 3.3)
#: Colour and mark of a verdict.
_VERDICTS = {"holds": (BLUE, "o"), "undecided": (ORANGE, "^"), "fails": (VERMILION, "X")}
#: Ends of the axis on which numbers are drawn over what they are compared with.
_ENDS = (1e-4, 1e2)


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
    ax = axes_of(ax, _SIZE)
    for number, series in enumerate(picture.series):
        _draw(ax, series, {"color": _COLOURS[number % len(_COLOURS)], **kwargs})
    ax.set_title(textwrap.fill(picture.title, 58), fontsize="medium")  # not clipped
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


def plot_results(results: Sequence[Result], ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw the number of each check over what it is compared with; beyond 1 it fails.

    Numbers outside of the axis stand at its ends; a check without a number has its mark at the
    left, hollow.

    Args:
        results: The results, from the top.
        ax: Axes to draw in; by default new ones.
        **kwargs: Passed on to each of the marks.

    Returns:
        The axes.
    """
    ax = axes_of(ax, (7.2, 1.2 + 0.22 * len(results)))
    named: set[str] = set()
    for row, result in enumerate(results):
        colour, mark = _VERDICTS[result.verdict]
        distance = result.distance
        label = None if result.verdict in named else result.verdict
        named.add(result.verdict)
        place = _ENDS[0] if math.isnan(distance) else min(max(distance, _ENDS[0]), _ENDS[1])
        style = {"color": colour, "marker": mark, "linestyle": "", "label": label, **kwargs}
        if math.isnan(distance):
            style["markerfacecolor"] = "none"
        ax.plot([place], [row], clip_on=False, zorder=3, **style)
    ax.axvline(1.0, color=GREY, linestyle="--", linewidth=1)
    ends = (_ENDS[0] / 2, _ENDS[1] * 2)  # marks at the ends stand free of the frame
    ax.set(xscale="log", xlim=ends, ylim=(len(results) - 0.5, -0.5))
    ax.set_yticks(range(len(results)), [result.name for result in results], fontsize="small")
    ax.grid(axis="y", linewidth=0.3)
    ax.set_xlabel("number of the check over its limit: beyond 1 it fails")
    if results:
        ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3)
    return ax
