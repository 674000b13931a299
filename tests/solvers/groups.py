"""Two groups of weights whose laws are known, for the tests of the groups' clock."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.integrate import quad
from torch import Tensor

from manifold_sde import CustomNoise, Problem, SamplingNoise
from manifold_sde.problems.circles import _TiltedSamples

GROUPS = (slice(0, 3), slice(3, 6))
#: Noise scales of the two groups of :func:`torus`, and how much its curvature varies.
SCALES, AMPLITUDE = (0.2, 0.8), 0.8


def torus() -> Problem:
    """L = (1 + k cos psi)^2 a_3^2 / 2 + b_3^2 / 2, psi the angle between two great circles.

    Each group has noise of its own, s_g / |x_g| in all directions orthogonal to x_g: V_g = 2 s_g^2.
    """

    def units(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:3] / x[:3].norm(), x[3:] / x[3:].norm()

    def loss(x: Tensor) -> Tensor:
        a, b = units(x)
        weight = 1.0 + AMPLITUDE * (a[0] * b[0] + a[1] * b[1])
        return 0.5 * (weight * a[2]) ** 2 + 0.5 * b[2] ** 2

    def factor(x: Tensor) -> Tensor:
        identity = torch.eye(3, dtype=x.dtype)
        return torch.block_diag(
            *(
                scale / x[g].norm() * (identity - torch.outer(u, u))
                for scale, g, u in zip(SCALES, GROUPS, units(x), strict=True)
            )
        )

    return Problem(loss, 6, CustomNoise(factor), rank=2)


def torus_start(ratio: float) -> Tensor:
    """A unit vector on the manifold at psi = 0, the first group's norm over the second's given."""
    y = torch.tensor([ratio, 0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    return y / y.norm()


def cosine(y: Tensor) -> Tensor:
    """The cosine of psi: (..., 6) -> (...)."""
    a, b = (y[..., g] / y[..., g].norm(dim=-1, keepdim=True) for g in GROUPS)
    return a[..., 0] * b[..., 0] + a[..., 1] * b[..., 1]


def mean_cosine(power: float) -> float:
    """E cos psi under a density proportional to (1 + k cos psi)^(-2 power)."""

    def moment(f: Callable[[float], float]) -> float:
        weight = lambda p: (1.0 + AMPLITUDE * np.cos(p)) ** (-2.0 * power)  # noqa: E731
        return float(quad(lambda p: f(p) * weight(p), 0.0, np.pi)[0])

    return moment(np.cos) / moment(lambda _: 1.0)


def known_mean() -> float:
    r"""E cos psi in equilibrium, by hand.

    With h = (1 + k cos psi)^2 the angles of the groups have the drift -s_1^2 d log h / (4 r_1^2
    r_g^2) and the variance s_g^2 / r_g^4, and r_g^4 = V_g / 2c. So psi has the drift -(c/4) (1 +
    s_1/s_2) d log h and the variance 2c: its density is h^{-(1 + s_1/s_2)/4}.
    """
    return mean_cosine(0.25 * (1.0 + SCALES[0] / SCALES[1]))


def common_norm_mean() -> float:
    """The same where the groups' norms are one and the same, as they are at ratio 1 for ever."""
    first, second = (scale**2 for scale in SCALES)
    return mean_cosine(first / (first + second))


#: Tilts of the two groups of :func:`circles`: V_g is four times as large in the second.
TILTS = (0.3, 0.6)


def circles() -> Problem:
    """Two circles with mixed noise side by side: sampling noise, each group a known law."""
    parts = [_TiltedSamples(0.5, tilt, 0.6) for tilt in TILTS]

    def samples(x: Tensor) -> Tensor:
        return (parts[0](x[:3])[:, None] + parts[1](x[3:])[None]).reshape(-1)

    return Problem(samples, 6, SamplingNoise(), rank=2)
