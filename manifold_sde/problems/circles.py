"""Circles along which the curvature varies: with pi not uniform, label noise, and mixed noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manifold_sde.arguments import check_between
from manifold_sde.noise import LabelNoise, Noise, SamplingNoise, SphericalNoise
from manifold_sde.problem import LeastSquaresProblem, Problem
from manifold_sde.problems.facts import Circle, Facts


@dataclass(frozen=True)
class _WeightedCoordinate:
    """The residual (1 + a x_1 / |x|) x_3 / |x|, as a picklable function of one vector."""

    __name__ = "weighted_coordinate"
    amplitude: float

    def __call__(self, x: Tensor) -> Tensor:
        direction = x / x.norm()
        return (1.0 + self.amplitude * direction[:1]) * direction[2:]


@dataclass(frozen=True)
class _WeightedLogDeterminant:
    """2 log(r (1 + a u_1)) - 2 log |y|, at points y = |y| u of Gamma."""

    amplitude: float
    radius: float = 1.0

    def __call__(self, y: Tensor) -> Tensor:
        norm = y.norm(dim=-1)
        varying = torch.log1p(self.amplitude * y[..., 0] / norm)
        return 2.0 * (varying + math.log(self.radius)) - 2.0 * norm.log()


def varying_circle(
    amplitude: float = 0.5, noise_scale: float = 0.3, *, noise: Noise | None = None
) -> LeastSquaresProblem:
    """L = ((1 + a x_1/|x|) x_3/|x|)^2 / 2 in R^3: Gamma_1 is x_3 = 0, with varying curvature.

    At the angle theta on Gamma_1, H has the one nonzero eigenvalue (1 + a cos theta)^2. With the
    noise (18), pi has the density proportional to pdet(H)^{-1/2} = 1 / (1 + a cos theta): the
    noise drives the weights to where the loss is flat. Phi is not the nearest point here.

    Args:
        amplitude: The amplitude a, in [0, 1).
        noise_scale: Scale of the noise (18).
        noise: Replaces the noise (18).

    Raises:
        ArgumentError: If the amplitude is out of range.

    Example:
        >>> import torch
        >>> from manifold_sde import problems
        >>> problem = problems.varying_circle(amplitude=0.5)
        >>> problem.facts.log_pseudo_determinant(problem.minimizer).exp()
        tensor(2.2500, dtype=torch.float64)
    """
    a = check_between(
        amplitude, 0.0, 1.0, "the amplitude", "amplitude=0.5; at 1 the Hessian vanishes at a point"
    )
    problem = LeastSquaresProblem(
        _WeightedCoordinate(a),
        3,
        noise or SphericalNoise(noise_scale),
        rank=1,
        name=f"circle of varying curvature, amplitude {a:g}",
    )
    identity = torch.eye(3, dtype=torch.float64)
    problem.facts = Facts(
        minimizer=identity[0],
        rank=1,
        manifold_dim=1,
        statement="Gamma_1 is the great circle x_3 = 0; H has the eigenvalue "
        "(1 + a cos theta)^2; with the noise (18), pi is proportional to 1 / (1 + a cos theta)",
        circle=Circle(torch.zeros(3, dtype=torch.float64), identity[:2], 1.0),
        log_pseudo_determinant=_WeightedLogDeterminant(a),
    )
    return problem


def label_noise_circle(
    amplitude: float = 0.5, label_scale: float = 0.3, batch_size: int = 1
) -> LeastSquaresProblem:
    """The circle of varying curvature with label noise: a flow towards small tr H, no diffusion.

    With kappa = s^2 / B the angle follows theta' = (kappa / 2) a sin theta (1 + a cos theta) in
    the clock u, that is -(kappa / 4) times the gradient of tr H = (1 + a cos theta)^2: it comes to
    rest at theta = pi, where the loss is flattest.

    Args:
        amplitude: The amplitude a, in [0, 1).
        label_scale: Standard deviation s of the labels' noise.
        batch_size: Number B of samples a step.

    Raises:
        ArgumentError: If a parameter is out of range.

    Example:
        >>> from manifold_sde import problems
        >>> problems.label_noise_circle().noise
        LabelNoise(scale=0.3, batch_size=1)
    """
    problem = varying_circle(amplitude, noise=LabelNoise(label_scale, batch_size))
    problem.facts = replace(
        problem.facts,
        statement="Gamma_1 is the great circle x_3 = 0, where tr H = (1 + a cos theta)^2; the "
        "angle follows theta' = (kappa / 2) a sin theta (1 + a cos theta) in the clock u, without "
        "diffusion",
    )
    return problem


@dataclass(frozen=True)
class _TiltedSamples:
    """Four sample losses that differ from ((1 + a u_1) (u_3 - h))^2 / 2 by the tilts +-b g_j."""

    __name__ = "tilted_samples"
    amplitude: float
    tilt: float
    height: float

    def __call__(self, x: Tensor) -> Tensor:
        u = x / x.norm()
        common = 0.5 * ((1.0 + self.amplitude * u[0]) * (u[2] - self.height)) ** 2
        tilts = self.tilt * torch.stack([u[0], u[1] + u[0] * u[2]])
        return torch.cat([common + tilts, common - tilts])


def mixed_noise_circle(
    amplitude: float = 0.5, tilt: float = 0.3, height: float = 0.6, *, noise: Noise | None = None
) -> Problem:
    """A small circle in R^3 whose sampling noise makes every term matter: the test for solvers.

    With u = x/|x|, the four sample losses are ((1 + a u_1)(u_3 - h))^2 / 2 with +-b u_1 and
    +-b (u_2 + u_1 u_3) added. Their mean is minimal on the circle u_3 = h, where the samples are
    not: there the sampling noise is Sigma = (grad g_1 grad g_1^T + grad g_2 grad g_2^T) / 2 with
    g_1 = b u_1 and g_2 = b (u_2 + u_1 u_3).

    Its tangent and normal parts are correlated, its trace varies along Gamma_1 by the factor 2.95
    (at the default values), and so do its columns: all terms of the drift matter, and the direction
    circulates. The equilibria in the intrinsic clock and in time differ, by 0.08 in total
    variation.

    Args:
        amplitude: The amplitude a, in [0, 1).
        tilt: The size b of the tilts, positive.
        height: The height h of the circle, in [0, 1); its radius is sqrt(1 - h^2). At 0 the circle
            is a great one, and the mixed term of the drift vanishes.
        noise: Replaces the sampling noise.

    Raises:
        ArgumentError: If a parameter is out of range.

    Example:
        >>> import torch
        >>> from manifold_sde import problems
        >>> problem = problems.mixed_noise_circle()
        >>> angles = torch.tensor([0.5, 2.5], dtype=torch.float64)
        >>> problem.noise_trace(problem.facts.circle.point(angles))
        tensor([0.0386, 0.1024], dtype=torch.float64)
    """
    a = check_between(
        amplitude, 0.0, 1.0, "the amplitude", "amplitude=0.5; at 1 the Hessian vanishes at a point"
    )
    b = check_between(tilt, 1e-6, 1e6, "the tilt", "tilt=0.3")
    h = check_between(height, 0.0, 1.0, "the height", "height=0.6; at 1 the circle is a point")
    radius = math.sqrt(1.0 - h * h)
    problem = Problem(
        _TiltedSamples(a, b, h),
        3,
        noise or SamplingNoise(),
        rank=1,
        name=f"circle with mixed noise, amplitude {a:g}, height {h:g}",
    )
    identity = torch.eye(3, dtype=torch.float64)
    center = h * identity[2]
    problem.facts = Facts(
        minimizer=center + radius * identity[0],
        rank=1,
        manifold_dim=1,
        statement=f"Gamma_1 is the circle of radius {radius:.3g} at x_3 = {h:g}; H has the "
        "eigenvalue r^2 (1 + a r cos theta)^2; the sampling noise does not vanish there, its "
        "tangent and normal parts are correlated, and pi is neither uniform nor reversible",
        circle=Circle(center, identity[:2], radius),
        log_pseudo_determinant=_WeightedLogDeterminant(a, radius),
    )
    return problem
