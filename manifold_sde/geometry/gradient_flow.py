r"""Gradient flow to its limit: a stiff integrator for a batch of points, and its derivative.

Near a manifold of minimisers gradient flow is stiff, with the condition number of the Hessian,
and only its end is wanted. Radau IIA collocation of order 9 follows it with step sizes
that grow without bound as the flow settles. Only the limit counts, so errors in directions that
the flow is about to contract are weighted down by the distance that is left.

The derivative of the limit is that of the numerical map with its step sizes held: it is exact
for the map, so it is as right as the map is, and forward and reverse mode are exact transposes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from manifold_sde.geometry.radau import (
    STAGES,
    BatchFunction,
    Linearisation,
    error_estimate,
    extrapolate,
    pull_step,
    push_step,
    solve_stages,
    tableau,
)


@dataclass(frozen=True)
class Precision:
    """What counts as small, for one dtype. Distances are relative to the norm of the point.

    Attributes:
        settled: Newton displacement in the fast directions at which a flow has settled.
        slow: Eigenvalue, relative to the largest, up to which a direction is slow.
        creeping: Force in the slow directions, relative to the largest eigenvalue, up to which
            the flow is at rest there.
        saddle: Newton displacement from a saddle at which rounding decides where the flow goes.
        negative: Negative eigenvalue, relative to the largest, that makes a rest point a saddle.
        kernel: Eigenvalue at the limit, relative to the largest, up to which it counts as zero.
        stalled: Flow time, over the fastest time scale, at which a flow is given up.
    """

    settled: float
    slow: float
    creeping: float
    saddle: float
    negative: float
    kernel: float
    stalled: float


_DOUBLE = Precision(1e-10, 1e-8, 1e-12, 1e-8, 1e-5, 1e-11, 1e12)
_SINGLE = Precision(1e-4, 1e-4, 1e-5, 1e-4, 1e-2, 1e-4, 1e8)


def precision(dtype: torch.dtype) -> Precision:
    """What counts as small for a dtype."""
    return _DOUBLE if dtype == torch.float64 else _SINGLE


#: Step size, over the fastest time scale, at which a flow is given up.
COLLAPSED = 1e-10
#: Tolerance of the estimate of the error: factor and power of rtol. Measured on least squares and
#: other losses, condition numbers up to 1e4: the limit is then within rtol, mostly by far.
_TOLERANCE_FACTOR, _TOLERANCE_POWER = 3.0, 0.65
_LARGEST_TOLERANCE = 1e-2
#: First step over the fastest time scale, and by how much steps may change.
FIRST_STEP = 0.5
_SAFETY = 0.9
_SHRINK, _GROW, _SHRINK_UNSOLVED = 0.2, 5.0, 0.4
#: Entries of the largest batch of step matrices that is solved at once.
_MATRIX_ENTRIES = 1 << 23


def tolerances(rtol: float, dtype: torch.dtype) -> tuple[float, float]:
    """Of the estimate of the error of a step, and of its Newton iteration, relative to the norm."""
    estimate = min(_LARGEST_TOLERANCE, _TOLERANCE_FACTOR * rtol**_TOLERANCE_POWER)
    return estimate, max(0.01 * rtol, 50.0 * torch.finfo(dtype).eps)


def step_factor(excess: Tensor, solved: Tensor, held: Tensor) -> Tensor:
    """By how much the next step is longer.

    Args:
        excess: Estimate of the error over its tolerance.
        solved: Whether the stages were found.
        held: Whether the step was accepted right after a rejection: it may then not grow.
    """
    factor = _SAFETY * excess.clamp(min=1e-30) ** (-1.0 / (STAGES + 1))
    factor = torch.where(solved, factor.clamp(_SHRINK, _GROW), _SHRINK_UNSOLVED)
    return torch.where(held, factor.clamp(max=1.0), factor)


class FlowStatus(IntEnum):
    """How the flow of a point ended."""

    FLOWING = 0
    SETTLED = 1
    NOT_FINITE = 2
    SADDLE = 3
    STALLED = 4
    COLLAPSED = 5


@dataclass(frozen=True)
class FlowStep:
    """One accepted step of some of the points.

    Attributes:
        rows: Which points, (m,).
        h: Step sizes (m,).
        stages: The stages (m, s, D).
    """

    rows: Tensor
    h: Tensor
    stages: Tensor


@dataclass
class FlowResult:
    """Where the flows of a batch ended.

    Attributes:
        points: End points (n, D).
        status: A :class:`FlowStatus` each, (n,).
        times: Flow time reached, (n,).
        distances: Newton displacement left, relative to the norm, (n,).
        values, basis: Eigendecomposition of the Hessian at the end points, (n, D), (n, D, D).
        steps: The accepted steps, if they were to be recorded.
        gradient_evaluations, hessian_evaluations: Totals over the batch.
    """

    points: Tensor
    status: Tensor
    times: Tensor
    distances: Tensor
    values: Tensor
    basis: Tensor
    steps: list[FlowStep]
    gradient_evaluations: int = 0
    hessian_evaluations: int = 0


def settle(
    gradient: BatchFunction,
    hessian: BatchFunction,
    x: Tensor,
    *,
    rtol: float,
    max_steps: int,
    record: bool = False,
) -> FlowResult:
    """Follow gradient flow from each point until it has settled.

    Args:
        gradient: Batched gradient (n, D) -> (n, D).
        hessian: Batched Hessian (n, D) -> (n, D, D).
        x: Start points (n, D), of norm about 1.
        rtol: Accuracy of the limit relative to the norm.
        max_steps: Steps, rejected ones included, after which a flow counts as failed.
        record: Whether to keep the steps, for the derivative.

    Returns:
        The end points, each with its own step sizes: a flow does not depend on its batch.
    """
    n, dim = x.shape
    tolerance, newton_tolerance = tolerances(rtol, x.dtype)
    method = tableau(STAGES, x.dtype, x.device)
    small = precision(x.dtype)

    def per_point(value: float) -> Tensor:
        return torch.full((n,), value, dtype=x.dtype, device=x.device)

    status = torch.zeros(n, dtype=torch.int64, device=x.device)
    values, basis = torch.zeros_like(x), x.new_zeros(n, dim, dim)
    result = FlowResult(x.clone(), status, per_point(0.0), per_point(torch.inf), values, basis, [])
    steps, last_steps, fastest = per_point(torch.nan), per_point(torch.nan), per_point(0.0)
    last_stages = x.new_zeros(n, STAGES, dim)
    rejected = torch.zeros(n, dtype=torch.bool, device=x.device)
    moved = active = torch.arange(n, device=x.device)
    force = torch.zeros_like(x)

    for _ in range(max_steps):
        # Linearise where a point has moved; a rejected step starts again from the same place.
        if len(moved):
            here = result.points[moved]
            slope, matrix = gradient(here), hessian(here)
            result.gradient_evaluations += len(moved)
            result.hessian_evaluations += len(moved)
            finite = torch.isfinite(slope).all(-1) & torch.isfinite(matrix).flatten(1).all(-1)
            status[moved[~finite]] = FlowStatus.NOT_FINITE
            moved, slope, matrix = moved[finite], slope[finite], matrix[finite]
            values[moved], basis[moved] = torch.linalg.eigh(matrix)
            force[moved] = -(slope[:, None] @ basis[moved])[:, 0]
            norm = here[finite].norm(dim=-1)
            top = values[moved].abs().amax(dim=-1)
            distance, slow_force = _rest(values[moved], force[moved], small.slow)
            distance = distance / norm
            result.distances[moved] = distance
            fastest[moved] = torch.maximum(fastest[moved], top)
            # Against the norm of the start: a flow to infinity does not come to rest.
            at_rest = slow_force <= small.creeping * top * x[moved].norm(dim=-1)
            at_rest &= distance <= small.settled
            status[moved[at_rest]] = FlowStatus.SETTLED
            saddle = (distance <= small.saddle) & (values[moved, 0] < -small.negative * top)
            status[moved[saddle]] = FlowStatus.SADDLE
        active = active[status[active] == FlowStatus.FLOWING]
        if len(active) == 0:
            break
        start = Linearisation(result.points[active], force[active], values[active], basis[active])
        norms, h = start.x.norm(dim=-1), steps[active]
        largest = start.values.abs().amax(dim=-1)
        first = FIRST_STEP / torch.maximum(largest, start.force.norm(dim=-1) / norms)
        h = torch.where(torch.isnan(h), first, h)

        ratio = h / last_steps[active]
        guess = extrapolate(method, last_stages[active], ratio)
        guess = torch.where(torch.isnan(ratio)[:, None, None], 0.0, guess)
        inside, solved, evaluations = solve_stages(
            gradient, start, h, guess, newton_tolerance * norms
        )
        result.gradient_evaluations += evaluations
        fast = start.values > small.slow * largest[:, None]
        weight = torch.where(fast, result.distances[active].clamp(max=1.0)[:, None], 1.0)
        error = (weight * error_estimate(start, inside, h, fast)).norm(dim=-1) / norms
        excess = error / tolerance
        solved = solved & torch.isfinite(excess) & torch.isfinite(inside).flatten(1).all(-1)
        accepted = solved & (excess <= 1.0)

        moved = active[accepted]
        stages = inside[accepted] @ start.basis[accepted].mT
        if record:
            result.steps.append(FlowStep(moved, h[accepted], start.x[accepted, None] + stages))
        result.points[moved] = start.x[accepted] + stages[:, -1]
        result.times[moved] += h[accepted]
        last_stages[moved], last_steps[moved] = stages, h[accepted]
        steps[active] = h * step_factor(excess, solved, accepted & rejected[active])
        rejected[active] = ~accepted
        over = active[result.times[active] * fastest[active] > small.stalled]
        status[over] = FlowStatus.STALLED
        status[active[steps[active] * fastest[active] < COLLAPSED]] = FlowStatus.COLLAPSED
    return result


def _rest(values: Tensor, force: Tensor, slow: float) -> tuple[Tensor, Tensor]:
    """Newton displacement in the fast directions and norm of the force in the slow ones.

    Args:
        values: Eigenvalues of the Hessian, (n, D).
        force: Force in its eigenbasis, (n, D).
        slow: Size relative to the largest up to which an eigenvalue is slow.

    Returns:
        Two tensors (n,).
    """
    fast = values.abs() > slow * values.abs().amax(dim=-1, keepdim=True)
    displacement = torch.where(fast, force / torch.where(fast, values, 1.0), 0.0)
    return displacement.norm(dim=-1), torch.where(fast, 0.0, force).norm(dim=-1)


def push_forward(hessian: BatchFunction, steps: list[FlowStep], tangents: Tensor) -> Tensor:
    """Carry tangents along recorded steps: the derivative of the numerical flow.

    Args:
        hessian: Batched Hessian (n, D) -> (n, D, D).
        steps: The steps.
        tangents: At the start points, (n, D, k).

    Returns:
        Tensor (n, D, k), at the end points.
    """
    return _sweep(push_step, hessian, steps, tangents)


def pull_back(hessian: BatchFunction, steps: list[FlowStep], cotangents: Tensor) -> Tensor:
    """Carry cotangents back along recorded steps: the transpose of :func:`push_forward`.

    Args:
        hessian: Batched Hessian (n, D) -> (n, D, D).
        steps: The steps.
        cotangents: At the end points, (n, D, k).

    Returns:
        Tensor (n, D, k), at the start points.
    """
    return _sweep(pull_step, hessian, steps[::-1], cotangents)


def _sweep(
    one_step: Callable[[Tensor, Tensor, Tensor], Tensor],
    hessian: BatchFunction,
    steps: list[FlowStep],
    vectors: Tensor,
) -> Tensor:
    vectors = vectors.clone()
    for step in steps:
        for rows, h, stages in _pieces(step):
            dim = stages.shape[-1]
            hessians = hessian(stages.reshape(-1, dim)).reshape(*stages.shape, dim)
            vectors[rows] = one_step(hessians, h, vectors[rows])
    return vectors


def _pieces(step: FlowStep) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A step of many points in pieces whose matrices fit into memory."""
    if len(step.rows) == 0:
        return
    size = max(1, _MATRIX_ENTRIES // (step.stages.shape[1] * step.stages.shape[2]) ** 2)
    yield from zip(step.rows.split(size), step.h.split(size), step.stages.split(size), strict=True)
