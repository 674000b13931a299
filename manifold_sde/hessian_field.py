"""Coefficients of the limiting diffusions from the Hessian and third derivatives of the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.coefficients import Coefficients
from manifold_sde.field import ARRIVED, Field
from manifold_sde.geometry.tangent import newton_step, tangent_basis, tangent_basis_and_inverse
from manifold_sde.problem import Problem

#: Newton steps of a retraction with a Hessian of their own, beyond those that the scheme asks for,
#: and those that share the last Hessian.
_MORE_STEPS = 1
_SHARED_STEPS = 4


class HessianField(Field):
    """The route for every problem: Hessians, eliminations, and sums of third derivatives.

    Anchors are tangent bases nearby (D, d, n), d = D - M.

    Args:
        problem: The problem.
        rank: Rank M of its Hessian on the manifold.
        compiled: Whether the kernels are compiled.
    """

    def __init__(self, problem: Problem, rank: int, *, compiled: bool = False) -> None:
        super().__init__(problem, compiled=compiled)
        self.rank = rank
        self.coefficients = Coefficients(problem.pointwise, problem.noise, rank)

    def anchor(self, x: Tensor) -> Tensor:
        """Orthonormal tangent bases at points of the manifold: (D, n) -> (D, d, n)."""
        _, vectors = self.eigen(x / x.norm(dim=0))
        return vectors[:, : len(x) - self.rank].contiguous()

    def noise(self, x: Tensor, anchor: Tensor, w: Tensor) -> Tensor:
        """P sigma w: (D, n), (D, d, n), (m, n) -> (D, n)."""
        r = x.norm(dim=0)
        y = x / r
        return _project(self._basis(y, anchor), self._noise_product(y, w)) / r

    def direction_drift(self, y: Tensor, anchor: Tensor, calculus: str) -> Tensor:
        """Drift of the direction diffusion at unit vectors: (D, n), (D, d, n) -> (D, n)."""
        if self.coefficients.isotropic:
            return self._isotropic_drift(y, *self._basis_and_inverse(y, anchor), calculus)
        return self.spectral_drift(y, *self.eigen(y), calculus)

    def drift_and_noise(
        self, y: Tensor, anchor: Tensor, w: Tensor, calculus: str
    ) -> tuple[Tensor, Tensor]:
        """Both with one Hessian."""
        if self.coefficients.isotropic:
            basis, inverse = self._basis_and_inverse(y, anchor)
            drift = self._isotropic_drift(y, basis, inverse, calculus)
        else:
            values, vectors = self.eigen(y)
            basis = vectors[:, : len(y) - self.rank]
            drift = self.spectral_drift(y, values, vectors, calculus)
        return drift, _project(basis, self._noise_product(y, w))

    def _isotropic_drift(self, y: Tensor, basis: Tensor, inverse: Tensor, calculus: str) -> Tensor:
        """The drift for the noise of (18).

        Stratonovich and tangent: -(s^2 / 4) P T[H^+], which is -(s^2 / 4) grad log pdet H along
        Gamma_1. Ito: that and -(s^2 / 2) H^+ T[P] - 1/2 V y; T[P - y y^T] is T[P], because the
        gradient is homogeneous and vanishes at y.
        """
        force = self.kernels.run_last("turning", self.coefficients.turning, y, inverse)
        variance = self.coefficients.isotropic_variance
        drift = (-0.25 * variance) * _project(basis, force)
        if calculus != "ito":
            return drift - y * (y * drift).sum(0)
        curving = self.kernels.run_last("curving", self.coefficients.curving, y, inverse, basis)
        return drift - (0.5 * variance) * curving - 0.5 * self.trace(y) * y

    def spectral_drift(self, y: Tensor, values: Tensor, vectors: Tensor, calculus: str) -> Tensor:
        """Drift of the direction diffusion, from the spectra of H at unit vectors (D, n)."""
        name = f"spectral_{calculus}"
        function = getattr(self.coefficients, name)
        drift: Tensor = self.kernels.run_last(f"{name}_{self.rank}", function, y, values, vectors)
        return drift if calculus != "ito" else drift - 0.5 * self.trace(y) * y

    def spectral_noise(self, y: Tensor, vectors: Tensor, w: Tensor) -> Tensor:
        """P sigma w at unit vectors, from the eigenvectors of H: -> (D, n)."""
        return _project(vectors[:, : len(y) - self.rank], self._noise_product(y, w))

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
            fresh_steps: Newton steps with a Hessian of their own, besides one more and those that
                share one.

        Returns:
            Points (D, n), tangent bases there (D, d, n), and whether the point arrived, (n,):
            one that did not is NaN.
        """
        r = x.norm(dim=0)
        y = x / r
        for _ in range(fresh_steps + _MORE_STEPS):
            arguments = (self._hessian(y), anchor, self._gradient(y))
            y = _unit(y - self.kernels.run_last("newton_step", newton_step, *arguments))
        basis, inverse = self._basis_and_inverse(y, anchor)
        left = y[0]
        for _ in range(_SHARED_STEPS):
            y, left = self.kernels.run_last("shared_step", self._shared_step, y, inverse)
        arrived = left <= ARRIVED.get(x.dtype, 1e-4)
        return torch.where(arrived, y * r, torch.nan), basis, arrived

    # Kernels.

    def _shared_step(self, y: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """A Newton step at one unit vector with the pseudo-inverse given, and its length."""
        step = inverse @ self.problem.pointwise.gradient(y)
        moved = y - step
        return moved * (moved * moved).sum().rsqrt(), (step * step).sum().sqrt()

    def _noise_product(self, y: Tensor, w: Tensor) -> Tensor:
        result: Tensor = self.kernels.run_last(
            "noise_product", self.coefficients.noise_product, y, w
        )
        return result

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

    def eigen(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues (D, n) and eigenvectors (D, D, n) of H at unit vectors; NaN at lost ones."""
        matrices = self._hessian(y).movedim(-1, 0)
        lost = ~torch.isfinite(matrices).flatten(1).all(1)
        # LAPACK refuses what is not finite.
        values, vectors = torch.linalg.eigh(matrices.masked_fill(lost[:, None, None], 0.0))
        values = values.masked_fill(lost[:, None], torch.nan)
        vectors = vectors.masked_fill(lost[:, None, None], torch.nan)
        return values.T, vectors.movedim(0, -1)


def _project(basis: Tensor, v: Tensor) -> Tensor:
    """Projection on orthonormal columns: (D, d, n), (D, n) -> (D, n)."""
    return (basis * (basis * v[:, None]).sum(0)).sum(1)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=0)
