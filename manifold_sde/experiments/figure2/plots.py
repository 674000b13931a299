"""Figure 2 drawn: the boxes of the paper, and the laws below them.

Every ``plot_*`` draws in ``ax``, by default in new axes, and returns it; keyword arguments go to
the function of matplotlib that draws what is named first.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from manifold_sde.drawing import (
    COLORS,
    GREY,
    axes_of,
    legend_below,
    new_figure,
    plot_band,
)
from manifold_sde.experiments.figure2.comparison import Comparison, compare, limit_law, ratio_curve
from manifold_sde.experiments.figure2.simulation import Figure2
from manifold_sde.experiments.settings.figure2 import DESIGNS
from manifold_sde.verification.exact.wrapped_normal import wrap

_BINS = 24
_TITLES = {
    "gaussian": "Gaussian inputs (the paper's)",
    "orthogonal": "Orthogonal inputs (well conditioned)",
}


def plot_boxes(figure: Figure2, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Scatter the runs of each box of Figure 2 in the plane, at (lr times steps, log10 lr)."""
    ax = axes_of(ax, (11.0, 3.8))
    settings = figure.settings
    products = settings.column_products()
    lrs = sorted(settings.lrs, reverse=True)
    levels = [math.log10(lr) for lr in lrs]
    width = 0.92 * (products[1] - products[0])
    gap = min([a - b for a, b in itertools.pairwise(levels)], default=1.0)
    ax.set_xlim(products[0] - 0.62 * width, products[-1] + 0.62 * width)
    ax.set_ylim(levels[-1] - 0.55 * gap, levels[0] + 0.55 * gap)
    _draw_constant_times(figure, ax)
    extent = _extent(figure)
    for row, (lr, level) in enumerate(zip(lrs, levels, strict=True)):
        run = figure.run("gaussian", lr)
        for column, product in enumerate(products):
            box = ax.inset_axes(
                (product - width / 2, level - 0.47 * gap, width, 0.94 * gap), transform=ax.transData
            )
            points = run.boxes[column] if run and column < len(run.boxes) else None
            style = {"color": COLORS[row % 6], **kwargs}
            _draw_box(box, points, figure.laws["gaussian"].radius, extent, style)
        _say_what_is_left_out(ax, products, level, 0 if run is None else len(run.boxes))
    ax.set(xlabel=r"learning rate × number of steps, $\eta k$", ylabel=r"$\log_{10}\eta$")
    ax.set_yticks(levels, [f"${level:.3g}$" for level in levels])
    ax.set_title(
        rf"Runs of SGD on the plane of minimisers, {settings.runs} a box; "
        r"dashed: constant $T=\frac{1}{2}\ln(1+(e^{4\eta\lambda k}-1)\,\eta/2\lambda)$",
        pad=20,
    )
    return ax


def _draw_constant_times(figure: Figure2, ax: Axes) -> None:
    """The dashed curves of constant T, with their times above."""
    settings = figure.settings
    low, high = ax.get_ylim()
    levels = np.linspace(low, high, 200)
    labelled = -math.inf
    for T in _shown_times(settings.horizon):
        products = [10**q * float(settings.scale(10**q).tau_inverse(T)) for q in levels]
        ax.plot(products, levels, "--", color="0.6", linewidth=0.9, zorder=1)
        room = 0.03 * (ax.get_xlim()[1] - ax.get_xlim()[0])
        if labelled + room < products[-1] <= ax.get_xlim()[1]:
            labelled = products[-1]
            label = f"$T={T:g}$" if T == 0 else f"{T:.4g}"
            style: dict[str, Any] = {"ha": "center", "color": GREY, "fontsize": "small"}
            at = (products[-1], high)
            ax.annotate(label, at, xytext=(0, 2), textcoords="offset points", **style)


def _shown_times(horizon: float) -> list[float]:
    """Round times up to the horizon, one of them early, and the horizon itself."""
    power = 10.0 ** math.floor(math.log10(horizon / 9))
    step = power * min(m for m in (1, 2, 5, 10) if m * power >= horizon / 9)
    whole = [i * step for i in range(math.ceil(horizon / step)) if i * step < horizon - 0.4 * step]
    return [0.0, step / 2, *whole[1:], horizon]


def _extent(figure: Figure2) -> float:
    """Half the width of a box: a few points may stick out of it."""
    radii = [
        np.quantile(np.hypot(run.boxes[..., 0], run.boxes[..., 1]), 0.95)
        for run in figure.runs
        if run.boxes.size
    ]
    return 1.06 * max([figure.laws["gaussian"].radius, *radii])


def _draw_box(
    box: Axes, points: np.ndarray | None, radius: float, extent: float, style: dict[str, Any]
) -> None:
    box.set_aspect("equal")
    box.set(xlim=(-extent, extent), ylim=(-extent, extent), xticks=[], yticks=[])
    box.patch.set_alpha(0.0)
    for spine in box.spines.values():
        spine.set_visible(False)
    line, face = (":", "none") if points is None else ("-", "white")
    box.add_patch(Circle((0, 0), radius, facecolor=face, alpha=0.6, edgecolor="none", zorder=0.5))
    edge = {"edgecolor": GREY, "linewidth": 0.6, "linestyle": line}
    box.add_patch(Circle((0, 0), radius, fill=False, **edge))
    if points is not None:
        options = {"s": 7.0, "alpha": 0.75, "linewidths": 0.0, **style}
        box.scatter(points[:, 0], points[:, 1], zorder=2, clip_on=False, **options)


