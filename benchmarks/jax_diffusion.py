"""The peers in JAX for the limiting diffusion (13): a scan by hand, and diffrax.

Both take the Euler-Maruyama step of the Ito form with the whole of d^2 Phi[Sigma], from one
eigendecomposition of the Hessian, and go back to the manifold by three Newton corrections, each
with a Hessian of its own. They know the loss as a function, and no closed form of Phi.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jax import lax, random
from torch import Tensor

from benchmarks.jax_peers import _fastest, to_jax, to_torch

Array = jax.Array
Loss = Callable[[Array], Array]
Step = Callable[[Array, Array, Array], Array]

#: Newton corrections after a step.
CORRECTIONS = 3


def normalized_linear(inputs: Tensor, targets: Tensor) -> Loss:
    """Loss of the model of section 6.1."""
    rows, labels = to_jax(inputs), to_jax(targets)
    return lambda x: 0.5 * jnp.mean((rows @ (x / jnp.linalg.norm(x)) - labels) ** 2)


def varying_circle(amplitude: float) -> Loss:
    """Loss of the circle of varying curvature."""

    def loss(x: Array) -> Array:
        u = x / jnp.linalg.norm(x)
        return 0.5 * ((1.0 + amplitude * u[0]) * u[2]) ** 2

    return loss


class Equation:
    """Coefficients of (13) with the noise (18), and the retraction, at ONE point.

    Args:
        loss: The loss of one vector (D,).
        dim: Dimension D.
        rank: Rank M of the Hessian on the manifold.
        scale: Scale s of the noise.
        contraction: How third derivatives are contracted: "forward mode", along M + D - M pairs of
            directions, or "gradient of a trace", by reverse mode.
    """

    def __init__(self, loss: Loss, dim: int, rank: int, scale: float, contraction: str) -> None:
        self.loss, self.scale, self.split = loss, scale, dim - rank
        self.dim = dim
        self.gradient = jax.grad(loss)
        self.hessian = jax.hessian(loss)
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
        sigma = self.scale**2 * (jnp.eye(self.dim) - jnp.outer(y, y))
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
        """P sigma w: (D,) -> (D,)."""
        norm, y, _, basis = frame
        tangent = basis[:, : self.split]
        return tangent @ (tangent.T @ (w - y * (y @ w))) * (self.scale / norm)

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
        """One step: (D,), (D,), () -> (D,)."""
        frame = self.frame(x)
        moved = x + h * self.drift(x, frame) + self.diffusion(frame, dw)
        return self.retract(moved, frame[3][:, : self.split])


class EulerMaruyama:
    """Euler-Maruyama by hand: one jitted scan over the steps that draws its own noise.

    Args:
        loss: The loss of one vector.
        rank: Rank M of the Hessian on the manifold.
        scale: Scale s of the noise.
        start: Start of all paths (D,).
        n_paths: Number of paths.
        steps: Number of steps of a run.
        span: Time of a run.
    """

    name = "JAX"

    def __init__(
        self,
        loss: Loss,
        rank: int,
        scale: float,
        start: Tensor,
        n_paths: int,
        steps: int,
        span: float = 1.0,
    ) -> None:
        self._start = to_jax(start.expand(n_paths, -1).contiguous())
        self._steps, self._h = steps, span / steps
        forms = {
            form: Equation(loss, len(start), rank, scale, form)
            for form in ("forward mode", "gradient of a trace")
        }
        batched = {form: jax.jit(jax.vmap(e.step, (0, 0, None))) for form, e in forms.items()}
        normals = random.normal(random.key(0), self._start.shape)
        self.form = _fastest(
            {
                form: lambda form=form: batched[form](  # type: ignore[misc]
                    self._start, 0.01 * normals, 1e-4
                ).block_until_ready()
                for form in forms
            },
            3,
        )
        self._step = batched[self.form]
        self._run = jax.jit(self._scan)

    def _scan(self, x: Array, key: Array) -> Array:
        def body(x: Array, key: Array) -> tuple[Array, None]:
            dw = self._h**0.5 * random.normal(key, x.shape, x.dtype)
            return self._step(x, dw, self._h), None

        return lax.scan(body, x, random.split(key, self._steps))[0]

    def step(self, x: Tensor, dw: Tensor, h: float) -> Tensor:
        """One step with its increment given: (n, D), (n, D) -> (n, D)."""
        return to_torch(self._step(to_jax(x.contiguous()), to_jax(dw.contiguous()), h))

    def run(self, seed: int) -> Array:
        """All steps, until they are done."""
        return self._run(self._start, random.key(seed)).block_until_ready()

    def end(self, seed: int) -> Tensor:
        """Where a run ends, (n, D)."""
        return to_torch(self.run(seed))


class RetractedEuler(diffrax.Euler):
    """diffrax's Euler, and the way back to the manifold after each step.

    diffrax has no projection; a solver of one's own is how one says it there.

    Attributes:
        retract: Function (D,) -> (D,).
    """

    retract: Callable[[Array], Array]

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Its step, retracted."""
        y1, error, dense, state, result = super().step(*args, **kwargs)
        y1 = self.retract(y1)
        return y1, error, {**dense, "y1": y1}, state, result


