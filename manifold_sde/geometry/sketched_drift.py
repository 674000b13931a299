r"""The drift by random columns of the noise: unbiased, with an error that is measured.

What the drift takes of a noise is linear in its covariance. With random signs w one has
:math:`E\,\sigma w (\sigma w)^\top = \Sigma`, and with :math:`c = Q^\top\sigma w` the solution of
the Lyapunov equation is

.. math::

    \mathcal L^{-1}(N\sigma w(\sigma w)^\top N) = E\, Qz(Qz)^\top, \qquad
    z_i = \frac{c_i}{\sqrt{\lambda_i}} (R\epsilon)_i, \quad
    (RR^\top)_{ij} = \frac{\sqrt{\lambda_i\lambda_j}}{\lambda_i + \lambda_j},

with signs :math:`\epsilon` of their own. So a column takes two third derivatives, where the exact
sum takes one for each of the M eigenvectors of H: few columns where M is large. The error makes a
step of length h vary by h^2 times its square, beside the noise's h, so that the walk keeps its weak
order 1 with any number of columns.

Source: the random signs are Hutchinson's, Communications in Statistics 19, 1990.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde.geometry.matrix_free import MatrixFreeSpace, each, eigen
from manifold_sde.geometry.normal_space import Frame, without_radial_part


def numbers(space: MatrixFreeSpace, columns: int) -> int:
    """How many random numbers so many columns take."""
    return columns * (space.noise.n_components(space.loss) + space.rank)


def increment(
    space: MatrixFreeSpace, y: Tensor, basis: Tensor, h: Tensor, w: Tensor, normals: Tensor
) -> Tensor:
    """What :func:`~manifold_sde.geometry.drift.tangent_increment` is, by random columns.

    Args:
        space: The route.
        y: Unit vectors (D, n).
        basis: Reference bases nearby (D, d, n).
        h: Steps, () or (n,).
        w: Increments (m, n).
        normals: What the columns are drawn from, :func:`numbers` of them a path, (k, n).

    Returns:
        Tensor (D, n).
    """

    def at(z: Tensor, near: Tensor, step: Tensor, v: Tensor, drawn: Tensor) -> Tensor:
        frame = space.frame(z, near)
        force = estimated_force(space, z, frame, drawn)
        move = step * force + space.kernels.noise_product(z, v)
        return without_radial_part(space.project(z, frame, move), z)

    found: Tensor = space.over_points(at, y, basis, h.expand(y.shape[1]), w, normals)
    return found


def estimated_force(space: MatrixFreeSpace, y: Tensor, frame: Frame, normals: Tensor) -> Tensor:
    """An unbiased estimate of what the tangent part of the Ito drift is the projection of.

    Args:
        space: The route.
        y: Unit vectors (D, n).
        frame: Their frame.
        normals: Standard normals, :func:`numbers` of them a point, (k, n); their signs are taken.

    Returns:
        Tensor (D, n).
    """

    def at_one(z: Tensor, own: Tensor, *f: Tensor) -> Tensor:
        return _terms_at(space, z, f, own)[0].mean(0)

    result: Tensor = each(at_one, y, normals, *frame)
    return result


def error_of_drift(
    space: MatrixFreeSpace, y: Tensor, basis: Tensor, normals: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """How far the drift of one column is from its mean, at unit vectors.

    Args:
        space: The route.
        y: Unit vectors (D, n).
        basis: Reference bases nearby (D, d, n).
        normals: As for :func:`estimated_force`, of several columns.

    Returns:
        Estimates without bias of the variance of the tangent drift by one column, of the square of
        the drift, and of tr P Sigma P, (n,) each.
    """

    def at_one(z: Tensor, own: Tensor, *f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        drifts, moves = drifts_at(space, z, f, own)
        mean = drifts.mean(0)
        variance = (drifts - mean).square().sum() / (len(drifts) - 1)
        return variance, mean @ mean - variance / len(drifts), moves.square().sum(1).mean()

    found: tuple[Tensor, Tensor, Tensor] = each(at_one, y, normals, *space.frame(y, basis))
    return found


def drifts_at(
    space: MatrixFreeSpace, y: Tensor, frame: Frame, normals: Tensor
) -> tuple[Tensor, Tensor]:
    """The tangent drift by each column, and P sigma w, rows (s, D), at ONE point."""
    forces, moves = _terms_at(space, y, frame, normals)
    drifts = vmap(lambda v: space.project_at(y, frame, v))(forces)
    return drifts - (drifts @ y)[:, None] * y, moves


def _terms_at(
    space: MatrixFreeSpace, y: Tensor, frame: Frame, normals: Tensor
) -> tuple[Tensor, Tensor]:
    """The force by each column, and P sigma w, rows (s, D), at ONE point."""
    values = frame[0]
    signs = torch.where(normals < 0.0, -1.0, 1.0).to(y).reshape(-1, numbers(space, 1))
    drawn, own = signs[:, : -len(values)], signs[:, -len(values) :]

    def combine(c: Tensor) -> Tensor:
        return vmap(lambda row: space.combine_at(y, frame, row))(c)

    moves = vmap(lambda w: space.noise.product(space.loss, y, w))(drawn)
    inside = vmap(lambda v: space.components_at(y, frame, v))(moves)
    along = vmap(lambda v: space.project_at(y, frame, v))(moves)
    normal = combine(inside * values.rsqrt() * (own @ _root(values).T))
    pairs = torch.cat([combine(inside / values), normal]), torch.cat([along, 0.5 * normal])
    thirds = vmap(lambda a, b: space.loss.third_derivative(y, a, b))(*pairs)
    return -thirds[: len(along)] - thirds[len(along) :], along


def _root(values: Tensor) -> Tensor:
    """A matrix R with R R^T = sqrt(a b) / (a + b) over pairs of values: (M,) -> (M, M)."""
    roots = values.sqrt()
    squares, vectors = eigen(torch.outer(roots, roots) / (values[:, None] + values[None, :]))
    return vectors * squares.clamp(min=0.0).sqrt()
