"""Random problems whose unit minimisers are known to be connected, or known not to be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manifold_sde import LeastSquaresProblem, SphericalNoise


@dataclass(frozen=True)
class Known:
    """A problem of which the components are known.

    Attributes:
        problem: The problem.
        axis: The axis along which it is told apart; the neck is across it, at 0.
        neck: Smallest radius that the manifold has across it.
        kind: What it is, in a word.
    """

    problem: LeastSquaresProblem
    axis: Tensor
    neck: float
    kind: str

    def height(self, y: Tensor) -> Tensor:
        """The coordinate of points along the axis: (n, D) -> (n,)."""
        return y @ self.axis


def _rotation(rng: np.random.Generator, dim: int) -> Tensor:
    q, r = np.linalg.qr(rng.normal(size=(dim, dim)))
    return torch.from_numpy(q * np.sign(np.diag(r)))


def quadric(rng: np.random.Generator, level: float, slope: float, dim: int) -> Known:
    """|u'|^2 = level + slope z^2 on the unit sphere, u' in D - 2 dimensions, in a random frame.

    For a positive level it is a torus-like manifold with a neck of radius sqrt(level) at z = 0,
    for a negative one there are two spheres, at z > 0 and z < 0.
    """
    turned = _rotation(rng, dim)

    def residuals(x: Tensor) -> Tensor:
        u = turned.to(x) @ (x / x.norm())
        return (u[: dim - 2].square().sum() - level - slope * u[dim - 2] ** 2)[None]

    made = LeastSquaresProblem(residuals, dim, SphericalNoise(0.3))
    return Known(made, turned[dim - 2], abs(level) ** 0.5, "quadric")


def graph(rng: np.random.Generator, dim: int, codimension: int) -> Known:
    """Some coordinates as random quadratic functions of the others: a bent great sphere."""
    turned = _rotation(rng, dim)
    free = dim - codimension
    forms = 0.5 * torch.from_numpy(rng.normal(size=(codimension, free, free))) / free

    def residuals(x: Tensor) -> Tensor:
        u = turned.to(x) @ (x / x.norm())
        bent = torch.einsum("kij,i,j->k", forms.to(x), u[:free], u[:free])
        return u[free:] - bent

    return Known(LeastSquaresProblem(residuals, dim, SphericalNoise(0.3)), turned[0], 1.0, "graph")


def connected(seed: int) -> Known:
    """A connected one of dimension two or three."""
    rng = np.random.default_rng([seed, 0])
    if seed % 3 == 0:
        return graph(rng, int(rng.integers(4, 6)), 1)
    neck = float(rng.uniform(0.15, 0.6))
    return quadric(rng, neck**2, float(rng.uniform(0.0, 4.0)), int(rng.integers(4, 6)))


def separated(seed: int) -> Known:
    """One of two components of dimension two or three."""
    rng = np.random.default_rng([seed, 1])
    level, slope = -float(rng.uniform(0.1, 0.3)), float(rng.uniform(1.0, 3.0))
    return quadric(rng, level, slope, int(rng.integers(4, 6)))
