r"""Coefficients of the limiting diffusions at ONE unit vector of the manifold.

Functions of single points, composable with ``torch.func``: :mod:`manifold_sde.field` evaluates
them on batches and extends them by homogeneity. At a unit vector y, with V = tr Sigma(y),

    Ito drift of (8) without its -c y:             1/2 d^2 Phi[Sigma]
    Stratonovich drift of (8) without its -c y:    b = b_1 + 1/2 V y

where b_1 is tangent to Gamma_1, and both move with P sigma dW. The direction diffusion in the
clock u takes 1/2 V y away from either.

The drifts here take an eigendecomposition of H and any noise. For the noise of (18), whose
covariance on the range of H is a multiple of the identity, half the pseudo-inverse solves the
Lyapunov equation: the field then does without eigenvectors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde.geometry.dense import contract_second_derivative
from manifold_sde.loss import Loss
from manifold_sde.noise import Noise, SphericalNoise


class Coefficients:
    """Coefficients at one unit vector, for one problem and rank.

    Args:
        loss: The loss of one vector.
        noise: Its gradient noise.
        rank: Rank M of the Hessian on the manifold.
    """

    def __init__(self, loss: Loss, noise: Noise, rank: int) -> None:
        self.loss = loss
        self.noise = noise
        self.rank = rank

    @property
    def isotropic(self) -> bool:
        """Whether the noise is that of (18), which needs no eigenvectors."""
        return isinstance(self.noise, SphericalNoise)

    def noise_product(self, y: Tensor, w: Tensor) -> Tensor:
        """Sigma w: (D,), (m,) -> (D,)."""
        return self.noise.product(self.loss, y, w)

    def noise_factor(self, y: Tensor) -> Tensor:
        """Sigma: (D,) -> (D, m)."""
        return self.noise.factor(self.loss, y)

    def script_t(self, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Script T of the symmetric part of a b^T: the sum over k of d^2(grad L)[a_k, b_k].

        Args:
            y: Point (D,).
            a: Columns (D, k).
            b: Columns (D, k).

        Returns:
            Tensor (D,).
        """
        third = self.loss.third_derivative
        return vmap(lambda p, q: third(y, p, q), in_dims=(1, 1))(a, b).sum(0)

    def turning(self, y: Tensor, inverse: Tensor) -> Tensor:
        """Script T of H^+: (D,), (D, D) -> (D,)."""
        return self.script_t(y, torch.eye(len(y), dtype=y.dtype, device=y.device), inverse)

    def curving(self, y: Tensor, inverse: Tensor, basis: Tensor) -> Tensor:
        """H^+ script T of P = basis basis^T: (D,), (D, D), (D, d) -> (D,)."""
        return inverse @ self.script_t(y, basis, basis)

    @property
    def isotropic_variance(self) -> float:
        """s^2 of (18)."""
        assert isinstance(self.noise, SphericalNoise)
        return self.noise.scale**2

    # Drifts for any noise, from the eigendecomposition of H.

    def spectral_ito(self, y: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
        """Half of d^2 Phi[Sigma]: (D,), (D,), (D, D) -> (D,)."""
        covariance = self.noise.covariance(self.loss, y)
        return 0.5 * contract_second_derivative(
            self.loss.third_derivative, y, values, vectors, covariance, self.rank
        )

    def spectral_stratonovich(self, y: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
        r"""b_1, the part of the Stratonovich drift that is tangent to Gamma_1.

        .. math::

            b = - P\, \mathcal T[\tfrac12 \mathcal L^{-1}(N\Sigma N)
            + \tfrac12 \mathrm{sym}(H^\dagger N\Sigma P)]
            - \tfrac12 P \sum_j \partial\sigma_j[P\sigma_j]
        """
        tangent, normal, lyapunov, mixed = self._blocks(y, values, vectors)
        force = self.script_t(y, normal, 0.5 * (lyapunov + mixed))
        projection = tangent @ tangent.T
        force = force + 0.5 * self.noise.correction(self.loss, y, projection)
        return without_radial_part(-(tangent @ (tangent.T @ force)), y)

    def spectral_tangent(self, y: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
        """The part of the Ito drift that is tangent to Gamma_1: the whole of the mixed block."""
        tangent, normal, lyapunov, mixed = self._blocks(y, values, vectors)
        force = self.script_t(y, normal, 0.5 * lyapunov + mixed)
        return without_radial_part(-(tangent @ (tangent.T @ force)), y)

    def _blocks(
        self, y: Tensor, values: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tangent and normal basis, and the columns of L^-1(N Sigma N) and of H^+ N Sigma P."""
        split = len(y) - self.rank
        tangent, normal = vectors[:, :split], vectors[:, split:]
        eigenvalues = values[split:]
        rows = normal.T @ self.noise.covariance(self.loss, y)
        lyapunov = (rows @ normal) / (eigenvalues[:, None] + eigenvalues[None, :])
        mixed = tangent @ ((rows @ tangent) / eigenvalues[:, None]).T
        return tangent, normal, normal @ lyapunov, mixed


def without_radial_part(v: Tensor, y: Tensor) -> Tensor:
    """The part of v orthogonal to y: (D,), (D,) -> (D,)."""
    return v - y * ((v * y).sum() / (y * y).sum())
