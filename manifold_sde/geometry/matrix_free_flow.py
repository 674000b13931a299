r"""Gradient flow of ONE point to its limit by products: Radau collocation without D x D matrices.

The method and its control are those of :mod:`~manifold_sde.geometry.gradient_flow`. The
simplified Newton iteration takes the curvature in the range of a frame and none outside it, which
is exact on the manifold; what is left off it costs iterations and no accuracy, since the
collocation equations contain the gradient alone. A frame costs more than a step: it is kept from
step to step as long as the iteration converges fast. Where the iteration fails with one that did so
at the last step, it is the step that is too long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde.geometry.gradient_flow import (
    COLLAPSED,
    FIRST_STEP,
    FlowStatus,
    precision,
    step_factor,
    tolerances,
)
from manifold_sde.geometry.matrix_free import MatrixFreeSpace
from manifold_sde.geometry.radau import (
    MAX_ITERATIONS,
    STAGES,
    Tableau,
    extrapolate,
    tableau,
)

#: Ratio of two corrections at which the Newton iteration is given up.
_MAX_CONTRACTION = 0.9
#: Rounds of the Newton iteration beyond which the next step has a frame of its own.
_FEW_ROUNDS = 6
#: Rank whose frame costs as much as a round: frames of larger ranks are kept for more rounds.
_RANK_A_ROUND = 50

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
        frames: Frames made.
        basis: Reference basis at the end (D, d).
        frame: The frame there, where it has settled.
    """

    point: Tensor
    status: FlowStatus
    distance: float
    time: float
    steps: int
    gradients: int
    frames: int
    basis: Tensor
    frame: Frame | None = None


@dataclass(frozen=True)
class Step:
    """An accepted step of a flow.

    Attributes:
        x: Where it begins (D,).
        h: Its size.
        stages: The stages (s, D); the last one is where it ends.
    """

    x: Tensor
    h: float
    stages: Tensor


@dataclass(frozen=True)
class Linearisation:
    """What stands for the Hessian at points near that where a frame was made.

    Attributes:
        space: The normal space.
        base: Where the frame was made (D,).
        frame: The frame.
    """

    space: MatrixFreeSpace
    base: Tensor
    frame: Frame

    def components(self, rows: Tensor) -> Tensor:
        """Q^T of rows: (s, D) -> (s, M)."""
        result: Tensor = vmap(lambda v: self.space.components_at(self.base, self.frame, v))(rows)
        return result

    def combine(self, rows: Tensor) -> Tensor:
        """Q of rows: (s, M) -> (s, D)."""
        result: Tensor = vmap(lambda c: self.space.combine_at(self.base, self.frame, c))(rows)
        return result

    def inverse(self, method: Tableau, h: float) -> Tensor:
        """The inverse of 1 + h A lambda for each eigenvalue lambda: (M, s, s)."""
        damped = 1.0 / (1.0 + (h * self.frame[0])[:, None] * method.eigenvalues)
        return ((method.right * damped[:, None, :]) @ method.left).real

    def change(self, stages: Tensor, inverse: Tensor) -> Tensor:
        """By how much such an inverse changes stages (..., s, D): outside the range, it does not.

        Args:
            stages: One vector, or several, for each stage.
            inverse: From :meth:`inverse`, or its transpose.
        """
        inside = self.components(stages.flatten(0, -2)).unflatten(0, stages.shape[:-1])
        moved = (inverse @ inside.mT[..., None])[..., 0].mT - inside
        return self.combine(moved.flatten(0, -2)).unflatten(0, stages.shape[:-1])


@dataclass(frozen=True)
class _Start(Linearisation):
    """The flow at the beginning of a step, with a frame made there or before.

    Attributes:
        x: Where the step begins (D,).
        force: Minus the gradient there.
    """

    x: Tensor
    force: Tensor

    @cached_property
    def inside(self) -> Tensor:
        """Components of the force in the range of the frame, (M,)."""
        return self.components(self.force[None])[0]

    @cached_property
    def distance(self) -> float:
        """Newton displacement over the norm."""
        return float((self.inside / self.frame[0]).norm()) / float(self.x.norm())

    @property
    def is_fresh(self) -> bool:
        """Whether the frame is that of the beginning."""
        return self.base is self.x


