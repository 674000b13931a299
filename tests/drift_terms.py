"""The terms of the Stratonovich drift where one eigenvalue of H is not 0, from its eigenvector n.

With P = I - n n^T and the eigenvalue lambda, H^+ = n n^T / lambda and L^-1 of n n^T is
n n^T / 2 lambda.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde import Problem


def normal(problem: Problem, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The one eigenvalue off the kernel, its eigenvector n, P, and Sigma, at a point (D,)."""
    values, vectors = torch.linalg.eigh(problem.pointwise.hessian(y))
    n = vectors[:, -1]
    projection = torch.eye(len(y), dtype=y.dtype) - torch.outer(n, n)
    return values[-1], n, projection, problem.noise.covariance(problem.pointwise, y)


def third_term(problem: Problem, y: Tensor) -> Tensor:
    """P T[L^-1(N Sigma N)]."""
    eigenvalue, n, projection, covariance = normal(problem, y)
    force = problem.pointwise.third_derivative(y, n, n)
    return projection @ force * ((n @ covariance @ n) / (2.0 * eigenvalue))


def mixed_term(problem: Problem, y: Tensor) -> Tensor:
    """P T[sym(H^+ N Sigma P)]."""
    eigenvalue, n, projection, covariance = normal(problem, y)
    across = projection @ (covariance @ n) / eigenvalue
    return projection @ problem.pointwise.third_derivative(y, n, across)


def sigma_term(problem: Problem, y: Tensor) -> Tensor:
    """P sum_j d sigma_j[P sigma_j]."""
    projection = normal(problem, y)[2]
    return projection @ problem.noise.correction(problem.pointwise, y, projection)
