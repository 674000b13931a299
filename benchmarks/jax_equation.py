"""The limiting diffusion (13) at one point, in JAX by hand; nothing here imports torch.

The Euler-Maruyama step of the Ito form with the whole of d^2 Phi[Sigma], from one
eigendecomposition of the Hessian, and the way back to the manifold by three Newton corrections,
each with a Hessian of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Loss = Callable[[Array], Array]

#: Newton corrections after a step.
CORRECTIONS = 3


def normalized_linear(inputs: Any, targets: Any) -> Loss:
    """Loss of the model of section 6.1."""
    rows, labels = jnp.asarray(np.asarray(inputs)), jnp.asarray(np.asarray(targets))
    return lambda x: 0.5 * jnp.mean((rows @ (x / jnp.linalg.norm(x)) - labels) ** 2)


def varying_circle(amplitude: float) -> Loss:
    """Loss of the circle of varying curvature."""

    def loss(x: Array) -> Array:
        u = x / jnp.linalg.norm(x)
        return 0.5 * ((1.0 + amplitude * u[0]) * u[2]) ** 2

    return loss


def great_sphere() -> Loss:
    """Loss of the great sphere in four dimensions."""
    return lambda x: 0.5 * (x[3] / jnp.linalg.norm(x)) ** 2


def mixed_noise_circle(amplitude: float, tilt: float, height: float) -> Loss:
    """The four sample losses of the small circle with mixed noise, (4,)."""

    def losses(x: Array) -> Array:
        u = x / jnp.linalg.norm(x)
        g = tilt * jnp.stack([u[0], u[1] + u[0] * u[2]])
        return 0.5 * ((1.0 + amplitude * u[0]) * (u[2] - height)) ** 2 + jnp.concatenate([g, -g])

    return losses


class Equation:
    """Coefficients of (13), and the retraction, at ONE point.

    Args:
        loss: The loss of one vector (D,).
        dim: Dimension D.
        rank: Rank M of the Hessian on the manifold.
        scale: Scale s of the noise (18); ``None`` for the noise of drawing samples, whose losses
            (m,) ``loss`` then returns.
        contraction: How third derivatives are contracted: "forward mode", along M + D - M pairs of
            directions, or "gradient of a trace", by reverse mode.
    """

    def __init__(
        self, loss: Loss, dim: int, rank: int, scale: float | None, contraction: str
    ) -> None:
        self.scale, self.split, self.dim, self.n_noise = scale, dim - rank, dim, dim
        if scale is None:
            self.samples, self.n_noise = loss, len(loss(jnp.ones(dim)))
        self.loss = (lambda x: loss(x).mean()) if scale is None else loss
        self.gradient = jax.grad(self.loss)
        self.hessian = jax.hessian(self.loss)
        forms = {"forward mode": self._along_directions, "gradient of a trace": self._of_trace}
        self._contract = forms[contraction]

    def _along_directions(self, y: Array, left: Array, right: Array) -> Array:
        def along(a: Array, b: Array) -> Array:
            def first(z: Array) -> Array:
                return jax.jvp(self.gradient, (z,), (a,))[1]

            return jax.jvp(first, (y,), (b,))[1]

        return jax.vmap(along, in_axes=1)(left, right).sum(0)

    def _of_trace(self, y: Array, left: Array, right: Array) -> Array:
        matrix = left @ right.T
        return jax.grad(lambda z: jnp.vdot(self.hessian(z), matrix))(y)

    def factor(self, y: Array) -> Array:
        """Deviations of the samples' gradients, so that sigma sigma^T is Sigma: (D,) -> (D, m)."""
        gradients = jax.jacrev(self.samples)(y)
        return (gradients - gradients.mean(0)).T / self.n_noise**0.5

    def covariance(self, y: Array) -> Array:
        """Sigma at a unit vector: (D,) -> (D, D)."""
        if self.scale is None:
            return self.factor(y) @ self.factor(y).T
        return self.scale**2 * (jnp.eye(self.dim) - jnp.outer(y, y))

    def noise(self, y: Array, w: Array) -> Array:
        """The product sigma w at a unit vector: (D,), (m,) -> (D,)."""
        return self.factor(y) @ w if self.scale is None else self.scale * (w - y * (y @ w))

    def frame(self, x: Array) -> tuple[Array, Array, Array, Array]:
        """Norm, direction, eigenvalues and eigenvectors of the Hessian at the direction."""
        norm = jnp.linalg.norm(x)
        y = x / norm
        values, basis = jnp.linalg.eigh(self.hessian(y))
        return norm, y, values, basis

    def drift(self, x: Array, frame: tuple[Array, Array, Array, Array]) -> Array:
        """Half of d^2 Phi[Sigma], less half of x: (D,)."""
        norm, y, eigenvalues, basis = frame
        tangent, normal = basis[:, : self.split], basis[:, self.split :]
        values = eigenvalues[self.split :]
        sigma = self.covariance(y)
        mixed = tangent.T @ sigma @ normal
        block = normal.T @ sigma @ normal
        columns = 2.0 * tangent @ (mixed / values)
        columns += normal @ (block / (values[:, None] + values))
        from_tangent = self._contract(y, tangent, tangent @ (tangent.T @ sigma @ tangent))
        from_normal = self._contract(y, normal, columns)
        inside = normal @ ((normal.T @ from_tangent) / values)
        second = -inside - tangent @ (tangent.T @ from_normal)
        return 0.5 * second / norm**3 - 0.5 * x

    def diffusion(self, frame: tuple[Array, Array, Array, Array], w: Array) -> Array:
        """P sigma w: (m,) -> (D,)."""
        norm, y, _, basis = frame
        tangent = basis[:, : self.split]
        return tangent @ (tangent.T @ self.noise(y, w)) / norm

    def retract(self, x: Array, tangent: Array) -> Array:
        """The point of the manifold near x, with its norm.

        With T a tangent basis nearby, H + mu T T^T is positive definite near the manifold, and
        Newton's correction is the part of its solution that is normal to T.
        """
        norm = jnp.linalg.norm(x)
        y = x / norm
        shift = tangent @ tangent.T
        for _ in range(CORRECTIONS):
            hessian, gradient = self.hessian(y), self.gradient(y)
            gradient -= shift @ gradient
            mu = jnp.trace(hessian) / (self.dim - self.split)
            factor = jax.scipy.linalg.cho_factor(hessian + mu * shift)
            y -= jax.scipy.linalg.cho_solve(factor, gradient)
            y /= jnp.linalg.norm(y)
        return y * norm

    def step(self, x: Array, dw: Array, h: Array) -> Array:
        """One step: (D,), (m,), () -> (D,)."""
        frame = self.frame(x)
        moved = x + h * self.drift(x, frame) + self.diffusion(frame, dw)
        return self.retract(moved, frame[3][:, : self.split])
