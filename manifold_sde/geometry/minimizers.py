"""A minimiser where the problem knows none: gradient flow from random directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manifold_sde.errors import ArgumentError, LimitMapError
from manifold_sde.geometry.dense import DENSE_LIMIT
from manifold_sde.geometry.geometry import Geometry

#: Directions from which gradient flow is followed.
_TRIES = 64


def limits(geometry: Geometry, x: Tensor) -> Tensor:
    """Phi at points (n, D), with NaN where the flow does not reach the manifold."""
    try:
        return geometry.limit_map(x)
    except LimitMapError as error:
        if error.partial is None:
            return torch.full_like(x, math.nan)
        partial: Tensor = error.partial
        return partial


def random_directions(dim: int, n: int, seed: int, use: int) -> Tensor:
    """Random unit vectors (n, D) for one use of a seed."""
    generator = torch.Generator().manual_seed((seed << 8) % 2**63 + use)
    normals = torch.randn(n, dim, dtype=torch.float64, generator=generator)
    return normals / normals.norm(dim=1, keepdim=True)


def tries(dim: int) -> int:
    """Directions from which a minimiser is looked for."""
    return _TRIES if dim <= DENSE_LIMIT else 1


def find_minimizer(geometry: Geometry, seed: int = 0) -> Tensor:
    """The minimiser that the problem knows, or the lowest that gradient flow finds, (D,).

    It is followed from unit vectors, and keeps the norm where the loss is scale-invariant.

    Raises:
        ArgumentError: If it ends on a manifold from none of 64 random directions, or not from the
            one that is tried in large dimensions.
    """
    problem = geometry.problem
    if problem.facts is not None:
        known: Tensor = problem.facts.minimizer
        return known
    number = tries(problem.dim)
    found = limits(geometry, random_directions(problem.dim, number, seed, 1))
    found = found[torch.isfinite(found).all(1)]
    if not len(found):
        raise ArgumentError(
            f"no minimiser of {problem.name!r} was found",
            received=f"gradient flow from {number} random directions, none of which ends on a "
            "manifold of minimisers",
            expected="a point that flows to the manifold",
            remedy="x_init=x, with x where your training starts or has come to",
        )
    return found[problem.loss(found).argmin()]
