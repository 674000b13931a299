"""The limiting map of gradient flow, differentiable, with named failures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde.errors import LimitMapError, RankError
from manifold_sde.geometry import autograd
from manifold_sde.geometry.gradient_flow import (
    FlowResult,
    FlowStatus,
    FlowStep,
    precision,
    pull_back,
    push_forward,
    settle,
)
from manifold_sde.geometry.kernels import Kernels
from manifold_sde.geometry.radau import BatchFunction
from manifold_sde.geometry.rank import describe, find_rank
from manifold_sde.problem import Problem
from manifold_sde.scale_invariance import INVARIANCE_TOLERANCE

#: Newton corrections after the flow has settled; the second one is at rounding level.
_CORRECTIONS = 3
#: Fewest points that a compiled kernel of the flow takes.
_SMALLEST_KERNEL = 64
#: Accuracy that single precision can deliver.
SINGLE_RTOL = 1e-5

_REASONS = {
    FlowStatus.NOT_FINITE: "the gradient or the Hessian is not finite",
    FlowStatus.SADDLE: "stalled on a saddle",
    FlowStatus.STALLED: "still creeping after more than any time scale of the flow: the minimum "
    "is degenerate (Assumption 2.1 asks for a Hessian of constant rank), or lies at infinity",
    FlowStatus.COLLAPSED: "the step size collapsed: the loss is not smooth on the way",
}


@dataclass
class _Solution:
    """Phi of a flat batch, with what its derivative needs.

    Attributes:
        directions: Unit vectors of the start points, or the points where L is not invariant.
        limits: Limits of the flow from there, (n, D).
        norms: Norms that were divided out, (n, 1), or ``None``.
        tangent_projectors: P at the limits, (n, D, D).
        steps: The recorded steps of the flow.
    """

    directions: Tensor
    limits: Tensor
    norms: Tensor | None
    tangent_projectors: Tensor
    steps: list[FlowStep]


class LimitMap:
    """Phi of a problem, by integrating gradient flow.

    A scale-invariant loss is followed from the direction of x, where the flow has a scale of its
    own, and the result is scaled back: Phi is 1-homogeneous and keeps the norm (Lemma 2.7).

    Args:
        problem: The problem.
        kernels: Evaluates gradients and Hessians.
        rtol: Accuracy of the limit relative to the norm.
        max_steps: Steps of the integrator after which a flow counts as failed.
    """

    def __init__(self, problem: Problem, kernels: Kernels, *, rtol: float, max_steps: int) -> None:
        self.problem = problem
        self.kernels = kernels
        self.rtol = rtol
        self.max_steps = max_steps
        self._invariant: dict[tuple[torch.dtype, torch.device], bool] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Phi(x): (..., D) -> (..., D), differentiable in forward and reverse mode.

        Raises:
            LimitMapError: If some of the flows fail; the others are in its ``partial``.
        """
        return at_points(self, x)

    def value(self, x: Tensor) -> Tensor:
        """Phi of a flat batch: (n, D) -> (n, D)."""
        solution = self._solve(x, record=False)
        return _scaled(solution.limits, solution.norms)

    def push(self, x: Tensor, tangents: Tensor) -> Tensor:
        """The derivative of Phi at x times tangents: (n, D), (n, D, k) -> (n, D, k)."""
        solution, hessian = self._solve(x, record=True), self._functions(len(x))[1]

        def along(vectors: Tensor) -> Tensor:
            images = push_forward(hessian, solution.steps, vectors)
            return solution.tangent_projectors @ images

        if solution.norms is None:
            return along(tangents)
        return homogeneous(along, solution.directions, solution.limits, tangents)

    def pull(self, x: Tensor, cotangents: Tensor) -> Tensor:
        """The transposed derivative of Phi at x: (n, D), (n, D, k) -> (n, D, k)."""
        solution, hessian = self._solve(x, record=True), self._functions(len(x))[1]

        def along(vectors: Tensor) -> Tensor:
            return pull_back(hessian, solution.steps, solution.tangent_projectors @ vectors)

        if solution.norms is None:
            return along(cotangents)
        return homogeneous(along, solution.limits, solution.directions, cotangents)

    def is_scale_invariant(self, x: Tensor) -> bool:
        """Whether the loss is scale-invariant, measured at fixed points (Lemma 2.5).

        Args:
            x: Any tensor of the dtype and device that matter.
        """
        key = (x.dtype, x.device)
        if key not in self._invariant:
            self._invariant[key] = is_scale_invariant(self.problem, x)
        return self._invariant[key]

    def _functions(self, n: int) -> tuple[BatchFunction, BatchFunction]:
        """Batched gradient and Hessian, for a flow of n points.

        Points settle one by one, and compiled kernels of a fraction of the batch do not make the
        others wait for the last.
        """
        size = max(_SMALLEST_KERNEL, n // 4)
        return (
            lambda points: self.kernels.gradient(points, size=size),
            lambda points: self.kernels.hessian(points, size=size),
        )

    def _solve(self, x: Tensor, *, record: bool) -> _Solution:
        with torch.no_grad():
            norms = None
            start = x
            if self.is_scale_invariant(x):
                # In two steps: the square of a tiny or huge norm is out of range.
                size = x.abs().amax(dim=-1, keepdim=True)
                start = x / size
                short = start.norm(dim=-1, keepdim=True)
                start, norms = start / short, size * short
            gradient, hessian = self._functions(len(x))
            result = settle(
                gradient,
                hessian,
                start,
                rtol=self.rtol if x.dtype == torch.float64 else max(self.rtol, SINGLE_RTOL),
                max_steps=self.max_steps,
                record=record,
            )
            limits, projectors, failures = self._finish(result, gradient, hessian)
            if norms is not None:
                limits = limits / limits.norm(dim=-1, keepdim=True)
        if failures:
            self._refuse(_scaled(limits, norms), result, failures)
        return _Solution(start, limits, norms, projectors, result.steps)

    def _finish(
        self, result: FlowResult, gradient: BatchFunction, hessian: BatchFunction
    ) -> tuple[Tensor, Tensor, dict[int, str]]:
        """Newton corrections to rounding level, P at the limits, and what went wrong."""
        failures = {
            index: self._describe(result, index)
            for index in torch.nonzero(result.status != FlowStatus.SETTLED)[:, 0].tolist()
        }
        small, points = precision(result.points.dtype), result.points
        values, basis = result.values, result.basis
        fast = values > small.slow * values.abs().amax(dim=-1, keepdim=True)
        inverse = torch.where(fast, 1.0 / torch.where(fast, values, 1.0), 0.0)
        for _ in range(_CORRECTIONS):
            slope = (gradient(points)[:, None] @ basis)[:, 0]
            points = points - (basis @ (inverse * slope)[..., None])[..., 0]
        matrix = hessian(points)
        finite = torch.isfinite(matrix).flatten(1).all(-1)
        values, basis = torch.linalg.eigh(torch.where(finite[:, None, None], matrix, 0.0))
        good = torch.nonzero((result.status == FlowStatus.SETTLED) & finite)[:, 0]
        for index in torch.nonzero(~finite)[:, 0].tolist():
            failures.setdefault(index, _REASONS[FlowStatus.NOT_FINITE])
        failures |= self._misfits(values, fast.sum(-1), good)
        order = torch.arange(values.shape[-1], device=values.device)
        normal = order >= values.shape[-1] - fast.sum(-1, keepdim=True)
        kernel = torch.where(normal[:, None], 0.0, basis)
        return points, kernel @ kernel.mT, failures

    def _misfits(self, values: Tensor, normal: Tensor, good: Tensor) -> dict[int, str]:
        """Why limits are not on the manifold, by the eigenvalues of H there.

        Args:
            values: Eigenvalues at the limits, ascending, (n, D).
            normal: Number of directions that the flow took for normal, (n,).
            good: The points to look at.
        """
        small, where = precision(values.dtype), "the end of the flow"
        misfits: dict[int, str] = {}

        def check(rows: Tensor) -> None:
            ranks = find_rank(values[rows], self.problem.rank, where)
            top = values[rows].abs().amax(dim=-1, keepdim=True)
            nonzero = (values[rows].abs() > small.kernel * top).sum(-1)
            if not bool(((ranks == normal[rows]) & (ranks == nonzero)).all()):
                raise RankError(
                    f"the minimum is degenerate, or stiffer than {1 / small.slow:.0e}, at {where}",
                    received=f"eigenvalues {describe(values[rows].flatten())}",
                )

        if self.problem.rank is None:
            # Where H is zero, nothing moves: that is a limit, though of no manifold.
            good = good[(values[good] != 0).any(dim=-1)]
        if len(good):
            try:
                check(good)
            except RankError:
                for index in good.tolist():
                    try:
                        check(torch.tensor([index], device=good.device))
                    except RankError as error:
                        misfits[index] = f"{error.problem}: {error.received}"
        return misfits

    def _describe(self, result: FlowResult, index: int) -> str:
        status = FlowStatus(int(result.status[index]))
        reason = describe_status(status, self.max_steps)
        if status == FlowStatus.SADDLE:
            return f"{reason} (smallest Hessian eigenvalue {result.values[index, 0]:.3g})"
        return reason

    def _refuse(self, points: Tensor, result: FlowResult, failures: dict[int, str]) -> None:
        n = len(points)
        failed = torch.zeros(n, dtype=torch.bool, device=points.device)
        failed[list(failures)] = True
        partial = points.masked_fill(failed[:, None], torch.nan)
        index = min(failures)
        size = float(self.kernels.gradient(result.points[index : index + 1]).norm())
        remedy = f"{hint(self.problem)}; the error's .partial holds the points that arrived"
        if not self.is_scale_invariant(points):
            remedy = (
                "the loss is not scale-invariant, and need not have minimisers: "
                "problem.require_scale_invariance() names what breaks it; or " + remedy
            )
        raise LimitMapError(
            "gradient flow did not reach the manifold of minimisers",
            failed=failed,
            partial=partial,
            received=f"{len(failures)} of {n} points failed; point {index}: "
            f"{failures[index]}, with gradient norm {size:.3g} and distance estimate "
            f"{float(result.distances[index]):.3g} after flow time "
            f"{float(result.times[index]):.4g} (at unit norm)",
            expected="points of the attraction set U, from which the flow ends on Gamma",
            remedy=remedy,
        )


def at_points(mapping: autograd.DifferentiableMap, x: Tensor) -> Tensor:
    """A limit map at points (..., D), differentiable; its errors have their shape, too.

    Raises:
        LimitMapError: If some of the flows fail.
    """
    if x.numel() == 0:
        return x.clone()
    try:
        return autograd.apply(mapping, x.reshape(-1, x.shape[-1])).reshape(x.shape)
    except LimitMapError as error:
        if error.partial.numel() == x.numel():
            error.failed = error.failed.reshape(x.shape[:-1])
            error.partial = error.partial.reshape(x.shape)
        raise


def homogeneous(
    along: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, vectors: Tensor
) -> Tensor:
    """The derivative of a map r u -> r Phi(u), with unit vectors u and Phi(u), or its transpose.

    Norms go through untouched.

    Args:
        along: The derivative of the flow from u, or its transpose, of (n, D, k).
        start: Where it starts, (n, D): u, or Phi(u) for the transpose.
        end: Where it ends.
        vectors: Vectors (n, D, k).
    """
    radial = start[:, None] @ vectors
    images = along(vectors - start[..., None] * radial)
    return images + end[..., None] * (radial - end[:, None] @ images)


def is_scale_invariant(problem: Problem, x: Tensor) -> bool:
    """Whether a loss is scale-invariant in the dtype and on the device of x (Lemma 2.5)."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4, problem.dim, generator=generator, dtype=torch.float64)
    points = (points / points.norm(dim=1, keepdim=True)).to(x)
    slopes = torch.vmap(problem.pointwise.gradient)(points)
    radial, sizes = (points * slopes).sum(-1).abs(), slopes.norm(dim=-1)
    tolerance = INVARIANCE_TOLERANCE.get(x.dtype, 1e-2)
    return bool(radial.max() <= tolerance * sizes.max())


def hint(problem: Problem) -> str:
    """What to do where a flow has no limit."""
    advice = (
        "start closer to Gamma, or train first; raise Geometry(max_steps=...) if the distance was "
        "still falling"
    )
    if problem.network is not None and problem.network.criterion.is_classification:
        # Bounded outputs, too, may be pushed to where a normalisation is singular.
        given = problem.network.criterion.label_smoothing
        smoother = f"label_smoothing={min(0.9, max(0.1, 3.0 * given)):.2g}, or "
        advice = (
            "the losses of classes are smallest at infinite outputs, and may have no minimiser"
            f"{f' within reach, with label_smoothing={given:g}, too' if given else ''}: "
            f"{smoother if given < 0.9 else ''}targets that are probabilities within reach of the "
            "outputs, and more parameters; or " + advice
        )
    if problem.rank is None:
        advice += "; rank=M with the problem, where you know it"
    return advice


def describe_status(status: FlowStatus, max_steps: int) -> str:
    """Why a flow has no limit, in words."""
    if status == FlowStatus.FLOWING:
        return f"not settled after {max_steps} steps"
    return _REASONS[status]


def _scaled(limits: Tensor, norms: Tensor | None) -> Tensor:
    return limits if norms is None else limits * norms
