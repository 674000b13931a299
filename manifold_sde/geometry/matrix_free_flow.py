r"""Gradient flow of ONE point to its limit by products: Radau collocation without D x D matrices.

The method and its control are those of :mod:`~manifold_sde.geometry.gradient_flow`. The
simplified Newton iteration takes the curvature in the range of the frame where the step begins and
none outside it, which is exact on the manifold; what is left off it costs iterations and no
accuracy, since the collocation equations contain the gradient alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde.geometry.gradient_flow import FlowStatus, precision
from manifold_sde.geometry.normal_space import NormalRoute
from manifold_sde.geometry.radau import STAGES, Tableau, extrapolate, tableau

_MAX_ITERATIONS = 15
_MAX_CONTRACTION = 0.9
_TOLERANCE_FACTOR, _TOLERANCE_POWER = 3.0, 0.65
_SAFETY, _SHRINK, _GROW, _SHRINK_UNSOLVED = 0.9, 0.2, 5.0, 0.4
_COLLAPSED = 1e-10
_FIRST_STEP = 0.5

Frame = tuple[Tensor, Tensor]


@dataclass
class Flow:
    """Where the flow of a point ended.

    Attributes:
        point: End point (D,).
        status: A :class:`FlowStatus`.
        distance: Newton displacement left, relative to the norm.
        time: Flow time reached.
        steps: Accepted steps.
        gradients: Gradients evaluated.
        anchor: Anchor at the end (D, d).
    """

    point: Tensor
    status: FlowStatus
    distance: float
    time: float
    steps: int
    gradients: int
    anchor: Tensor


@dataclass(frozen=True)
class _Start:
    """The flow at the beginning of a step."""

    route: NormalRoute
    x: Tensor
    frame: Frame
    force: Tensor

    def components(self, rows: Tensor) -> Tensor:
        """Q^T of rows: (s, D) -> (s, M)."""
        result: Tensor = vmap(lambda v: self.route.components(self.x, self.frame, v))(rows)
        return result

    def combine(self, rows: Tensor) -> Tensor:
        """Q of rows: (s, M) -> (s, D)."""
        result: Tensor = vmap(lambda c: self.route.combine(self.x, self.frame, c))(rows)
        return result


def flow_to_limit(
    route: NormalRoute,
    start: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    rtol: float,
    max_steps: int,
) -> Flow:
    """Follow gradient flow from one point until it has settled.

    Args:
        route: Makes frames, of H or of what takes its place off the manifold.
        start: Makes an anchor from nothing.
        x: Start (D,), of norm about 1.
        rtol: Accuracy of the limit relative to the norm.
        max_steps: Steps, rejected ones included, after which the flow counts as failed.
    """
    method = tableau(STAGES, x.dtype, x.device)
    tolerance = min(1e-2, _TOLERANCE_FACTOR * rtol**_TOLERANCE_POWER)
    newton = max(0.01 * rtol, 50.0 * torch.finfo(x.dtype).eps)
    small = precision(x.dtype)
    gradient = vmap(route.loss.gradient)
    flow = Flow(x, FlowStatus.FLOWING, float("inf"), 0.0, 0, 0, start(x))
    h, last_h, fastest, size = 0.0, 0.0, 0.0, float(x.norm())
    last_stages, held, begin = torch.zeros_like(x).expand(STAGES, -1), False, None
    for _ in range(max_steps):
        if begin is None:
            begin = _begin(route, flow)
            if begin is None:
                flow.status = FlowStatus.NOT_FINITE
                return flow
            top = float(begin.frame[0][-1])
            fastest = max(fastest, top)
            inside = begin.components(begin.force[None])[0]
            flow.distance = float((inside / begin.frame[0]).norm()) / float(flow.point.norm())
            slow = float((begin.force - begin.combine(inside[None])[0]).norm())
            if flow.distance <= small.settled and slow <= 1e2 * small.creeping * top * size:
                flow.status = FlowStatus.SETTLED
                return flow
            if h == 0.0:
                h = _FIRST_STEP / max(top, float(begin.force.norm()) / size)
        guess = torch.zeros_like(last_stages)
        if last_h > 0.0:
            ratio = torch.tensor([h / last_h], dtype=x.dtype, device=x.device)
            guess = extrapolate(method, last_stages[None], ratio)[0]
        stages, solved, rounds = _solve(begin, gradient, method, h, guess, newton * size)
        flow.gradients += rounds * STAGES
        excess = float("inf")
        if solved:
            excess = _error(begin, method, stages, h, flow.distance) / (tolerance * size)
        if solved and excess <= 1.0:
            flow.point, flow.time = flow.point + stages[-1], flow.time + h
            flow.steps += 1
            last_stages, last_h, begin = stages, h, None
        factor = _SHRINK_UNSOLVED
        if excess < float("inf"):
            factor = _SAFETY * max(excess, 1e-30) ** (-1.0 / (STAGES + 1))
            factor = min(max(factor, _SHRINK), 1.0 if held and begin is None else _GROW)
        held = begin is not None
        h *= factor
        if flow.time * fastest > small.stalled:
            flow.status = FlowStatus.STALLED
            return flow
        if h * fastest < _COLLAPSED:
            flow.status = FlowStatus.COLLAPSED
            return flow
    return flow


def _begin(route: NormalRoute, flow: Flow) -> _Start | None:
    """Linearise at the point of the flow; ``None`` where the loss is not finite."""
    force = -route.loss.gradient(flow.point)
    flow.gradients += 1
    if not bool(torch.isfinite(force).all()):
        return None
    frame = route.frame(flow.point, flow.anchor)
    flow.anchor = route.anchor(frame, flow.point)
    return _Start(route, flow.point, frame, force)


def _solve(
    start: _Start,
    gradient: Callable[[Tensor], Tensor],
    method: Tableau,
    h: float,
    stages: Tensor,
    tolerance: float,
) -> tuple[Tensor, bool, int]:
    """The stages U_i - x of one step (s, D), whether found, and in how many rounds."""
    damped = 1.0 / (1.0 + (h * start.frame[0])[:, None] * method.eigenvalues)
    inverse = ((method.right * damped[:, None, :]) @ method.left).real
    last = float("inf")
    for iteration in range(_MAX_ITERATIONS):
        residual = stages + h * (method.matrix @ gradient(start.x + stages))
        inside = start.components(residual)
        # Outside the range of the frame the inverse is the identity.
        change = residual + start.combine((inverse @ inside.T[..., None])[..., 0].T - inside)
        stages = stages - change
        moved = float(change.norm())
        if moved <= tolerance:
            return stages, True, iteration + 1
        contraction = moved / last
        if not contraction < (_MAX_CONTRACTION if iteration else float("inf")):
            return stages, False, iteration + 1
        ahead = contraction / (1.0 - contraction) if iteration else float("inf")
        if moved * ahead <= tolerance:
            return stages, True, iteration + 1
        remaining = _MAX_ITERATIONS - 1 - iteration
        if iteration and moved * contraction**remaining * ahead > tolerance:
            return stages, False, iteration + 1
        last = moved
    return stages, False, _MAX_ITERATIONS


def _error(start: _Start, method: Tableau, stages: Tensor, h: float, distance: float) -> float:
    """How badly the polynomial's slope at the beginning misses the force there.

    Stiff directions are damped as the method damps them, and weighted by the distance that is left
    in them.
    """
    slope = stages.T @ method.slope_at_start - h * start.force
    inside = start.components(slope[None])[0]
    outside = slope - start.combine(inside[None])[0]
    damped = min(distance, 1.0) * inside / (1.0 + method.gamma * h * start.frame[0])
    return method.gamma * float(torch.hypot(damped.norm(), outside.norm()))
