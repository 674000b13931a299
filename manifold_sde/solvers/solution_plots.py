"""What a solution draws of itself: expectations, norms, directions and densities.

Each picture is drawn in ``ax``, by default in new axes, which it returns. Bands are two standard
errors; curves differ in dashes and marks as well as in colours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle
from torch import Tensor

from manifold_sde.arguments import real
from manifold_sde.drawing import BLUE, GREY, STYLES, axes_of, plot_band
from manifold_sde.errors import ArgumentError, ShapeError
from manifold_sde.number_arrays import Array
from manifold_sde.solvers.exports import Shown
from manifold_sde.solvers.moments import Observable, evaluate

_SIZE = (5.4, 3.6)
_SQUARE = (4.4, 4.4)
#: Standard errors of a band, and what it is called.
_ERRORS, _BAND = 2.0, "± 2 standard errors"
_ALPHA = 0.25
#: Quantiles of the paths that are shown beside a mean norm.
_QUANTILES = (0.05, 0.95)
#: Part of the directions' spread outside a circle or a sphere, below which they lie on it.
_OUTSIDE = 1e-4
#: Directions that are drawn at most, and paths that a density needs.
_MOST, _FEWEST = 1500, 50
#: How a sphere is turned, and the circles drawn on it, in radians.
_TILT, _LATITUDES, _LONGITUDES = 0.5, (-1.0, -0.5, 0.0, 0.5, 1.0), (0.0, 0.63, 1.26, 1.88, 2.51)
#: Times whose densities are drawn together.
_TIMES = 3


class Drawn(Shown, Protocol):
    """What is drawn of a solution, of which states may be missing or lost."""

    @property
    def norms(self) -> Tensor: ...  # noqa: D102
    @property
    def directions(self) -> Tensor: ...  # noqa: D102
    def expectation(self, function: Observable) -> tuple[Tensor, Tensor]: ...  # noqa: D102


def time_label(config: Any) -> str:
    """What the times of a solution are, in the paper's symbols, from how it was made."""
    sde, ratio = str(config.get("sde", "")), config.get("ratio")
    if "lr" in config or sde.startswith("WeightDecaySDE"):
        return "steps $k$"
    if sde.startswith("DirectionDiffusion") and ratio is None:
        return "intrinsic clock $u$"
    if sde.startswith("GroupDirectionDiffusion") and ratio is None:
        return "clock $s$ of the groups"
    if sde.startswith("LimitingDiffusion") or ratio == 0.5:
        return "time $T$"
    return "time" if ratio is None else r"time $t = \eta^2 k$"


def _symbol(solution: Drawn) -> str:
    """The symbol of the time, such as $k$."""
    words = time_label(solution.config)
    return f"${words.split('$')[1].partition(' ')[0]}$" if "$" in words else words


def _several(solution: Drawn) -> bool:
    return solution.ys.dim() == 3 and solution.ys.shape[1] > 1


def _numbers(values: Tensor) -> Array:
    return values.detach().cpu().to(torch.float64).numpy()


def plot_mean(
    solution: Drawn, function: Observable | str, ax: Axes | None = None, **kwargs: Any
) -> Axes:
    """Mean of a function, or of an observable by its name, with a band of two standard errors."""
    times = _numbers(solution.ts)
    if isinstance(function, str):
        if function not in solution.observed:
            raise ArgumentError(
                "the solution has no observable of this name",
                received=repr(function),
                expected=", ".join(map(repr, solution.observed)) or "a function of the states",
                remedy="solution.plot(lambda y: y[:, 0]), or solve with observables={name: ...}",
            )
        name, (mean, error) = function, solution.observed[function]
    else:
        name = getattr(function, "__name__", "f").replace("<lambda>", "f")
        if _several(solution):
            mean, error = solution.expectation(function)
        else:
            one = solution.ys.reshape(len(times), -1, solution.ys.shape[-1])
            mean = torch.stack([evaluate("the function", function, x)[0][0] for x in one])
            error = torch.zeros_like(mean)
    ax = axes_of(ax, _SIZE)
    parts = _numbers(mean).reshape(len(times), -1).T, _numbers(error).reshape(len(times), -1).T
    several = bool((parts[1] > 0).any())
    for number, (middle, width) in enumerate(zip(*parts, strict=True)):
        label = f"component {number + 1}" if len(parts[0]) > 1 else "mean" if several else None
        style = {**STYLES[number % len(STYLES)], "markersize": 4, "label": label, **kwargs}
        plot_band(ax, times, middle, _ERRORS * width, style, _ALPHA)
    if several:
        color = GREY if len(parts[0]) > 1 else ax.lines[-1].get_color()
        ax.fill([], [], color=color, alpha=_ALPHA, linewidth=0, label=_BAND)
    ax.set(xlabel=time_label(solution.config), ylabel=f"mean of {name}" if several else name)
    if len(parts[0]) > 1 or several:
        ax.legend(frameon=False)
    return ax


