"""What every gradient noise provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import vmap

from manifold_sde import derivatives, rng
from manifold_sde.arguments import check_integer, kind_of
from manifold_sde.derivatives import unit_rows
from manifold_sde.errors import NoiseError
from manifold_sde.loss import Loss
from manifold_sde.reverse_mode import grad

#: How many random numbers are drawn at once.
AT_ONCE = 1 << 18


class Noise(ABC):
    """A gradient noise with factor sigma(x) (D, m) and covariance Sigma = sigma sigma^T.

    All methods act on ONE point and are composable with ``torch.func``; a problem batches them.
    A noise holds no data of the problem: the loss is handed in.
    """

    def lasting_share(self, loss: Loss) -> float:
        """Return the share of the covariance that later steps do not undo.

        It is 1 for independent steps, of which the SDEs of the theory are the limit; they take no
        other noise.
        """
        return 1.0

    def validate(self, loss: Loss) -> None:  # noqa: B027  (most losses will do)
        """Check that the noise fits the loss.

        Raises:
            NoiseError: If it does not.
        """

    @abstractmethod
    def n_components(self, loss: Loss) -> int:
        """Return the number m of columns of sigma."""

    def draw_counts(self, loss: Loss) -> tuple[int, int]:
        """Return how many normals and uniforms one step of SGD consumes, by default m and 0."""
        return self.n_components(loss), 0

    @abstractmethod
    def product(self, loss: Loss, x: Tensor, w: Tensor) -> Tensor:
        """Return sigma(x) w: (D,), (m,) -> (D,)."""

    @abstractmethod
    def transposed_product(self, loss: Loss, x: Tensor, v: Tensor) -> Tensor:
        """Return sigma(x)^T v: (D,), (D,) -> (m,)."""

    def stochastic_gradient(
        self, loss: Loss, x: Tensor, normals: Tensor, uniforms: Tensor
    ) -> Tensor:
        """Return the gradient (D,) of one step of SGD, with mean grad L(x) and covariance Sigma(x).

        It consumes as many standard normals, and uniforms on (0, 1), as :meth:`draw_counts` says.
        By default it is the gradient plus sigma(x) times the normals.
        """
        return loss.gradient(x) + self.product(loss, x, normals)

    def numbers(
        self, loss: Loss, key: rng.Key, paths: Tensor, steps: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return the normals ``(a, *steps, n)`` and uniforms ``(b, *steps, n)`` of some steps.

        Of steps that are independent; else :meth:`step_numbers` has them.

        Args:
            loss: The loss.
            key: From :func:`~manifold_sde.rng.seed_key`.
            paths: Path indices (n,).
            steps: Numbers of the steps, of any shape.
            dtype: float64 or float32.
        """
        a, b = self.draw_counts(loss)
        return (
            rng.normals(key, rng.STREAM_SGD_NORMAL, paths, steps, a, dtype),
            rng.uniforms(key, rng.STREAM_SGD_UNIFORM, paths, steps, b, dtype),
        )

    def step_numbers(
        self, loss: Loss, key: rng.Key, paths: Tensor, steps: Tensor, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the normals (a, n) and uniforms (b, n) of one step (m,) after the other."""
        numbers = max(1, sum(self.draw_counts(loss)) * len(paths))
        for some in steps.split(max(1, AT_ONCE // numbers)):
            normals, uniforms = self.numbers(loss, key, paths, some, dtype)
            yield from zip(normals.unbind(1), uniforms.unbind(1), strict=True)

    def draw(self, loss: Loss, points: Tensor, seed: int, step: object) -> Tensor:
        """Noise that a step of SGD adds to the gradient: (n, D) -> (n, D), point i as path i.

        Raises:
            ArgumentError: If the step is not the number of one.
        """
        count = "count the steps from 0, as run_sgd does"
        number = check_integer("step", step, 0, rng.STEPS - 1, count)
        if len(points) == 0:
            return torch.zeros_like(points)
        paths = torch.arange(len(points), device=points.device)
        steps = torch.tensor([number], device=points.device)
        drawn = self.step_numbers(loss, rng.seed_key(seed), paths, steps, points.dtype)
        normals, uniforms = next(iter(drawn))

        def noise(z: Tensor, n: Tensor, u: Tensor) -> Tensor:
            return self.stochastic_gradient(loss, z, n, u) - loss.gradient(z)

        return vmap(noise)(points, normals.T, uniforms.T)

    def columns(self, loss: Loss, x: Tensor, which: slice) -> Tensor:
        """Return some of the columns of sigma(x), as rows: (D,) -> (b, D)."""
        units = unit_rows(self.n_components(loss), which.start, which.stop, x)
        return vmap(lambda w: self.product(loss, x, w))(units)

    def own_correction(self, loss: Loss, x: Tensor) -> Tensor | None:
        """Return :meth:`correction` for P = I, where it takes less than a pass for each column."""
        return None

    def factor(self, loss: Loss, x: Tensor) -> Tensor:
        """Return sigma(x): (D,) -> (D, m)."""
        identity = torch.eye(self.n_components(loss), dtype=x.dtype, device=x.device)
        return vmap(lambda w: self.product(loss, x, w), out_dims=1)(identity)

    def covariance(self, loss: Loss, x: Tensor) -> Tensor:
        """Return Sigma(x): (D,) -> (D, D)."""
        factor = self.factor(loss, x)
        return factor @ factor.T

    def trace(self, loss: Loss, x: Tensor) -> Tensor:
        """Return V = tr Sigma(x): (D,) -> ()."""
        return self.factor(loss, x).square().sum()

    def turned(self, loss: Loss, x: Tensor, w: Tensor, along: Tensor) -> Tensor:
        """Return the derivative of sigma(x) w along a direction: (D,), (m,), (D,) -> (D,)."""
        return derivatives.product(lambda z: self.product(loss, z, w), x, along)

    def correction(self, loss: Loss, x: Tensor, projection: Tensor) -> Tensor:
        """Return the sum over j of the derivative of sigma_j along P sigma_j: (D,) -> (D,).

        It is the term of the Stratonovich drift that comes from the noise itself. The symmetric
        matrix ``projection`` is P (D, D), held fixed.
        """
        identity = torch.eye(self.n_components(loss), dtype=x.dtype, device=x.device)

        def column(w: Tensor) -> Tensor:
            return self.turned(loss, x, w, projection @ self.product(loss, x, w))

        return vmap(column)(identity).sum(0)


class GradientNoise(Noise):
    """A noise whose columns are gradients of functions: its Jacobians are symmetric.

    They are made of derivatives of the loss, and differentiated by the modes that suit that.
    """

    def turned(self, loss: Loss, x: Tensor, w: Tensor, along: Tensor) -> Tensor:
        """Return the derivative of sigma(x) w along a direction: (D,), (m,), (D,) -> (D,)."""
        return loss.along(lambda z: self.product(loss, z, w), x, along)

    def correction(self, loss: Loss, x: Tensor, projection: Tensor) -> Tensor:
        """Return half the gradient of tr(P Sigma(x)) at fixed P, by one reverse pass."""

        def projected_trace(z: Tensor) -> Tensor:
            factor = self.factor(loss, z)
            return ((projection @ factor) * factor).sum()

        return 0.5 * grad(projected_trace)(x)


def check_noise(noise: object) -> None:
    """Refuse what is not a noise model, by a NoiseError."""
    if not isinstance(noise, Noise):
        raise NoiseError(
            "the noise is not a noise model",
            received=kind_of(noise),
            expected="SphericalNoise, SamplingNoise, LabelNoise or CustomNoise",
            remedy="SphericalNoise(0.3), or CustomNoise(factor) for a sigma of your own",
        )


def require_independent_steps(noise: Noise, loss: Loss, what: str) -> None:
    """Refuse a noise that later steps undo, by a NoiseError.

    Args:
        noise: The noise.
        loss: The loss.
        what: What needs independent steps.
    """
    share = noise.lasting_share(loss)
    if share != 1.0:
        raise NoiseError(
            f"{what} is a limit of SGD with independent steps, which these are not",
            received=f"{noise!r}: {share:.2g} of it outlasts an epoch",
            expected="batches that are drawn anew at each step, as in (1)",
            remedy="SamplingNoise(batch_size) for the theory; run_sgd takes this noise as it is",
        )


def check_batch_size(batch_size: object) -> int:
    """Check a mini-batch size: a positive integer of 64 bits."""
    remedy = "SamplingNoise(batch_size=1) draws one sample a step"
    return check_integer("batch_size", batch_size, 1, 2**63 - 1, remedy)
