"""The equilibrium for the noise of (18): a density against the volume of Gamma_1."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from manifold_sde.errors import ArgumentError
from manifold_sde.noise import SphericalNoise
from manifold_sde.paper import implements
from manifold_sde.problem import Problem
from manifold_sde.verification.exact.periodic_law import PeriodicLaw
from manifold_sde.verification.exact.spectral import fourier_derivative, fourier_nodes

Array = NDArray[np.float64]
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
        """The law of a problem with the noise of (18).

        Args:
            problem: The problem.
            chart: Gamma_1 as a map of the whole circle or sphere: angles (n,), or unit vectors
                (n, 3), to points (n, D). By default the circle that the problem knows, or the
                subspace's sphere of a problem whose Phi is known.
            dimension: Dimension 1 or 2 of Gamma_1; by default what the problem says.
            log_pseudo_determinant: log pdet H, tensors (n, D) -> (n,); by default what the
                problem knows of it, or from the eigenvalues of its Hessian.
            nodes: Odd number of nodes along the curve, or a great circle of the sphere.

        Returns:
            The law.

        Raises:
            ArgumentError: If the noise is another one, or the chart is missing or is none.
        """
        if type(problem.noise) is not SphericalNoise:
            raise ArgumentError(
                "pi is known by its density for the noise of (18)",
                received=f"{problem.noise!r}",
                expected="SphericalNoise",
                remedy="CircleDiffusion.of(problem) finds pi for every noise on a curve",
            )
        facts = problem.facts
        if dimension is None and facts is not None:
            dimension = facts.manifold_dim
        if dimension not in (1, 2) or nodes < 9 or nodes % 2 == 0:
            raise ArgumentError(
                "the density of pi is integrated over curves and surfaces",
                received=f"dimension={dimension!r}, nodes={nodes!r}",
                expected="dimension 1 or 2, and an odd number of nodes of at least 9",
                remedy="in more dimensions test the law by its generator",
            )
        chart = chart or _known_chart(problem, dimension)
        places, area = _curve(chart, nodes) if dimension == 1 else _surface(chart, nodes)
        points = np.asarray(chart(places), dtype=np.float64)
        if log_pseudo_determinant is None and facts is not None:
            log_pseudo_determinant = facts.log_pseudo_determinant
        if log_pseudo_determinant is None:
            values = _log_determinant(problem, points, dimension)
        else:
            values = log_pseudo_determinant(torch.from_numpy(points)).numpy()
        density = area * np.exp(-0.5 * (values - values.min()))
        return cls(points, density / density.sum())

    def expectation(self, f: Callable[[Array], ArrayLike]) -> float:
        """E f(direction), for a smooth function of points (n, D) with a value for each, (n,)."""
        return float(self.weights @ np.asarray(f(self.points), dtype=np.float64))

    @property
    def periodic(self) -> PeriodicLaw:
        """The law of the angle of a curve's chart; of no meaning on a surface."""
        return PeriodicLaw(self.weights)


def _curve(chart: Chart, nodes: int) -> tuple[Array, Array]:
    angles = fourier_nodes(nodes)
    velocity = fourier_derivative(nodes) @ np.asarray(chart(angles), dtype=np.float64)
    return angles, np.linalg.norm(velocity, axis=1)


def _surface(chart: Chart, nodes: int) -> tuple[Array, Array]:
    """Unit vectors (k, 3), and the area of Gamma_1 that each stands for (k,)."""
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
    facts = problem.facts
    if facts is not None and facts.circle is not None and dimension == 1:
        circle = facts.circle
        return lambda angles: np.asarray(circle.point(torch.from_numpy(angles)))
    if facts is not None and facts.limit_map is not None:
        phi = facts.limit_map
        # Phi maps the unit vectors of the tangent space of the cone at one point onto Gamma_1.
        hessian = problem.hessian(facts.minimizer).numpy()
        basis = np.linalg.eigh(hessian)[1][:, : problem.dim - facts.rank].T

        def chart(n: Array) -> Array:
            limits = phi(torch.from_numpy(n @ basis)).numpy()
            return np.asarray(limits / np.linalg.norm(limits, axis=1, keepdims=True))

        return chart
    raise ArgumentError(
        f"Gamma_1 of {problem.name!r} is not known as a whole",
        received="chart=None",
        expected="a map of the circle or the sphere onto Gamma_1",
        remedy="ReversibleLaw.of(problem, chart), with TracedCurve.of(problem, y) for a curve",
    )


def _log_determinant(problem: Problem, points: Array, dimension: int) -> Array:
    """Log pdet H from the eigenvalues of H: (n, D) -> (n,)."""
    values = np.linalg.eigvalsh(problem.hessian(torch.from_numpy(points)).numpy())
    logs: Array = np.log(values[:, dimension + 1 :]).sum(1)
    return logs
