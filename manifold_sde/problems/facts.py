"""What a problem says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde.arguments import check_point


@dataclass(frozen=True)
class Circle:
    """A circle of unit vectors: Gamma_1 where it has dimension one.

    Attributes:
        center: Centre (D,), orthogonal to the plane's directions.
        basis: Orthonormal directions of the plane, (2, D).
        radius: Radius, sqrt(1 - |center|^2).
    """

    center: Tensor
    basis: Tensor
    radius: float

    def plane_coordinates(self, x: Tensor) -> Tensor:
        """Coordinates of the direction of x in the plane: (..., D) -> (..., 2).

        Raises:
            DTypeError, ShapeError, ZeroVectorError: If x cannot be used. NaN stays NaN.
        """
        x = check_point(x, len(self.center), allow_nan=True)
        direction = x / x.norm(dim=-1, keepdim=True)
        return direction @ self.basis.to(x).mT

    def angle(self, x: Tensor) -> Tensor:
        """Angle of x in (-pi, pi], measured from the first direction: (..., D) -> (...)."""
        plane = self.plane_coordinates(x)
        return torch.atan2(plane[..., 1], plane[..., 0])

    def point(self, angle: Tensor) -> Tensor:
        """Unit vector at an angle: (...) -> (..., D).

        Raises:
            DTypeError: If the angles are not a tensor of single or double precision.
        """
        column = angle.unsqueeze(-1) if isinstance(angle, Tensor) else angle
        check_point(column, 1, name="angle", allow_zero=True, allow_nan=True)
        plane = torch.stack([torch.cos(angle), torch.sin(angle)], dim=-1)
        return self.center.to(angle) + self.radius * plane @ self.basis.to(angle)


@dataclass(frozen=True)
class Facts:
    """What is known of a problem in closed form.

    Attributes:
        minimizer: A unit vector on the manifold of minimisers, (D,).
        rank: Rank M of the Hessian there.
        manifold_dim: Dimension D - M - 1 of Gamma_1.
        statement: What is known, in words.
        circle: Gamma_1, where it is a circle.
        limit_map: Phi in closed form, (..., D) -> (..., D), where it is known.
        log_pseudo_determinant: log pdet H on Gamma, (..., D) -> (...), where it is known.
    """

    minimizer: Tensor
    rank: int
    manifold_dim: int
    statement: str
    circle: Circle | None = None
    limit_map: Callable[[Tensor], Tensor] | None = None
    log_pseudo_determinant: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class ConstantLogDeterminant:
    """log pdet H where it is constant on Gamma_1: H has degree -2, so it falls with 2 M log |y|.

    Attributes:
        value: Its value on Gamma_1.
        rank: Rank M of H.
    """

    value: float
    rank: int

    def __call__(self, y: Tensor) -> Tensor:
        """Log pdet H at points of Gamma: (..., D) -> (...)."""
        return self.value - 2.0 * self.rank * y.norm(dim=-1).log()
