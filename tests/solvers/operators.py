"""The one-step operator of a scheme, by quadrature: weak errors without sampling.

Where dim Gamma_1 = 1 a step takes a function of the angle to its expectation after the step. The
random numbers of a step that act are integrated by tensor Gauss-Hermite rules, functions are held
by their values at equally spaced angles, and powers of the matrix give the law of the scheme.

On a circle or a sphere all of whose points are alike (rotations take the problem, its noise and the
scheme to themselves) harmonics are eigenfunctions of the step, and one start gives the eigenvalues.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import scipy.linalg
import torch
from scipy.special import eval_legendre
from torch import Tensor

from benchmarks.weak_errors import gauss_hermite
from manifold_sde import DirectionDiffusion, Problem, problems
from manifold_sde.equations import StochasticEquation
from manifold_sde.solvers.schemes import PhiJet, Scheme, StepNoise, Weak2
from manifold_sde.verification.exact import CircleDiffusion
from manifold_sde.verification.exact.spectral import (
    fourier_cardinals,
    fourier_nodes,
)

Array = np.ndarray

ROOT = 0.5**0.5
#: Problems, by the names that the functions here take.
PROBLEMS = {
    "varying": problems.varying_circle,
    "mixed": problems.mixed_noise_circle,
    "linear": lambda: problems.normalized_linear(6, 4, design="orthogonal"),
    "circle": problems.great_circle,
    "sphere": problems.great_sphere,
}


@functools.cache
def problem(name: str) -> Problem:
    """The problem of that name."""
    return PROBLEMS[name]()


@functools.cache
def law(name: str) -> CircleDiffusion:
    """The exact law of the direction on the circles where it has a drift."""
    made = problem(name)
    return CircleDiffusion.of(made) if name == "mixed" else CircleDiffusion.reversible(made)


def direction(name: str, calculus: str | None) -> DirectionDiffusion:
    """The direction diffusion of a problem, in a form of calculus, ready for use."""
    sde = DirectionDiffusion(problem(name), calculus or "ito")
    sde.require_on_manifold(problem(name).minimizer)
    return sde


def acting(name: str, scheme: Scheme) -> Tensor:
    """Orthonormal directions (m, k) of the noise that act on the direction in a step."""
    made = problem(name)
    if name == "mixed":
        # Samples j and j + 2 differ by tilts of opposite sign: only w_j - w_{j+2} is left.
        columns = [[ROOT, 0.0], [0.0, ROOT], [-ROOT, 0.0], [0.0, -ROOT]]
        return torch.tensor(columns, dtype=torch.float64)
    if name == "linear":
        # H is isotropic on its range: nothing leaves the span of the circle's plane and centre.
        circle = made.facts.circle
        return torch.cat([circle.basis, circle.center[None] / circle.center.norm()]).T
    # Gamma is x_D = 0, and so is all that the other components do. Phi goes along meridians where
    # the curvature is constant, and otherwise along curves that end elsewhere.
    whole = name == "varying" and isinstance(scheme, PhiJet)
    return torch.eye(made.dim, dtype=torch.float64)[:, : made.dim - 1 + whole]


def rule(scheme: Scheme, directions: Tensor, quadrature: int) -> tuple[Tensor, Tensor]:
    """Normals (2, m, q) of a step, those of dW and the others, and their weights (q,)."""
    dim = directions.shape[1]
    parts = 2 if isinstance(scheme, Weak2) else 1
    points, weights = gauss_hermite(parts * dim, quadrature)
    normals = directions @ points.reshape(parts, dim, -1)
    return (normals if parts == 2 else torch.cat([normals, torch.zeros_like(normals)])), weights


def moved(scheme: Scheme, sde: StochasticEquation, x: Tensor, h: float, normals: Tensor) -> Tensor:
    """Points (D, n) after one step from x (D, n) with normals (2, m, n)."""
    noise = StepNoise(h**0.5 * normals[0], lambda: normals[1])
    end, _ = scheme.step(sde, x, sde.reference_basis(x), torch.tensor(h, dtype=x.dtype), noise)
    assert bool(torch.isfinite(end).all())
    return end


@torch.no_grad()
def one_step(
    name: str,
    scheme: Scheme,
    sde: StochasticEquation,
    h: float,
    *,
    nodes: int = 33,
    quadrature: int | None = None,
) -> Array:
    """Matrix (n, n) that takes values of f at n angles to E f after one step from there.

    Args:
        name: Name of a problem with a circle.
        scheme: The scheme.
        sde: StochasticEquation of its direction diffusion.
        h: The step, in the clock.
        nodes: Odd number n of angles.
        quadrature: Nodes for each random number; by default 4 for weak2 and the Phi-jet, whose
            steps are dear or have more of them, and 6 for the others. With 4 the moments up to
            degree 7 are exact.
    """
    circle = problem(name).facts.circle
    quadrature = quadrature or (4 if isinstance(scheme, (PhiJet, Weak2)) else 6)
    normals, weights = rule(scheme, acting(name, scheme), quadrature)
    count = len(weights)
    angles = torch.from_numpy(fourier_nodes(nodes)).repeat_interleave(count)
    x = circle.point(angles).T.contiguous()
    end = moved(scheme, sde, x, h, normals.repeat(1, 1, nodes))
    new = circle.angle(end.T).numpy()
    cardinals = fourier_cardinals(nodes, new).reshape(nodes, count, nodes)
    return np.einsum("q,iqj->ij", weights.numpy(), cardinals)


@torch.no_grad()
def decay(
    name: str,
    scheme: Scheme,
    sde: StochasticEquation,
    h: float,
    start: Tensor,
    *,
    degree: int = 3,
    quadrature: int = 4,
) -> Array:
    """Factors (degree,) of the first harmonics in one step, where all points are alike.

    Of cos(k angle) on a circle, and of Legendre's polynomials of <start, .> on a 2-sphere.

    Args:
        name: Name of the problem.
        scheme: The scheme.
        sde: StochasticEquation of its direction diffusion.
        h: The step, in the clock.
        start: The point (D,) from which the step is made.
        degree: Number of harmonics.
        quadrature: Nodes for each random number.
    """
    circle = problem(name).facts.circle
    normals, weights = rule(scheme, acting(name, scheme), quadrature)
    x = start[:, None].expand(-1, len(weights)).contiguous()
    end = moved(scheme, sde, x, h, normals)
    orders = np.arange(1, degree + 1)[:, None]
    if circle is None:
        values = eval_legendre(orders, (start @ end).numpy())
    else:
        values = np.cos(orders * (circle.angle(end.T) - circle.angle(start)).numpy())
    return values @ weights.numpy()


def harmonics(angles: Array, degree: int = 3) -> Array:
    """Values (n, 2 degree) of the first harmonics."""
    waves = np.arange(1, degree + 1) * angles[:, None]
    return np.concatenate([np.cos(waves), np.sin(waves)], 1)


def weak_error(matrix: Array, h: float, exact: CircleDiffusion, u: float) -> float:
    """Largest error of E f(angle) at the clock u, over all starts and the first harmonics f."""
    n = len(matrix)
    have = np.linalg.matrix_power(matrix, _steps(u, h)) @ harmonics(fourier_nodes(n))
    values = scipy.linalg.expm(u * exact.generator) @ harmonics(exact.angles)
    want = fourier_cardinals(len(values), fourier_nodes(n)) @ values
    return float(np.abs(have - want).max())


def decay_error(factors: Array, h: float, rates: Array, u: float) -> float:
    """Largest error of the harmonics at the clock u, from their factors in one step."""
    return float(np.abs(factors ** _steps(u, h) - np.exp(-rates * u)).max())


def _steps(u: float, h: float) -> int:
    steps = round(u / h)
    assert abs(steps * h - u) < 1e-9 * u
    return steps


def slopes(errors: Sequence[float]) -> list[float]:
    """Orders by which the errors fall from step to half a step."""
    return [float(np.log2(a / b)) for a, b in itertools.pairwise(errors)]
