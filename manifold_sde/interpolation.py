r"""Coefficients of the limiting diffusions where least squares interpolates.

Residuals r that all vanish on the manifold make it the level set r = 0, with H = J^T J / Xi, and
the noise of (18) then asks for second derivatives of the residuals only. With X the rows of the
transposed pseudo-inverse of J and P the projection on ker J,

.. math::

    P\,\mathcal T[H^\dagger] = 2 P \sum_i \nabla^2 r_i\, X_i, \qquad
    H^\dagger\mathcal T[P] = \sum_i X_i \operatorname{tr}(P \nabla^2 r_i).

No Hessian, no third derivative and no eigenvector is needed, for a fraction of the work. Off the
manifold these are another smooth extension of the coefficients, and the Newton steps back to it are
those of Gauss and Newton, which come back from further away.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vjp, vmap

from manifold_sde.derivatives import jvp
from manifold_sde.field import ARRIVED, Field
from manifold_sde.geometry.row_space import (
    complement,
    dual_rows,
    project_on_kernel,
    shortest_solution,
)
from manifold_sde.noise import SphericalNoise
from manifold_sde.problem import LeastSquaresProblem, Problem

#: Gauss-Newton steps of a retraction beyond those that the scheme asks for.
_MORE_STEPS = 4
#: Residuals that two steps of Gauss and Newton leave, in units of rounding of |J| |y|, that count
#: as none; and points at which they are looked at.
_ROUNDING_UNITS = 1e3
_POINTS = 16


def interpolates(problem: Problem, y: Tensor, rank: int) -> bool:
    """Whether the manifold is the level set r = 0 of residuals with independent gradients.

    Two steps of Gauss and Newton from points near the manifold take the residuals to zero there,
    and nowhere else.

    Args:
        problem: The problem.
        y: Points at or near the manifold (n, D), of which some are looked at.
        rank: Rank M of the Hessian.
    """
    if not isinstance(problem, LeastSquaresProblem) or problem.pointwise.n_residuals != rank:
        return False
    points = y[:: -(-len(y) // _POINTS)]
    for _ in range(2):
        residuals, jacobian = problem.residuals(points), problem.jacobian(points)
        step = torch.linalg.pinv(jacobian) @ residuals[..., None]
        points = points - step[..., 0]
    left = problem.residuals(points).norm(dim=-1)
    size = problem.jacobian(points).flatten(1).norm(dim=-1) * points.norm(dim=-1)
    rounding = _ROUNDING_UNITS * torch.finfo(y.dtype).eps
    return bool((left <= rounding * size).all())


class InterpolationField(Field):
    """Coefficients on batches of points of the level set r = 0, for the noise of (18).

    Anchors are tangent bases (D, d, n) where the Ito drift is wanted, and empty (D, 0, n)
    otherwise.

    Args:
        problem: Least squares that interpolates.
        needs_basis: Whether the Ito drift will be asked for.
        compiled: Whether the kernels are compiled.
    """

    problem: LeastSquaresProblem

    def __init__(
        self, problem: LeastSquaresProblem, *, needs_basis: bool, compiled: bool = False
    ) -> None:
        assert isinstance(problem.noise, SphericalNoise)
        super().__init__(problem, compiled=compiled)
        self.loss = problem.pointwise
        self.noise_of_18 = problem.noise
        self.needs_basis = needs_basis

    def anchor(self, x: Tensor) -> Tensor:
        """Orthonormal tangent bases: (D, n) -> (D, d, n), or (D, 0, n)."""
        if not self.needs_basis:
            return x.new_zeros(x.shape[0], 0, x.shape[1])
        rows = self.kernels.run_last("jacobian", self.loss.jacobian, x / x.norm(dim=0))
        right = torch.linalg.svd(rows.movedim(-1, 0))[2]
        return right[:, len(rows) :].permute(2, 1, 0).contiguous()

    def noise(self, x: Tensor, anchor: Tensor, w: Tensor) -> Tensor:
        """P sigma w: (D, n), (D, d, n), (m, n) -> (D, n)."""
        r = x.norm(dim=0)
        result: Tensor = self.kernels.run_last("level_set_noise", self._noise, x / r, w)
        return result / r

    def direction_drift(self, y: Tensor, anchor: Tensor, calculus: str) -> Tensor:
        """Drift of the direction diffusion at unit vectors: (D, n), (D, d, n) -> (D, n)."""
        rows, dual = self.kernels.run_last("level_set_dual", self._dual, y)
        return self._drift_from(y, rows, dual, anchor, calculus)

    def _drift_from(
        self, y: Tensor, rows: Tensor, dual: Tensor, anchor: Tensor, calculus: str
    ) -> Tensor:
        force = self.kernels.run_last("level_set_force", self._force, y, dual)
        drift: Tensor = self.kernels.run_last("level_set_drift", self._drift, y, rows, force)
        if calculus != "ito":
            return drift
        curving = self.kernels.run_last("level_set_curving", self._curving, y, dual, anchor)
        # P T[H^+] has the part -2 M along y, and V is s^2 (D - 1).
        radial = 0.5 * self.noise_of_18.scale**2 * (len(rows) - len(y) + 1)
        return drift - curving + radial * y

    def drift_and_noise(
        self, y: Tensor, anchor: Tensor, w: Tensor, calculus: str
    ) -> tuple[Tensor, Tensor]:
        """Both with one elimination."""
        rows, dual = self.kernels.run_last("level_set_dual", self._dual, y)
        noise = self.kernels.run_last("level_set_projection", self._projected_noise, y, rows, w)
        return self._drift_from(y, rows, dual, anchor, calculus), noise

    def retract(
        self, x: Tensor, anchor: Tensor, fresh_steps: int = 2
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Points of the manifold near x, with the norms of x, by Gauss and Newton's method.

        Args:
            x: Points near the manifold (D, n).
            anchor: Tangent bases nearby, or none.
            fresh_steps: Steps, besides four more.

        Returns:
            Points (D, n), tangent bases there, and whether the point arrived, (n,): one that did
            not is NaN.
        """
        r = x.norm(dim=0)
        y = x / r
        for _ in range(fresh_steps + _MORE_STEPS):
            y, left = self.kernels.run_last("level_set_step", self._step, y)
        arrived = left <= ARRIVED.get(x.dtype, 1e-4)
        if self.needs_basis:
            anchor = self.kernels.run_last("level_set_basis", self._basis, y, anchor)
        return torch.where(arrived, y * r, torch.nan), anchor, arrived

    # Functions of one unit vector.

    def _noise(self, y: Tensor, w: Tensor) -> Tensor:
        return project_on_kernel(self.loss.jacobian(y), self.noise_of_18.product(self.loss, y, w))

    def _projected_noise(self, y: Tensor, rows: Tensor, w: Tensor) -> Tensor:
        move = self.noise_of_18.product(self.loss, y, w)
        return move - (rows * (rows @ move)[:, None]).sum(0)

    def _dual(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return dual_rows(self.loss.jacobian(y))

    def _force(self, y: Tensor, dual: Tensor) -> Tensor:
        """Sum over i of the Hessian of r_i times X_i."""
        force: Tensor = vjp(self.loss.jacobian, y)[1](dual)[0]
        return force

    def _drift(self, y: Tensor, rows: Tensor, force: Tensor) -> Tensor:
        """-(s^2 / 4) P T[H^+] without its part along y."""
        along = force - rows.mT @ (rows @ force)
        return (-0.5 * self.noise_of_18.scale**2) * (along - y * ((y * along).sum()))

    def _curving(self, y: Tensor, dual: Tensor, basis: Tensor) -> Tensor:
        """(s^2 / 2) H^+ T[P]."""

        def second(t: Tensor) -> Tensor:
            return jvp(lambda z: self.loss.residual_product(z, t), (y,), (t,))[1]

        bends = vmap(second, in_dims=1)(basis).sum(0)
        return (0.5 * self.noise_of_18.scale**2) * (bends @ dual)

    def _step(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """One step of Gauss and Newton on the unit sphere, and its length."""
        step = shortest_solution(self.loss.jacobian(y), self.loss.residuals(y))
        moved = y - step
        return moved * (moved * moved).sum().rsqrt(), (step * step).sum().sqrt()

    def _basis(self, y: Tensor, near: Tensor) -> Tensor:
        return complement(dual_rows(self.loss.jacobian(y))[0], near)
