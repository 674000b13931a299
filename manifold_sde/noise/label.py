"""The noise of fresh labels, for least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.errors import NoiseError
from manifold_sde.noise.base import GradientNoise, check_batch_size, check_scale
from manifold_sde.noise.sampling import one_hot_draws
from manifold_sde.pointwise import LeastSquaresPointwise, Pointwise


class LabelNoise(GradientNoise):
    r"""SGD on least squares whose labels get fresh Gaussian noise at every draw.

    A step draws B samples with replacement and follows the mean of
    ``(r_xi + eps) grad r_xi`` with eps ~ N(0, s^2). Where the residuals vanish, that is on Gamma
    at interpolation, Sigma = s^2 H / B: there is no diffusion along Gamma, only the drift
    -(s^2 / 4B) P grad tr H. Off Gamma the noise of drawing the samples comes on top; sigma has a
    block of Xi columns for each of the two.

    Args:
        scale: Standard deviation s of the labels' noise; positive.
        batch_size: Number B of samples a step.

    Source: Li, Wang and Arora, "What happens after SGD reaches zero loss?", ICLR 2022, section 6.
    """

    def __init__(self, scale: float, batch_size: int = 1) -> None:
        self.scale = check_scale(scale)
        self.batch_size = check_batch_size(batch_size)

    def __repr__(self) -> str:
        return f"LabelNoise(scale={self.scale:g}, batch_size={self.batch_size})"

    def bind(self, loss: Pointwise) -> None:
        """Needs residuals."""
        if not isinstance(loss, LeastSquaresPointwise):
            raise NoiseError(
                "label noise is defined for least squares only",
                received="a loss that is not given by residuals",
                expected="a LeastSquaresProblem",
                remedy="LeastSquaresProblem(residuals, dim, LabelNoise(...)), or another noise",
            )

    @staticmethod
    def _least_squares(loss: Pointwise) -> tuple[LeastSquaresPointwise, int]:
        assert isinstance(loss, LeastSquaresPointwise)
        assert loss.n_samples is not None
        return loss, loss.n_samples

    def n_components(self, loss: Pointwise) -> int:
        """M = 2 Xi: drawing the samples, then their labels."""
        return 2 * self._least_squares(loss)[1]

    def draw_counts(self, loss: Pointwise) -> tuple[int, int]:
        """A normal and a uniform for each draw."""
        return self.batch_size, self.batch_size

    def product(self, loss: Pointwise, x: Tensor, w: Tensor) -> Tensor:
        """sigma(x) w by one reverse mode."""
        loss, n = self._least_squares(loss)
        drawn, labels = w[:n], w[n:]
        residuals = loss.residuals(x)
        weights = residuals * (drawn - drawn.mean()) + self.scale * labels
        return loss.residual_transposed_product(x, weights / (n * self.batch_size) ** 0.5)

    def transposed_product(self, loss: Pointwise, x: Tensor, v: Tensor) -> Tensor:
        """sigma(x)^T v by one forward mode."""
        loss, n = self._least_squares(loss)
        along = loss.residual_product(x, v)
        drawn = loss.residuals(x) * along
        parts = torch.cat([drawn - drawn.mean(), self.scale * along])
        return parts / (n * self.batch_size) ** 0.5

    def factor(self, loss: Pointwise, x: Tensor) -> Tensor:
        """Both blocks from one Jacobian."""
        loss, n = self._least_squares(loss)
        jacobian = loss.jacobian(x)
        gradients = loss.residuals(x)[:, None] * jacobian
        blocks = torch.cat([gradients - gradients.mean(0), self.scale * jacobian])
        return blocks.T / (n * self.batch_size) ** 0.5

    def stochastic_gradient(
        self, loss: Pointwise, x: Tensor, normals: Tensor, uniforms: Tensor
    ) -> Tensor:
        """The gradient on the samples drawn, with their fresh labels."""
        loss, n = self._least_squares(loss)
        draws = one_hot_draws(uniforms, n)
        residuals = loss.residuals(x)
        weights = residuals * draws.sum(0) + self.scale * (normals[:, None] * draws).sum(0)
        return loss.residual_transposed_product(x, weights / self.batch_size)
