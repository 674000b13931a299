"""The dense route: everything from one eigendecomposition of the Hessian, in batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde.errors import NonFiniteError, NotOnManifoldError, RankError
from manifold_sde.geometry.gradient_flow import precision
from manifold_sde.geometry.kernels import Kernels
from manifold_sde.geometry.limit_map import LimitMap
from manifold_sde.geometry.spectrum import Spectrum, common_rank, find_rank, normal_directions
from manifold_sde.problem import Problem

#: Largest dimension in which anything of the size D x D is made.
DENSE_LIMIT = 1000
#: Largest Newton displacement, relative to the norm, of a point that counts as on the manifold.
ON_MANIFOLD = {torch.float64: 1e-6, torch.float32: 1e-3}
#: Newton steps of a retraction, and the displacement at which it is content.
_NEWTON_STEPS = 8
_NEWTON_TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}


class DenseGeometry:
    """Geometry by eigendecomposition of H, up to dimensions of a few hundred.

    Args:
        problem: The problem.
        rtol: Accuracy of the limit map relative to the norm.
        max_steps: Steps of the gradient flow after which it counts as failed.
        compiled: Whether Hessians and third derivatives are compiled.
    """

    def __init__(self, problem: Problem, *, rtol: float, max_steps: int, compiled: bool) -> None:
        self.problem = problem
        self.kernels = Kernels(problem, compiled)
        self.limit_map = LimitMap(problem, self.kernels, rtol=rtol, max_steps=max_steps)

    def eigenvalues(self, y: Tensor) -> Tensor:
        """Eigenvalues of H, ascending: (n, D) -> (n, D)."""
        return torch.linalg.eigvalsh(self._finite_hessian(y))

    def hessian(self, y: Tensor) -> Tensor:
        """The Hessian: (n, D) -> (n, D, D)."""
        return self.kernels.hessian(y)

    def _finite_hessian(self, y: Tensor) -> Tensor:
        matrix = self.hessian(y)
        if bool(torch.isfinite(matrix.sum())):
            return matrix
        finite = torch.isfinite(matrix).flatten(1).all(-1)
        if not bool(finite.all()):
            raise NonFiniteError(
                "the Hessian is not finite",
                received=f"NaN or infinity at {int((~finite).sum())} of {len(y)} points, first at "
                f"point {int(torch.nonzero(~finite)[0])}",
                expected="a loss that is smooth on Gamma (Assumption 2.1)",
                remedy="look for norms, roots or logarithms of zero in the loss at that point",
            )
        return matrix

    def spectrum(self, y: Tensor) -> Spectrum:
        """Eigendecomposition of H with its rank, at points that are checked to lie on Gamma.

        Raises:
            RankError: If the rank is ambiguous, not the declared one, or not constant.
            NotOnManifoldError: If a point is not on the manifold.
        """
        values, basis = torch.linalg.eigh(self._finite_hessian(y))
        gradient = self.kernels.gradient(y)
        self._check_rest(y, values, basis, gradient)
        return Spectrum(values, basis, common_rank(find_rank(values, self.problem.rank)))

    def _check_rest(self, y: Tensor, values: Tensor, basis: Tensor, gradient: Tensor) -> None:
        """The Newton displacement in the fast directions has to be small."""
        components = (basis.mT @ gradient[..., None])[..., 0].abs()
        top = values.abs().max(dim=-1, keepdim=True).values
        fast = values.abs() > 1e-6 * top
        step = components / torch.where(fast, values.abs(), 1e-6 * top).clamp(min=1e-300)
        distance = step.norm(dim=-1) / y.norm(dim=-1)
        tolerance = ON_MANIFOLD.get(y.dtype, 1e-2)
        if bool((distance <= tolerance).all()):
            return
        worst = int(distance.argmax())
        raise NotOnManifoldError(
            "a point is not on the manifold of minimisers",
            received=f"{int((distance > tolerance).sum())} of {len(y)} points; at worst "
            f"gradient norm {float(gradient[worst].norm()):.3g}, distance estimate "
            f"{float(distance[worst]):.3g}",
            expected=f"a distance of at most {tolerance:.0e} of the norm",
            remedy="Geometry(problem).limit_map(x), the end of gradient flow from there",
        )

    def tangent_projection(self, y: Tensor, v: Tensor) -> Tensor:
        """P v: (n, D), (n, D) -> (n, D)."""
        return self.spectrum(y).project(v)

    def projector(self, y: Tensor) -> Callable[[Tensor], Tensor]:
        """P at ONE point (D,) as a function of vectors (..., D)."""
        spectrum = self.spectrum(y[None])
        own = Spectrum(spectrum.eigenvalues[0], spectrum.eigenvectors[0], spectrum.rank)
        return own.project

    def second_derivative(self, y: Tensor, covariance: Tensor) -> Tensor:
        """d^2 Phi(y)[Sigma]: (n, D), (n, D, D) -> (n, D)."""
        spectrum = self.spectrum(y)

        def contract(point: Tensor, values: Tensor, basis: Tensor, sigma: Tensor) -> Tensor:
            return contract_second_derivative(
                self.problem.pointwise.third_derivative, point, values, basis, sigma, spectrum.rank
            )

        return self.kernels.run(
            f"second_derivative_{spectrum.rank}",
            contract,
            y,
            spectrum.eigenvalues,
            spectrum.eigenvectors,
            covariance,
        )

    def retract(self, x: Tensor) -> Tensor:
        """Newton's method to the manifold, at constant norm where the loss is scale-invariant.

        Raises:
            NotOnManifoldError: If it does not arrive.
            RankError: If it arrives where the rank is ambiguous or not the declared one.
        """
        invariant = self.limit_map.is_scale_invariant(x)
        norms = x.norm(dim=-1, keepdim=True)
        scale = norms if invariant else torch.ones_like(norms)
        rank: int | Tensor | None = self.problem.rank
        if rank is None:
            # What is normal shows on the manifold alone: the way there begins anew with its rank.
            rank = self._newton(x / scale, invariant, None)[-1].sum(-1, keepdim=True)
        point, step, values, normal = self._newton(x / scale, invariant, rank)
        left = step.norm(dim=-1) / point.norm(dim=-1)
        arrived = torch.isfinite(point).all(-1) & (left <= ON_MANIFOLD.get(x.dtype, 1e-2))
        top = values.abs().amax(dim=-1, keepdim=True)
        arrived &= normal.sum(-1) >= (values > precision(x.dtype).slow * top).sum(-1)
        failed, unclear = ~arrived, None
        try:
            find_rank(values, self.problem.rank, "the end of the retraction")
        except RankError as error:
            unclear, failed = error, failed | error.failed
        partial = torch.where(failed[:, None], torch.nan, point * scale)
        if not bool(arrived.all()):
            worst = int(torch.nonzero(~arrived)[0])
            raise NotOnManifoldError(
                "the retraction did not arrive on the manifold of minimisers",
                received=f"{int((~arrived).sum())} of {len(x)} points; point {worst} still moved "
                f"by {float(left[worst]):.3g} of its norm at the last Newton step",
                expected="points close enough to Gamma for Newton's method, and to tell flat "
                "normal directions from tangent ones",
                remedy="geometry.limit_map(x), which follows gradient flow from any distance; "
                "declare rank=M with the problem if you know it",
                failed=failed,
                partial=partial,
            )
        if unclear is not None:
            unclear.partial = partial
            raise unclear
        return partial

    def _newton(
        self, point: Tensor, invariant: bool, rank: int | Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Points (n, D) after Newton steps in the normal directions.

        Returns:
            The points and their last steps, (n, D), and the eigenvalues there (n, D), ascending,
            with a mask of those that counted as normal.
        """
        tolerance = _NEWTON_TOLERANCE.get(point.dtype, 1e-3)
        for _ in range(_NEWTON_STEPS):
            matrix = self.hessian(point)
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


