"""The noise of SGD itself: which samples are drawn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manifold_sde import rng
from manifold_sde.arguments import check_choice, check_flag
from manifold_sde.derivatives import ScalarFunction, hessian_product
from manifold_sde.errors import NoiseError
from manifold_sde.ghost_products import mean_and_squares
from manifold_sde.loss import Loss
from manifold_sde.noise.base import AT_ONCE, GradientNoise, check_batch_size
from manifold_sde.paper import implements
from manifold_sde.reverse_mode import gradient

_EPOCH = "epoch"


@implements("Equation (2)")
class SamplingNoise(GradientNoise):
    """Noise of drawing the samples, sigma_xi = (grad L_xi - grad L) / sqrt(Xi).

    A batch of B samples divides the covariance: by B when it is drawn with replacement, as in
    (2), and multiplies it by (Xi - B) / (B (Xi - 1)) when it is drawn without.

    In epochs (``replacement="epoch"``, as PyTorch's loaders do it) every sample comes once an
    epoch, in an order of its own. A step then has the same covariance, but the noise of an epoch
    sums to zero: SGD's norms are those of independent steps, and its motion along the manifold of
    minimisers is not. The SDEs refuse it.

    Args:
        batch_size: Number B of samples a step.
        replacement: Whether the same sample can be drawn twice in one step; or ``"epoch"``, if not
            before all others were drawn.
        drop_last: Whether an epoch ends where fewer than B samples are left. By default they are a
            last, smaller batch of the same learning rate, so that each of them weighs more.

    Source: equations (1) and (2); epochs and ``drop_last`` as in ``torch.utils.data.DataLoader``.
    """

    def __init__(
        self,
        batch_size: int = 1,
        *,
        replacement: bool | str = True,
        drop_last: bool = False,
    ) -> None:
        self.batch_size = check_batch_size(batch_size)
        hint = 'replacement="epoch": every sample once an epoch'
        self.replacement: bool | str = (
            check_choice("replacement", replacement, (True, False, _EPOCH), hint)
            if isinstance(replacement, str)
            else check_flag("replacement", replacement)
        )
        self.drop_last = check_flag("drop_last", drop_last)
        if self.drop_last and self.replacement != _EPOCH:
            raise NoiseError(
                "drop_last belongs to epochs",
                received=f"drop_last=True with replacement={self.replacement!r}",
                expected='replacement="epoch"',
                remedy='SamplingNoise(batch_size, replacement="epoch", drop_last=True)',
            )

    def __repr__(self) -> str:
        drawn = "" if self.replacement is True else f", replacement={self.replacement!r}"
        drawn += ", drop_last=True" if self.drop_last else ""
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
        if self.replacement is not True and self.batch_size >= loss.n_samples:
            raise NoiseError(
                "a batch drawn without replacement has to be smaller than the data",
                received=f"batch_size={self.batch_size} of {loss.n_samples} samples",
                expected=f"batch_size below {loss.n_samples}: the full batch has no noise",
                remedy="a smaller batch_size, or replacement=True",
            )

    def variance_factor(self, n_samples: int) -> float:
        """Return the factor kappa by which a batch multiplies the covariance of one sample."""
        if self.replacement is True:
            return 1.0 / self.batch_size
        return (n_samples - self.batch_size) / (self.batch_size * (n_samples - 1))

    def batch_sizes(self, n_samples: int) -> list[int]:
        """Return the sizes of an epoch's batches; of one batch, where there are no epochs."""
        if self.replacement != _EPOCH:
            return [self.batch_size]
        whole, left = divmod(n_samples, self.batch_size)
        return [self.batch_size] * whole + [left] * (left > 0 and not self.drop_last)

    def lasting_share(self, loss: Loss) -> float:
        """Return the share of the noise that is left of an epoch's sum, 0 where B divides Xi.

        Of K batches of sizes b_k it is (A - K^2) / (A - K) with A the sum of Xi / b_k: the variance
        of the sum over a random order, over that of independent batches without replacement.
        """
        if self.replacement != _EPOCH:
            return 1.0
        n_samples = self.n_components(loss)
        sizes = self.batch_sizes(n_samples)
        whole, number = sum(n_samples / size for size in sizes), len(sizes)
        return (whole - number**2) / (whole - number)

    def _weight(self, loss: Loss) -> float:
        assert loss.n_samples is not None
        return (self.variance_factor(loss.n_samples) / loss.n_samples) ** 0.5

    def n_components(self, loss: Loss) -> int:
        """Return m = Xi."""
        assert loss.n_samples is not None
        return loss.n_samples

    def draw_counts(self, loss: Loss) -> tuple[int, int]:
        """Return one uniform for each draw, or for each sample without replacement."""
        return 0, self.n_components(loss) if self.replacement is False else self.batch_size

    def step_numbers(
        self, loss: Loss, key: rng.Key, paths: Tensor, steps: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what the steps consume; in epochs, uniforms in the cells of the samples drawn."""
        if self.replacement != _EPOCH:
            yield from super().step_numbers(loss, key, paths, steps, dtype)
            return
        n_samples = self.n_components(loss)
        sizes, n_normals = self.batch_sizes(n_samples), self.draw_counts(loss)[0]
        last, order = -1, paths
        for number, step in zip(steps.tolist(), steps, strict=True):
            epoch, place = divmod(number, len(sizes))
            if epoch != last:
                last, order = epoch, _orders(key, paths, epoch, n_samples)
            first = place * self.batch_size
            cells = (order[first : first + sizes[place]].to(dtype) + 0.5) / n_samples
            normals = cells[:0]
            if n_normals:
                normals = rng.normals(key, rng.STREAM_SGD_NORMAL, paths, step, n_normals, dtype)
            yield normals, cells

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

    def columns(self, loss: Loss, x: Tensor, which: slice) -> Tensor:
        """Return the centred gradients of some samples, by one vectorised pass over them."""
        return self._weight(loss) * (loss.gradients_of(x, which) - loss.gradient(x))

    def trace(self, loss: Loss, x: Tensor) -> Tensor:
        """Return the sum of the squares, without a matrix of the size D x Xi where it can be had.

        That is where samples do not act on each other: from what their layers receive, or from
        their gradients, a block at a time.
        """
        if loss.per_sample is None:
            return super().trace(loss, x)
        found = mean_and_squares(loss, x)
        if found is None:
            mean, squares = loss.gradient(x), self._squares(loss, x)
        else:
            mean, squares = found
        whole = squares.sum() - self.n_components(loss) * (mean @ mean)
        # Rounding of the mean's square may be left where all gradients are the same.
        return self._weight(loss) ** 2 * whole.clamp(min=0.0)

    @staticmethod
    def _squares(loss: Loss, x: Tensor) -> Tensor:
        """The squares of the gradients, (Xi,), by one vectorised pass over the samples."""

        def square(sample: ScalarFunction, z: Tensor) -> Tensor:
            found = gradient(sample, z)
            return found @ found

        parts = [loss.map_samples(square, x, which) for which in loss.blocks_of_samples()]
        return torch.cat(parts)

    def own_correction(self, loss: Loss, x: Tensor) -> Tensor | None:
        """Return the sum of H_xi (grad L_xi - grad L), two vectorised passes over the samples."""
        if loss.per_sample is None:
            return None
        mean, total = loss.gradient(x), torch.zeros_like(x)
        for which in loss.blocks_of_samples():
            centred = loss.gradients_of(x, which) - mean
            total = total + loss.map_samples(hessian_product, x, which, centred).sum(0)
        return self._weight(loss) ** 2 * total

    def stochastic_gradient(
        self, loss: Loss, x: Tensor, normals: Tensor, uniforms: Tensor
    ) -> Tensor:
        """Return the gradient of the mean loss of the samples drawn."""
        return loss.drawn_gradient(x, self._drawn(loss, uniforms))

    def _drawn(self, loss: Loss, uniforms: Tensor) -> Tensor:
        """The numbers of the samples drawn, (B,)."""
        if self.replacement is not False:
            return draws(uniforms, self.n_components(loss))
        # Those with the smallest uniforms; by rank, so that ties never make a larger batch.
        return uniforms.argsort(stable=True)[: self.batch_size]


def _orders(key: rng.Key, paths: Tensor, epoch: int, n_samples: int) -> Tensor:
    """The order in which an epoch takes the samples, for each path: (Xi, n)."""
    number = torch.tensor(epoch, device=paths.device)

    def of(some: Tensor) -> Tensor:
        stream, dtype = rng.STREAM_SGD_EPOCH, torch.float64  # one order for all precisions
        return rng.uniforms(key, stream, some, number, n_samples, dtype).argsort(stable=True, dim=0)

    return torch.cat([of(some) for some in paths.split(max(1, AT_ONCE // n_samples))], 1)


def draws(uniforms: Tensor, n_samples: int) -> Tensor:
    """Return which of n_samples each uniform on (0, 1) draws: (B,) -> integers (B,)."""
    return (uniforms * n_samples).floor().clamp(max=n_samples - 1).to(torch.int64)


def one_hot_draws(uniforms: Tensor, n_samples: int) -> Tensor:
    """Return which sample each uniform draws, as rows of ones and zeros: (B,) -> (B, Xi)."""
    drawn = (uniforms * n_samples).floor().clamp(max=n_samples - 1)
    index = torch.arange(n_samples, dtype=uniforms.dtype, device=uniforms.device)
    return (drawn[:, None] == index).to(uniforms.dtype)
