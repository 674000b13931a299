"""Gamma_1 traced numerically where it is a closed curve, by its arc length."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from manifold_sde.arguments import check_point
from manifold_sde.errors import ArgumentError, NotOnManifoldError
from manifold_sde.number_arrays import as_float64, like
from manifold_sde.problem import Problem, require_problem
from manifold_sde.verification.exact.circle_coefficients import curvature_of
from manifold_sde.verification.exact.facts import one_point
from manifold_sde.verification.exact.spectral import Array, fourier_cardinals, fourier_nodes

#: Points by which the curve is kept.
_NODES = 513
#: Longest curve that is followed.
_LONGEST = 200.0
#: Largest relative gradient of a start, before Newton's method improves it.
_NEAR = 1e-4
_FINE = 8
#: Arc length that is searched for a return at once.
_WINDOW = 4.0


@dataclass(frozen=True, eq=False)
class TracedCurve:
    r"""A closed curve of unit vectors, with the angle 2 pi (arc length) / (whole length).

    It has the methods of ``problem.facts.circle``: a point at an angle, and the angle of a point.

    Attributes:
        points: Points (n, D) at the angles 2 pi j / n, n odd.
        length: The whole length; 2 pi for a great circle.

    Example:
        >>> from manifold_sde import problems
        >>> from manifold_sde.verification.exact import TracedCurve
        >>> problem = problems.mixed_noise_circle()
        >>> curve = TracedCurve.of(problem, problem.minimizer)
        >>> round(curve.length / (2 * math.pi), 9)
        0.8
    """

    points: Array
    length: float

    @classmethod
    def of(cls, problem: Problem, start: Tensor) -> TracedCurve:
        """Trace the curve of minimisers of unit norm through a point.

        SciPy's Dormand-Prince method of order eight follows the tangent, and Newton's method
        brings each point onto the manifold.

        Args:
            problem: A problem with dim Gamma_1 = 1.
            start: A point near the manifold (D,); its norm does not matter.

        Returns:
            The curve. Its orientation is that in which the start's tangent has its largest
            component positive.

        Raises:
            ArgumentError: If the minimisers of unit norm are not a curve, or one that does not
                close within an arc length of 200.
            DTypeError: If the problem is no problem, or the start no tensor.
            NotOnManifoldError: If the start is not near the manifold.
        """
        x = one_point(require_problem(problem), start, "start")
        y = x.detach().cpu().to(torch.float64).numpy()
        first = _onto(problem, y[None] / np.linalg.norm(y))[0]
        curvature_of(problem, first[None])
        tangent = _tangent(problem, first)
        tangent *= math.copysign(1.0, tangent[np.abs(tangent).argmax()])
        length = _period(problem, first, tangent)
        steps = length * np.arange(_NODES) / _NODES
        path = _solve(problem, first, tangent, float(steps[-1]), t_eval=steps)
        return cls(_onto(problem, path.y.T), length)

    def __call__(self, angles: Array) -> Array:
        """Return points (n, D) at angles (n,), as ``CircleDiffusion.of`` takes a curve."""
        curve: Array = fourier_cardinals(len(self.points), angles) @ self.points
        return curve / np.linalg.norm(curve, axis=1, keepdims=True)

    def point(self, angle: Tensor) -> Tensor:
        """Return the unit vectors at angles: (...) -> (..., D)."""
        angles: Any = as_float64("angle", angle)
        points: Tensor = like(self(angles.reshape(-1)).reshape(*angles.shape, -1), angle)
        return points

    def angle(self, x: Tensor) -> Tensor:
        """Return the angle in (-pi, pi] of the nearest point of the curve: (..., D) -> (...)."""
        x = check_point(x, self.points.shape[1], values=True)
        flat = x.detach().cpu().to(torch.float64).numpy().reshape(-1, x.shape[-1])
        y = flat / np.linalg.norm(flat, axis=1, keepdims=True)
        finest, points, slopes, bends = self._table
        nearest = np.array([int((points @ row).argmax()) for row in y])
        angles = finest[nearest]
        # One step of Newton's method for <y - gamma, gamma'> = 0 from a grid of 4000 points.
        away = y - points[nearest]
        slope, bend = slopes[nearest], bends[nearest]
        angles = angles + (away * slope).sum(1) / ((slope * slope).sum(1) - (away * bend).sum(1))
        turned = -((math.pi - angles) % (2.0 * math.pi) - math.pi)
        return torch.from_numpy(turned).to(x).reshape(x.shape[:-1])

    @cached_property
    def _table(self) -> tuple[Array, Array, Array, Array]:
        """A fine grid: angles (k,), points and their first two derivatives (k, D)."""
        n, fine = len(self.points), _FINE * len(self.points)
        spectrum = np.fft.rfft(self.points, axis=0)
        modes = 1j * np.arange(len(spectrum))[:, None]
        scale = fine / n
        tables = [
            scale * np.fft.irfft(modes**order * spectrum, fine, axis=0) for order in (0, 1, 2)
        ]
        return fourier_nodes(fine), tables[0], tables[1], tables[2]


def _tangent(problem: Problem, y: Array) -> Array:
    """Return the unit vector orthogonal to y among the two flattest directions of H."""
    values, vectors = np.linalg.eigh(problem.hessian(torch.from_numpy(y)).numpy())
    basis = vectors[:, np.argsort(np.abs(values))[:2]]
    across = basis - y[:, None] * (y @ basis)
    direction: Array = np.linalg.svd(across)[0][:, 0]
    return direction


def _period(problem: Problem, first: Array, tangent: Array) -> float:
    """Find the arc length at which the curve returns to its start."""

    def plane(s: float, y: Array) -> float:
        return float(tangent @ (y - first)) if s > 0 else 1.0

    plane.direction = 1.0  # type: ignore[attr-defined]
    done = 0.0
    y, along = first, tangent
    while done < _LONGEST:
        found = _solve(problem, y, along, _WINDOW, events=plane)
        for s, point in zip(found.t_events[0], found.y_events[0], strict=True):
            if done + s > 1e-3 and np.linalg.norm(point - first) < 1e-7:
                return done + float(s)
        done += _WINDOW
        y = _onto(problem, found.y[:, -1][None])[0]
        along = _aligned(problem, y, found.y[:, -1] - found.y[:, -2])
    raise ArgumentError(
        "the curve of minimisers does not close",
        received=f"no return within an arc length of {_LONGEST:g}",
        expected="a closed curve: Gamma_1 compact (Assumption 5.1)",
        remedy="a loss that can be scaled by groups of weights separately has none",
    )


def _solve(problem: Problem, y: Array, tangent: Array, end: float, **options: Any) -> Any:
    last = [tangent]

    def rate(_: float, state: Array) -> Array:
        last[0] = _aligned(problem, state / np.linalg.norm(state), last[0])
        return last[0]

    return solve_ivp(
        rate, (0.0, end), y, method="DOP853", rtol=1e-11, atol=1e-12, max_step=0.4, **options
    )


def _aligned(problem: Problem, y: Array, before: Array) -> Array:
    tangent = _tangent(problem, y)
    return tangent if tangent @ before >= 0 else -tangent


def _onto(problem: Problem, points: Array) -> Array:
    """Retract points (n, D) onto the minimisers of unit norm by Newton's method."""
    y = points / np.linalg.norm(points, axis=1, keepdims=True)
    left = np.full(len(y), np.inf)
    for _ in range(6):
        x = torch.from_numpy(y)
        values, vectors = np.linalg.eigh(problem.hessian(x).numpy())
        size = np.abs(values).max(1, keepdims=True)
        gradient = problem.gradient(x).numpy()
        left = np.linalg.norm(gradient, axis=1) / size[:, 0]
        if not left.max() <= _NEAR:
            break
        weights = np.where(values > 1e-6 * size, 1.0 / np.where(values != 0, values, 1.0), 0.0)
        step = np.einsum("nij,nj,nkj,nk->ni", vectors, weights, vectors, gradient)
        y = y - step
        y /= np.linalg.norm(y, axis=1, keepdims=True)
    if not left.max() <= 1e-10:
        raise NotOnManifoldError(
            "the curve does not start on the manifold of minimisers",
            received=f"a gradient of {left.max():.2g}, relative to the Hessian",
            expected=f"at most {_NEAR:g} at the start, and rounding after Newton's method",
            remedy="start=Geometry(problem).limit_map(x)",
        )
    return y