class Diffrax:
    """Euler-Maruyama in diffrax, one jitted and vmapped ``diffeqsolve`` of all paths.

    Args:
        loss, rank, scale, start, n_paths, steps, span: As for :class:`EulerMaruyama`.
        retracted: Whether each step ends on the manifold.
        source: "UnsafeBrownianPath" or "VirtualBrownianTree".
        contraction: How third derivatives are contracted.
    """

    name = "diffrax"

    def __init__(
        self,
        loss: Loss,
        rank: int,
        scale: float,
        start: Tensor,
        n_paths: int,
        steps: int,
        span: float = 1.0,
        *,
        retracted: bool = True,
        source: str = "UnsafeBrownianPath",
        contraction: str = "gradient of a trace",
    ) -> None:
        self.form = source
        self._start = to_jax(start.expand(n_paths, -1).contiguous())
        self._steps, self._span = steps, span
        dim = len(start)
        self._equation = Equation(loss, dim, rank, scale, contraction)
        self._retracted = retracted
        self._source = source
        self._run = jax.jit(jax.vmap(self._solve))

    def _terms(self, path: Any) -> Any:
        equation = self._equation

        def drift(t: Any, y: Array, args: Any) -> Array:
            return equation.drift(y, equation.frame(y))

        def diffusion(t: Any, y: Array, args: Any) -> Array:
            frame = equation.frame(y)
            return jax.vmap(lambda w: equation.diffusion(frame, w), out_axes=1)(jnp.eye(len(y)))

        return diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path))

    def _solver(self) -> Any:
        equation = self._equation
        if not self._retracted:
            return diffrax.Euler()

        def retract(x: Array) -> Array:
            # The tangent basis of the last point is not at hand here: one more eigenproblem.
            return equation.retract(x, equation.frame(x)[3][:, : equation.split])

        return RetractedEuler(retract)

    def _solve(self, x: Array, key: Array) -> Array:
        h = self._span / self._steps
        if self._source == "UnsafeBrownianPath":
            path: Any = diffrax.UnsafeBrownianPath(x.shape, key)
        else:
            path = diffrax.VirtualBrownianTree(0.0, self._span, 0.5 * h, x.shape, key)
        solution = diffrax.diffeqsolve(
            self._terms(path),
            self._solver(),
            0.0,
            self._span,
            h,
            x,
            max_steps=self._steps + 2,
            adjoint=diffrax.DirectAdjoint(),
        )
        return solution.ys[0]

    def step(self, x: Tensor, dw: Tensor, h: float) -> Tensor:
        """One step of diffrax's solver with its increment given: (n, D), (n, D) -> (n, D)."""

        def one(x: Array, dw: Array) -> Array:
            terms, solver = self._terms(_Given(dw)), self._solver()
            return solver.step(terms, 0.0, h, x, None, None, False)[0]

        return to_torch(jax.jit(jax.vmap(one))(to_jax(x.contiguous()), to_jax(dw.contiguous())))

    def run(self, seed: int) -> Array:
        """All steps, until they are done."""
        keys = random.split(random.key(seed), len(self._start))
        return self._run(self._start, keys).block_until_ready()

    def end(self, seed: int) -> Tensor:
        """Where a run ends, (n, D)."""
        return to_torch(self.run(seed))


class _Given(diffrax.AbstractPath):
    """A path with one increment.

    Attributes:
        increment: The increment (D,).
    """

    increment: Array
    t0: float = 0.0
    t1: float = 1.0

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True, **kwargs: Any) -> Array:
        """The increment, whatever the times."""
        return self.increment
