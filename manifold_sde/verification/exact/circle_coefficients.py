"""Drift and variance of the direction along a closed curve, from differences of the limit map."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp

from manifold_sde.errors import ArgumentError, LimitMapError, NoiseError, NotOnManifoldError
from manifold_sde.noise import SphericalNoise
from manifold_sde.problem import Problem
from manifold_sde.verification.exact.spectral import (
    fourier_derivative,
    fourier_nodes,
    fourier_tail,
)

Array = NDArray[np.float64]
Curve = Callable[[Array], Array]
LimitMap = Callable[[Array], Array]

#: Weights of f(k h) + f(-k h), k = 0, 1, ..., 4, in differences of order eight and six for f''.
_EIGHT = (-205 / 144, 8 / 5, -1 / 5, 8 / 315, -1 / 560)
_SIX = (-49 / 36, 3 / 2, -3 / 20, 1 / 90, 0.0)
#: Largest difference between the two, relative to the second derivative.
_CONVERGED = 1e-6
#: Largest gradient at norm 1, relative to the Hessian, on the curve and where the flow has ended.
_ON_CURVE, _ENDED = 1e-8, 1e-11
#: Largest violation of the two properties of the noise.
_VIOLATION = 1e-8
#: The flow runs for so many of its slowest relaxation times.
_RELAXATIONS = 34.0


def circle_coefficients(
    problem: Problem,
    curve: Curve | None,
    *,
    nodes: int,
    limit_map: LimitMap | None,
    step: float,
) -> tuple[Array, Array, Array]:
    r"""Drift, variance and trace along Gamma_1 in the clock u: three arrays (n,).

    With d^2 Phi[Sigma] = sum_j d^2/dh^2 Phi(y + h sigma_j) from differences of order eight, no
    formula for the second derivative of Phi is used. In the coordinate theta of the curve gamma,

    .. math::

        v = \frac{|\sigma^\top \gamma'|^2}{|\gamma'|^4}, \qquad
        b = \frac{\langle\gamma', \frac12 \partial^2\Phi[\Sigma] - \frac12 v \gamma''\rangle}
                 {|\gamma'|^2} .

    The arguments are those of ``CircleDiffusion.of``.
    """
    angles = fourier_nodes(_check_nodes(nodes))
    points = _points(problem, curve, angles)
    derivative = fourier_derivative(nodes)
    velocity = derivative @ points
    if not fourier_tail(points) <= 1e-9:
        raise ArgumentError(
            "the nodes do not resolve the curve",
            received=f"Fourier coefficients of {fourier_tail(points):.2g} at the end",
            expected="a smooth closed curve, traversed once from 0 to 2 pi",
            remedy=f"nodes={2 * nodes - 1}, or a curve with the period 2 pi",
        )
    speed = (velocity**2).sum(1)
    _check_noise(problem)
    slowest, size = _curvature(problem, points)
    factor = _shortest_factor(problem.noise_factor(torch.from_numpy(points)).numpy())
    variance = (np.einsum("idj,id->ij", factor, velocity) ** 2).sum(1) / speed**2
    trace = (factor**2).sum((1, 2))
    if not float((variance * speed).max()) > 1e-12 * float(trace.max()):
        raise ArgumentError(
            "the noise does not move the direction along the curve",
            received=f"a largest variance of {float((variance * speed).max()):.2g}",
            expected="a diffusion: noise with a tangential part (Assumption 5.2)",
            remedy="for label noise and at interpolation the limit is a flow, or stands still",
        )
    phi = limit_map or (lambda x: flow_to_limit(problem, x, slowest, size))
    second = second_difference(phi, points, factor, step)
    bent = 0.5 * second - 0.5 * variance[:, None] * (derivative @ velocity)
    drift = (velocity * bent).sum(1) / speed
    return drift, variance, trace


def reversible_coefficients(problem: Problem, *, nodes: int) -> tuple[Array, Array, Array]:
    """Drift, variance and trace for the noise of (18), from the known pdet H: three arrays (n,)."""
    angles = fourier_nodes(_check_nodes(nodes))
    facts = problem.facts
    if facts is None or facts.circle is None or facts.log_pseudo_determinant is None:
        raise ArgumentError(
            f"log pdet H on a circle is not known of {problem.name!r}",
            received="no such facts",
            expected="facts.circle and facts.log_pseudo_determinant",
            remedy="CircleDiffusion.of(problem, curve) asks for neither",
        )
    if type(problem.noise) is not SphericalNoise:
        raise ArgumentError(
            "the direction is reversible with respect to pdet(H)^{-1/2} for the noise of (18)",
            received=f"{problem.noise!r}",
            expected="SphericalNoise",
            remedy="CircleDiffusion.of(problem) takes every noise with the two properties",
        )
    values = facts.log_pseudo_determinant(facts.circle.point(torch.from_numpy(angles))).numpy()
    square = problem.noise.scale**2
    slope = fourier_derivative(nodes) @ values
    drift = -0.25 * square / facts.circle.radius**2 * slope
    variance = np.full(nodes, square / facts.circle.radius**2)
    return drift, variance, np.full(nodes, square * (problem.dim - 1))


def second_difference(phi: LimitMap, points: Array, factor: Array, step: float) -> Array:
    """The sum over j of d^2/dh^2 phi(y + h sigma_j) at h = 0: (n, D), (n, D, m) -> (n, D).

    At points y that phi leaves alone. Differences of order eight along each column, in one batch:
    if phi is computed with the same steps for all of its points, its own error is smooth and is not
    magnified.
    """
    if not 0.0 < step < 0.2:
        raise ArgumentError(
            "the step of the differences is out of range",
            received=repr(step),
            expected="a number between 0 and 0.2",
            remedy="step=0.02",
        )
    sizes = np.linalg.norm(factor, axis=1)  # (n, m)
    columns = factor.transpose(0, 2, 1) / np.where(sizes > 0, sizes, 1.0)[:, :, None]
    offsets = np.array([k * step for k in (-4, -3, -2, -1, 1, 2, 3, 4)])
    shifted = points[:, None, None] + offsets[:, None] * columns[:, :, None]  # (n, m, 8, D)
    ends = phi(shifted.reshape(-1, points.shape[1])).reshape(shifted.shape)
    sums = [2.0 * np.broadcast_to(points[:, None], columns.shape)]
    sums += [ends[:, :, 4 - k] + ends[:, :, 3 + k] for k in range(1, 5)]

    def derivative(weights: tuple[float, ...]) -> Array:
        terms = sum(weight * term for weight, term in zip(weights, sums, strict=True))
        return np.asarray((terms * sizes[:, :, None] ** 2).sum(1) / step**2, dtype=np.float64)

    second = derivative(_EIGHT)
    error = float(np.abs(second - derivative(_SIX)).max() / np.abs(second).max())
    if not error <= _CONVERGED:
        raise ArgumentError(
            "the differences of Phi have not converged",
            received=f"order six and eight differ by {error:.2g} at the step {step:g}",
            expected=f"at most {_CONVERGED:g}, relative to the largest second derivative",
            remedy=f"step={step / 4:g}, so that Phi is smooth over four steps on either side",
        )
    return second


def flow_to_limit(problem: Problem, x: Array, slowest: float, size: float) -> Array:
    """Phi(x), (k, D) -> (k, D), by SciPy's Dormand-Prince method of order eight.

    Args:
        problem: The problem.
        x: Points.
        slowest: Smallest positive eigenvalue of the Hessian at norm 1, which sets the time.
        size: Its largest eigenvalue.

    Returns:
        The limits, with the norms of x.

    Raises:
        LimitMapError: If a flow has not ended.
    """
    norms = np.linalg.norm(x, axis=1, keepdims=True)

    def force(state: Array) -> Array:
        z = state.reshape(x.shape)
        return -problem.gradient(torch.from_numpy(z)).numpy()

    result = solve_ivp(
        lambda _, state: force(state).ravel(),
        (0.0, _RELAXATIONS / slowest),
        (x / norms).ravel(),
        method="DOP853",
        rtol=1e-12,
        atol=1e-14,
        max_step=4.0 / size,  # at the limit of stability the end would be noisy
    )
    end = result.y[:, -1].reshape(x.shape)
    end /= np.linalg.norm(end, axis=1, keepdims=True)
    left = np.linalg.norm(force(end), axis=1) / size
    if not (result.success and left.max() <= _ENDED):
        raise LimitMapError(
            "gradient flow has not ended",
            received=f"{int((left > _ENDED).sum())} of {len(x)} points with a relative gradient "
            f"of up to {left.max():.2g}",
            expected=f"at most {_ENDED:g}",
            remedy="a smaller step, at which Phi is smooth, or limit_map=...",
            failed=torch.from_numpy(left > _ENDED),
        )
    limit: Array = norms * end
    return limit


def _points(problem: Problem, curve: Curve | None, angles: Array) -> Array:
    if curve is None:
        facts = problem.facts
        if facts is None or facts.circle is None:
            raise ArgumentError(
                f"no circle of minimisers is known of {problem.name!r}",
                received="curve=None",
                expected="a problem with facts.circle, or Gamma_1 as a function of an angle",
                remedy="CircleDiffusion.of(problem, curve)",
            )
        points: Array = facts.circle.point(torch.from_numpy(angles)).numpy()
        return points
    points = np.asarray(curve(angles), dtype=np.float64)
    if points.shape != (len(angles), problem.dim) or not np.isfinite(points).all():
        raise ArgumentError(
            "the curve does not give points",
            received=f"shape {points.shape}, finite: {bool(np.isfinite(points).all())}",
            expected=f"({len(angles)}, {problem.dim}) for {len(angles)} angles",
            remedy="a function of an array of angles, with the points as rows",
        )
    return points


def _curvature(problem: Problem, points: Array) -> tuple[float, float]:
    """Smallest positive and largest eigenvalue of H on the curve, if it is Gamma_1."""
    y = torch.from_numpy(points)
    eigenvalues = np.linalg.eigvalsh(problem.hessian(y).numpy())
    eigenvalues = np.pad(eigenvalues, ((0, 0), (0, max(0, 3 - problem.dim))))
    size = float(eigenvalues.max())
    gradient = float(problem.gradient(y).norm(dim=-1).max()) / size
    length = float(np.abs(np.linalg.norm(points, axis=1) - 1.0).max())
    if not (gradient <= _ON_CURVE and length <= 1e-9):
        raise NotOnManifoldError(
            "the curve is not one of minimisers of unit norm",
            received=f"relative gradients of up to {gradient:.2g}, norms off by {length:.2g}",
            expected=f"at most {_ON_CURVE:g} and 1e-9",
            remedy="unit vectors: the slice Gamma_1, not another curve on the cone",
        )
    kernel, rest = float(np.abs(eigenvalues[:, 1]).max()), float(eigenvalues[:, 2].min())
    if not kernel < 1e-8 * size < rest:
        raise ArgumentError(
            "the minimisers of unit norm are not a curve",
            received=f"second and third eigenvalue of H of {kernel:.2g} and {rest:.2g}",
            expected="a kernel of dimension two: the curve's direction and the radius",
            remedy="dim Gamma_1 = 1 is needed; problems.varying_circle() has it",
        )
    return rest, size


def _shortest_factor(factor: Array) -> Array:
    """A factor of the same covariance with D - 1 columns, those of eigenvectors."""
    values, vectors = np.linalg.eigh(factor @ factor.transpose(0, 2, 1))
    shortest: Array = vectors[:, :, 1:] * np.sqrt(np.maximum(values[:, None, 1:], 0.0))
    return shortest


def _check_noise(problem: Problem) -> None:
    violations = problem.noise_violations()
    if not max(violations.values()) <= _VIOLATION:
        raise NoiseError(
            "the noise has not the two properties, so the direction has no law of its own",
            received=", ".join(f"{name} {value:.2g}" for name, value in violations.items()),
            expected=f"violations of at most {_VIOLATION:g}",
            remedy="sigma of degree -1 with sigma^T x = 0, as of every scale-invariant loss",
        )


def _check_nodes(nodes: int) -> int:
    if not (isinstance(nodes, int) and nodes >= 9 and nodes % 2):
        raise ArgumentError(
            "the number of nodes is out of range",
            received=f"nodes={nodes!r}",
            expected="an odd integer of at least 9",
            remedy="nodes=65",
        )
    return nodes
