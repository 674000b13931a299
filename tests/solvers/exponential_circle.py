"""A circle whose curvature is exponential, with Phi in closed form that is not the nearest point.

With rho, theta, phi for distance from the axis, longitude and latitude, the residual is
exp(a cos theta) sin phi. Gradient flow on the sphere has d theta / d phi = -a sin theta tan phi /
cos^2 phi, so that log tan(theta / 2) - a tan^2 phi / 2 is constant along it. H has the eigenvalue
exp(2 a cos theta) on the circle phi = 0, and with the noise (18) the drift in the clock is
s^2 a sin theta / 2.

A finite learning rate shows in E (cos theta - cos 2 theta) by -0.050 at eta = 0.08, lambda = 0.4,
T = 2 and by half of it at half the rates (n = 5e5); without Phi, by -0.019.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde import LeastSquaresProblem, SphericalNoise
from manifold_sde.solvers.moments import moments_of
from manifold_sde.verification.exact import CircleDiffusion

A = 0.5
SCALE = 1.0
ANGLE = 1.0
START = torch.tensor([math.cos(ANGLE), math.sin(ANGLE), 0.0], dtype=torch.float64)
#: lambda / eta, and the time T at which laws are compared.
RATIO = 5.0
TIME = 2.0


def _residual(x: Tensor) -> Tensor:
    return torch.exp(A * x[0] / x[:2].norm()) * x[2:] / x.norm()


def problem() -> LeastSquaresProblem:
    return LeastSquaresProblem(_residual, 3, SphericalNoise(SCALE), rank=1, name="exponential")


def limit_map(x: Tensor) -> Tensor:
    """Phi: (..., 3) -> (..., 3)."""
    tangent = x[..., 2].square() / x[..., :2].square().sum(-1)
    half = torch.atan2(x[..., 1], x[..., 0]) / 2.0
    theta = 2.0 * torch.atan(half.tan() * torch.exp(0.5 * A * tangent))
    unit = torch.stack([theta.cos(), theta.sin(), torch.zeros_like(theta)], dim=-1)
    return x.norm(dim=-1, keepdim=True) * unit


def law() -> CircleDiffusion:
    """The exact law, from the closed form of its coefficients."""
    theta = 2.0 * math.pi * np.arange(65) / 65
    variance = np.full(65, SCALE**2)
    return CircleDiffusion(0.5 * SCALE**2 * A * np.sin(theta), variance, 2.0 * variance)


def observable(y: Tensor) -> Tensor:
    """Cos theta - cos 2 theta: (n, 3) -> (n,)."""
    theta = torch.atan2(y[:, 1], y[:, 0])
    return theta.cos() - (2.0 * theta).cos()


def expectation(joint: Any) -> float:
    """Its expectation under a law of the angle and the norm."""
    return float(joint.angle.expectation(lambda t: np.cos(t) - np.cos(2.0 * t)))


def sampled(x: Tensor, phi: Callable[[Tensor], Tensor] = limit_map) -> tuple[float, float]:
    """Its mean over weights (n, 3) of a run, and the standard error."""
    mean, error = moments_of("f", observable, phi(x)[None]).result()
    return float(mean), float(error)
