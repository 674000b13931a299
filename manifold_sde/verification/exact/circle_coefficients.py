"""Drift and variance of the direction along a closed curve, from differences of the limit map."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.integrate import solve_ivp

from manifold_sde.arguments import real
from manifold_sde.compile import compile_points
from manifold_sde.errors import ArgumentError, LimitMapError, NoiseError, NotOnManifoldError
from manifold_sde.noise.base import require_independent_steps
from manifold_sde.problem import Problem, require_problem
from manifold_sde.verification.exact.facts import chart_of, known, spherical_scale
from manifold_sde.verification.exact.inputs import check_nodes, values_at
from manifold_sde.verification.exact.spectral import (
    Array,
    fourier_derivative,
    fourier_nodes,
    fourier_tail,
)

Curve = Callable[[Array], Array]
LimitMap = Callable[[Array], Array]

#: Weights of f(k h) + f(-k h), k = 0, 1, ..., 4, in differences of order eight and six for f''.
_EIGHT = (-205 / 144, 8 / 5, -1 / 5, 8 / 315, -1 / 560)
_SIX = (-49 / 36, 3 / 2, -3 / 20, 1 / 90, 0.0)
#: Largest difference between the two, relative to the second derivative or the noise's trace.
_CONVERGED = 1e-6
#: Largest gradient at norm 1, relative to the Hessian, on the curve and where the flow has ended.
_ON_CURVE, _ENDED = 1e-8, 1e-11
#: Largest violation of the two properties of the noise.
_VIOLATION = 1e-8
#: Time of the flow, in units of its slowest relaxation time.
_RELAXATIONS = 34.0


def circle_coefficients(
    problem: Problem,
    curve: Curve | None,
    *,
    nodes: int,
    limit_map: LimitMap | None,
    step: float,
) -> tuple[Array, Array, Array]:
    r"""Compute drift, variance and trace along Gamma_1 in the clock u: three arrays (n,).

    With d^2 Phi[Sigma] = sum_j d^2/dh^2 Phi(y + h sigma_j) from differences of order eight, no
    formula for the second derivative of Phi is used. In the coordinate theta of the curve gamma,

    .. math::

        v = \frac{|\sigma^\top \gamma'|^2}{|\gamma'|^4}, \qquad
        b = \frac{\langle\gamma', \frac12 \partial^2\Phi[\Sigma] - \frac12 v \gamma''\rangle}
                 {|\gamma'|^2} .

    The arguments are those of ``CircleDiffusion.of``.
    """
    require_problem(problem)
    angles = fourier_nodes(check_nodes("nodes", nodes))
    curve = chart_of(known(problem, "circle")) if curve is None else curve
    points = values_at("curve", curve, (nodes, problem.dim), angles)
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
    slowest, size = curvature_of(problem, points)
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

    def phi(x: Array) -> Array:
        if limit_map is None:
            return flow_to_limit(problem, x, slowest, size)
        return values_at("limit map", limit_map, x.shape, x)

    second = second_difference(phi, points, factor, step)
    bent = 0.5 * second - 0.5 * variance[:, None] * (derivative @ velocity)
    drift = (velocity * bent).sum(1) / speed
    return drift, variance, trace


def reversible_coefficients(problem: Problem, *, nodes: int) -> tuple[Array, Array, Array]:
    """Compute the same from the known pdet H, for the noise of (18)."""
    circle, square = known(require_problem(problem), "circle"), spherical_scale(problem) ** 2
    points = circle.point(torch.from_numpy(fourier_nodes(check_nodes("nodes", nodes))))
    values = known(problem, "log_pseudo_determinant")(points).numpy()
    slope = fourier_derivative(nodes) @ values
    drift = -0.25 * square / circle.radius**2 * slope
    variance = np.full(nodes, square / circle.radius**2)
    return drift, variance, np.full(nodes, square * (problem.dim - 1))


def second_difference(phi: LimitMap, points: Array, factor: Array, step: float) -> Array:
    """Sum d^2/dh^2 phi(y + h sigma_j) at h = 0 over j: (n, D), (n, D, m) -> (n, D).

    The points y are fixed points of phi. All differences, of order eight, are one batch: where phi
    takes the same steps for all of its points, its error is smooth and is not magnified.
    """
    size = real(step)
    if not 0.0 < size < 0.2:
        raise ArgumentError(
            "the step of the differences is out of range",
            received=repr(step),
            expected="a number between 0 and 0.2",
            remedy="step=0.02",
        )
    sizes = np.linalg.norm(factor, axis=1)  # (n, m)
    columns = factor.transpose(0, 2, 1) / np.where(sizes > 0, sizes, 1.0)[:, :, None]
    offsets = np.array([k * size for k in (-4, -3, -2, -1, 1, 2, 3, 4)])
    shifted = points[:, None, None] + offsets[:, None] * columns[:, :, None]  # (n, m, 8, D)
    ends = phi(shifted.reshape(-1, points.shape[1])).reshape(shifted.shape)
    sums = [2.0 * np.broadcast_to(points[:, None], columns.shape)]
    sums += [ends[:, :, 4 - k] + ends[:, :, 3 + k] for k in range(1, 5)]

    def derivative(weights: tuple[float, ...]) -> Array:
        terms = sum(weight * term for weight, term in zip(weights, sums, strict=True))
        return np.asarray((terms * sizes[:, :, None] ** 2).sum(1) / size**2, dtype=np.float64)

    second = derivative(_EIGHT)
    # Phi of norm 1 may have no second derivative at all along the noise, as on a great circle.
    largest = max(np.abs(second).max(), (sizes**2).sum(1).max())
    error = float(np.abs(second - derivative(_SIX)).max() / largest)
    if not error <= _CONVERGED:
        raise ArgumentError(
            "the differences of Phi have not converged",
            received=f"order six and eight differ by {error:.2g} at the step {size:g}",
            expected=f"at most {_CONVERGED:g}, relative to the second derivative or the noise",
            remedy=f"step={size / 4:g}, so that Phi is smooth over four steps on either side",
        )
    return second


def flow_to_limit(problem: Problem, x: Array, slowest: float, size: float) -> Array:
    """Compute Phi, (k, D) -> (k, D), by SciPy's Dormand-Prince method of order eight.

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

    # The flow asks for the gradient thousands of times.
    few = torch.from_numpy(np.ascontiguousarray(x[:2].T))
    kernel = compile_points(problem.pointwise.gradient, (few,))

    def force(z: Array) -> Array:
        if kernel is None:
            return -problem.gradient(torch.from_numpy(z)).numpy()
        gradient = kernel(torch.from_numpy(np.ascontiguousarray(z.T)))
        assert isinstance(gradient, torch.Tensor)
        return -gradient.numpy().T

    result = solve_ivp(
        lambda _, state: force(state.reshape(x.shape)).ravel(),
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


def curvature_of(problem: Problem, points: Array) -> tuple[float, float]:
    """Return the smallest positive and the largest eigenvalue of H on a curve that is Gamma_1.

    Raises:
        NotOnManifoldError: If its points are not minimisers of unit norm.
        ArgumentError: If these are not a curve.
    """
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
    """Return a factor of the same covariance with D - 1 columns, scaled eigenvectors."""
    values, vectors = np.linalg.eigh(factor @ factor.transpose(0, 2, 1))
    shortest: Array = vectors[:, :, 1:] * np.sqrt(np.maximum(values[:, None, 1:], 0.0))
    return shortest


def _check_noise(problem: Problem) -> None:
    require_independent_steps(problem.noise, problem.pointwise, "the direction's law")
    violations = problem.noise_violations()
    if not max(violations.values()) <= _VIOLATION:
        raise NoiseError(
            "the noise lacks the two properties, so the direction alone has no law",
            received=", ".join(f"{name} {value:.2g}" for name, value in violations.items()),
            expected=f"violations of at most {_VIOLATION:g}",
            remedy="sigma of degree -1 with sigma^T x = 0, as of every scale-invariant loss",
        )
