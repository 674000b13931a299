"""The noise of section 6.1: isotropic on the sphere."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.arguments import check_positive
from manifold_sde.loss import Loss
from manifold_sde.noise.base import Noise
from manifold_sde.paper import implements


@implements("Equation (18)")
class SphericalNoise(Noise):
    """Isotropic noise on the sphere, sigma(x) = (s / |x|) (I - x x^T / |x|^2).

    It is what adding ``<x / |x|, eps>`` with eps ~ N(0, s^2 I) to the loss does to the gradient.
    Its covariance is Sigma = (s / |x|)^2 (I - x x^T / |x|^2) and tr Sigma = s^2 (D - 1) / |x|^2.

    Args:
        scale: The scale s, the hat sigma of (18); positive.

    Source: equation (18), section 6.1.
    """

    def __init__(self, scale: float) -> None:
        self.scale = check_positive(
            "scale", scale, "scale=0.3, as in section 6.1; no noise is gradient flow"
        )

    def __repr__(self) -> str:
        return f"SphericalNoise(scale={self.scale:g})"

    def n_components(self, loss: Loss) -> int:
        """Return m = D."""
        return loss.dim

    def product(self, loss: Loss, x: Tensor, w: Tensor) -> Tensor:
        """Return sigma(x) w, without the matrix."""
        square = (x * x).sum()
        return (self.scale * square.rsqrt()) * (w - x * ((x * w).sum() / square))

    def transposed_product(self, loss: Loss, x: Tensor, v: Tensor) -> Tensor:
        """Return sigma(x) v, as sigma is symmetric."""
        return self.product(loss, x, v)

    def covariance(self, loss: Loss, x: Tensor) -> Tensor:
        """Return (s / |x|)^2 (I - x x^T / |x|^2)."""
        square = (x * x).sum()
        identity = torch.eye(loss.dim, dtype=x.dtype, device=x.device)
        return (self.scale**2 / square) * (identity - x[:, None] * x[None, :] / square)

    def trace(self, loss: Loss, x: Tensor) -> Tensor:
        """Return s^2 (D - 1) / |x|^2."""
        return self.scale**2 * (loss.dim - 1) / (x * x).sum()

    def correction(self, loss: Loss, x: Tensor, projection: Tensor) -> Tensor:
        """Return the closed form, -s^2 (dim Gamma - 1) x / |x|^4 for P onto T_x(Gamma)."""
        square = (x * x).sum()
        projected = projection @ x
        radial = (x * projected).sum() / square
        tangential_trace = projection.diagonal().sum() - radial
        # sigma^T P x and P sigma^T x = 0 enter through the derivative of 1 / |x| and of x x^T.
        turned = projected - x * radial
        return -(self.scale**2 / square**2) * (x * tangential_trace + turned)
