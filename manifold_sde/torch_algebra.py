"""Linear algebra whose higher derivatives torch gets wrong, from functions where it has them right.

In torch 2.13 the third derivatives of ``solve``, ``det``, ``logdet``, ``slogdet`` and
``householder_product`` are wrong, and the forward-mode derivatives of ``cholesky_inverse`` and
``triangular_solve``, without an error. ``lu_solve`` is wrong in a batch of batches, as
the Hessian at several points is. ``lu_factor``, ``lu_unpack`` and ``solve_triangular`` are right to
all three orders (tests/test_operations.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    # torch's own rule for a right-hand side that is a vector, or a batch of them.
    vector = B.dim() == 1 or (A.dim() - 1 == B.dim() and B.shape == A.shape[:-1])
    columns = B.unsqueeze(-1) if vector else B
    factors, pivots = torch.linalg.lu_factor(A)
    solution = _lu_solve(factors, pivots, columns, left=left)
    return solution.squeeze(-1) if vector else solution


def _lu_solve(
    LU: Tensor, pivots: Tensor, B: Tensor, *, left: bool = True, adjoint: bool = False
) -> Tensor:
    if not left:
        return _lu_solve(LU, pivots, B.mT, adjoint=not adjoint).mT
    permutation, lower, upper = torch.lu_unpack(LU, pivots)
    solve = torch.linalg.solve_triangular
    if adjoint:
        inside = solve(upper.mT, B, upper=False)
        return permutation @ solve(lower.mT, inside, upper=True, unitriangular=True)
    inside = solve(lower, permutation.mT @ B, upper=False, unitriangular=True)
    return solve(upper, inside, upper=True)


def _old_lu_solve(b: Tensor, LU_data: Tensor, LU_pivots: Tensor) -> Tensor:
    return _lu_solve(LU_data, LU_pivots, b)


def _tensorsolve(A: Tensor, B: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    if dims is not None:
        A = A.movedim(tuple(dims), tuple(range(A.dim() - len(dims), A.dim())))
    shape = A.shape[B.dim() :]
    return _solve(A.reshape(-1, math.prod(shape)), B.reshape(-1)).reshape(shape)


def _pivots_and_sign(A: Tensor) -> tuple[Tensor, Tensor]:
    """Diagonal (..., n) of the triangular factor, and the sign (...) of the row exchanges."""
    factors, pivots = torch.linalg.lu_factor(A)
    moved = pivots != torch.arange(1, A.shape[-1] + 1, device=A.device)
    return factors.diagonal(dim1=-2, dim2=-1), 1.0 - 2.0 * (moved.sum(-1) % 2).to(A.dtype)


def _det(A: Tensor) -> Tensor:
    diagonal, sign = _pivots_and_sign(A)
    return sign * diagonal.prod(-1)


def _sign_and_log(A: Tensor) -> tuple[Tensor, Tensor]:
    diagonal, sign = _pivots_and_sign(A)
    return sign * diagonal.sign().prod(-1), diagonal.abs().log().sum(-1)


def _logdet(A: Tensor) -> Tensor:
    sign, log = _sign_and_log(A)
    return torch.where(sign < 0, torch.nan, log)


def _slogdet(A: Tensor) -> Any:
    return torch.return_types.slogdet(_sign_and_log(A))


def _linalg_slogdet(A: Tensor) -> Any:
    return torch.return_types.linalg_slogdet(_sign_and_log(A))  # type: ignore[attr-defined]


def _cholesky_inverse(L: Tensor, upper: bool = False) -> Tensor:
    identity = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device).expand(L.shape)
    inverse = torch.linalg.solve_triangular(L.mT if upper else L, identity, upper=False)
    return inverse.mT @ inverse


def _triangular_solve(
    b: Tensor,
    A: Tensor,
    upper: bool = True,
    transpose: bool = False,
    unitriangular: bool = False,
) -> Any:
    matrix = A.mT if transpose else A
    solution = torch.linalg.solve_triangular(
        matrix, b, upper=upper != transpose, unitriangular=unitriangular
    )
    return torch.return_types.triangular_solve((solution, A))


def _householder_product(A: Tensor, tau: Tensor) -> Tensor:
    rows, columns = A.shape[-2:]
    identity = torch.eye(rows, columns, dtype=A.dtype, device=A.device)
    vectors = A.tril(-1) + identity
    result = identity.expand(A.shape)
    for i in reversed(range(tau.shape[-1])):
        v = vectors[..., i : i + 1]
        result = result - tau[..., i, None, None] * (v @ (v.mT @ result))
    return result


#: What takes the place of a function, by torch's own object. Methods of tensors are others.
REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    torch.linalg.solve: _solve,
    torch.linalg.tensorsolve: _tensorsolve,
    torch.linalg.lu_solve: _lu_solve,
    torch.lu_solve: _old_lu_solve,
    Tensor.lu_solve: _old_lu_solve,
    torch.linalg.det: _det,
    torch.det: _det,
    Tensor.det: _det,
    torch.logdet: _logdet,
    Tensor.logdet: _logdet,
    torch.slogdet: _slogdet,
    Tensor.slogdet: _slogdet,
    torch.linalg.slogdet: _linalg_slogdet,
    torch.cholesky_inverse: _cholesky_inverse,
    Tensor.cholesky_inverse: _cholesky_inverse,
    torch.triangular_solve: _triangular_solve,
    Tensor.triangular_solve: _triangular_solve,
    torch.linalg.householder_product: _householder_product,
    torch.orgqr: _householder_product,
    Tensor.orgqr: _householder_product,
}
