"""The dense route: everything from one eigendecomposition of the Hessian, in batches."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.errors import NonFiniteError, RankError
from manifold_sde.geometry.dense import DenseSpace, eigenframe_of
from manifold_sde.geometry.gradient_flow import precision
from manifold_sde.geometry.kernels import Kernels
from manifold_sde.geometry.limit_map import LimitMap
from manifold_sde.geometry.normal_space import Frame, NormalSpace
from manifold_sde.geometry.rank import common_rank, find_rank, normal_directions
from manifold_sde.geometry.route import (
    NEWTON_STEPS,
    NEWTON_TOLERANCE,
    Route,
    refuse_off_manifold,
)
from manifold_sde.problem import Problem


class DenseRoute(Route):
    """Geometry by eigendecomposition of H, up to dimensions of a few hundred.

    Args:
        problem: The problem.
        rtol: Accuracy of the limit map relative to the norm.
        max_steps: Steps of the gradient flow after which it counts as failed.
        compiled: Whether Hessians and third derivatives are compiled.
    """

    def __init__(
        self, problem: Problem, *, rtol: float, max_steps: int, compiled: bool | str
    ) -> None:
        super().__init__(problem, rtol=rtol, max_steps=max_steps)
        self.kernels = Kernels(problem, compiled)
        self._limit_map = LimitMap(problem, self.kernels, rtol=rtol, max_steps=max_steps)

    def limit_map(self, x: Tensor) -> Tensor:
        """Phi(x): (..., D) -> (..., D), differentiable in forward and reverse mode."""
        return self._limit_map(x)

    def eigenvalues(self, y: Tensor) -> Tensor:
        """Eigenvalues of H, ascending: (n, D) -> (n, D)."""
        return torch.linalg.eigvalsh(self._finite_hessian(y).movedim(-1, 0))

    def _finite_hessian(self, y: Tensor) -> Tensor:
        # Points last, as eigendecompositions in C take them.
        matrix: Tensor = self.kernels.run_last("hessian", self.problem.pointwise.hessian, y.T)
        if bool(torch.isfinite(matrix.sum())):
            return matrix
        finite = torch.isfinite(matrix).flatten(0, 1).all(0)
        if not bool(finite.all()):
            raise NonFiniteError(
                "the Hessian is not finite",
                received=f"NaN or infinity at {int((~finite).sum())} of {len(y)} points, first at "
                f"point {int(torch.nonzero(~finite)[0])}",
                expected="a loss that is smooth on Gamma (Assumption 2.1)",
                remedy="look for norms, roots or logarithms of zero in the loss at that point",
            )
        return matrix

    def frames_at(self, y: Tensor) -> tuple[NormalSpace, Frame, Tensor]:
        """Eigenbases of H at points that are checked to lie on the manifold."""
        eigenvalues, vectors = self.kernels.eigh(self._finite_hessian(y))
        values, gradient = eigenvalues.T, self.kernels.gradient(y)
        components = (vectors * gradient.T[:, None]).sum(0).T.abs()
        top = values.abs().max(dim=-1, keepdim=True).values
        fast = values.abs() > 1e-6 * top
        step = components / torch.where(fast, values.abs(), 1e-6 * top).clamp(min=1e-300)
        distance = step.norm(dim=-1) / y.norm(dim=-1)
        refuse_off_manifold(distance, gradient.__getitem__, y.dtype)
        rank = common_rank(find_rank(values, self.problem.rank))
        space = DenseSpace(self.problem, rank, eigenbasis=True).with_kernels(self.kernels)
        frame = eigenframe_of(eigenvalues, vectors, rank)
        return space, frame, values[:, values.shape[1] - rank :]

    def normal_variances(self, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Nonzero eigenvalues of H, and q^T Sigma q of their vectors: (n, D) -> (n, M) twice."""
        values, vectors = torch.linalg.eigh(self.problem.hessian(y))
        covariance = self.problem.noise_covariance(y)
        across = torch.einsum("pdi,pde,pei->pi", vectors, covariance, vectors)
        first = values.shape[-1] - rank
        return values[:, first:], across[:, first:]

    def newton(
        self, point: Tensor, invariant: bool
    ) -> tuple[Tensor, Tensor, Tensor, RankError | None]:
        """Newton steps in the directions that count as normal at each distance."""
        rank: int | Tensor | None = self.problem.rank
        if rank is None:
            # What is normal shows on the manifold alone: the way there begins anew with its rank.
            rank = self._newton(point, invariant, None)[-1].sum(-1, keepdim=True)
        point, step, values, normal = self._newton(point, invariant, rank)
        top = values.abs().amax(dim=-1, keepdim=True)
        unclear = normal.sum(-1) < (values > precision(point.dtype).slow * top).sum(-1)
        ambiguous = None
        try:
            find_rank(values, self.problem.rank, "the end of the retraction")
        except RankError as error:
            ambiguous = error
        return point, step.norm(dim=-1), unclear, ambiguous

    def _newton(
        self, point: Tensor, invariant: bool, rank: int | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points (n, D), last steps (n, D), eigenvalues (n, D), and which count as normal."""
        tolerance = NEWTON_TOLERANCE.get(point.dtype, 1e-3)
        for _ in range(NEWTON_STEPS):
            matrix = self.kernels.hessian(point)
            finite = torch.isfinite(matrix).flatten(1).all(-1)
            values, basis = torch.linalg.eigh(torch.where(finite[:, None, None], matrix, 0.0))
            force = (self.kernels.gradient(point)[:, None] @ basis)[:, 0]
            normal = normal_directions(values, force, rank)
            inside = torch.where(normal, force / torch.where(normal, values, 1.0), 0.0)
            step = (basis @ torch.where(finite[:, None], inside, torch.nan)[..., None])[..., 0]
            point = point - step
            if invariant:
                point = point / point.norm(dim=-1, keepdim=True)
            if bool((step.norm(dim=-1) <= tolerance).all()):
                break
        return point, step, values, normal
