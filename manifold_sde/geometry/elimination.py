r"""Tangent space and pseudo-inverse at ONE point of the manifold, by elimination.

From the Hessian: with T any D x (D - M) matrix whose columns have independent projections on
ker H, let A = H + mu T T^T. Where H has exactly rank M:

- the columns of A^-1 T span ker H;
- N A^-1 N = H^+, with N the projection on the range of H.

(In a basis of ker H and its complement A^-1 T = (T_k^T)^-1 / mu on ker H and 0 beside it, and the
Schur complement of the kernel's block of A is H itself.) So one elimination gives both, exactly,
whatever T is; a tangent basis of a point nearby makes it well conditioned. It costs a tenth of an
eigendecomposition, and compiles. Off the manifold the same formulas are a smooth extension.

From the rows of a Jacobian of full row rank M: the tangent space is the kernel of J. One
Gram-Schmidt elimination of its rows gives the projection on it, the shortest displacement that
removes a residual, and the dual rows, which are those of the transposed pseudo-inverse of J.
Nothing is squared: errors grow with the condition number of J, not of H.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Largest dimension whose elimination is written out; beyond it LAPACK is as fast.
_WRITTEN_OUT = 32


def solve_positive(matrix: Tensor, columns: Tensor) -> Tensor:
    """Solve A X = B for a symmetric positive definite A: (D, D), (D, k) -> (D, k).

    Up to D = 32 the elimination is written out in D rank-one updates, so that it compiles into
    one kernel with what is before and after it. NaN where A is not positive definite: where H is
    not positive semidefinite of rank M, as at a maximum or a saddle point of the loss.
    """
    dim, count = columns.shape
    if dim > _WRITTEN_OUT:
        factor, wrong = torch.linalg.cholesky_ex(matrix)
        return torch.cholesky_solve(columns, torch.where(wrong == 0, factor, torch.nan))
    rest = torch.cat([matrix, columns], dim=1)
    rows = []
    for _ in range(dim):
        row = rest[0, 1:] / torch.where(rest[0, 0] > 0.0, rest[0, 0], torch.nan)
        rows.append(row)
        rest = rest[1:, 1:] - rest[1:, :1] * row
    solution: list[Tensor] = []
    for k in reversed(range(dim)):
        row = rows[k]
        value = row[-count:]
        for j, known in enumerate(reversed(solution)):
            value = value - row[j] * known
        solution.append(value)
    return torch.stack(solution[::-1])


def orthonormal_columns(columns: Tensor) -> Tensor:
    """Orthonormal basis of the span of nearly orthogonal columns: (D, d) -> (D, d)."""
    count = columns.shape[1]
    if count > _WRITTEN_OUT:
        return torch.linalg.qr(columns)[0]
    basis: list[Tensor] = []
    for k in range(count):
        column = columns[:, k]
        for known in basis:
            column = column - known * (known * column).sum()
        basis.append(column * (column * column).sum().rsqrt())
    return torch.stack(basis, dim=1)


def _shifted(hessian: Tensor, basis: Tensor) -> Tensor:
    """H + mu T T^T with mu the mean of the nonzero eigenvalues."""
    rank = hessian.shape[0] - basis.shape[1]
    shift = hessian.diagonal().sum() / max(rank, 1)
    return hessian + shift * (basis @ basis.T)


def tangent_basis(hessian: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal basis of ker H, next to the reference basis.

    Args:
        hessian: H (D, D), of rank M.
        basis: T (D, D - M), for example a tangent basis at a point nearby.

    Returns:
        Tensor (D, D - M).
    """
    return orthonormal_columns(solve_positive(_shifted(hessian, basis), basis))


def tangent_inverse(hessian: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of ker H, and the pseudo-inverse of H.

    Args:
        hessian: H (D, D), of rank M.
        basis: T (D, D - M).

    Returns:
        Tensors (D, D - M) and (D, D).
    """
    dim, count = basis.shape
    identity = torch.eye(dim, dtype=hessian.dtype, device=hessian.device)
    both = solve_positive(_shifted(hessian, basis), torch.cat([basis, identity], dim=1))
    kernel = orthonormal_columns(both[:, :count])
    half = both[:, count:] - kernel @ (kernel.T @ both[:, count:])
    return kernel, half - (half @ kernel) @ kernel.T


def newton_displacement(hessian: Tensor, basis: Tensor, gradient: Tensor) -> Tensor:
    """Displacement normal to the manifold that removes the gradient to first order.

    Near the manifold the part of the gradient along ker H is of second order, and is not looked
    at: N A^-1 g in place of H^+ g.

    Args:
        hessian: H (D, D) near the manifold.
        basis: T (D, D - M).
        gradient: The gradient (D,).

    Returns:
        Tensor (D,), to be subtracted.
    """
    count = basis.shape[1]
    columns = torch.cat([basis, gradient[:, None]], dim=1)
    both = solve_positive(_shifted(hessian, basis), columns)
    kernel = orthonormal_columns(both[:, :count])
    step = both[:, count]
    return step - kernel @ (kernel.T @ step)


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
