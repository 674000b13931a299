"""Least squares: a loss given by its residuals."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from manifold_sde import loss_checks
from manifold_sde.derivatives import check_point
from manifold_sde.elementary import ElementaryFunction, elementary
from manifold_sde.errors import DTypeError, ShapeError
from manifold_sde.noise import Noise
from manifold_sde.pointwise import LeastSquaresPointwise
from manifold_sde.problem import Problem


class LeastSquaresProblem(Problem):
    r"""Half the mean over samples of squared residuals, L = |r(x)|^2 / (2 Xi).

    Where the residuals vanish, H = J^T J / Xi, and the pseudo-determinant of H comes from the
    singular values of the Jacobian J, which keep the digits that H loses.

    Args:
        residuals: Function of ONE vector x (D,) that returns the residuals (Xi,), or (Xi, K) for
            K outputs a sample.
        dim: Ambient dimension D.
        noise: The gradient noise.
        rank: Rank M of the Hessian on the manifold of minimisers, where it is known.
        name: Name used in messages and figures.

    Raises:
        ArgumentError, ShapeError, DTypeError, NonFiniteError, DifferentiationError: If the
            residuals cannot be used.
        NoiseError: If the noise does not fit.
    """

    pointwise: LeastSquaresPointwise

    def __init__(
        self,
        residuals: Callable[[Tensor], Tensor],
        dim: int,
        noise: Noise,
        *,
        rank: int | None = None,
        name: str | None = None,
    ) -> None:
        dim = loss_checks.check_dim(dim)
        if not callable(residuals):
            raise DTypeError(
                "the residuals are not a function",
                received=type(residuals).__name__,
                expected="a function of one vector (D,) that returns (Xi,)",
                remedy="LeastSquaresProblem(lambda x: Z @ (x / x.norm()) - targets, dim, noise)",
            )
        value = loss_checks.try_function(ElementaryFunction(residuals), dim, "residual function")
        if value.dim() not in (1, 2) or value.numel() == 0:
            raise ShapeError(
                "the residuals of one vector have the wrong shape",
                received=f"{tuple(value.shape)} for x of shape ({dim},)",
                expected="(Xi,), a residual a sample, or (Xi, K), K of them",
                remedy="flatten the outputs of a sample; write the function for ONE vector",
            )
        function = elementary(residuals, loss_checks.fixed_directions(dim, 1)[0])
        pointwise = LeastSquaresPointwise(function, dim, len(value), value[0].numel())
        loss_checks.require_derivatives(pointwise, function, "residual function")
        self._setup(pointwise, noise, rank, name or getattr(residuals, "__name__", "residuals"))

    def residuals(self, x: Tensor) -> Tensor:
        """The residuals r, a sample's K side by side: (..., D) -> (..., Xi K)."""
        return self._apply(self.pointwise.residuals, check_point(x, self.dim))

    def jacobian(self, x: Tensor) -> Tensor:
        """Jacobian of the residuals: (..., D) -> (..., Xi K, D)."""
        return self._apply(self.pointwise.jacobian, check_point(x, self.dim))
