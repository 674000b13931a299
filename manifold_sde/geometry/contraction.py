r"""Third derivatives of the loss contracted with a covariance, by products, at ONE point.

A covariance comes as pairs of vectors, Sigma = sym(sum_j a_j b_j^T): the columns of a factor, each
with itself, or those of a matrix with unit vectors. The three blocks of the second derivative of
Phi,

.. math::

    \partial^2\Phi[\Sigma] = -H^\dagger \mathcal T[P\Sigma P]
    - 2 P\, \mathcal T[\mathrm{sym}(H^\dagger N\Sigma P)]
    - P\, \mathcal T[\mathcal L^{-1}(N\Sigma N)],

are sums of third derivatives along such vectors; no more than a block of them is in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde.derivatives import unit_rows
from manifold_sde.geometry.normal_space import NormalRoute
from manifold_sde.noise import Noise

#: Vectors (b, D) and their partners (b, D).
Pairs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Contraction:
    """Script T of the blocks of a covariance, at one point.

    Attributes:
        tangent: Of P Sigma P, (D,); zero where it was not asked for.
        mixed: Of sym(H^+ N Sigma P), (D,).
        normal: Of L^-1(N Sigma N), (D,).
    """

    tangent: Tensor
    mixed: Tensor
    normal: Tensor


def contract(
    route: NormalRoute,
    y: Tensor,
    frame: tuple[Tensor, Tensor],
    pairs: Iterable[Pairs],
    *,
    tangent: bool,
) -> Contraction:
    """The three sums of third derivatives.

    Args:
        route: Multiplies by the basis of range H.
        y: Point (D,).
        frame: Its frame.
        pairs: The covariance, in blocks of pairs.
        tangent: Whether the tangent block is wanted.
    """
    values = frame[0]
    along, across = torch.zeros_like(y), torch.zeros_like(y)
    inner = y.new_zeros(len(values), len(values))

    def split(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q^T v, H^+ v and P v of rows."""
        components = vmap(lambda z: route.components(y, frame, z))(v)
        inverse = vmap(lambda c: route.combine(y, frame, c / values))(components)
        return components, inverse, vmap(lambda z: route.project(y, frame, z))(v)

    for a, b in pairs:
        left = split(a)
        right = left if b is a else split(b)
        inner = inner + left[0].T @ right[0]
        if b is a:
            across = across + route.script_t(y, left[1], left[2])
        else:
            both = torch.cat([left[1], right[1]]), torch.cat([right[2], left[2]])
            across = across + 0.5 * route.script_t(y, *both)
        if tangent:
            along = along + route.script_t(y, left[2], right[2])
    inner = 0.5 * (inner + inner.T) / (values[:, None] + values[None, :])
    normal = torch.zeros_like(y)
    for rows, basis in route.basis_rows(y, frame):
        columns = vmap(lambda c: route.combine(y, frame, c))(inner[rows])
        normal = normal + route.script_t(y, basis, columns)
    return Contraction(along, across, normal)


def factor_pairs(factor: Tensor, size: int) -> Iterator[Pairs]:
    """Columns of a factor (D, m), each with itself."""
    for block in factor.T.split(size):
        yield block, block


def covariance_pairs(covariance: Tensor, size: int) -> Iterator[Pairs]:
    """Columns of a symmetric matrix (D, D) with unit vectors."""
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    yield from zip(covariance.split(size), identity.split(size), strict=True)


def noise_pairs(route: NormalRoute, noise: Noise, y: Tensor) -> Iterator[Pairs]:
    """Columns of sigma(y), by products, each with itself."""
    for units in noise_units(route, noise, y):
        block = vmap(lambda w: noise.product(route.loss, y, w))(units)
        yield block, block


def noise_units(route: NormalRoute, noise: Noise, y: Tensor) -> Iterator[Tensor]:
    """Unit vectors of the noise (b, m), in blocks."""
    count, size = noise.n_components(route.loss), route.block(y)
    for first in range(0, count, size):
        yield unit_rows(count, first, min(first + size, count), y)