def contract_second_derivative(
    third_derivative: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    eigenvalues: Tensor,
    basis: Tensor,
    covariance: Tensor,
    rank: int,
) -> Tensor:
    r"""Second derivative of Phi contracted with a symmetric matrix, at one point of Gamma.

    .. math::

        \partial^2\Phi[\Sigma] = -H^\dagger \mathcal T[P\Sigma P]
        - 2 P\, \mathcal T[\mathrm{sym}(H^\dagger N\Sigma P)]
        - P\, \mathcal T[\mathcal L^{-1}(N\Sigma N)]

    In the eigenbasis of H each script T is a sum of third derivatives along one eigenvector and
    one combination of them: D - M for the tangent block, M for the two others together.

    Args:
        third_derivative: d^2(grad L)(y)[a, b] of one point and two directions.
        y: Point (D,).
        eigenvalues: Eigenvalues of H, ascending, (D,).
        basis: Eigenvectors as columns, (D, D).
        covariance: Sigma (D, D), symmetric.
        rank: Rank M of H.

    Returns:
        Tensor (D,).

    Source: Li, Wang and Arora, ICLR 2022, Lemmas 4.3 and 4.6, in the form whose three terms are
    the tangent, the mixed and the normal block.
    """
    split = y.shape[-1] - rank
    tangent, normal = basis[:, :split], basis[:, split:]
    values = eigenvalues[split:]
    inner = basis.T @ covariance @ basis
    tangent_block = inner[:split, :split]
    mixed_block = inner[:split, split:]
    normal_block = inner[split:, split:]
    # Columns b_i of the two sums of d^2(grad L)[q_i, b_i].
    lyapunov = normal_block / (values[:, None] + values[None, :])
    tangent_columns = tangent @ tangent_block
    normal_columns = 2.0 * tangent @ (mixed_block / values) + normal @ lyapunov
    along = torch.cat([tangent, normal], dim=1)
    across = torch.cat([tangent_columns, normal_columns], dim=1)
    thirds = vmap(lambda a, b: third_derivative(y, a, b), in_dims=(1, 1))(along, across)
    from_tangent, from_normal = thirds[:split].sum(0), thirds[split:].sum(0)
    normal_part = normal @ ((normal.T @ from_tangent) / values)
    tangent_part = tangent @ (tangent.T @ from_normal)
    return -(normal_part + tangent_part)