def _say_what_is_left_out(ax: Axes, products: list[float], level: float, done: int) -> None:
    if done < len(products):
        middle = (products[done] + products[-1]) / 2
        text = "not run in the quick form: --full runs it"
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": GREY, "fontsize": "small"}
        frame = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2}
        ax.text(middle, level, text, bbox=frame, zorder=10, **style)


def plot_angle_law(
    figure: Figure2, design: str, lr: float, ax: Axes | None = None, **kwargs: Any
) -> Axes:
    """Draw a histogram of SGD's angles at the last time compared, and the limit's density.

    ``design`` is "gaussian" or "orthogonal".
    """
    ax = axes_of(ax, (4.0, 3.0))
    run = figure.run(design, lr)
    T = figure.settings.law_times[-1]
    ax.set(xlabel="angle", xlim=(-math.pi, math.pi))
    ax.set_xticks([-math.pi, 0, math.pi], ["$-\\pi$", "0", "$\\pi$"])
    ax.set_title(rf"$\eta={_power(lr)}$", fontsize="medium")
    if run is None or T not in run.plan.law_times:
        ax.text(0.5, 0.5, "not run in\nthe quick form", transform=ax.transAxes, ha="center")
        ax.set_yticks([])
        return ax
    index = run.plan.law_times.index(T)
    law = limit_law(figure, run.plan, index)
    options = {"color": _color(figure, lr), "alpha": 0.45, "density": True, **kwargs}
    angles = wrap(run.angles[index])
    heights, _, _ = ax.hist(angles, bins=_BINS, range=(-math.pi, math.pi), **options)
    grid = np.linspace(-math.pi, math.pi, 401)
    ax.plot(grid, law.density(grid), color="black", linewidth=1.3)
    ax.set_ylim(0, 1.7 * max(float(law.density(law.mean)), float(np.max(heights))))
    rows = {(row.design, row.lr, row.T): row for row in compare(figure)}
    caption = _caption(rows[design, lr, T])
    ax.text(0.04, 0.96, caption, transform=ax.transAxes, va="top", fontsize="small")
    return ax


def _caption(row: Comparison) -> str:
    p = "p < 0.0001" if row.p_angle < 1e-4 else f"p = {row.p_angle:.2g}"
    ratio = f"{row.variance_ratio:.2f} ± {row.standard_error:.2f}"
    return f"unwrapped variance:\n{ratio} × limit\non the circle: {p}"


def plot_variance_ratio(
    figure: Figure2, design: str, ax: Axes | None = None, **kwargs: Any
) -> Axes:
    """Plot the variance of SGD's unwrapped angle divided by the limit's, over time.

    Bands are two standard errors wide on either side.
    """
    ax = axes_of(ax, (4.0, 3.0))
    for lr in sorted(figure.settings.lrs, reverse=True):
        run = figure.run(design, lr)
        if run is None or not run.plan.law_steps:
            continue
        times, ratios = ratio_curve(figure, run)
        value = np.array([r.value for r in ratios])
        error = np.array([r.standard_error for r in ratios])
        color = _color(figure, lr)
        style = {"color": color, "label": rf"$\eta={_power(lr)}$", **kwargs}
        plot_band(ax, times, value, 2 * error, style, alpha=0.15)
    ax.axhline(1.0, color="black", linewidth=1.3, zorder=0.5)
    ax.set(xlabel="time $T$", xlim=(0, figure.settings.law_times[-1]))
    ax.set(ylabel="SGD / limit", ylim=(0.0, None))
    return ax


def plot_figure2(figure: Figure2, **kwargs: Any) -> Figure:
    """The whole figure: boxes above, and below them the laws at both designs."""
    lrs = sorted(figure.settings.lrs, reverse=True)
    canvas = new_figure((11.0, 9.6), kwargs)
    parts: Any = canvas.subfigures(3, 1, height_ratios=[4.2, 2.6, 2.6], hspace=0.02)
    plot_boxes(figure, parts[0].subplots())
    for design, part in zip(DESIGNS, parts[1:], strict=True):
        law = figure.laws[design]
        part.suptitle(
            f"{_TITLES[design]}: circle of radius {law.radius:.2f}, "
            f"condition number of H {figure.conditions[design]:.3g}",
            fontsize="large",
        )
        axes = part.subplots(1, len(lrs) + 1, width_ratios=[1.0] * len(lrs) + [1.15])
        for lr, ax in zip(lrs, axes, strict=False):
            plot_angle_law(figure, design, lr, ax)
        top = max(ax.get_ylim()[1] for ax in axes[:-1])
        for ax in axes[:-1]:
            ax.set_ylim(0, top)
        axes[0].set_ylabel(f"density at $T={figure.settings.law_times[-1]:g}$")
        plot_variance_ratio(figure, design, axes[-1])
        axes[-1].set_title("variance of the unwrapped angle", fontsize="medium")
    style: dict[str, Any] = {"linewidth": 4, "alpha": 0.7}
    handles = [
        Line2D([], [], color=_color(figure, lr), label=rf"SGD, $\eta={_power(lr)}$", **style)
        for lr in lrs
    ]
    handles.append(Line2D([], [], color="black", label="limit of small learning rates"))
    legend_below(canvas, handles, len(handles))
    return canvas


def _power(lr: float) -> str:
    """A learning rate as 10^{-2} where it is a power of ten."""
    exponent = math.log10(lr)
    return f"10^{{{exponent:.0f}}}" if abs(exponent - round(exponent)) < 1e-9 else f"{lr:g}"


def _color(figure: Figure2, lr: float) -> str:
    return COLORS[sorted(figure.settings.lrs, reverse=True).index(lr) % len(COLORS)]
