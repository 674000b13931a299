r"""The rows of a Jacobian at ONE point: tangent projection and Newton steps of level sets.

Where the manifold is the level set r = 0 and J has full row rank M, the tangent space is the
kernel of J. One Gram-Schmidt elimination of its rows gives the projection on it, the shortest
displacement that removes a residual, and the dual rows, which are those of the transposed
pseudo-inverse of J. Nothing is squared: errors grow with the condition number of J, not of H.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Largest number of rows whose elimination is written out; beyond it LAPACK is as fast.
_WRITTEN_OUT = 32


def _orthonormal_rows(rows: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows Q of the same span, and the right-hand sides that belong to them.

    Args:
        rows: J (M, D), of rank M.
        sides: Right-hand sides of J x = b, (M, k).

    Returns:
        Q (M, D), and c (M, k) with Q x = c for every solution x.
    """
    count = len(rows)
    if count > _WRITTEN_OUT:
        columns, upper = torch.linalg.qr(rows.mT)
        return columns.mT, torch.linalg.solve_triangular(upper.mT, sides, upper=False)
    found, beside = [], []
    for remaining in reversed(range(count)):
        scale = (rows[0] * rows[0]).sum().rsqrt()
        row, side = rows[0] * scale, sides[0] * scale
        found.append(row)
        beside.append(side)
        if remaining:
            along = (rows[1:] * row).sum(1)[:, None]
            rows = rows[1:] - along * row
            sides = sides[1:] - along * side
    return torch.stack(found), torch.stack(beside)


def project_on_kernel(rows: Tensor, v: Tensor) -> Tensor:
    """The part of v in the kernel of the rows: (M, D), (D,) -> (D,)."""
    if len(rows) > _WRITTEN_OUT:
        columns = torch.linalg.qr(rows.mT)[0]
        return v - columns @ (columns.mT @ v)
    both = torch.cat([rows, v[None]])
    for _ in range(len(rows)):
        row = both[0] * (both[0] * both[0]).sum().rsqrt()
        both = both[1:] - (both[1:] * row).sum(1)[:, None] * row
    return both[0]


def shortest_solution(rows: Tensor, side: Tensor) -> Tensor:
    """The shortest x with J x = b, which is J^+ b: (M, D), (M,) -> (D,)."""
    orthonormal, beside = _orthonormal_rows(rows, side[:, None])
    return (orthonormal * beside).sum(0)


def dual_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows Q of the same span, and the rows of the transposed pseudo-inverse of J.

    Args:
        rows: J (M, D), of rank M.

    Returns:
        Q (M, D) and X (M, D): J X^T is the identity and the rows of X are in the span of J's.
    """
    identity = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    orthonormal, beside = _orthonormal_rows(rows, identity)
    return orthonormal, beside.mT @ orthonormal


def complement(orthonormal: Tensor, near: Tensor) -> Tensor:
    """Orthonormal columns of the kernel of orthonormal rows, next to given columns.

    Args:
        orthonormal: Q (M, D).
        near: Columns (D, d), d = D - M, whose projections on the kernel are independent.

    Returns:
        Tensor (D, d).
    """
    inside = near - orthonormal.mT @ (orthonormal @ near)
    return _orthonormal_rows(inside.mT, inside.new_zeros(inside.shape[1], 1))[0].mT
