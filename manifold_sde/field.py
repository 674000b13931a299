"""Coefficients and retraction for many points near the manifold at once, points last.

Everything is evaluated at the direction of a point and extended by homogeneity: with r = |x|, the
noise has degree -1 and the drifts of (8) without their -c y have degree -3. Near the manifold, off
it, this is a smooth extension; on it, it is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.coefficients import Coefficients
from manifold_sde.geometry.kernels import Kernels
from manifold_sde.geometry.tangent import newton_step, tangent_basis, tangent_basis_and_inverse
from manifold_sde.problem import Problem

#: Newton steps of a retraction that share the last Hessian.
_SHARED_STEPS = 4
#: Last Newton step of a retraction that has arrived, relative to the norm.
ARRIVED = {torch.float64: 1e-12, torch.float32: 1e-5}


class Field:
    """Coefficients of the limiting diffusions on batches of points.

    Points are columns: x (D, n), with anchors (D, d, n), d = D - M: tangent bases nearby. A
    compiled kernel computes one thing (a Hessian, an elimination, a sum of third derivatives):
    larger ones compile badly.

    Args:
        problem: The problem.
        rank: Rank M of its Hessian on the manifold.
        compiled: Whether the kernels are compiled.
    """

    def __init__(self, problem: Problem, rank: int, *, compiled: bool = False) -> None:
        self.problem = problem
        self.rank = rank
        self.coefficients = Coefficients(problem.pointwise, problem.noise, rank)
        self.kernels = Kernels(problem, compiled)

    def anchor(self, x: Tensor) -> Tensor:
        """Orthonormal tangent bases at points of the manifold: (D, n) -> (D, d, n)."""
        _, vectors = self.eigen(x / x.norm(dim=0))
        return vectors[:, : len(x) - self.rank].contiguous()

    def trace(self, x: Tensor) -> Tensor:
        """V = tr Sigma at the direction: (D, n) -> (n,)."""
        result: Tensor = self.kernels.run_last("trace", self.coefficients.trace, x / x.norm(dim=0))
        return result

    def noise(self, x: Tensor, anchor: Tensor, w: Tensor) -> Tensor:
        """P sigma w: (D, n), (D, d, n), (m, n) -> (D, n)."""
        r = x.norm(dim=0)
        y = x / r
        move = self.kernels.run_last("noise_product", self.coefficients.noise_product, y, w)
        return _project(self._basis(y, anchor), move) / r

    def drift(self, x: Tensor, anchor: Tensor, calculus: str) -> Tensor:
        """Drift of (8) at ratio 0: (D, n), (D, d, n) -> (D, n).

        Args:
            x: Points.
            anchor: Tangent bases nearby.
            calculus: "ito" or "stratonovich".
        """
        r = x.norm(dim=0)
        y = x / r
        return (self.direction_drift(y, anchor, calculus) + 0.5 * self.trace(y) * y) / r**3

    def direction_drift(self, y: Tensor, anchor: Tensor, calculus: str) -> Tensor:
        """Drift of the direction diffusion at unit vectors: (D, n), (D, d, n) -> (D, n)."""
        stratonovich = calculus == "stratonovich"
        if self.coefficients.isotropic:
            drift = self._isotropic_drift(y, anchor, stratonovich)
            return drift if stratonovich else drift - 0.5 * self.trace(y) * y
        return self.spectral_drift(y, *self.eigen(y), calculus)

    def _isotropic_drift(self, y: Tensor, anchor: Tensor, stratonovich: bool) -> Tensor:
        """The drift for the noise of (18).

        Stratonovich: -(s^2 / 4) P T[H^+], which is -(s^2 / 4) grad log pdet H along Gamma_1. Ito:
        that and -(s^2 / 2) H^+ T[P]; T[P - y y^T] is T[P], because the gradient is homogeneous
        and vanishes at y.
        """
        basis, inverse = self._basis_and_inverse(y, anchor)
        identity = torch.eye(len(y), dtype=y.dtype, device=y.device)
        variance = self.coefficients.isotropic_variance
        force = self._script_t(y, identity[..., None].expand_as(inverse), inverse)
        drift = (-0.25 * variance) * _project(basis, force)
        if stratonovich:
            return drift - y * (y * drift).sum(0)
        curving = (inverse * self._script_t(y, basis, basis)).sum(1)
        return drift - (0.5 * variance) * curving

    def spectral_drift(self, y: Tensor, values: Tensor, vectors: Tensor, calculus: str) -> Tensor:
        """Drift of the direction diffusion, from the spectra of H at unit vectors (D, n)."""
        name = f"spectral_{calculus}"
        function = getattr(self.coefficients, name)
        drift: Tensor = self.kernels.run_last(f"{name}_{self.rank}", function, y, values, vectors)
        return drift if calculus == "stratonovich" else drift - 0.5 * self.trace(y) * y

    def spectral_noise(self, y: Tensor, vectors: Tensor, w: Tensor) -> Tensor:
        """P sigma w at unit vectors, from the eigenvectors of H: -> (D, n)."""
        basis = vectors[:, : len(y) - self.rank]
        move = self.kernels.run_last("noise_product", self.coefficients.noise_product, y, w)
        return _project(basis, move)

    def spectral_factor(self, y: Tensor, vectors: Tensor) -> Tensor:
        """P sigma at unit vectors, from the eigenvectors of H: -> (D, m, n)."""
        factor = self.kernels.run_last("noise_factor", self.coefficients.noise_factor, y)
        basis = vectors[:, : len(y) - self.rank]
        inner = torch.einsum("din,dmn->imn", basis, factor)
        return torch.einsum("din,imn->dmn", basis, inner)

    def retract(
        self, x: Tensor, anchor: Tensor, fresh_steps: int = 2
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Points of the manifold near x, with the norms of x.

        Newton's method in a fixed number of steps, so that nothing has to wait for a result.

        Args:
            x: Points near the manifold (D, n).
            anchor: Tangent bases nearby (D, d, n).
            fresh_steps: Newton steps with a Hessian of their own, before those that share one.

        Returns:
            Points (D, n), tangent bases there (D, d, n), and whether the point arrived, (n,):
            one that did not is NaN.
        """
        r = x.norm(dim=0)
        y = x / r
        for _ in range(fresh_steps):
            arguments = (self._hessian(y), anchor, self._gradient(y))
            y = _unit(y - self.kernels.run_last("newton_step", newton_step, *arguments))
        basis, inverse = self._basis_and_inverse(y, anchor)
        step = y
        for _ in range(_SHARED_STEPS):
            step = (inverse * self._gradient(y)).sum(1)
            y = _unit(y - step)
        arrived = step.norm(dim=0) <= ARRIVED.get(x.dtype, 1e-4)
        return torch.where(arrived, y * r, torch.nan), basis, arrived

    # Kernels.

    def _gradient(self, y: Tensor) -> Tensor:
        result: Tensor = self.kernels.run_last("gradient", self.problem.pointwise.gradient, y)
        return result

    def _hessian(self, y: Tensor) -> Tensor:
        result: Tensor = self.kernels.run_last("hessian", self.problem.pointwise.hessian, y)
        return result

    def _basis(self, y: Tensor, anchor: Tensor) -> Tensor:
        hessian = self._hessian(y)
        result: Tensor = self.kernels.run_last("tangent_basis", tangent_basis, hessian, anchor)
        return result

    def _basis_and_inverse(self, y: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        hessian = self._hessian(y)
        result: tuple[Tensor, Tensor] = self.kernels.run_last(
            "tangent_basis_and_inverse", tangent_basis_and_inverse, hessian, anchor
        )
        return result

    def _script_t(self, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        name = f"script_t_{a.shape[1]}"
        result: Tensor = self.kernels.run_last(name, self.coefficients.script_t, y, a, b)
        return result

    def eigen(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues (D, n) and eigenvectors (D, D, n) of H at unit vectors."""
        values, vectors = torch.linalg.eigh(self._hessian(y).movedim(-1, 0))
        return values.T, vectors.movedim(0, -1)


def _project(basis: Tensor, v: Tensor) -> Tensor:
    """Projection on orthonormal columns: (D, d, n), (D, n) -> (D, n)."""
    return (basis * (basis * v[:, None]).sum(0)).sum(1)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=0)
