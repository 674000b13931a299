"""The logarithm of the pseudo-determinant of H, from the Jacobian where that keeps more digits."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.geometry import autograd
from manifold_sde.geometry.dense_route import DenseRoute
from manifold_sde.loss import LeastSquaresLoss

#: Residuals of at most so many units of rounding, relative to |J| |y|, count as zero. A point of
#: Gamma that is rounded leaves about one.
_ROUNDING_UNITS = 100.0


class LogPseudoDeterminant:
    r"""log pdet H at points of Gamma, and its derivative along Gamma.

    Least squares whose residuals vanish at y have H = J^T J / Xi: the eigenvalues of H are then
    taken as the squared singular values of J over Xi. Their relative errors grow with the
    condition number of J, those of the eigenvalues of H with its square.

    Args:
        dense: The dense route of the problem.
    """

    def __init__(self, dense: DenseRoute) -> None:
        self.dense = dense

    def __call__(self, y: Tensor) -> Tensor:
        """Log pdet H: (n, D) -> (n,), differentiable once, in forward and reverse mode.

        Raises:
            NotOnManifoldError: If a point is not on the manifold.
            RankError: If the rank is ambiguous, not the declared one, or not constant.
        """
        return autograd.apply(self, y)[:, 0]

    def value(self, y: Tensor) -> Tensor:
        """Log pdet H as a column: (n, D) -> (n, 1)."""
        with torch.no_grad():
            _, _, values = self.dense.frames_at(y)
            total = values.log().sum(-1)
            rows = self._zero_residuals(y, values)
            if len(rows):
                total[rows] = self._from_jacobian(y[rows], values.shape[1])
        return total[:, None]

    def push(self, y: Tensor, tangents: Tensor) -> Tensor:
        """The derivative times tangents: (n, D), (n, D, k) -> (n, 1, k)."""
        return self._slope(y)[:, None] @ tangents

    def pull(self, y: Tensor, cotangents: Tensor) -> Tensor:
        """The transposed derivative times cotangents: (n, D), (n, 1, k) -> (n, D, k)."""
        return self._slope(y)[..., None] * cotangents

    def _slope(self, y: Tensor) -> Tensor:
        """The gradient along Gamma, P T[H^+]: (n, D) -> (n, D)."""
        with torch.no_grad():
            space, frame, _ = self.dense.frames_at(y)
            x = y.T.contiguous()
            return space.project(x, frame, space.third_of_inverse(x, frame)).T

    def _zero_residuals(self, y: Tensor, values: Tensor) -> Tensor:
        """Indices of the points where H is J^T J / Xi to rounding, by its eigenvalues (n, M)."""
        loss = self.dense.problem.pointwise
        if not isinstance(loss, LeastSquaresLoss):
            return torch.empty(0, dtype=torch.int64, device=y.device)
        residuals = self.dense.kernels.run("residuals", loss.residuals, y)
        # |J|^2 = Xi tr H where the residuals vanish.
        slope = (loss.n_samples * values.sum(-1).clamp(min=0.0)).sqrt()
        tolerance = _ROUNDING_UNITS * torch.finfo(y.dtype).eps
        return torch.nonzero(residuals.norm(dim=-1) <= tolerance * slope * y.norm(dim=-1))[:, 0]

    def _from_jacobian(self, y: Tensor, rank: int) -> Tensor:
        """Sum of the logarithms of the squared singular values over Xi: (n, D) -> (n,)."""
        loss = self.dense.problem.pointwise
        assert isinstance(loss, LeastSquaresLoss)
        jacobian = self.dense.kernels.run("jacobian", loss.jacobian, y)
        values = torch.linalg.svdvals(jacobian)[:, :rank]
        return (values.square() / loss.n_samples).log().sum(-1)