def flow_to_limit(
    space: MatrixFreeSpace,
    x: Tensor,
    *,
    rtol: float,
    max_steps: int,
    record: list[Step] | None = None,
) -> Flow:
    """Follow gradient flow from one point until it has settled.

    Args:
        space: Makes frames, of H or of what takes its place off the manifold.
        x: Start (D,), of norm about 1.
        rtol: Accuracy of the limit relative to the norm.
        max_steps: Steps, rejected ones included, after which the flow counts as failed.
        record: Gets the accepted steps, for the derivative.
    """
    method = tableau(STAGES, x.dtype, x.device)
    tolerance, newton = tolerances(rtol, x.dtype)
    small = precision(x.dtype)
    gradient = vmap(space.loss.gradient)
    flow = Flow(x, FlowStatus.FLOWING, float("inf"), 0.0, 0, 0, 0, space.start_at(x))
    h, last_h, fastest, size = 0.0, 0.0, 0.0, float(x.norm())
    last_stages, held = torch.zeros_like(x).expand(STAGES, -1), False
    begin, keep, good = None, False, False
    for _ in range(max_steps):
        if begin is None or begin.x is not flow.point:
            begin = _begin(space, flow, begin if keep else None)
        if begin is not None and not begin.is_fresh and begin.distance <= small.settled:
            begin = _begin(space, flow, None)
        if begin is None:
            flow.status = FlowStatus.NOT_FINITE
            return flow
        top = float(begin.frame[0].abs().max())
        fastest = max(fastest, top)
        flow.distance = begin.distance
        slow = float((begin.force - begin.combine(begin.inside[None])[0]).norm())
        at_rest = slow <= small.creeping * top * size
        if begin.is_fresh and at_rest and flow.distance <= small.settled:
            flow.status, flow.frame = FlowStatus.SETTLED, begin.frame
            return flow
        if h == 0.0:
            h = FIRST_STEP / max(top, float(begin.force.norm()) / size)
        guess = torch.zeros_like(last_stages)
        if last_h > 0.0:
            ratio = torch.tensor([h / last_h], dtype=x.dtype, device=x.device)
            guess = extrapolate(method, last_stages[None], ratio)[0]
        stages, solved, rounds = _solve(begin, gradient, method, h, guess, newton * size)
        flow.gradients += rounds * STAGES
        keep = solved and rounds <= max(_FEW_ROUNDS, space.rank // _RANK_A_ROUND)
        if not solved and not begin.is_fresh and not good:
            begin = _begin(space, flow, None)
            continue
        good = solved and rounds <= _FEW_ROUNDS
        excess = float("inf")
        if solved:
            excess = _error(begin, method, stages, h, flow.distance) / (tolerance * size)
        accepted = solved and excess <= 1.0
        if accepted:
            if record is not None:
                record.append(Step(begin.x, h, begin.x + stages))
            flow.point, flow.time = flow.point + stages[-1], flow.time + h
            flow.steps += 1
            last_stages, last_h = stages, h
        solved = solved and excess < float("inf")
        error = torch.tensor(excess, dtype=torch.float64)
        h *= float(step_factor(error, torch.tensor(solved), torch.tensor(held and accepted)))
        held = not accepted
        if flow.time * fastest > small.stalled:
            flow.status = FlowStatus.STALLED
            return flow
        if h * fastest < COLLAPSED:
            flow.status = FlowStatus.COLLAPSED
            return flow
    return flow


def _begin(space: MatrixFreeSpace, flow: Flow, last: _Start | None) -> _Start | None:
    """The flow at its point, with the frame of the last step or a new one.

    ``None`` where the loss is not finite.
    """
    force = -space.loss.gradient(flow.point)
    flow.gradients += 1
    if not bool(torch.isfinite(force).all()):
        return None
    if last is not None:
        return _Start(space, last.base, last.frame, flow.point, force)
    frame = space.frame_at(flow.point, flow.basis)
    flow.frames += 1
    flow.basis = space.reference_at(flow.point, frame)
    return _Start(space, flow.point, frame, flow.point, force)


def _solve(
    start: _Start,
    gradient: Callable[[Tensor], Tensor],
    method: Tableau,
    h: float,
    stages: Tensor,
    tolerance: float,
) -> tuple[Tensor, bool, int]:
    """The stages U_i - x of one step (s, D), whether found, and in how many rounds."""
    inverse = start.inverse(method, h)
    last = float("inf")
    for iteration in range(MAX_ITERATIONS):
        residual = stages + h * (method.matrix @ gradient(start.x + stages))
        change = residual + start.change(residual, inverse)
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
        remaining = MAX_ITERATIONS - 1 - iteration
        if iteration and moved * contraction**remaining * ahead > tolerance:
            return stages, False, iteration + 1
        last = moved
    return stages, False, MAX_ITERATIONS


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
