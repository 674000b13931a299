"""The matrix-free route: networks, where nothing of size D x D fits into memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde.columns import column_norms
from manifold_sde.derivatives import is_followed
from manifold_sde.errors import (
    LimitMapError,
    NonFiniteError,
    NotOnManifoldError,
    RankError,
)
from manifold_sde.geometry.gradient_flow import FlowStatus, precision
from manifold_sde.geometry.limit_map import (
    SINGLE_RTOL,
    at_points,
    describe_status,
    hint,
    homogeneous,
    is_scale_invariant,
)
from manifold_sde.geometry.matrix_free import MatrixFreeSpace, eigen, fixed_vectors
from manifold_sde.geometry.matrix_free_derivative import pull_back, push_forward
from manifold_sde.geometry.matrix_free_flow import Flow, Step, flow_to_limit
from manifold_sde.geometry.matrix_free_spaces import HessianSpace, JacobianSpace, LeadingSpace
from manifold_sde.geometry.normal_space import Frame
from manifold_sde.geometry.rank import common_rank, find_rank
from manifold_sde.geometry.route import (
    NEWTON_STEPS,
    NEWTON_TOLERANCE,
    Route,
    refuse_off_manifold,
)
from manifold_sde.loss import LeastSquaresLoss
from manifold_sde.problem import Problem
from manifold_sde.progress import Progress

#: Bytes that the vectors of one block may take with what is computed from them.
DEFAULT_MEMORY = 1 << 29
#: Residuals that Newton's method leaves, in units of rounding of |J| |y|, that count as none.
_ROUNDING_UNITS = 1e3
#: Eigenvalue of J J^T, relative to the largest, below which a direction has no slope.
_NO_SLOPE = 1e-12
#: Eigenvalue of H, relative to the largest, above which a direction counts as normal.
_SLOW = 1e-6
#: Leading eigenvalues that are looked at first where the rank is not known.
_FIRST_LOOK = 16
#: Newton corrections after the flow has settled.
_CORRECTIONS = 2


@dataclass
class Limit:
    """The limit of the flow from one point, with what its derivative needs.

    Attributes:
        start: Where the flow starts (D,), a unit vector where L is scale-invariant.
        size: The norm that was divided out.
        point: Where it ends.
        invariant: Whether L is scale-invariant.
        off: The space that the flow is followed with.
        steps: Its steps, if they are kept.
        space, frame: Those of the end.
        reason: Why there is no limit; empty where there is one.
    """

    start: Tensor
    size: Tensor
    point: Tensor
    invariant: bool
    off: MatrixFreeSpace
    steps: list[Step] | None
    space: MatrixFreeSpace | None = None
    frame: Frame = ()
    reason: str = ""

    def push(self, tangents: Tensor) -> Tensor:
        """The derivative of Phi times tangents: (D, k) -> (D, k)."""

        def along(vectors: Tensor) -> Tensor:
            assert self.steps is not None
            return self._project(push_forward(self.off, self.steps, vectors.T)).T

        return self._carry(along, self.start, self.point, tangents)

    def pull(self, cotangents: Tensor) -> Tensor:
        """The transposed derivative of Phi times cotangents: (D, k) -> (D, k)."""

        def along(vectors: Tensor) -> Tensor:
            assert self.steps is not None
            return pull_back(self.off, self.steps, self._project(vectors.T)).T

        return self._carry(along, self.point, self.start, cotangents)

    def _project(self, rows: Tensor) -> Tensor:
        """P at the end times rows (k, D)."""
        space = self.space
        assert space is not None
        found: Tensor = vmap(lambda v: space.project_at(self.point, self.frame, v))(rows)
        return found

    def _carry(
        self, along: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, vectors: Tensor
    ) -> Tensor:
        if not self.invariant:
            return along(vectors)
        one = homogeneous(lambda v: along(v[0])[None], start[None], end[None], vectors[None])
        return one[0]


class _LimitMap:
    """Phi of one call, whose derivative is asked for later.

    The derivative is that of the numerical flow, step by step, and then the projection at its end;
    that projection alone would be the derivative on Gamma and nowhere else. A step has 5 vectors in
    memory. Steps that do not fit are found again, by the same flow.

    Args:
        route: The route.
        followed: Whether a derivative may be asked for.
    """

    def __init__(self, route: MatrixFreeRoute, followed: bool) -> None:
        self.route = route
        self.followed = followed
        self.kept: tuple[Tensor, list[Limit]] | None = None

    def value(self, x: Tensor) -> Tensor:
        """Phi of a flat batch: (n, D) -> (n, D)."""
        limits = self._limits(x)
        return torch.stack([limit.point * limit.size for limit in limits])

    def push(self, x: Tensor, tangents: Tensor) -> Tensor:
        """The derivative of Phi at x times tangents: (n, D), (n, D, k) -> (n, D, k)."""
        return self._each(x, Limit.push, tangents)

    def pull(self, x: Tensor, cotangents: Tensor) -> Tensor:
        """The transposed derivative of Phi at x: (n, D), (n, D, k) -> (n, D, k)."""
        return self._each(x, Limit.pull, cotangents)

    @torch.no_grad()
    def _each(self, x: Tensor, image: Callable[[Limit, Tensor], Tensor], vectors: Tensor) -> Tensor:
        found = []
        for point, limit, own in zip(x, self._limits(x), vectors, strict=True):
            if limit.steps is None:
                limit = self.route.one_limit(point, limit.invariant, True)
            found.append(image(limit, own))
        return torch.stack(found)

    @torch.no_grad()
    def _limits(self, x: Tensor) -> list[Limit]:
        """The limits of points (n, D), one flow after the other.

        Raises:
            LimitMapError: If some of the flows fail.
        """
        if self.kept is not None and torch.equal(self.kept[0], x):
            return self.kept[1]
        problem, limits = self.route.problem, []
        invariant, left = is_scale_invariant(problem, x), self.route.memory
        with Progress(False, "flows", total=len(x)) as bar:  # for the deadline
            for point in x:
                limit = self.route.one_limit(point, invariant, self.followed)
                left -= sum(step.stages.nbytes for step in limit.steps or ())
                limit.steps = limit.steps if left >= 0 else None
                limits.append(limit)
                bar.update()
        reasons = {i: limit.reason for i, limit in enumerate(limits) if limit.reason}
        if reasons:
            raise _unreached(problem, limits, reasons)
        if self.followed:
            self.kept = x, limits
        return limits


class MatrixFreeRoute(Route):
    """Geometry by products with J or H, for any dimension.

    Least squares whose residuals vanish take the Jacobian, everything else the Hessian. Points are
    taken as many at once as fit into the memory; the flows of a limit map one after the other, as
    each has steps of its own.

    Args:
        problem: The problem.
        rtol: Accuracy of the limit map relative to the norm.
        max_steps: Steps of the gradient flow after which it counts as failed.
        memory: Bytes that the vectors of one block may take with what is computed from them.
        drift_columns: Random columns of sigma by which the walk takes its drift; 0 for all of it.
    """

    def __init__(
        self, problem: Problem, *, rtol: float, max_steps: int, memory: int, drift_columns: int = 0
    ) -> None:
        super().__init__(problem, rtol=rtol, max_steps=max_steps)
        self.loss = problem.pointwise
        self.memory = memory
        self.drift_columns = drift_columns

    def frames_at(self, y: Tensor) -> tuple[MatrixFreeSpace, Frame, Tensor]:
        """Frames at points that are checked to lie on the manifold (n, D)."""
        found: tuple[MatrixFreeSpace, Frame] | None = self._jacobian_frames(y)
        space, frame = found or self._hessian_frames(y)
        return space, frame, frame[0].T

    def _jacobian_frames(self, y: Tensor) -> tuple[JacobianSpace, Frame] | None:
        """From one Gram matrix a point; ``None`` where the residuals do not vanish there."""
        whole = self._all_residuals()
        if whole is None:
            return None
        loss, x = whole.loss, y.T
        values, weights = whole.over_points(whole.frame, x, y.new_zeros(loss.dim, 0, len(y)))
        if not bool(torch.isfinite(values).all()):
            raise _not_finite("Jacobian")

        def residuals_left(point: Tensor, *frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            moved, first = point, None
            for _ in range(3):
                step = whole.displacement_at(point, frame, moved)
                first, moved = step if first is None else first, moved - step
            size = (loss.n_samples * frame[0].sum()).sqrt() * point.norm()
            assert first is not None
            return first.norm() / point.norm(), loss.residuals(moved).norm(), size

        distance, residuals, sizes = whole.at_points(residuals_left, x, values, weights)
        refuse_off_manifold(distance, lambda k: self.loss.gradient(y[k]), y.dtype)
        if bool((residuals > _ROUNDING_UNITS * torch.finfo(y.dtype).eps * sizes).any()):
            return None
        rank = common_rank(find_rank(self._with_zero(values.T), self.problem.rank))
        first = len(values) - rank
        frame = values[first:], weights[:, first:].contiguous()
        return JacobianSpace(self.problem, rank, self.memory), frame

    def _all_residuals(self) -> JacobianSpace | None:
        """The space of all residuals, whatever their rank; ``None`` where there are none."""
        loss = self.loss
        if not isinstance(loss, LeastSquaresLoss) or loss.n_residuals > loss.dim:
            return None
        return JacobianSpace(self.problem, loss.n_residuals, self.memory, floor=_NO_SLOPE)

    def _with_zero(self, values: Tensor) -> Tensor:
        """The eigenvalues of H that can differ from zero, and one that cannot."""
        if values.shape[-1] == self.loss.dim:
            return values
        return torch.cat([values.new_zeros(len(values), 1), values], dim=1)

    def _hessian_frames(self, y: Tensor) -> tuple[HessianSpace, Frame]:
        """From the leading eigenvectors of H."""
        found = [self._leading(point) for point in y]
        for point, (values, basis) in zip(y, found, strict=True):
            fast = values.abs() > _SLOW * values.abs().max()
            gradient = self.loss.gradient(point)
            step = basis[:, fast] @ ((basis[:, fast].T @ gradient) / values[fast])
            refuse_off_manifold((step.norm() / point.norm())[None], [gradient].__getitem__, y.dtype)
        rank = common_rank(
            torch.stack([find_rank(values[None], self.problem.rank)[0] for values, _ in found])
        )
        values = torch.stack([v[len(v) - rank :] for v, _ in found], -1)
        basis = torch.stack([q[:, q.shape[1] - rank :] for _, q in found], -1)
        space = HessianSpace(self.problem, rank, self.memory)
        sizes = (values.abs().sort(descending=True).values for values, _ in found)
        space.beyond = max(float(size[rank] / size[0]) for size in sizes)
        return space, (values, basis)

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
            if count >= dim - 1:  # as many products as for all, without the last of them
                space = HessianSpace(self.problem, dim, self.memory)
                matrix = space.products(y, torch.eye(dim).to(y))
                return eigen(0.5 * (matrix + matrix.T))
            values, vectors = self._lanczos(y, count)
            if self.problem.rank is not None:
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
        from scipy.sparse.linalg import LinearOperator, eigsh  # slow to import

        operator = LinearOperator((dim, dim), matvec=product, dtype=np.float64)
        first = fixed_vectors(y, 1)[:, 0].double().cpu().numpy()
        values, vectors = eigsh(operator, k=count, which="LM", v0=first)
        order = np.argsort(values)
        return (
            torch.from_numpy(values[order]).to(y),
            torch.from_numpy(np.ascontiguousarray(vectors[:, order])).to(y),
        )

    def eigenvalues(self, y: Tensor) -> Tensor:
        """Leading eigenvalues of H with the first that counts as zero, ascending: -> (n, k)."""
        found = self._jacobian_frames(y)
        if found is not None:
            return self._with_zero(found[1][0].T)
        leading = [self._leading(point)[0] for point in y]
        most = max(len(values) for values in leading)
        # What was not looked at is smaller than what was.
        return torch.stack([torch.cat([v.new_zeros(most - len(v)), v]) for v in leading])

    def normal_variances(self, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Nonzero eigenvalues of H, and q^T Sigma q of their vectors: (n, D) -> (n, M) twice."""
        space, frame, eigenvalues = self.frames_at(y)
        noise = self.problem.noise

        def at_one(point: Tensor, *own: Tensor) -> Tensor:
            parts = [
                vmap(lambda q: noise.transposed_product(self.loss, point, q))(rows).square().sum(1)
                for _, rows in space.eigenvectors_at(point, own)
            ]
            return torch.cat(parts)

        variances: Tensor = space.at_points(at_one, y.T, *frame)
        return eigenvalues, variances.T

    def newton(
        self, point: Tensor, invariant: bool
    ) -> tuple[Tensor, Tensor, Tensor, RankError | None]:
        """Newton steps with a frame of each."""
        space = self._off_manifold()
        if isinstance(space, LeadingSpace):
            # What is normal shows on the manifold alone: the way there begins anew with its rank.
            ends = torch.stack([space.approach(start, NEWTON_STEPS) for start in point])
            space = self._hessian_frames(ends)[0]
        x = point.T
        basis = space.over_points(space.reference_basis, x)

        def displacement(y: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
            frame = space.frame_at(y, near)
            return space.displacement_at(y, frame, y), space.reference_at(y, frame)

        for _ in range(NEWTON_STEPS):
            moved, basis = space.at_points(displacement, x, basis)
            x = x - moved
            if invariant:
                x = x / column_norms(x)
            steps = column_norms(moved)
            if bool((steps <= NEWTON_TOLERANCE.get(x.dtype, 1e-3) * column_norms(x)).all()):
                break
        ambiguous = None
        try:
            self.frames_at(x.T)
        except RankError as error:
            ambiguous = error
        except (NotOnManifoldError, NonFiniteError):
            pass  # it did not arrive
        return x.T, steps, torch.zeros_like(steps, dtype=torch.bool), ambiguous

    def _off_manifold(self) -> MatrixFreeSpace:
        """A space for points near the manifold, or on their way to it."""
        whole, rank = self._all_residuals(), self.problem.rank
        if whole is not None:
            return JacobianSpace(self.problem, rank or whole.rank, self.memory, floor=_NO_SLOPE)
        if rank is None:
            return LeadingSpace(self.problem, self.memory)
        return HessianSpace(self.problem, rank, self.memory)

    def limit_map(self, x: Tensor) -> Tensor:
        """Phi(x): (..., D) -> (..., D), differentiable in forward and reverse mode.

        Raises:
            LimitMapError: If some of the flows fail; the others are in its ``partial``.
        """
        return at_points(_LimitMap(self, is_followed(x)), x)

    def one_limit(self, x: Tensor, invariant: bool, record: bool) -> Limit:
        """The limit of the flow from one point (D,), or why there is none."""
        size = x.norm() if invariant else torch.ones_like(x[0])
        x = x / size
        off = space = self._off_manifold()
        rtol = self.rtol if x.dtype == torch.float64 else max(self.rtol, SINGLE_RTOL)
        steps: list[Step] | None = [] if record else None
        flow = flow_to_limit(space, x, rtol=rtol, max_steps=self.max_steps, record=steps)
        limit = Limit(x, size, flow.point, invariant, off, steps)
        if flow.status != FlowStatus.SETTLED:
            limit.reason = _reason(flow, self.max_steps)
            return limit
        base = point = flow.point
        frame = flow.frame
        assert frame is not None
        try:
            if isinstance(space, LeadingSpace):
                # The rank is that of the end, where the spectrum has a gap.
                space, (_, bases) = self._hessian_frames(point[None])
                frame = space.frame_at(point, bases[..., 0])
            for _ in range(_CORRECTIONS):
                point = point - space.displacement_at(base, frame, point)
            limit.point = point / point.norm() if invariant else point
            limit.space, frames, _ = self.frames_at(limit.point[None])
            limit.frame = tuple(part[..., 0] for part in frames)
            beyond = getattr(limit.space, "beyond", 0.0)
            if beyond > precision(x.dtype).kernel:
                raise RankError(
                    "the minimum is degenerate, or the flow ended on a plateau",
                    received=f"an eigenvalue of {beyond:.2g} of the largest beyond the rank",
                )
        except (RankError, NotOnManifoldError, NonFiniteError) as error:
            limit.reason = f"{error.problem}: {error.received}"
        return limit

    def residuals(self, y: Tensor) -> dict[str, Tensor]:
        """How accurate the route is at points of the manifold: relative errors, (n,) each.

        Returns:
            "orthogonality": size of Q^T Q - 1 on a fixed vector; "eigenvectors": |H q - lambda q|
            over the largest eigenvalue, for a combination q of all eigenvectors; "projection":
            |P P v - P v| / |v|; "constraint": the Newton displacement over the norm.
        """
        space, frame, _ = self.frames_at(y)
        probe = fixed_vectors(y.new_empty(self.loss.dim), 1)[:, 0]

        def at_one(point: Tensor, *own: Tensor) -> tuple[Tensor, ...]:
            values = own[0]
            c = space.components_at(point, own, probe)
            c = c / c.norm()
            mixed = space.combine_at(point, own, c)
            image = self.loss.hessian_product(point, mixed)
            wanted = space.combine_at(point, own, values * c)
            once = space.project_at(point, own, probe)
            return (
                (space.components_at(point, own, mixed) - c).norm(),
                (image - wanted).norm() / values[-1],
                (space.project_at(point, own, once) - once).norm(),
                space.displacement_at(point, own, point).norm() / point.norm(),
            )

        names = ("orthogonality", "eigenvectors", "projection", "constraint")
        found = space.at_points(at_one, y.T, *frame)
        return dict(zip(names, found, strict=True))


def _unreached(problem: Problem, limits: list[Limit], reasons: dict[int, str]) -> LimitMapError:
    points = torch.stack([limit.point * limit.size for limit in limits])
    failed = torch.zeros(len(limits), dtype=torch.bool, device=points.device)
    failed[list(reasons)] = True
    index = min(reasons)
    single = points.dtype == torch.float32
    return LimitMapError(
        "gradient flow did not reach the manifold of minimisers",
        failed=failed,
        partial=points.masked_fill(failed[:, None], torch.nan),
        received=f"{len(reasons)} of {len(limits)} points failed; point {index}: {reasons[index]}",
        expected="points of the attraction set U, from which the flow ends on Gamma",
        remedy=hint(problem) + ("; x.double(): single precision seldom tells the rank" * single),
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
