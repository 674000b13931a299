r"""The range of H from the rows of the Jacobian, where least squares has zero residuals.

Residuals r that all vanish on the manifold make it the level set r = 0, with H = J^T J / Xi, and
the noise of (18) then asks for second derivatives of the residuals only. With X the rows of the
transposed pseudo-inverse of J and P the projection on ker J,

.. math::

    P\,\mathcal T[H^\dagger] = 2 P \sum_i \nabla^2 r_i\, X_i, \qquad
    H^\dagger\mathcal T[P] = \sum_i X_i \operatorname{tr}(P \nabla^2 r_i).

No Hessian, no third derivative and no eigenvector is needed, for a fraction of the work. Off the
manifold these are another smooth extension, and Newton's method is that of Gauss-Newton, which
comes back from further away.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde.geometry.elimination import (
    complement,
    dual_rows,
    project_on_kernel,
    shortest_solution,
)
from manifold_sde.geometry.normal_space import Frame, NormalSpace, to_unit
from manifold_sde.loss import LeastSquaresLoss
from manifold_sde.noise import SphericalNoise
from manifold_sde.problem import LeastSquaresProblem, Problem
from manifold_sde.reverse_mode import vjp

#: Residuals that two steps of Gauss-Newton leave, in units of rounding of |J| |y|, that count as
#: none; and points at which they are looked at.
_ROUNDING_UNITS = 1e3
_POINTS = 16


def has_zero_residuals(problem: Problem, y: Tensor, rank: int) -> bool:
    """Whether the manifold is the level set r = 0 of residuals with independent gradients.

    Two steps of Gauss-Newton from points near the manifold take the residuals to zero there, and
    nowhere else.

    Args:
        problem: The problem.
        y: Points at or near the manifold (n, D), of which some are looked at.
        rank: Rank M of the Hessian.
    """
    if not isinstance(problem, LeastSquaresProblem) or problem.pointwise.n_residuals != rank:
        return False
    if not len(y):
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


class LeastSquaresSpace(NormalSpace):
    """Least squares with zero residuals, and the noise of (18).

    Reference bases are tangent bases (D, D - M, n) where the Ito drift is wanted, and empty
    otherwise. A frame is an orthonormal basis of the rows of J and the rows X, (M, D, n) each, and
    the reference basis.

    Args:
        problem: Least squares whose residuals vanish on the manifold.
        needs_basis: Whether the Ito drift will be needed.
    """

    problem: LeastSquaresProblem
    loss: LeastSquaresLoss
    label = "InterpolationField"
    fresh_steps = 4
    shared_steps = 0

    def __init__(self, problem: LeastSquaresProblem, *, needs_basis: bool) -> None:
        assert isinstance(problem.noise, SphericalNoise)
        super().__init__(problem, problem.pointwise.n_residuals)
        self.loss = problem.pointwise
        self.needs_basis = needs_basis

    def reference_basis(self, y: Tensor) -> Tensor:
        """Orthonormal tangent bases, (D, D - M, n), or (D, 0, n)."""
        if not self.needs_basis:
            return y.new_zeros(y.shape[0], 0, y.shape[1])
        rows = self.kernels.run_last("jacobian", self.loss.jacobian, y)
        right = torch.linalg.svd(rows.movedim(-1, 0))[2]
        return right[:, len(rows) :].permute(2, 1, 0).contiguous()

    def frame(self, y: Tensor, basis: Tensor) -> Frame:
        """Orthonormal rows, dual rows, and the reference basis."""
        return *self.kernels.run_last("level_set_dual", self._dual, y), basis

    def project(self, y: Tensor, frame: Frame, v: Tensor) -> Tensor:
        """P v, by the orthonormal rows."""
        result: Tensor = self.kernels.run_last("level_set_projection", _project, frame[0], v)
        return result

    def inverse(self, y: Tensor, frame: Frame, v: Tensor) -> Tensor:
        """H^+ v = Xi X^T X v."""
        inner = (frame[1] * v).sum(1)
        return self.loss.n_samples * (frame[1] * inner[:, None]).sum(0)

    def third_of_inverse(self, y: Tensor, frame: Frame) -> Tensor:
        """Twice the sum over i of the Hessian of r_i times X_i."""
        force: Tensor = self.kernels.run_last("level_set_force", self._force, y, frame[1])
        return 2.0 * force

    def third_of_projection(self, y: Tensor, frame: Frame) -> Tensor:
        """The sum over i of X_i tr(P Hessian of r_i)."""
        result: Tensor = self.kernels.run_last("level_set_curving", self._curving, y, *frame)
        return result

    def contract(self, y: Tensor, frame: Frame, **_: object) -> tuple[Tensor, Tensor]:
        """Not by the rows alone: the noise of (18) does without."""
        raise NotImplementedError("the rows of the Jacobian serve the noise of (18) alone")

    def noise_correction(self, y: Tensor, frame: Frame) -> Tensor:
        """Not needed for the noise of (18)."""
        raise NotImplementedError("the rows of the Jacobian serve the noise of (18) alone")

    def tangent_noise(self, y: Tensor, basis: Tensor, w: Tensor) -> Tensor:
        """P sigma w in one kernel, which keeps no rows."""
        result: Tensor = self.kernels.run_last("level_set_noise", self._tangent_noise, y, w)
        return result

    def newton_step(self, y: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A step of Gauss-Newton."""
        return *self.kernels.run_last("level_set_step", self._step, y), basis

    def settle(self, y: Tensor, basis: Tensor) -> tuple[Frame, Tensor]:
        """The reference basis alone: no steps follow."""
        if self.needs_basis:
            basis = self.kernels.run_last("level_set_basis", self._basis, y, basis)
        return (), basis

    # Functions of one unit vector.

    def _tangent_noise(self, y: Tensor, w: Tensor) -> Tensor:
        return project_on_kernel(self.loss.jacobian(y), self.noise.product(self.loss, y, w))

    def _dual(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return dual_rows(self.loss.jacobian(y))

    def _force(self, y: Tensor, dual: Tensor) -> Tensor:
        return vjp(self.loss.jacobian, y)[1](dual)

    def _curving(self, y: Tensor, rows: Tensor, dual: Tensor, near: Tensor) -> Tensor:
        def second(t: Tensor) -> Tensor:
            return self.loss.along(lambda z: self.loss.residual_product(z, t), y, t)

        return vmap(second, in_dims=1)(complement(rows, near)).sum(0) @ dual

    def _step(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return to_unit(y, shortest_solution(self.loss.jacobian(y), self.loss.residuals(y)))

    def _basis(self, y: Tensor, near: Tensor) -> Tensor:
        return complement(dual_rows(self.loss.jacobian(y))[0], near)


def _project(rows: Tensor, v: Tensor) -> Tensor:
    return v - (rows * (rows @ v)[:, None]).sum(0)