def plot_norm(solution: Drawn, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Mean norm with a band of two standard errors, and the range of nine paths in ten."""
    ax = axes_of(ax, _SIZE)
    if _several(solution):
        norms, times = _numbers(solution.norms), _numbers(solution.ts)
        label: str | None = f"{100 * (_QUANTILES[1] - _QUANTILES[0]):.0f} % of the paths"
        for ends in np.nanquantile(norms, _QUANTILES, axis=1):
            ax.plot(times, ends, color=GREY, linestyle=":", linewidth=1.2, label=label)
            label = None
    plot_mean(solution, _norm, ax, **kwargs)
    ax.set_ylabel(r"norm $\|Y\|$" if "lr" not in solution.config else r"norm $\|x_k\|$")
    return ax


def _norm(states: Tensor) -> Tensor:
    return states.norm(dim=-1)


# Directions.


@dataclass(frozen=True)
class Slice:
    """The circle or sphere on which directions lie, or the plane in which they spread most.

    Attributes:
        kind: "circle", "sphere" or "plane".
        center: Center (D,).
        axes: Orthonormal directions: two of a circle or plane, three of a sphere, (d, D).
        radius: Radius of circle or sphere.
        shares: Part of the spread along each of the directions, (d,).
    """

    kind: str
    center: Array
    axes: Array
    radius: float
    shares: Array

    @classmethod
    def of(cls, directions: Array) -> Slice:
        """Where directions (n, D) lie.

        Unit vectors of an affine plane are a circle, and those of an affine space of dimension
        three a sphere.
        """
        dim = directions.shape[1]
        mean = directions.mean(0)
        size, rows = np.linalg.svd(directions - mean, full_matrices=False)[1:]
        shares = np.square(size) / max(float(np.square(size).sum()), 1e-300)
        for kind, d in (("circle", 2), ("sphere", 3)):
            enough = len(directions) > d + 1 and (dim == d or size[d - 1] > 1e-9)
            if dim >= d <= len(rows) and enough and shares[d:].sum() < _OUTSIDE:
                axes = rows[:d]
                center = mean - axes.T @ (axes @ mean)
                radius = math.sqrt(max(1.0 - float(center @ center), 0.0))
                return cls(kind, center, axes, radius, shares[:d])
        axes = np.linalg.qr(np.concatenate([rows[:2], np.eye(dim)]).T)[0].T[:2]
        return cls("plane", mean, axes, 1.0, np.pad(shares, (0, 2))[:2])

    def coordinates(self, directions: Array) -> Array:
        """Coordinates (..., d) of directions (..., D)."""
        return (directions - self.center) @ self.axes.T

    def seen_from(self, view: Array) -> Slice:
        """A sphere whose third direction is that of a point in its coordinates, (3,)."""
        third = view / max(float(np.linalg.norm(view)), 1e-300)
        turned = np.linalg.qr(np.concatenate([third[:, None], np.eye(3)], 1))[0].T
        turned = turned * np.sign(turned[0] @ third)
        axes = turned[[1, 2, 0]] @ self.axes
        return Slice(self.kind, self.center, axes, self.radius, self.shares)


def _directions(solution: Drawn) -> Array:
    """Directions (K, n, D) of the paths that are not lost.

    Raises:
        ArgumentError: If none is left.
    """
    found = _numbers(solution.directions)
    found = found.reshape(len(found), -1, found.shape[-1])
    kept = found[:, np.isfinite(found).all((0, 2))]
    if not kept.shape[1]:
        raise ArgumentError(
            "there are no directions to draw",
            received=f"{found.shape[1]} paths, all of them lost",
            expected="a path that is not lost",
            remedy="a smaller step",
        )
    return kept


def _number_of(solution: Drawn, time: object) -> int:
    """The number of the kept time that is next to one; the last for ``None``.

    Raises:
        ArgumentError: If it is no number.
    """
    if time is None:
        return len(solution.ts) - 1
    moment = real(time)
    if math.isnan(moment):
        raise ArgumentError(
            "time is not a time of the solution",
            received=repr(time),
            expected=f"a number; the times are from {solution.ts[0]:g} to {solution.ts[-1]:g}",
            remedy="leave it out for the last",
        )
    return int((solution.ts.to(torch.float64) - moment).abs().argmin())


def plot_directions(
    solution: Drawn, time: float | None = None, ax: Axes | None = None, **kwargs: Any
) -> Axes:
    """Directions at a kept time, the last by default: on their circle, sphere or main plane."""
    number = _number_of(solution, time)
    directions = _directions(solution)
    alone = directions.shape[1] == 1  # one path is drawn as far as it has come
    start = directions[0]
    now = directions[: number + 1, 0] if alone else directions[number][:_MOST]
    where = Slice.of(directions.reshape(-1, directions.shape[-1]))
    ax = axes_of(ax, _SQUARE)
    ax.set_aspect("equal", adjustable="datalim")
    if where.kind == "sphere":
        where = where.seen_from(where.coordinates(directions[number]).mean(0))
        ax.set_axis_off()
        _draw_sphere(ax, where.radius)
    elif where.kind == "circle":
        ax.set_axis_off()
        ax.add_patch(Circle((0, 0), where.radius, fill=False, edgecolor=GREY))
    else:
        # One plane for all pictures of a solution, whatever the time.
        first, second = (f"{100 * share:.0f} % of all times' spread" for share in where.shares)
        ax.set_xlabel(f"first principal direction ({first})")
        ax.set_ylabel(f"second principal direction ({second})")
    label = f"directions at {_symbol(solution)} = {solution.ts[number]:g}"
    style = {"color": BLUE, "markersize": 4, "alpha": max(0.2, len(now) ** -0.2), **kwargs}
    points = where.coordinates(now)
    front = points[:, 2] >= 0 if where.kind == "sphere" else np.ones(len(points), dtype=bool)
    if alone:
        ax.plot(points[:, 0], points[:, 1], color=BLUE, linewidth=0.8, alpha=0.5)
    elif where.kind == "circle":
        _draw_ring(ax, where, points)
    ax.plot(points[front, 0], points[front, 1], "o", label=label, **style)
    if not front.all():
        behind = {**style, "markersize": 2.5, "color": GREY, "label": "behind"}
        ax.plot(points[~front, 0], points[~front, 1], "x", **behind)
    starts = start[:1] if np.ptp(start, axis=0).max() < 1e-12 else start[:_MOST]
    began = where.coordinates(starts)
    ax.plot(began[:, 0], began[:, 1], "*", color="black", markersize=11, label="start")
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)
    return ax


def _draw_sphere(ax: Axes, radius: float) -> None:
    """The outline of a sphere with some of its circles."""
    ax.add_patch(Circle((0, 0), radius, fill=False, edgecolor=GREY))
    # The circles of a globe whose pole is turned towards the eye; what is behind is left out.
    pole = np.array([0.0, math.cos(_TILT), math.sin(_TILT)])
    east, north = np.array([1.0, 0.0, 0.0]), np.array([0.0, -math.sin(_TILT), math.cos(_TILT)])
    angles = np.linspace(0.0, 2.0 * math.pi, 181)[:, None]
    around = np.cos(angles) * east + np.sin(angles) * north
    circles = [math.sin(h) * pole + math.cos(h) * around for h in _LATITUDES]
    for longitude in _LONGITUDES:
        side = math.cos(longitude) * east + math.sin(longitude) * north
        circles.append(np.cos(angles) * side + np.sin(angles) * pole)
    for circle in circles:
        seen = np.where(circle[:, 2:] >= 0.0, circle, np.nan)
        ax.plot(radius * seen[:, 0], radius * seen[:, 1], color=GREY, linewidth=0.5, alpha=0.6)


def _boxes(n: int) -> int:
    """Boxes of a histogram of n values: Rice's rule, between 8 and 40."""
    return min(40, max(8, round(2.0 * n ** (1.0 / 3.0))))


def _draw_ring(ax: Axes, where: Slice, points: Array) -> None:
    """The density of angles around a circle, outside of it."""
    edges = np.linspace(-math.pi, math.pi, 2 * _boxes(len(points)))
    counts = np.histogram(np.arctan2(points[:, 1], points[:, 0]), edges)[0]
    fine = np.repeat(edges, 8)[4:-4]
    heights = np.interp(
        fine, 0.5 * (edges[1:] + edges[:-1]), counts / counts.max(), period=2 * math.pi
    )
    outer = where.radius * (1.06 + 0.35 * heights)
    ax.fill(
        np.concatenate([outer * np.cos(fine), 1.06 * where.radius * np.cos(fine[::-1])]),
        np.concatenate([outer * np.sin(fine), 1.06 * where.radius * np.sin(fine[::-1])]),
        color=BLUE,
        alpha=_ALPHA,
        linewidth=0,
        label="density",
    )


# Densities.


def plot_density(
    solution: Drawn,
    function: Observable | None = None,
    times: Sequence[float] | None = None,
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Density over the paths of a function of the states, or of the direction's angle."""
    directions = _directions(solution)
    if directions.shape[1] < _FEWEST:
        raise ShapeError(
            "there are too few paths for a density",
            received=f"{directions.shape[1]} paths",
            expected=f"at least {_FEWEST}",
            remedy="n_paths=1000",
        )
    numbers = (
        sorted({round(k) for k in np.linspace(0, len(solution.ts) - 1, _TIMES + 1)} - {0})
        if times is None
        else [_number_of(solution, time) for time in times]
    )
    numbers = numbers or [0]
    values, label = _values_for_density(solution, function, directions, numbers)
    ax = axes_of(ax, _SIZE)
    for k, (number, row) in enumerate(zip(numbers, values, strict=True)):
        # Boxes of its own, as the law may be much narrower at first.
        box = max(float(np.ptp(row)), 1e-12) / _boxes(len(row))
        edges = row.min() + box * np.arange(_boxes(len(row)) + 1)
        edges[-1] = np.nextafter(max(edges[-1], row.max()), np.inf)
        share = np.histogram(row, edges)[0] / len(row)
        error = np.sqrt(share * (1.0 - share) / len(row))
        style = {**STYLES[k % len(STYLES)], "markersize": 3, **kwargs}
        style["label"] = f"{_symbol(solution)} = {solution.ts[number]:g}"
        middle = 0.5 * (edges[1:] + edges[:-1])
        plot_band(ax, middle, share / box, _ERRORS * error / box, style, _ALPHA)
    ax.fill([], [], color=GREY, alpha=_ALPHA, linewidth=0, label=_BAND)
    ax.set(xlabel=label, ylabel="density")
    ax.set_ylim(bottom=0.0)
    ax.legend(frameon=False)
    return ax


def _values_for_density(
    solution: Drawn, function: Observable | None, directions: Array, numbers: Sequence[int]
) -> tuple[list[Array], str]:
    """Values (n,) at some times, and what they are called."""
    if function is not None:
        found = [evaluate("the function", function, solution.ys[k]) for k in numbers]
        if any(rows.dim() != 1 for rows, _ in found):
            raise ShapeError(
                "a density is that of one number",
                received=f"a function with values of shape {tuple(found[0][0].shape[1:])}",
                expected="one number for each state",
                remedy="solution.plot_density(lambda y: y[:, 0])",
            )
        values = [_numbers(rows[valid]) for rows, valid in found]
        label = getattr(function, "__name__", "f").replace("<lambda>", "f")
    else:
        where = Slice.of(directions.reshape(-1, directions.shape[-1]))
        points = where.coordinates(directions)
        if where.kind == "circle":
            start = np.arctan2(points[0, 0, 1], points[0, 0, 0])
            angles = np.arctan2(points[..., 1], points[..., 0]) - start
            angles = np.angle(np.exp(1j * angles))
            return [angles[k] for k in numbers], "angle from the start"
        values = [points[k, :, 0] for k in numbers]
        label = f"first principal direction ({100 * where.shares[0]:.0f} % of the spread)"
    return values, label
