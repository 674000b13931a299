r"""Gradient flow to its limit: a stiff exponential integrator for a batch of points.

Near a manifold of minimisers gradient flow is stiff, with the condition number of the Hessian,
and its end is all that is asked for. An exponential Rosenbrock method takes the Hessian's
eigendecomposition at the beginning of each step and is exact for the linear part, so that the
steps grow without bound as the flow settles. Only the limit counts, so errors in directions
that the flow is about to contract are weighted down by the distance that is left.

Source: Hochbruck, Ostermann and Schweitzer, "Exponential Rosenbrock-type methods", SIAM J. Numer.
Anal. 47 (2009); the fifth-order method exprb53s3 with three stages is that of Luan and Ostermann,
J. Comput. Appl. Math. 255 (2014). The fourth-order exponential Runge-Kutta method for the tangents
is that of Hochbruck and Ostermann, SIAM J. Numer. Anal. 43 (2005), equation (5.19).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Newton displacement, relative to the norm, at which the flow counts as settled.
SETTLED = {torch.float64: 1e-10, torch.float32: 1e-4}
#: Relative size below which an eigenvalue off the manifold belongs to the slow directions.
SLOW = 1e-7
TANGENT_FACTOR = 10.0
_FIRST_STEP = 0.1
_SAFETY = 0.9
_SHRINK, _GROW = 0.2, 8.0

BatchFunction = Callable[[Tensor], Tensor]
BatchProduct = Callable[[Tensor, Tensor], Tensor]


@dataclass
class FlowResult:
    """Where the flows of a batch ended.

    Attributes:
        points: End points (n, D).
        tangents: Images of the tangents (n, D, k), or ``None``.
        settled: Whether each flow settled, (n,).
        times: Flow time reached, (n,).
        distances: Newton displacement left, (n,).
        gradient_evaluations, hessian_evaluations: Totals over the batch.
    """

    points: Tensor
    tangents: Tensor | None
    settled: Tensor
    times: Tensor
    distances: Tensor
    gradient_evaluations: int
    hessian_evaluations: int


def phi_functions(z: Tensor, count: int) -> list[Tensor]:
    """The functions phi_1, ..., phi_count of exponential integrators, elementwise.

    phi_0 = exp and phi_{k+1}(z) = (phi_k(z) - 1/k!) / z; by Taylor series for small |z|, where
    the recursion cancels.
    """
    small = z.abs() < 1.0
    near = torch.where(small, z, torch.zeros_like(z))
    far = torch.where(small, torch.ones_like(z), z)
    values = []
    recursive = torch.exp(far)
    for k in range(1, count + 1):
        recursive = (recursive - 1.0 / math.factorial(k - 1)) / far
        series = torch.zeros_like(z)
        for j in range(19, -1, -1):
            series = series * near + 1.0 / math.factorial(j + k)
        values.append(torch.where(small, series, recursive))
    return values


def settle(
    gradient: BatchFunction,
    hessian: BatchFunction,
    x: Tensor,
    *,
    rtol: float,
    max_steps: int,
    rank: int | None = None,
    hessian_product: BatchProduct | None = None,
    tangents: Tensor | None = None,
) -> FlowResult:
    """Follow gradient flow from each point until it has settled.

    Args:
        gradient: Batched gradient (n, D) -> (n, D).
        hessian: Batched Hessian (n, D) -> (n, D, D).
        x: Start points (n, D), of norm about 1.
        rtol: Accuracy of the limit relative to the norm.
        max_steps: Steps after which a flow counts as failed.
        rank: Rank of the Hessian at the limit, if it is known.
        hessian_product: Batched (n, D), (n, D, k) -> (n, D, k); needed with tangents.
        tangents: Tangent vectors to transport, (n, D, k).

    Returns:
        The end points, each with its own step sizes: a flow does not depend on its batch.
    """
    # The estimate is that of the third-order method inside a fifth-order one: the error per step
    # of the latter is about the 3/2 power of it. The constants are measured: the error of the
    # limit stays below rtol and that of the tangents below the root of it.
    step_tolerance = 0.25 * rtol ** (2.0 / 3.0)
    tangent_tolerance = TANGENT_FACTOR * rtol ** (2.0 / 3.0)
    threshold = SETTLED.get(x.dtype, 1e-3)
    n = x.shape[0]
    points, carried = x.clone(), None if tangents is None else tangents.clone()
    times = torch.zeros(n, dtype=x.dtype, device=x.device)
    distances = torch.full((n,), torch.inf, dtype=x.dtype, device=x.device)
    settled = torch.zeros(n, dtype=torch.bool, device=x.device)
    steps = torch.full((n,), torch.nan, dtype=x.dtype, device=x.device)
    active = torch.arange(n, device=x.device)
    gradients = hessians = 0

    for _ in range(max_steps):
        here = points[active]
        force = -gradient(here)
        matrix = hessian(here)
        gradients += len(active)
        hessians += len(active)
        finite = torch.isfinite(force).all(-1) & torch.isfinite(matrix).flatten(1).all(-1)
        if not bool(finite.all()):
            active, here, force, matrix = (
                active[finite],
                here[finite],
                force[finite],
                matrix[finite],
            )
            if len(active) == 0:
                break
        values, basis = torch.linalg.eigh(matrix)
        distance = _newton_displacement(values, basis, force, rank) / here.norm(dim=-1)
        distances[active] = distance
        done = distance <= threshold
        settled[active[done]] = True
        keep = ~done
        if not bool(keep.any()):
            break
        active, here, force = active[keep], here[keep], force[keep]
        values, basis, matrix = values[keep], basis[keep], matrix[keep]
        largest = values.abs().max(dim=-1).values
        h = steps[active]
        h = torch.where(torch.isnan(h), _FIRST_STEP / largest, h)
        new, error = _exprb53(gradient, here, force, matrix, values, basis, h, distance[keep])
        gradients += 2 * len(active)
        error = error / here.norm(dim=-1)
        usable = torch.isfinite(new).all(-1) & torch.isfinite(error)
        accepted = usable & (error <= step_tolerance)
        excess = error / step_tolerance
        if carried is not None:
            assert hessian_product is not None
            images, image_error = _transport(
                gradient, hessian_product, here, force, carried[active], values, basis, h
            )
            gradients += 4 * len(active)
            excess = torch.maximum(excess, image_error / tangent_tolerance)
            usable = usable & torch.isfinite(image_error)
            accepted = usable & (excess <= 1.0)
            carried[active[accepted]] = images[accepted]
        factor = _SAFETY * excess.clamp(min=1e-300) ** -0.25
        factor = torch.where(usable, factor.clamp(_SHRINK, _GROW), torch.full_like(h, _SHRINK))
        moved = active[accepted]
        points[moved] = new[accepted]
        times[moved] += h[accepted]
        steps[active] = torch.where(accepted, h * factor, h * factor.clamp(max=1.0))
    return FlowResult(points, carried, settled, times, distances, gradients, hessians)


def _newton_displacement(values: Tensor, basis: Tensor, force: Tensor, rank: int | None) -> Tensor:
    """Norm of the Newton step in the fast directions, an estimate of the distance to Gamma."""
    components = (basis.mT @ force[..., None])[..., 0]
    if rank is not None:
        fast = torch.zeros_like(values, dtype=torch.bool)
        fast[:, values.shape[-1] - rank :] = True
        fast &= values > 0
        # Not yet a minimum in the directions that should be normal: far away.
        missing = fast.sum(-1) < rank
    else:
        fast = values.abs() > SLOW * values.abs().max(dim=-1, keepdim=True).values
        missing = torch.zeros(values.shape[0], dtype=torch.bool, device=values.device)
    step = torch.where(fast, components / torch.where(fast, values, torch.ones_like(values)), 0.0)
    size = step.norm(dim=-1)
    # A point at which the gradient vanishes is at rest, whatever the curvature.
    at_rest = components.norm(dim=-1) == 0
    return torch.where(missing & ~at_rest, torch.ones_like(size), size)


def _exprb53(
    gradient: BatchFunction,
    x: Tensor,
    force: Tensor,
    matrix: Tensor,
    values: Tensor,
    basis: Tensor,
    h: Tensor,
    distance: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of exprb53s3, and the weighted norm of the third-order estimate of its error."""
    h = h[:, None]
    z = -h * values
    half, most, full = (phi_functions(c * z, 4) for c in (0.5, 0.9, 1.0))

    def inside(v: Tensor) -> Tensor:
        return (basis.mT @ v[..., None])[..., 0]

    def outside(v: Tensor) -> Tensor:
        return (basis @ v[..., None])[..., 0]

    def defect(stage: Tensor) -> Tensor:
        """Nonlinear remainder of the force at a stage, in the eigenbasis."""
        linear = force - (matrix @ (stage - x)[..., None])[..., 0]
        return inside(-gradient(stage) - linear)

    f = inside(force)
    d2 = defect(x + outside(0.5 * h * half[0] * f))
    bend = (27.0 / 25.0) * half[2] + (729.0 / 125.0) * most[2]
    d3 = defect(x + outside(0.9 * h * most[0] * f + h * bend * d2))
    phi1, _, phi3, phi4 = full
    last = -60.0 * phi4 * d2 + (500.0 / 27.0) * phi4 * d3
    new = x + outside(h * (phi1 * f + phi3 * (18.0 * d2 - (250.0 / 81.0) * d3) + last))
    fast = values > SLOW * values.abs().max(dim=-1, keepdim=True).values
    weight = torch.where(fast, distance.clamp(max=1.0)[:, None], torch.ones_like(values))
    return new, (weight * h * last).norm(dim=-1)


