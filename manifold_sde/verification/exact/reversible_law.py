"""The equilibrium for the noise of (18): a density against the volume of Gamma_1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from manifold_sde.arguments import integer
from manifold_sde.errors import ArgumentError
from manifold_sde.paper import implements
from manifold_sde.problem import Problem, require_problem
from manifold_sde.verification.exact.facts import chart_of, kernel_basis, known, spherical_scale
from manifold_sde.verification.exact.inputs import check_nodes, values_at
from manifold_sde.verification.exact.periodic_law import PeriodicLaw
from manifold_sde.verification.exact.spectral import Array, fourier_derivative, fourier_nodes

#: Angles (n,) -> points (n, D) of a closed curve, or unit vectors (n, 3) -> points of a surface.
Chart = Callable[[Array], Array]

#: Weights of f(k h) - f(-k h), k = 1, ..., 4, in the first difference of order eight.
_FIRST = (4 / 5, -1 / 5, 4 / 105, -1 / 280)
_STEP = 0.02


@dataclass(frozen=True, eq=False)
class ReversibleLaw:
    r"""The equilibrium pi of the direction for the noise of (18), where dim Gamma_1 is 1 or 2.

    The generator of the direction in the clock u is

    .. math::

        \tfrac{s^2}2 \Delta - \tfrac{s^2}4 \langle\nabla \log\operatorname{pdet} H, \nabla\rangle
        = \tfrac{s^2}2 \rho^{-1} \operatorname{div}(\rho \nabla\,\cdot), \qquad
        \rho = \operatorname{pdet}(H)^{-1/2},

    so that it is reversible with respect to rho times the volume of Gamma_1. The trace of the noise
    is constant, so this is the equilibrium in the clock and in time.

    Args:
        points: Nodes (n, D) on Gamma_1.
        weights: Their weights (n,), of sum 1.

    Example:
        >>> from manifold_sde import problems
        >>> law = ReversibleLaw.of(problems.varying_circle())
        >>> round(law.expectation(lambda y: y[:, 0]), 6)
        -0.267949

    Source: the drift of (13) with the noise of (18).
    """

    points: Array
    weights: Array

    @classmethod
    @implements("Remark 6.1")
    def of(
        cls,
        problem: Problem,
        chart: Chart | None = None,
        *,
        dimension: int | None = None,
        log_pseudo_determinant: Callable[[Tensor], Tensor] | None = None,
        nodes: int = 65,
    ) -> ReversibleLaw:
        """Compute the law of a problem with the noise of (18).

        Args:
            problem: The problem.
            chart: Gamma_1 as a map of the whole circle or sphere: angles (n,), or unit vectors
                (n, 3), to points (n, D). By default the circle that the problem knows, or the
                sphere of a problem whose Phi is known.
            dimension: Dimension 1 or 2 of Gamma_1; by default that of the problem's facts.
            log_pseudo_determinant: log pdet H, tensors (n, D) -> (n,); by default the
                known one, or that of the eigenvalues of the Hessian.
            nodes: Odd number of nodes along the curve, or along a great circle of the sphere.

        Returns:
            The law.

        Raises:
            ArgumentError: If the noise is another one, or the chart is missing or gives no points.
        """
        spherical_scale(require_problem(problem))
        facts = problem.facts
        if dimension is None and facts is not None:
            dimension = facts.manifold_dim
        d = integer(dimension)
        if d is None or not 1 <= d <= 2:
            raise ArgumentError(
                "the density of pi is integrated over curves and surfaces",
                received=f"dimension={dimension!r}",
                expected="dimension 1 or 2",
                remedy="in more dimensions test the law by its generator",
            )
        nodes = check_nodes("nodes", nodes)
        given = chart or _known_chart(problem, d)

        def checked(places: Array) -> Array:
            return values_at("chart", given, (len(places), problem.dim), places)

        places, area = _curve(checked, nodes) if d == 1 else _surface(checked, nodes)
        points = checked(places)
        if log_pseudo_determinant is None and facts is not None:
            log_pseudo_determinant = facts.log_pseudo_determinant
        if log_pseudo_determinant is None:
            values = _log_determinant(problem, points, d)
        else:
            y = torch.from_numpy(points)
            values = values_at("log_pseudo_determinant", log_pseudo_determinant, area.shape, y)
        density = area * np.exp(-0.5 * (values - values.min()))
        return cls(points, density / density.sum())

    def expectation(self, f: Callable[[Array], ArrayLike]) -> float:
        """Compute E f(direction) for a smooth function of points, (n, D) -> (n,)."""
        return float(self.weights @ values_at("function", f, self.weights.shape, self.points))

    @property
    def periodic(self) -> PeriodicLaw:
        """The law of the angle of a curve's chart, without meaning on a surface."""
        return PeriodicLaw(self.weights)


def _curve(chart: Chart, nodes: int) -> tuple[Array, Array]:
    angles = fourier_nodes(nodes)
    velocity = fourier_derivative(nodes) @ chart(angles)
    return angles, np.linalg.norm(velocity, axis=1)


def _surface(chart: Chart, nodes: int) -> tuple[Array, Array]:
    """Return unit vectors (k, 3), and the area of Gamma_1 that each stands for (k,)."""
    heights, weights = np.polynomial.legendre.leggauss((nodes + 1) // 2)
    longitudes = fourier_nodes(nodes)
    z = np.repeat(heights, nodes)
    around = np.tile(longitudes, len(heights))
    flat = np.sqrt(1.0 - z**2)
    n = np.stack([flat * np.cos(around), flat * np.sin(around), z], 1)
    east = np.stack([-np.sin(around), np.cos(around), 0 * z], 1)
    north = np.cross(n, east)

    def slope(direction: Array) -> Array:
        turned = [
            weight * sign * chart(math.cos(k * _STEP) * n + sign * math.sin(k * _STEP) * direction)
            for k, weight in enumerate(_FIRST, 1)
            for sign in (1.0, -1.0)
        ]
        return np.asarray(sum(turned), dtype=np.float64) / _STEP

    first, second = slope(east), slope(north)
    gram = (first**2).sum(1) * (second**2).sum(1) - (first * second).sum(1) ** 2
    return n, np.repeat(weights, nodes) * np.sqrt(np.maximum(gram, 0.0))


def _known_chart(problem: Problem, dimension: int) -> Chart:
    if dimension == 1:
        return chart_of(known(problem, "circle"))
    phi = known(problem, "limit_map")
    # Phi maps the unit vectors of the tangent space of the cone at one point onto Gamma_1.
    basis = kernel_basis(problem)

    def chart(n: Array) -> Array:
        limits = phi(torch.from_numpy(n @ basis)).numpy()
        return np.asarray(limits / np.linalg.norm(limits, axis=1, keepdims=True))

    return chart


def _log_determinant(problem: Problem, points: Array, dimension: int) -> Array:
    """Compute log pdet H from the eigenvalues of H: (n, D) -> (n,)."""
    values = np.linalg.eigvalsh(problem.hessian(torch.from_numpy(points)).numpy())
    logs: Array = np.log(values[:, dimension + 1 :]).sum(1)
    return logs
