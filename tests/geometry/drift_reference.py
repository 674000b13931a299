"""The coefficients of the diffusions at ONE unit vector, from whole tensors, to be read.

Nothing is taken from the toolkit but the loss and the columns of sigma: derivatives by
``torch.func``, blocks by an eigendecomposition, all sums written out.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.func import hessian, jacfwd

from manifold_sde import Problem


class Reference:
    """At a unit vector y (D,) of the manifold, for a problem whose Hessian has rank M there."""

    def __init__(self, problem: Problem, y: Tensor, rank: int) -> None:
        loss = problem.pointwise.loss
        self.y = y
        self.hessian = hessian(loss)(y)
        #: Third derivatives (D, D, D).
        self.third = jacfwd(hessian(loss))(y)
        values, vectors = torch.linalg.eigh(self.hessian)
        self.values, self.normal = values[-rank:], vectors[:, -rank:]
        self.P = vectors[:, :-rank] @ vectors[:, :-rank].T
        self.N = self.normal @ self.normal.T
        self.inverse = self.normal @ torch.diag(1.0 / self.values) @ self.normal.T

        def factor(x: Tensor) -> Tensor:
            return problem.noise.factor(problem.pointwise, x)

        #: sigma (D, m) and its derivatives (D, m, D).
        self.sigma, self.slopes = factor(y), jacfwd(factor)(y)

    def script_t(self, matrix: Tensor) -> Tensor:
        """T[A]_i = sum over j, k of d_i d_j d_k L A_jk."""
        return torch.einsum("ijk,jk->i", self.third, matrix)

    @cached_property
    def covariance(self) -> Tensor:
        """Sigma."""
        return self.sigma @ self.sigma.T

    @property
    def trace(self) -> Tensor:
        """V."""
        return self.covariance.diagonal().sum()

    def lyapunov(self, sigma: Tensor) -> Tensor:
        """X on the range of H with H X + X H = N Sigma N."""
        inner = self.normal.T @ sigma @ self.normal
        return self.normal @ (inner / (self.values[:, None] + self.values)) @ self.normal.T

    def mixed(self, sigma: Tensor) -> Tensor:
        """sym(H^+ N Sigma P)."""
        block = self.inverse @ self.N @ sigma @ self.P
        return 0.5 * (block + block.T)

    def second_derivative(self, sigma: Tensor) -> Tensor:
        """d^2 Phi[Sigma]."""
        return (
            -self.inverse @ self.script_t(self.P @ sigma @ self.P)
            - 2.0 * self.P @ self.script_t(self.mixed(sigma))
            - self.P @ self.script_t(self.lyapunov(sigma))
        )

    @property
    def correction(self) -> Tensor:
        """Sum over j of the derivative of sigma_j along P sigma_j."""
        return torch.einsum("ijk,kj->i", self.slopes, self.P @ self.sigma)

    def drift(self, calculus: str) -> Tensor:
        """Drift of the direction diffusion."""
        sigma, half = self.covariance, 0.5 * self.trace * self.y
        if calculus == "stratonovich":
            blocks = 0.5 * self.lyapunov(sigma) + 0.5 * self.mixed(sigma)
            return -self.P @ (self.script_t(blocks) + 0.5 * self.correction) - half
        drift = 0.5 * self.second_derivative(sigma) - half
        if calculus == "ito":
            return drift
        drift = self.P @ drift
        return drift - self.y * (self.y @ drift)
