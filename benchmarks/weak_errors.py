r"""Biases of schemes in E cos(angle) at T = 1, by quadrature and without sampling.

On a circle of minimisers a step of a scheme that stays on the manifold takes a function of the
angle and the norm to its expectation after the step. Functions are held by their values at
equally spaced angles times Chebyshev points of the norm; the random numbers that act are
integrated by Gauss-Hermite rules; the matrix of one step, applied once a step, gives the
expectation at the end. The noise of (18) acts in the plane of the circle alone: there the Hessian
has its kernel, at the points of the manifold and near it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.interpolate import BarycentricInterpolator
from torch import Tensor

from manifold_sde import DirectionDiffusion, LimitingDiffusion, Problem
from manifold_sde.noise import SphericalNoise
from manifold_sde.problem import LeastSquaresProblem
from manifold_sde.problems.facts import Circle
from manifold_sde.solvers.schemes import SCHEMES, StepNoise
from manifold_sde.verification.exact import CircleDiffusion
from manifold_sde.verification.exact.spectral import (
    fourier_cardinals,
    fourier_nodes,
)

Array = np.ndarray
#: A step (x, dw, extra, h) of points (D, n), increments and further normals (m, n).
Step = Callable[[Tensor, Tensor, Tensor, float], Tensor]

#: The time T of (13) at which laws are compared; |Y(0)| is 1.
TIME = 1.0
#: The norms that are held, relative to the extremes that the exact path takes.
_NORMS_BELOW, _NORMS_ABOVE = 0.8, 1.5
_NORM_NODES = 17
#: Points that go through a scheme at once.
_AT_ONCE = 16384


@dataclass(frozen=True)
class Setting:
    """A problem with a circle and the noise (18), and its exact law.

    Attributes:
        name: Name of the problem.
        problem: The problem; paths start at the angle 0 with norm 1.
        nodes: Odd number of angles at which functions are held. Where the problem looks the same
            from each angle, waves go into waves of the same length, and 3 are exact.
    """

    name: str
    problem: LeastSquaresProblem
    nodes: int

    @property
    def circle(self) -> Circle:
        """The circle."""
        assert self.problem.facts is not None
        assert self.problem.facts.circle is not None
        return self.problem.facts.circle

    @property
    def scale(self) -> float:
        """The scale s of the noise."""
        assert isinstance(self.problem.noise, SphericalNoise)
        return self.problem.noise.scale

    @property
    def trace(self) -> float:
        """V, which is constant for the noise (18)."""
        return self.scale**2 * (self.problem.dim - 1)

    @property
    def clock(self) -> float:
        """The clock u at T = 1."""
        return math.log1p(self.trace * math.expm1(2.0 * TIME)) / (2.0 * self.trace)

    @cached_property
    def exact(self) -> float:
        """E cos(angle) at T = 1."""
        law = CircleDiffusion.reversible(self.problem)
        return float(law.expectation(np.cos, self.clock))

    def plain(self) -> Problem:
        """The same loss as a plain problem, which is not known to be least squares."""
        residuals = self.problem.residuals
        return Problem(
            lambda x: 0.5 * residuals(x).square().mean(),
            self.problem.dim,
            SphericalNoise(self.scale),
            rank=self.problem.rank,
            name=f"{self.name}, plain",
        )

    def cosine(self, x: Tensor) -> Tensor:
        """Cos(angle): (n, D) -> (n,)."""
        return torch.cos(self.circle.angle(x))


def our_step(problem: Problem, start: Tensor, name: str, *, clock: bool, compiled: bool) -> Step:
    """A step of one of our schemes, for the direction in the clock u or for (13) in T."""
    scheme = SCHEMES[name]
    equation = DirectionDiffusion if clock else LimitingDiffusion
    sde = equation(problem, scheme.calculus or "ito")
    sde.require_on_manifold(start)
    sde = sde.prepare(compiled=compiled)

    def step(x: Tensor, dw: Tensor, extra: Tensor, h: float) -> Tensor:
        noise = StepNoise(dw, lambda: extra)
        size = torch.tensor(h, dtype=x.dtype)
        return scheme.step(sde, x, sde.reference_basis(x), size, noise)[0]

    return step


@dataclass(frozen=True)
class Bias:
    """How wrong a scheme is.

    Attributes:
        value: Bias of E cos(angle) at T = 1 over the paths that are not lost.
        lost: Probability that a path is lost, as far as the rule sees it.
    """

    value: float
    lost: float


def bias(setting: Setting, step: Step, steps: int, *, clock: bool, flows: int, rule: int) -> Bias:
    """Bias of a scheme in E cos(angle) at T = 1.

    Args:
        setting: The problem.
        step: A step of the scheme.
        steps: Number of steps to T = 1.
        clock: Whether the scheme moves the direction in the clock u.
        flows: Normals that act in each direction of the plane: 1, or 2 where a step draws more
            than its increment.
        rule: Nodes of the rule for each normal.
    """
    h = (setting.clock if clock else TIME) / steps
    norms = np.ones(1) if clock else _norms(setting)
    matrix = one_step(setting, step, h, norms, flows, rule)
    values = np.repeat(np.cos(fourier_nodes(setting.nodes)), len(norms))
    alive = np.ones_like(values)
    for _ in range(steps):
        values, alive = matrix @ values, matrix @ alive
    at_start = [v[: len(norms)] for v in (values, alive)]
    value, share = (
        v[0] if clock else float(BarycentricInterpolator(norms, v)(1.0)) for v in at_start
    )
    return Bias(float(value / share) - setting.exact, float(1.0 - share))


def _norms(setting: Setting) -> Array:
    """Chebyshev points around the norms between the start and the equilibrium."""
    settled = setting.trace**0.25
    low, high = _NORMS_BELOW * min(1.0, settled), _NORMS_ABOVE * max(1.0, settled)
    angles = np.pi * (2 * np.arange(_NORM_NODES) + 1) / (2 * _NORM_NODES)
    return 0.5 * (low + high) - 0.5 * (high - low) * np.cos(angles)


def gauss_hermite(dim: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Tensor rule for independent standard normals: points (dim, q), weights (q,).

    Points whose weight is below rounding are left out.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    grid = np.array(list(itertools.product(points, repeat=dim))).T
    masses = np.array(list(itertools.product(weights, repeat=dim))).prod(1)
    kept = masses > 1e-15
    return torch.from_numpy(grid[:, kept].copy()), torch.from_numpy(masses[kept])


@torch.no_grad()
def one_step(setting: Setting, step: Step, h: float, norms: Array, flows: int, rule: int) -> Array:
    """Matrix of a step on values at angles times norms; a path that is lost counts as zero."""
    points, weights = gauss_hermite(2 * flows, rule)
    count, nodes = len(weights), setting.nodes
    plane = setting.circle.basis.T
    normals = plane @ points.reshape(flows, 2, count)
    angles = fourier_nodes(nodes)
    matrix = np.empty((nodes, len(norms), nodes * len(norms)))
    starts = list(itertools.product(range(nodes), range(len(norms))))
    for some in _pieces(starts, max(1, _AT_ONCE // count)):
        x = torch.stack(
            [norms[j] * setting.circle.point(torch.tensor(angles[i])) for i, j in some], dim=1
        ).repeat_interleave(count, 1)
        drawn = normals.repeat(1, 1, len(some))
        new = step(x, math.sqrt(h) * drawn[0], drawn[-1], h)
        lost = ~torch.isfinite(new).all(0)
        new = torch.where(lost, x, new)
        turned = fourier_cardinals(nodes, setting.circle.angle(new.T).numpy())
        radial = _cardinals(norms, new.norm(dim=0).numpy())
        both = turned[:, :, None] * radial[:, None, :]
        both[lost.numpy()] = 0.0
        both = both.reshape(len(some), count, -1)
        for place, (i, j) in enumerate(some):
            matrix[i, j] = weights.numpy() @ both[place]
    return matrix.reshape(nodes * len(norms), -1)


def _pieces(items: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _cardinals(nodes: Array, values: Array) -> Array:
    """Weights of the values at Chebyshev points in the interpolant at values (n,): (n, k).

    Values outside are read at the nearest end; so far out there is next to no weight.
    """
    if len(nodes) == 1:
        return np.ones((len(values), 1))
    inside = np.clip(values, nodes[0], nodes[-1])
    return np.stack(
        [BarycentricInterpolator(nodes, row)(inside) for row in np.eye(len(nodes))], axis=1
    )


def fewest_steps(bias_of: Callable[[int], float], largest: float, most: int = 4096) -> int:
    """The smallest number of steps from which on the bias stays at most this large.

    Twice and four times as many must do so too: a bias that passes through zero does not count.

    Args:
        bias_of: Bias for a number of steps; NaN counts as too large.
        largest: The largest bias allowed.
        most: Where the search ends.

    Raises:
        AssertionError: If that many steps are not enough.
    """

    def enough(steps: int) -> bool:
        return all(abs(bias_of(k * steps)) <= largest for k in (1, 2, 4))

    high = 1
    while not enough(high):
        high *= 2
        if high > most:
            raise AssertionError(f"{most} steps do not bring the bias down to {largest:g}")
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
