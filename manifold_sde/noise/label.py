"""The noise of fresh labels, for least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.arguments import check_positive
from manifold_sde.errors import NoiseError
from manifold_sde.loss import LeastSquaresLoss, Loss
from manifold_sde.noise.base import GradientNoise, check_batch_size
from manifold_sde.noise.sampling import draws, one_hot_draws


class LabelNoise(GradientNoise):
    """Noise of SGD on least squares whose labels get fresh Gaussian noise at every draw.

    A step draws B samples with replacement and follows the mean of
    ``(r_xi + eps) grad r_xi`` with eps ~ N(0, s^2), summed over a sample's K outputs. Where the
    residuals vanish, that is on Gamma at interpolation, Sigma = s^2 H / B: there is no diffusion
    along Gamma, only the drift -(s^2 / 4B) P grad tr H. Off Gamma the noise of drawing the samples
    comes on top; sigma has a block of columns for each of the two, Xi and Xi K.

    Args:
        scale: Standard deviation s of the labels' noise; positive.
        batch_size: Number B of samples a step.

    Source: Li, Wang and Arora, "What happens after SGD reaches zero loss?", ICLR 2022, section 6.
    """

    def __init__(self, scale: float, batch_size: int = 1) -> None:
        self.scale = check_positive(
            "scale", scale, "scale=0.3, as in section 6.1; no noise is gradient flow"
        )
        self.batch_size = check_batch_size(batch_size)

    def __repr__(self) -> str:
        return f"LabelNoise(scale={self.scale:g}, batch_size={self.batch_size})"

    def validate(self, loss: Loss) -> None:
        """Require a loss that is given by residuals."""
        if not isinstance(loss, LeastSquaresLoss):
            raise NoiseError(
                "label noise is defined for least squares only",
                received="a loss that is not given by residuals",
                expected="a LeastSquaresProblem",
                remedy="LeastSquaresProblem(residuals, dim, LabelNoise(...)), or another noise",
            )

    @staticmethod
    def _least_squares(loss: Loss) -> LeastSquaresLoss:
        assert isinstance(loss, LeastSquaresLoss)
        return loss

    def _size(self, loss: LeastSquaresLoss) -> float:
        return float((loss.n_samples * self.batch_size) ** 0.5)

    def n_components(self, loss: Loss) -> int:
        """Return m = Xi + Xi K, for drawing the samples and for their labels."""
        loss = self._least_squares(loss)
        return loss.n_samples + loss.n_residuals

    def draw_counts(self, loss: Loss) -> tuple[int, int]:
        """Return K normals and one uniform for each draw."""
        return self.batch_size * self._least_squares(loss).n_outputs, self.batch_size

    def product(self, loss: Loss, x: Tensor, w: Tensor) -> Tensor:
        """Return sigma(x) w, by one reverse pass."""
        loss = self._least_squares(loss)
        drawn, labels = w[: loss.n_samples], w[loss.n_samples :]
        residuals = loss.of_samples(loss.residuals(x))
        drawing = (residuals * (drawn - drawn.mean())[:, None]).reshape(-1)
        weights = drawing + self.scale * labels
        return loss.residual_transposed_product(x, weights / self._size(loss))

    def transposed_product(self, loss: Loss, x: Tensor, v: Tensor) -> Tensor:
        """Return sigma(x)^T v, by one forward pass."""
        loss = self._least_squares(loss)
        along = loss.residual_product(x, v)
        drawn = loss.of_samples(loss.residuals(x) * along).sum(1)
        parts = torch.cat([drawn - drawn.mean(), self.scale * along])
        return parts / self._size(loss)

    def factor(self, loss: Loss, x: Tensor) -> Tensor:
        """Return both blocks, from one Jacobian."""
        loss = self._least_squares(loss)
        jacobian = loss.jacobian(x)
        gradients = loss.of_samples(loss.residuals(x)[:, None] * jacobian).sum(1)
        blocks = torch.cat([gradients - gradients.mean(0), self.scale * jacobian])
        return blocks.T / self._size(loss)

    def stochastic_gradient(
        self, loss: Loss, x: Tensor, normals: Tensor, uniforms: Tensor
    ) -> Tensor:
        """Return the gradient on the samples drawn, with their fresh labels."""
        loss = self._least_squares(loss)
        fresh = self.scale * normals.reshape(self.batch_size, loss.n_outputs)
        if loss.per_sample is not None and self.batch_size < loss.n_samples:
            return loss.labelled_gradient(x, draws(uniforms, loss.n_samples), fresh)
        drawn = one_hot_draws(uniforms, loss.n_samples)
        residuals = loss.of_samples(loss.residuals(x))
        weights = residuals * drawn.sum(0)[:, None] + drawn.T @ fresh
        return loss.residual_transposed_product(x, weights.reshape(-1) / self.batch_size)
