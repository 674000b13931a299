"""The one-step operator of a scheme on a circle, by quadrature: weak errors without sampling.

Where dim Gamma_1 = 1 a step takes a function of the angle to its expectation after the step. The
random numbers of a step that act are integrated by tensor Gauss-Hermite rules, functions are held
by their values at equally spaced angles, and powers of the matrix give the law of the scheme.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from manifold_sde import Problem, problems
from manifold_sde.solvers.schemes import Motion, Noise, Scheme
from manifold_sde.verification.exact import CircleDiffusion
from manifold_sde.verification.exact.spectral import fourier_cardinals, fourier_nodes

Array = np.ndarray

ROOT = 0.5**0.5
#: Orthonormal directions (m, 2) of the noise that act on the circle of a problem.
ACTING = {
    # Gamma_1 lies in the plane x_3 = 0, and so does all that the first two components do.
    "varying": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64),
    # Samples j and j + 2 differ by tilts of opposite sign: only w_j - w_{j+2} is left.
    "mixed": torch.tensor(
        [[ROOT, 0.0], [0.0, ROOT], [-ROOT, 0.0], [0.0, -ROOT]], dtype=torch.float64
    ),
}


def problem(name: str) -> Problem:
    """The problem whose noise acts in the directions of that name."""
    return {"varying": problems.varying_circle, "mixed": problems.mixed_noise_circle}[name]()


def gauss_hermite(dim: int, nodes: int) -> tuple[Tensor, Tensor]:
    """Tensor rule for independent standard normals: points (dim, q), weights (q,).

    Points whose weight is below rounding are left out.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    grid = np.array(list(itertools.product(points, repeat=dim))).T
    masses = np.array(list(itertools.product(weights, repeat=dim))).prod(1)
    kept = masses > 1e-15
    return torch.from_numpy(grid[:, kept].copy()), torch.from_numpy(masses[kept])


@torch.no_grad()
def one_step(
    name: str, scheme: Scheme, motion: Motion, h: float, *, nodes: int = 33, quadrature: int = 8
) -> Array:
    """Matrix (n, n) that takes values of f at n angles to E f after one step from there.

    Args:
        name: Name of the problem.
        scheme: The scheme.
        motion: Motion of the direction diffusion.
        h: The step, in the clock.
        nodes: Odd number n of angles.
        quadrature: Nodes for each random number.
    """
    circle = motion.sde.problem.facts.circle
    points, weights = gauss_hermite(4 if scheme.name.startswith("weak2") else 2, quadrature)
    count = len(weights)
    angles = torch.from_numpy(fourier_nodes(nodes)).repeat_interleave(count)
    x = circle.point(angles).T.contiguous()
    normals = (ACTING[name] @ points.reshape(-1, 2, count)).repeat(1, 1, nodes)
    noise = Noise(h**0.5 * normals[0], lambda: normals[1])
    step = torch.tensor(h, dtype=torch.float64)
    moved, _ = scheme.step(motion, x, motion.anchor(x), step, noise)
    new = circle.angle(moved.T).numpy()
    assert np.isfinite(new).all()
    cardinals = fourier_cardinals(nodes, new).reshape(nodes, count, nodes)
    return np.einsum("q,iqj->ij", weights.numpy(), cardinals)


def harmonics(angles: Array, degree: int = 3) -> Array:
    """Values (n, 2 degree) of the first harmonics."""
    waves = np.arange(1, degree + 1) * angles[:, None]
    return np.concatenate([np.cos(waves), np.sin(waves)], 1)


def weak_error(matrix: Array, h: float, law: CircleDiffusion, u: float) -> float:
    """Largest error of E f(angle) at the clock u, over all starts and the first harmonics f."""
    steps = round(u / h)
    assert abs(steps * h - u) < 1e-9 * u
    n = len(matrix)
    have = np.linalg.matrix_power(matrix, steps) @ harmonics(fourier_nodes(n))
    exact = scipy.linalg.expm(u * law.generator) @ harmonics(law.angles)
    want = fourier_cardinals(len(exact), fourier_nodes(n)) @ exact
    return float(np.abs(have - want).max())


def slopes(errors: Sequence[float]) -> list[float]:
    """Orders by which the errors fall from step to half a step."""
    return [float(np.log2(a / b)) for a, b in itertools.pairwise(errors)]
