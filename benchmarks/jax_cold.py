"""A program written by hand in JAX: 64 Euler-Maruyama steps of (13), from a fresh process.

    python -m benchmarks.jax_cold PROBLEM.npz END.npy

It imports JAX, compiles, runs all paths to T = 1 once, saves where they end, and prints the
processor time of the whole process.
"""

from __future__ import annotations

import os
import sys
import time

# The number of processors that XLA believes in keeps it to one thread.
os.environ |= {"NPROC": "1", "PJRT_NPROC": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from benchmarks.jax_equation import Equation, normalized_linear, varying_circle

jax.config.update("jax_enable_x64", True)

STEPS = 64


def main(file: str) -> None:
    """Run the program for the problem of a file."""
    data = np.load(file)
    start, scale, paths = jnp.asarray(data["start"]), float(data["scale"]), int(data["paths"])
    if "inputs" in data:
        loss, rank = normalized_linear(data["inputs"], data["targets"]), len(data["inputs"])
    else:
        loss, rank = varying_circle(float(data["amplitude"])), 1
    dim = len(start)
    equation = Equation(loss, dim, rank, scale, "forward mode")
    step, h = jax.vmap(equation.step, (0, 0, None)), 1.0 / STEPS

    @jax.jit
    def run(x: jax.Array, key: jax.Array) -> jax.Array:
        def body(x: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
            return step(x, h**0.5 * random.normal(key, x.shape, x.dtype), h), None

        return lax.scan(body, x, random.split(key, STEPS))[0]

    x = run(jnp.broadcast_to(start, (paths, dim)), random.key(0))
    np.save(sys.argv[2], np.asarray(x))
    print(time.process_time())


if __name__ == "__main__":
    main(sys.argv[1])
