"""Losses whose minimisers are a great circle or a great sphere."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.arguments import integer
from manifold_sde.errors import ArgumentError
from manifold_sde.least_squares import LeastSquaresProblem
from manifold_sde.noise import Noise, SphericalNoise
from manifold_sde.problems.facts import Circle, ConstantLogDeterminant, Facts


class _LastCoordinate:
    """The residual x_D / |x|, as a picklable function of one vector."""

    __name__ = "last_coordinate"

    def __call__(self, x: Tensor) -> Tensor:
        return x[-1:] / x.norm()


class _MeridianFlow:
    """Phi along meridians: the last coordinate goes to 0 at constant norm."""

    def __call__(self, x: Tensor) -> Tensor:
        flat = torch.cat([x[..., :-1], torch.zeros_like(x[..., -1:])], dim=-1)
        return flat * (x.norm(dim=-1, keepdim=True) / flat.norm(dim=-1, keepdim=True))


def great_sphere(
    dim: int = 4, noise_scale: float = 0.3, *, noise: Noise | None = None
) -> LeastSquaresProblem:
    """L = (x_D / |x|)^2 / 2, whose Gamma_1 is the great sphere x_D = 0 of dimension D - 2.

    In the clock u the direction is a Brownian motion of variance s^2 on that sphere, so that a
    spherical harmonic of degree l decays like exp(-l (l + D - 3) s^2 u / 2).

    Args:
        dim: Dimension D, at least 3; 4 makes Gamma_1 a 2-sphere, 3 a circle.
        noise_scale: Scale of the noise (18).
        noise: Replaces the noise (18).

    Raises:
        ArgumentError: If dim is below 3.

    Example:
        >>> from manifold_sde import problems
        >>> problems.great_sphere().facts.manifold_dim
        2
    """
    size = integer(dim)
    if size is None or size < 3:
        raise ArgumentError(
            "the dimension is too small for a great sphere",
            received=f"dim={dim!r}",
            expected="an integer of at least 3",
            remedy="dim=3 is the great circle",
        )
    problem = LeastSquaresProblem(
        _LastCoordinate(),
        size,
        noise or SphericalNoise(noise_scale),
        rank=1,
        name="great circle" if size == 3 else f"great sphere of dimension {size - 2}",
    )
    identity = torch.eye(size, dtype=torch.float64)
    circle = Circle(torch.zeros(size, dtype=torch.float64), identity[:2], 1.0)
    problem.facts = Facts(
        minimizer=identity[0],
        rank=1,
        manifold_dim=size - 2,
        statement="Phi(x) = |x| (x_1, ..., x_{D-1}, 0) normalised; H = e_D e_D^T / |x|^2; with "
        "the noise (18), pi is uniform and every moment is closed",
        circle=circle if size == 3 else None,
        limit_map=_MeridianFlow(),
        log_pseudo_determinant=ConstantLogDeterminant(0.0, 1),
    )
    return problem


def great_circle(noise_scale: float = 0.3, *, noise: Noise | None = None) -> LeastSquaresProblem:
    """L = (x_3 / |x|)^2 / 2 in R^3, whose Gamma_1 is the great circle x_3 = 0.

    Args:
        noise_scale: Scale of the noise (18).
        noise: Replaces the noise (18).

    Example:
        >>> from manifold_sde import problems
        >>> problems.great_circle().minimizer
        tensor([1., 0., 0.], dtype=torch.float64)
    """
    return great_sphere(3, noise_scale, noise=noise)
