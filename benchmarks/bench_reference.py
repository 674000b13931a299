"""The reference set: what this toolkit, diffrax and torchsde make of its exact laws.

All start from the formulas of (13): diffrax by Euler-Maruyama with a retraction of its own,
torchsde by its Euler on our coefficients, which knows no manifold. The number is the largest error
of an exact mean over all functions and times, in units of its standard error and the weak error
1e-3 together: that of a right solver is about 3, and above 5 a law is another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchsde

from benchmarks.rows import Row, installed, one_thread
from manifold_sde import LimitingDiffusion
from manifold_sde.verification import Reference
from manifold_sde.verification.reference import TIMES, Comparison

TITLE = "The reference set: the largest error of a mean, 10,000 paths"
PEERS = ("jax", "diffrax")
PATHS, PER_UNIT = 10_000, 64
#: The weak error that counts as one unit beside the standard error.
BIAS = 1e-3
Solver = Callable[[Reference, int, int], np.ndarray]


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks.

    Args:
        quick: Few paths and large steps of two entries: it shows that everything runs.
    """
    paths, per_unit = (32, 8) if quick else (PATHS, PER_UNIT)
    peers: dict[str, Solver] = {"torchsde": by_torchsde}
    if installed("jax") and installed("diffrax"):
        peers["diffrax"] = by_diffrax
    found = []
    with one_thread():
        for name in ("varying_circle", "mixed_noise_circle") if quick else Reference.names():
            entry = Reference.of(name)
            ours = compared(entry, by_solve, paths, per_unit)
            for peer, solver in peers.items():
                theirs = compared(entry, solver, paths, per_unit)
                found.append(row(name, peer, ours, theirs, per_unit))
    return found


def compared(
    entry: Reference, solver: Solver, paths: int, per_unit: int
) -> tuple[Comparison, float]:
    """What a solver makes of an entry, and its processor time, with what it has to compile."""
    start = time.process_time()
    states = solver(entry, paths, per_unit)
    return entry.compare(states), time.process_time() - start


def row(
    name: str,
    peer: str,
    ours: tuple[Comparison, float],
    theirs: tuple[Comparison, float],
    per_unit: int,
) -> Row:
    """What two solvers make of an entry."""
    sizes = largest_error(ours[0]), largest_error(theirs[0])
    said = "passes" if theirs[0].passed else "does not pass"
    note = f"{peer} at the step 1/{per_unit} {said}, and ends {theirs[0].off_manifold:.2g} off the "
    note += (
        f"manifold, in {theirs[1]:.2g} s; ours {'passes' if ours[0].passed else 'does not pass'}"
    )
    note += f" at the step that it chooses, in {ours[1]:.2g} s"
    return Row(name, *sizes, peer, "σ", sizes[0] / sizes[1], note=note)


def largest_error(found: Comparison) -> float:
    """The largest error of a mean, in units of its standard error and the bias together."""
    return max(abs(row.found - row.exact) / (row.error + BIAS) for row in found.rows)


def by_solve(entry: Reference, paths: int, per_unit: int, seed: int = 1) -> np.ndarray:
    """States at the times (K, n, D), by ``solve``, which chooses its step."""
    return entry.draws(paths, seed)


@torch.no_grad()
def by_torchsde(entry: Reference, paths: int, per_unit: int, seed: int = 1) -> np.ndarray:
    """The same by torchsde's Euler."""
    start = entry.problem.minimizer.expand(paths, -1).contiguous()
    ts = torch.tensor([0.0, *TIMES], dtype=torch.float64)
    size = (paths, entry.problem.n_noise)
    path = torchsde.BrownianInterval(
        0.0, TIMES[-1], size=size, dtype=start.dtype, dt=1.0 / per_unit, entropy=seed
    )
    sde = LimitingDiffusion(entry.problem)
    ys = torchsde.sdeint(sde, start, ts, bm=path, method="euler", dt=1.0 / per_unit)
    found: np.ndarray = ys[1:].numpy()
    return found


def by_diffrax(entry: Reference, paths: int, per_unit: int, seed: int = 1) -> np.ndarray:
    """The same by diffrax, one program for all times."""
    from benchmarks import jax_diffusion, jax_equation

    problem, numbers = entry.problem, entry.parameters
    losses: dict[str, Callable[[], Any]] = {
        "great_circle": lambda: jax_equation.varying_circle(numbers["a"]),
        "great_sphere": jax_equation.great_sphere,
        "varying_circle": lambda: jax_equation.varying_circle(numbers["a"]),
        "normalized_linear": lambda: jax_equation.normalized_linear(numbers["z"], numbers["t"]),
        "mixed_noise_circle": lambda: jax_equation.mixed_noise_circle(*numbers.values()),
    }
    program = jax_diffusion.Diffrax(
        *(losses[entry.name](), problem.rank, numbers.get("s"), problem.minimizer),
        *(paths, round(TIMES[-1] * per_unit), TIMES[-1]),
        times=TIMES[:-1],
    )
    found: np.ndarray = np.moveaxis(np.asarray(program.run(seed)), 0, 1)
    return found
