"""The matrix-free route: networks, where nothing of size D x D fits into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from torch.func import vmap

from manifold_sde.errors import (
    DifferentiationError,
    LimitMapError,
    NonFiniteError,
    NotOnManifoldError,
    RankError,
)
from manifold_sde.geometry.contraction import (
    Pairs,
    contract,
    covariance_pairs,
    factor_pairs,
    noise_pairs,
)
from manifold_sde.geometry.dense import ON_MANIFOLD
from manifold_sde.geometry.gradient_flow import FlowStatus
from manifold_sde.geometry.limit_map import (
    SINGLE_RTOL,
    describe_status,
    is_scale_invariant,
    way_out,
)
from manifold_sde.geometry.matrix_free_flow import Flow, flow_to_limit
from manifold_sde.geometry.normal_space import (
    HessianRoute,
    JacobianRoute,
    LeadingRoute,
    NormalRoute,
    fixed_vectors,
)
from manifold_sde.geometry.spectrum import common_rank, find_rank
from manifold_sde.loss import LeastSquaresLoss
from manifold_sde.problem import Problem

#: Bytes that the vectors of one block may take with what is computed from them.
DEFAULT_MEMORY = 1 << 29
#: Residuals that Newton's method leaves, in units of rounding of |J| |y|, that count as none.
_ROUNDING_UNITS = 1e3
#: Eigenvalue of J J^T, relative to the largest, below which a direction has no slope.
_NO_SLOPE = 1e-12
#: Eigenvalue of H, relative to the largest, from which on a direction counts as normal.
_SLOW = 1e-6
#: Leading eigenvalues that are looked at first where the rank is not known.
_FIRST_LOOK = 16
#: Newton steps of a retraction.
_NEWTON_STEPS = 8
_NEWTON_TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}
_CORRECTIONS = 2


#: Eigenvalues (n, M) and what multiplies by the eigenvectors (n, k, M).
Frames = tuple[Tensor, Tensor]


class MatrixFreeGeometry:
    """Geometry by products with J or H, for any dimension.

    Least squares whose residuals vanish take the Jacobian, everything else the Hessian. Points are
    taken as many at once as fit into the memory; the flows of a limit map one after the other, as
    each has steps of its own.

    Args:
        problem: The problem.
        rtol: Accuracy of the limit map relative to the norm.
        max_steps: Steps of the gradient flow after which it counts as failed.
        memory: Bytes that the vectors of one block may take with what is computed from them.
    """

    def __init__(self, problem: Problem, *, rtol: float, max_steps: int, memory: int) -> None:
        self.problem = problem
        self.loss = problem.pointwise
        self.rtol = rtol
        self.max_steps = max_steps
        self.memory = memory

    # Routes and frames.

    def frames_at(self, y: Tensor) -> tuple[NormalRoute, Frames]:
        """The route for points that are checked to lie on the manifold (n, D), and their frames.

        Raises:
            NotOnManifoldError: If one does not.
            RankError: If the rank is ambiguous, not the declared one, or not constant.
            NonFiniteError: If the derivatives are not finite.
        """
        found: tuple[NormalRoute, Frames] | None = self._jacobian_frames(y)
        return found or self._hessian_frames(y)

    def route_at(self, y: Tensor) -> NormalRoute:
        """The route for points that are checked to lie on the manifold: (n, D)."""
        return self.frames_at(y)[0]

    def _jacobian_frames(self, y: Tensor) -> tuple[JacobianRoute, Frames] | None:
        """From one Gram matrix a point; ``None`` where the residuals do not vanish there."""
        whole = self._all_residuals()
        if whole is None:
            return None
        loss, none = whole.loss, y.new_zeros(self.loss.dim, 0)
        values, weights = self.each(
            lambda point: whole.frame(point, none), y, vectors=loss.n_residuals
        )
        if not bool(torch.isfinite(values).all()):
            raise _not_finite("Jacobian")
        self._require_rest(whole, y, (values, weights))

        def left(point: Tensor, *frame: Tensor) -> tuple[Tensor, Tensor]:
            moved = point
            for _ in range(3):
                moved = moved - whole.newton_step(point, (frame[0], frame[1]), moved)
            size = (loss.n_samples * frame[0].sum()).sqrt() * point.norm()
            return loss.residuals(moved).norm(), size

        residuals, sizes = self.each(left, y, values, weights)
        if bool((residuals > _ROUNDING_UNITS * torch.finfo(y.dtype).eps * sizes).any()):
            return None
        rank = common_rank(find_rank(self._with_zero(values), self.problem.rank))
        first = values.shape[-1] - rank
        return (
            JacobianRoute(loss, rank, self.memory),
            (values[:, first:], weights[:, :, first:].contiguous()),
        )

    def _all_residuals(self) -> JacobianRoute | None:
        """The route of all residuals, whatever their rank; ``None`` where there are none."""
        loss = self.loss
        if not isinstance(loss, LeastSquaresLoss) or loss.n_residuals > loss.dim:
            return None
        return JacobianRoute(loss, loss.n_residuals, self.memory, floor=_NO_SLOPE)

    def _with_zero(self, values: Tensor) -> Tensor:
        """The eigenvalues of H that can differ from zero, and one that cannot."""
        if values.shape[-1] == self.loss.dim:
            return values
        return torch.cat([values.new_zeros(len(values), 1), values], dim=1)

    def _hessian_frames(self, y: Tensor) -> tuple[HessianRoute, Frames]:
        """From the leading eigenvectors of H."""
        found = [self._leading(point) for point in y]
        for point, (values, basis) in zip(y, found, strict=True):
            fast = values.abs() > _SLOW * values.abs().max()
            step = basis[:, fast] @ ((basis[:, fast].T @ self.loss.gradient(point)) / values[fast])
            _refuse_off((step.norm() / point.norm())[None], y)
        rank = common_rank(
            torch.stack([find_rank(values[None], self.problem.rank)[0] for values, _ in found])
        )
        values = torch.stack([v[len(v) - rank :] for v, _ in found])
        basis = torch.stack([q[:, q.shape[1] - rank :] for _, q in found])
        return HessianRoute(self.loss, rank, self.memory), (values, basis)

    def _leading(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """The largest eigenvalues of H, ascending, beyond its rank, with their vectors: one point.

        Lanczos; as many as the declared rank and one more, or until there is a gap.
        """
        dim = self.loss.dim
        probe = fixed_vectors(y, 2)
        if not bool(self.loss.hessian_product(y, probe[:, 0]).any()):
            return y.new_zeros(2), probe  # Lanczos has nothing to begin with
        count = _FIRST_LOOK if self.problem.rank is None else self.problem.rank + 1
        while True:
            count = min(count, dim - 1)
            values, vectors = self._lanczos(y, count)
            if count == dim - 1 or self.problem.rank is not None:
                return values, vectors
            with contextlib.suppress(RankError):
                if int(find_rank(values[None], None)[0]) < count:
                    return values, vectors
            count *= 4

    def _lanczos(self, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Eigenvalues (k,) of largest size, ascending, and eigenvectors (D, k) of H."""

        def product(v: np.ndarray) -> np.ndarray:
            image = self.loss.hessian_product(y, torch.as_tensor(v.reshape(-1)).to(y))
            if not bool(torch.isfinite(image).all()):
                raise _not_finite("Hessian")
            return np.asarray(image.detach().cpu(), dtype=np.float64)

        dim = self.loss.dim
        operator = LinearOperator((dim, dim), matvec=product, dtype=np.float64)
        first = fixed_vectors(y, 1)[:, 0].double().cpu().numpy()
        values, vectors = eigsh(operator, k=count, which="LM", v0=first)
        order = np.argsort(values)
        return (
            torch.from_numpy(values[order]).to(y),
            torch.from_numpy(np.ascontiguousarray(vectors[:, order])).to(y),
        )

    def start(self, route: NormalRoute) -> Callable[[Tensor], Tensor]:
        """A function that makes the anchor of a point from nothing: (D,) -> (D, d)."""
        if isinstance(route, JacobianRoute):
            return lambda y: y.new_zeros(len(y), 0)
        if isinstance(route, LeadingRoute):
            return route.start
        columns: dict[Any, Tensor] = {}

        def anchor(y: Tensor) -> Tensor:
            key = (y.dtype, y.device)
            if key not in columns:
                columns[key] = fixed_vectors(torch.empty(self.loss.dim).to(y), route.rank)
            near = columns[key]
            for _ in range(2):
                near = route.frame(y, near)[1]
            return near

        return anchor

    def each(self, function: Callable[..., Any], *arguments: Tensor, vectors: int = 1) -> Any:
        """A function of one point at all points (n, ...), as many at once as fit."""
        first = arguments[0]
        size = first.element_size() * self.loss.dim * max(1, vectors)
        points = max(1, self.memory // (8 * size))
        return vmap(function, chunk_size=points)(*(a.contiguous() for a in arguments))

    def _require_rest(self, route: NormalRoute, y: Tensor, frames: Frames) -> None:
        """The Newton displacement has to be small."""

        def displacement(point: Tensor, *frame: Tensor) -> Tensor:
            return route.newton_step(point, (frame[0], frame[1]), point).norm() / point.norm()

        _refuse_off(self.each(displacement, y, *frames), y)

    # What Geometry asks for: flat batches.

    def eigenvalues(self, y: Tensor) -> Tensor:
        """Leading eigenvalues of H with the first that counts as zero, ascending: -> (n, k)."""
        found = self._jacobian_frames(y)
        if found is not None:
            return self._with_zero(found[1][0])
        leading = [self._leading(point)[0] for point in y]
        most = max(len(values) for values in leading)
        # What was not looked at is smaller than what was.
        return torch.stack([torch.cat([v.new_zeros(most - len(v)), v]) for v in leading])

    def tangent_projection(self, y: Tensor, v: Tensor) -> Tensor:
        """P v: (n, D), (n, D) -> (n, D)."""
        route, frames = self.frames_at(y)

        def project(point: Tensor, vector: Tensor, *frame: Tensor) -> Tensor:
            return route.project(point, (frame[0], frame[1]), vector)

        result: Tensor = self.each(project, y, v, *frames)
        return result

    def projector(self, y: Tensor) -> Callable[[Tensor], Tensor]:
        """The projection at ONE point as a function of vectors (..., D), after one set-up."""
        route, (values, weights) = self.frames_at(y[None])
        frame = values[0], weights[0]

        def project(v: Tensor) -> Tensor:
            if v.dim() == 1:
                return route.project(y, frame, v)
            parts = [
                vmap(lambda z: route.project(y, frame, z))(part)
                for part in v.reshape(-1, len(y)).split(route.block(y))
            ]
            return torch.cat(parts).reshape(v.shape)

        return project

    def second_derivative(
        self, y: Tensor, covariance: Tensor | None, factor: Tensor | None
    ) -> Tensor:
        """d^2 Phi(y)[Sigma] by products; Sigma is (n, D, D), or has a factor (n, D, m)."""
        route, frames = self.frames_at(y)
        noise = self.problem.noise

        def at_one(point: Tensor, values: Tensor, weights: Tensor, *given: Tensor) -> Tensor:
            frame = values, weights
            if covariance is not None:
                pairs: Iterable[Pairs] = covariance_pairs(given[0], route.block(point))
            elif factor is not None:
                pairs = factor_pairs(given[0], route.block(point))
            else:
                pairs = noise_pairs(route, noise, point)
            terms = contract(route, point, frame, pairs, tangent=True)
            tangent = route.project(point, frame, 2.0 * terms.mixed + terms.normal)
            return -tangent - route.inverse(point, frame, terms.tangent)

        given = [a for a in (covariance, factor) if a is not None]
        result: Tensor = self.each(at_one, y, *frames, *given, vectors=route.rank)
        return result

    def log_pseudo_determinant(self, y: Tensor) -> Tensor:
        """Log pdet H: (n, D) -> (n,), and not differentiable."""
        return self.frames_at(y)[1][0].log().sum(-1)

    def normal_variances(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Nonzero eigenvalues of H, and q^T Sigma q of their vectors: (n, D) -> (n, M) twice."""
        route, frames = self.frames_at(y)
        noise = self.problem.noise

        def at_one(point: Tensor, values: Tensor, weights: Tensor) -> Tensor:
            parts = [
                vmap(lambda q: noise.transposed_product(self.loss, point, q))(rows).square().sum(1)
                for _, rows in route.basis_rows(point, (values, weights))
            ]
            return torch.cat(parts)

        variances: Tensor = self.each(at_one, y, *frames, vectors=route.rank)
        return frames[0], variances

    def retract(self, x: Tensor) -> Tensor:
        """Newton's method to the manifold, at constant norm where the loss is scale-invariant.

        Raises:
            NotOnManifoldError: If it does not arrive.
        """
        norms = x.norm(dim=-1, keepdim=True)
        scale = norms if is_scale_invariant(self.problem, x) else torch.ones_like(norms)
        point = x / scale
        route = self._off_manifold()
        if isinstance(route, LeadingRoute):
            # What is normal shows on the manifold alone: the way there begins anew with its rank.
            ends = torch.stack([route.approach(start, _NEWTON_STEPS) for start in point])
            route = self._hessian_frames(ends)[0]
        anchors = self.each(self.start(route), point, vectors=route.rank)
        left = torch.full_like(norms[:, 0], torch.inf)

        def step(y: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
            frame = route.frame(y, near)
            return route.newton_step(y, frame, y), route.anchor(frame, y)

        for _ in range(_NEWTON_STEPS):
            moved, anchors = self.each(step, point, anchors, vectors=route.rank)
            point = point - moved
            if scale is norms:
                point = point / point.norm(dim=-1, keepdim=True)
            left = moved.norm(dim=-1) / point.norm(dim=-1)
            if bool((left <= _NEWTON_TOLERANCE.get(x.dtype, 1e-3)).all()):
                break
        arrived = torch.isfinite(point).all(-1) & (left <= ON_MANIFOLD.get(x.dtype, 1e-2))
        partial = torch.where(arrived[:, None], point * scale, torch.nan)
        if bool(arrived.all()):
            self.route_at(point)
            return partial
        worst = int(torch.nonzero(~arrived)[0])
        raise NotOnManifoldError(
            "the retraction did not arrive on the manifold of minimisers",
            received=f"{int((~arrived).sum())} of {len(x)} points; point {worst} still moved by "
            f"{float(left[worst]):.3g} of its norm at the last Newton step",
            expected="points close enough to Gamma for Newton's method",
            remedy="geometry.limit_map(x), which follows gradient flow from any distance",
            failed=~arrived,
            partial=partial,
        )

    def _off_manifold(self) -> NormalRoute:
        """A route for points near the manifold, or on their way to it."""
        whole, rank = self._all_residuals(), self.problem.rank
        if whole is not None:
            return JacobianRoute(whole.loss, rank or whole.rank, self.memory, floor=_NO_SLOPE)
        if rank is None:
            return LeadingRoute(self.loss, self.memory)
        return HessianRoute(self.loss, rank, self.memory)

    def limit_map(self, x: Tensor) -> Tensor:
        """Phi(x): (..., D) -> (..., D), without derivatives.

        Raises:
            LimitMapError: If some of the flows fail; the others are in its ``partial``.
        """
        if torch._C._functorch.is_functorch_wrapped_tensor(x) or x.requires_grad:
            raise DifferentiationError(
                "the limit map by products is not differentiable",
                received="a point whose derivatives are followed",
                expected="a plain tensor",
                remedy="on Gamma its derivative is geometry.tangent_projection; the dense route "
                "differentiates it anywhere",
            )
        flat = x.reshape(-1, x.shape[-1])
        invariant = is_scale_invariant(self.problem, x)
        ends, reasons = [], {}
        for index, point in enumerate(flat):
            size = point.norm() if invariant else torch.ones_like(point[0])
            with torch.no_grad():
                end, reason = self._one_limit(point / size, invariant)
            ends.append(end * size)
            if reason:
                reasons[index] = reason
        limits = torch.stack(ends) if ends else flat.clone()
        if not reasons:
            return limits.reshape(x.shape)
        failed = torch.zeros(len(flat), dtype=torch.bool, device=x.device)
        failed[list(reasons)] = True
        index = min(reasons)
        raise LimitMapError(
            "gradient flow did not reach the manifold of minimisers",
            failed=failed.reshape(x.shape[:-1]),
            partial=limits.masked_fill(failed[:, None], torch.nan).reshape(x.shape),
            received=f"{len(reasons)} of {len(flat)} points failed; point {index}: "
            f"{reasons[index]}",
            expected="points of the attraction set U, from which the flow ends on Gamma",
            remedy=way_out(self.problem)
            + ("; x.double(): single precision seldom tells the rank" * (x.dtype == torch.float32)),
        )

    def _one_limit(self, x: Tensor, invariant: bool) -> tuple[Tensor, str]:
        """The limit of the flow from one point, and why it is none."""
        route = self._off_manifold()
        flow = flow_to_limit(
            route,
            self.start(route),
            x,
            rtol=self.rtol if x.dtype == torch.float64 else max(self.rtol, SINGLE_RTOL),
            max_steps=self.max_steps,
        )
        if flow.status != FlowStatus.SETTLED:
            return flow.point, _reason(flow, self.max_steps)
        point, near = flow.point, flow.anchor
        try:
            if isinstance(route, LeadingRoute):
                # The rank is that of the end, where the spectrum has a gap.
                route, (_, bases) = self._hessian_frames(point[None])
                near = bases[0]
            for _ in range(_CORRECTIONS):
                frame = route.frame(point, near)
                point = point - route.newton_step(point, frame, point)
            if invariant:
                point = point / point.norm()
            self.route_at(point[None])
        except (RankError, NotOnManifoldError, NonFiniteError) as error:
            return point, f"{error.problem}: {error.received}"
        return point, ""

    def residuals(self, y: Tensor) -> dict[str, Tensor]:
        """How accurate the route is at points of the manifold: relative errors, (n,) each.

        Returns:
            "orthogonality": size of Q^T Q - 1 on a fixed vector; "eigenvectors": |H q - lambda q|
            over the largest eigenvalue, for a combination q of all eigenvectors; "projection":
            |P P v - P v| / |v|; "constraint": the Newton displacement over the norm.
        """
        route, frames = self.frames_at(y)
        probe = fixed_vectors(y.new_empty(self.loss.dim), 1)[:, 0]

        def at_one(point: Tensor, values: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
            frame = values, weights
            c = route.components(point, frame, probe)
            c = c / c.norm()
            mixed = route.combine(point, frame, c)
            image = self.loss.hessian_product(point, mixed)
            wanted = route.combine(point, frame, values * c)
            once = route.project(point, frame, probe)
            return (
                (route.components(point, frame, mixed) - c).norm(),
                (image - wanted).norm() / values[-1],
                (route.project(point, frame, once) - once).norm(),
                route.newton_step(point, frame, point).norm() / point.norm(),
            )

        names = ("orthogonality", "eigenvectors", "projection", "constraint")
        return dict(zip(names, self.each(at_one, y, *frames), strict=True))


def _refuse_off(distance: Tensor, y: Tensor) -> None:
    """Refuse points whose Newton displacement over the norm is too large."""
    tolerance = ON_MANIFOLD.get(y.dtype, 1e-2)
    if bool((distance <= tolerance).all()):
        return
    raise NotOnManifoldError(
        "a point is not on the manifold of minimisers",
        received=f"{int((distance > tolerance).sum())} of {len(y)} points; at worst distance "
        f"estimate {float(distance.max()):.3g}",
        expected=f"a distance of at most {tolerance:.0e} of the norm",
        remedy='Geometry(problem, method="matrix_free").limit_map(x), the end of gradient flow '
        "from there",
    )


def _reason(flow: Flow, max_steps: int) -> str:
    what = describe_status(flow.status, max_steps)
    return f"{what}, at distance estimate {flow.distance:.3g} after flow time {flow.time:.4g}"


def _not_finite(what: str) -> NonFiniteError:
    return NonFiniteError(
        f"the {what} is not finite",
        received="NaN or infinity in its products",
        expected="a loss that is smooth on Gamma (Assumption 2.1)",
        remedy="look for norms, roots or logarithms of zero in the loss at that point",
    )
