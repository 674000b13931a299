"""The noise of SGD itself: which samples are drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from manifold_sde.arguments import check_flag
from manifold_sde.errors import NoiseError
from manifold_sde.loss import Loss
from manifold_sde.noise.base import GradientNoise, check_batch_size
from manifold_sde.paper import implements


@implements("Equation (2)")
class SamplingNoise(GradientNoise):
    """Noise of drawing the samples, sigma_xi = (grad L_xi - grad L) / sqrt(Xi).

    A batch of B samples divides the covariance: by B when it is drawn with replacement, as in
    (2), and multiplies it by (Xi - B) / (B (Xi - 1)) when it is drawn without.

    Args:
        batch_size: Number B of samples a step.
        replacement: Whether the same sample can be drawn twice in one step.

    Source: equations (1) and (2).
    """

    def __init__(self, batch_size: int = 1, *, replacement: bool = True) -> None:
        self.batch_size = check_batch_size(batch_size)
        self.replacement = check_flag("replacement", replacement)

    def __repr__(self) -> str:
        drawn = "" if self.replacement else ", replacement=False"
        return f"SamplingNoise(batch_size={self.batch_size}{drawn})"

    def validate(self, loss: Loss) -> None:
        """Require the losses of samples, and a batch that fits them."""
        if loss.n_samples is None:
            raise NoiseError(
                "sampling noise needs the losses of the samples",
                received="a loss that returns one number",
                expected="a loss that returns the sample losses, shape (Xi,)",
                remedy="return the losses before the mean, or use SphericalNoise or CustomNoise",
            )
        if loss.n_samples < 2:
            raise NoiseError(
                "one sample has no sampling noise",
                received=f"{loss.n_samples} sample loss",
                expected="at least 2 sample losses",
                remedy="give the losses of all samples, or use SphericalNoise or CustomNoise",
            )
        if not self.replacement and self.batch_size >= loss.n_samples:
            raise NoiseError(
                "a batch drawn without replacement has to be smaller than the data",
                received=f"batch_size={self.batch_size} of {loss.n_samples} samples",
                expected=f"batch_size below {loss.n_samples}: the full batch has no noise",
                remedy="a smaller batch_size, or replacement=True",
            )

    def variance_factor(self, n_samples: int) -> float:
        """Return the factor kappa by which a batch multiplies the covariance of one sample."""
        if self.replacement:
            return 1.0 / self.batch_size
        return (n_samples - self.batch_size) / (self.batch_size * (n_samples - 1))

    def _weight(self, loss: Loss) -> float:
        assert loss.n_samples is not None
        return (self.variance_factor(loss.n_samples) / loss.n_samples) ** 0.5

    def n_components(self, loss: Loss) -> int:
        """Return m = Xi."""
        assert loss.n_samples is not None
        return loss.n_samples

    def draw_counts(self, loss: Loss) -> tuple[int, int]:
        """Return one uniform for each draw, or for each sample without replacement."""
        return 0, self.batch_size if self.replacement else self.n_components(loss)

    def product(self, loss: Loss, x: Tensor, w: Tensor) -> Tensor:
        """Return sigma(x) w, by one reverse pass: centring the weights centres the gradients."""
        return loss.weighted_gradient(x, self._weight(loss) * (w - w.mean()))

    def transposed_product(self, loss: Loss, x: Tensor, v: Tensor) -> Tensor:
        """Return sigma(x)^T v, by one forward pass."""
        along = loss.sample_derivatives(x, v)
        return self._weight(loss) * (along - along.mean())

    def factor(self, loss: Loss, x: Tensor) -> Tensor:
        """Return the centred gradients of the samples, as columns."""
        gradients = loss.sample_gradients(x)
        return self._weight(loss) * (gradients - gradients.mean(0)).T

    def stochastic_gradient(
        self, loss: Loss, x: Tensor, normals: Tensor, uniforms: Tensor
    ) -> Tensor:
        """Return the gradient of the mean loss of the samples drawn."""
        return loss.drawn_gradient(x, self._drawn(loss, uniforms))

    def _drawn(self, loss: Loss, uniforms: Tensor) -> Tensor:
        """The numbers of the samples drawn, (B,)."""
        if self.replacement:
            return draws(uniforms, self.n_components(loss))
        # Those with the smallest uniforms; by rank, so that ties never make a larger batch.
        return uniforms.argsort(stable=True)[: self.batch_size]


def draws(uniforms: Tensor, n_samples: int) -> Tensor:
    """Return which of n_samples each uniform on (0, 1) draws: (B,) -> integers (B,)."""
    return (uniforms * n_samples).floor().clamp(max=n_samples - 1).to(torch.int64)


def one_hot_draws(uniforms: Tensor, n_samples: int) -> Tensor:
    """Return which sample each uniform draws, as rows of ones and zeros: (B,) -> (B, Xi)."""
    drawn = (uniforms * n_samples).floor().clamp(max=n_samples - 1)
    index = torch.arange(n_samples, dtype=uniforms.dtype, device=uniforms.device)
    return (drawn[:, None] == index).to(uniforms.dtype)