def _transport(
    gradient: BatchFunction,
    hessian_product: BatchProduct,
    x: Tensor,
    force: Tensor,
    tangents: Tensor,
    values: Tensor,
    basis: Tensor,
    h: Tensor,
) -> tuple[Tensor, Tensor]:
    """Carry tangents along one step of the flow: S' = -H(x(t)) S, fourth order.

    The pair (x, S) is stepped with the linear part -H(x_n) in both: the remainder of S is
    -(H(x) - H(x_n)) S, of the size of the distance that is left. The estimate of the error,
    relative to the tangents at the start, comes from the two stages in the middle of the step.
    """
    h = h[:, None]
    z = -h * values
    halves, fulls = phi_functions(0.5 * z, 3), phi_functions(z, 3)
    phi12, phi22, phi32 = halves
    phi1, phi2, phi3 = fulls
    exp_half, exp_full = torch.exp(0.5 * z), torch.exp(z)

    def inside(v: Tensor) -> Tensor:
        return (basis.mT @ v[..., None])[..., 0]

    def outside(v: Tensor) -> Tensor:
        return (basis @ v[..., None])[..., 0]

    f = inside(force)
    s = basis.mT @ tangents

    def remainders(dx: Tensor, stage: Tensor) -> tuple[Tensor, Tensor]:
        """Nonlinear remainders of force and tangents at x + dx, all in the eigenbasis."""
        point = x + outside(dx)
        rest = inside(-gradient(point)) + values * dx - f
        turned = basis.mT @ hessian_product(point, basis @ stage)
        return rest, values[..., None] * stage - turned

    def combine(
        phis: list[Tensor], nonlinear: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        dx = sum(h * p * n[0] for p, n in zip(phis, nonlinear, strict=True))
        ds = sum((h * p)[..., None] * n[1] for p, n in zip(phis, nonlinear, strict=True))
        assert isinstance(dx, Tensor)
        assert isinstance(ds, Tensor)
        return dx, ds

    drift_half, drift_full = 0.5 * h * phi12 * f, h * phi1 * f
    start_half, start_full = exp_half[..., None] * s, exp_full[..., None] * s
    n1 = (torch.zeros_like(f), torch.zeros_like(s))
    dx, ds = combine([0.5 * phi12], [n1])
    n2 = remainders(drift_half + dx, start_half + ds)
    dx, ds = combine([0.5 * phi12 - phi22, phi22], [n1, n2])
    n3 = remainders(drift_half + dx, start_half + ds)
    dx, ds = combine([phi1 - 2 * phi2, phi2, phi2], [n1, n2, n3])
    n4 = remainders(drift_full + dx, start_full + ds)
    a52 = 0.5 * phi22 - phi3 + 0.25 * phi2 - 0.5 * phi32
    a54 = 0.25 * phi22 - a52
    dx, ds = combine([0.5 * phi12 - 2 * a52 - a54, a52, a52, a54], [n1, n2, n3, n4])
    n5 = remainders(drift_half + dx, start_half + ds)
    weights = [phi1 - 3 * phi2 + 4 * phi3, -phi2 + 4 * phi3, 4 * phi2 - 8 * phi3]
    _, ds = combine(weights, [n1, n4, n5])
    middle = (h * weights[2])[..., None] * (n5[1] - n3[1])
    size = tangents.flatten(1).norm(dim=1).clamp(min=1e-300)
    return basis @ (start_full + ds), middle.flatten(1).norm(dim=1) / size
