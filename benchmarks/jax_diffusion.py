"""The peers in JAX for the limiting diffusion (13): a scan by hand, and diffrax.

Both take the Euler-Maruyama step of the Ito form with the whole of d^2 Phi[Sigma], from one
eigendecomposition of the Hessian, and go back to the manifold by three Newton corrections, each
with a Hessian of its own. They know the loss as a function, and no closed form of Phi.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
from jax import lax, random
from torch import Tensor

from benchmarks.jax_equation import Array, Equation, Loss
from benchmarks.jax_peers import _fastest, to_jax, to_torch

Step = Callable[[Array, Array, Array], Array]


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
        loss, rank, scale, start, n_paths, steps, span: As for :class:`EulerMaruyama`; ``scale`` may
            be ``None`` for the noise of samples, as for :class:`~benchmarks.jax_equation.Equation`.
        retracted: Whether each step ends on the manifold.
        source: "UnsafeBrownianPath" or "VirtualBrownianTree".
        contraction: How third derivatives are contracted.
        times: Times of the grid that are kept besides the end.
    """

    name = "diffrax"

    def __init__(
        self,
        loss: Loss,
        rank: int,
        scale: float | None,
        start: Tensor,
        n_paths: int,
        steps: int,
        span: float = 1.0,
        *,
        retracted: bool = True,
        source: str = "UnsafeBrownianPath",
        contraction: str = "gradient of a trace",
        times: Sequence[float] = (),
    ) -> None:
        self.form = source
        self._start = to_jax(start.expand(n_paths, -1).contiguous())
        self._steps, self._span = steps, span
        self._kept = {"ts": jnp.array([*times, span])} if times else {"t1": True}
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
            return jax.vmap(lambda w: equation.diffusion(frame, w), out_axes=1)(
                jnp.eye(equation.n_noise)
            )

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
        h, shape = self._span / self._steps, (self._equation.n_noise,)
        if self._source == "UnsafeBrownianPath":
            path: Any = diffrax.UnsafeBrownianPath(shape, key)
        else:
            path = diffrax.VirtualBrownianTree(0.0, self._span, 0.5 * h, shape, key)
        solution = diffrax.diffeqsolve(
            self._terms(path),
            self._solver(),
            0.0,
            self._span,
            h,
            x,
            saveat=diffrax.SaveAt(**self._kept),
            max_steps=self._steps + 2,
            adjoint=diffrax.DirectAdjoint(),
        )
        return solution.ys

    def step(self, x: Tensor, dw: Tensor, h: float) -> Tensor:
        """One step of diffrax's solver with its increment given: (n, D), (n, D) -> (n, D)."""

        def one(x: Array, dw: Array) -> Array:
            terms, solver = self._terms(_Given(dw)), self._solver()
            return solver.step(terms, 0.0, h, x, None, None, False)[0]

        return to_torch(jax.jit(jax.vmap(one))(to_jax(x.contiguous()), to_jax(dw.contiguous())))

    def run(self, seed: int) -> Array:
        """All steps, until they are done: the times kept, and the end, (n, K, D)."""
        keys = random.split(random.key(seed), len(self._start))
        return self._run(self._start, keys).block_until_ready()

    def end(self, seed: int) -> Tensor:
        """Where a run ends, (n, D)."""
        return to_torch(self.run(seed)[:, -1])


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
