"""The peers in JAX: SGD and the second derivative of Phi on the model of section 6.1, by hand.

Importing this sets JAX to double precision and one thread. The usual flags of XLA do not keep it to
one thread (measured: 1.9 cores with jaxlib 0.10): the number of processors that it believes in
does. Both have to be set before JAX computes anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("NPROC", "1")
os.environ.setdefault("PJRT_NPROC", "1")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    ]
).strip()

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax, random
from torch import Tensor

from benchmarks.rows import seconds
from manifold_sde.problems import NormalizedLinear

jax.config.update("jax_enable_x64", True)

Array = jax.Array
Function = Callable[..., Any]


def to_jax(tensor: Tensor) -> Array:
    """The same numbers in JAX."""
    return jnp.asarray(tensor.numpy())


def to_torch(array: Array) -> Tensor:
    """The same numbers in torch."""
    return torch.from_numpy(np.array(array))


def _fastest(candidates: dict[str, Callable[[], object]], repeats: int) -> str:
    return min(candidates, key=lambda name: seconds(candidates[name], repeats))


class Sgd:
    """SGD with weight decay and the noise (18): one jitted scan that draws its own noise.

    It is written with ``vmap(grad)``, and batched by hand with the paths last; the faster of the
    two is timed.

    Args:
        problem: The model, whose data and noise scale are used.
        lr: Learning rate.
        weight_decay: Weight decay.
        n_paths: Number of paths, which start at the minimiser.
        steps: Number of steps of a run.
    """

    name = "JAX"

    def __init__(
        self, problem: NormalizedLinear, lr: float, weight_decay: float, n_paths: int, steps: int
    ) -> None:
        self.steps = steps
        inputs, targets = to_jax(problem.inputs), to_jax(problem.targets)
        scale: float = problem.noise.scale  # type: ignore[attr-defined]
        shrink = 1.0 - lr * weight_decay

        def loss(x: Array) -> Array:
            return 0.5 * jnp.mean((inputs @ (x / jnp.linalg.norm(x)) - targets) ** 2)

        def one_path(x: Array, w: Array) -> Array:
            square = x @ x
            noise = scale * lax.rsqrt(square) * (w - x * ((x @ w) / square))
            return shrink * x - lr * (jax.grad(loss)(x) + noise)

        def total(x: Array) -> Array:
            residuals = inputs @ (x / jnp.linalg.norm(x, axis=0)) - targets[:, None]
            return 0.5 * jnp.mean(residuals**2, axis=0).sum()

        def by_hand(x: Array, w: Array) -> Array:
            square = (x * x).sum(0)
            noise = scale * lax.rsqrt(square) * (w - x * ((x * w).sum(0) / square))
            return shrink * x - lr * (jax.grad(total)(x) + noise)

        first = to_jax(problem.minimizer.expand(n_paths, -1).contiguous())
        last = to_jax(problem.minimizer[:, None].expand(-1, n_paths).contiguous())
        forms = {
            "vmap(grad)": (jax.vmap(one_path), first, 0),
            "batched by hand": (by_hand, last, 1),
        }
        runs = {form: self._scan(step) for form, (step, _, _) in forms.items()}
        key = random.key(0)
        self.form = _fastest(
            {f: lambda f=f: runs[f](forms[f][1], key).block_until_ready() for f in forms},  # type: ignore[misc]
            3,
        )
        step, self._start, self._path_axis = forms[self.form]
        self._step, self._run = jax.jit(step), runs[self.form]

    def _scan(self, step: Function) -> Function:
        def run(x: Array, key: Array) -> Array:
            def body(x: Array, key: Array) -> tuple[Array, None]:
                return step(x, random.normal(key, x.shape, x.dtype)), None

            return lax.scan(body, x, random.split(key, self.steps))[0]

        return jax.jit(run)

    def step(self, x: Tensor, normals: Tensor) -> Tensor:
        """One step with its noise given: (n, D) each -> (n, D)."""
        turned = (to_jax(a.movedim(0, self._path_axis).contiguous()) for a in (x, normals))
        return to_torch(self._step(*turned)).movedim(self._path_axis, 0)

    def run(self, seed: int) -> Array:
        """All steps, until they are done."""
        return self._run(self._start, random.key(seed)).block_until_ready()

    def end(self, seed: int) -> Tensor:
        """Where a run ends, (n, D)."""
        return to_torch(self.run(seed)).movedim(self._path_axis, 0)


class SecondDerivative:
    """The second derivative of Phi contracted with Sigma: one jitted function of a batch.

    The third derivatives are contracted in two ways, along D pairs of directions by forward mode
    and as gradients of traces by reverse mode; the faster of the two is timed.

    Args:
        problem: The model.
        y: Points of the manifold, (n, D).
        sigma: Sigma at the points, (n, D, D).
    """

    name = "JAX"

    def __init__(self, problem: NormalizedLinear, y: Tensor, sigma: Tensor) -> None:
        inputs, targets = to_jax(problem.inputs), to_jax(problem.targets)
        split = problem.dim - len(targets)

        def loss(x: Array) -> Array:
            return 0.5 * jnp.mean((inputs @ (x / jnp.linalg.norm(x)) - targets) ** 2)

        def along_directions(y: Array, left: Array, right: Array) -> Array:
            def along(a: Array, b: Array) -> Array:
                def first(z: Array) -> Array:
                    return jax.jvp(jax.grad(loss), (z,), (a,))[1]

                return jax.jvp(first, (y,), (b,))[1]

            return jax.vmap(along, in_axes=1)(left, right).sum(0)

        def of_trace(y: Array, left: Array, right: Array) -> Array:
            matrix = left @ right.T
            return jax.grad(lambda z: jnp.vdot(jax.hessian(loss)(z), matrix))(y)

        def whole(contract: Function) -> Function:
            def at_one_point(y: Array, sigma: Array) -> Array:
                values, basis = jnp.linalg.eigh(jax.hessian(loss)(y))
                tangent, normal, values = basis[:, :split], basis[:, split:], values[split:]
                mixed = tangent.T @ sigma @ normal
                block = normal.T @ sigma @ normal
                columns = 2.0 * tangent @ (mixed / values)
                columns += normal @ (block / (values[:, None] + values))
                from_tangent = contract(y, tangent, tangent @ (tangent.T @ sigma @ tangent))
                from_normal = contract(y, normal, columns)
                inside = normal @ ((normal.T @ from_tangent) / values)
                return -inside - tangent @ (tangent.T @ from_normal)

            return jax.jit(jax.vmap(at_one_point))

        self._arguments = (to_jax(y.contiguous()), to_jax(sigma.contiguous()))
        forms = {"forward mode": whole(along_directions), "gradient of a trace": whole(of_trace)}
        self.form = _fastest(
            {f: lambda f=f: forms[f](*self._arguments).block_until_ready() for f in forms},  # type: ignore[misc]
            3,
        )
        self._function = forms[self.form]

    def run(self) -> Array:
        """At all points, until it is done."""
        return self._function(*self._arguments).block_until_ready()
