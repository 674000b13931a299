"""The symbolic route: Phi and its derivatives from a closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from manifold_sde.arguments import is_known_false
from manifold_sde.errors import LimitMapError
from manifold_sde.geometry.dense_route import DenseRoute


class ClosedFormGeometry:
    """Geometry of a symbolic problem whose Phi is known; exact derivatives, no eigenvalues.

    Args:
        closed_form: The problem's ``closed_form``.
        dense: The dense route of the same problem, which checks that points are on the manifold.
    """

    def __init__(self, closed_form: Any, dense: DenseRoute) -> None:
        self.closed_form = closed_form
        self.dense = dense

    def limit_map(self, x: Tensor) -> Tensor:
        """Phi(x): (..., D) -> (..., D).

        Raises:
            LimitMapError: If the closed form is not finite at x.
        """
        y = self.closed_form.limit_map(x)
        if is_known_false(torch.isfinite(y).all()):
            failed = ~torch.isfinite(y).all(-1)
            count = int(failed.sum())
            raise LimitMapError(
                "the closed form of the limit map is not finite",
                failed=failed,
                partial=y.masked_fill(failed[..., None], torch.nan),
                received=f"NaN or infinity at {count} of {failed.numel()} points, the first at "
                f"x = {x[failed][0].tolist()[:8]}",
                expected="points in the domain of the closed form, inside the attraction set U",
                remedy='method="dense" follows gradient flow; the error\'s .partial holds the '
                "points that arrived",
            )
        return y

    def project(self, y: Tensor, v: Tensor) -> Tensor:
        """The exact Jacobian of Phi times v: (n, D), (n, D) -> (n, D)."""
        self.dense.frames_at(y)
        return self.closed_form.tangent_projection(y, v)

    def second_derivative(
        self, y: Tensor, covariance: Tensor | None = None, factor: Tensor | None = None
    ) -> Tensor:
        """The exact second derivative contracted: (n, D), (n, D, D) or (n, D, m) -> (n, D)."""
        self.dense.frames_at(y)
        if factor is not None:
            covariance = factor @ factor.mT
        if covariance is None:
            covariance = self.dense.problem.noise_covariance(y)
        return self.closed_form.second_derivative(y, covariance)
