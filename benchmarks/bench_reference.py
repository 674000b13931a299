"""The reference set: what this toolkit, diffrax and torchsde make of its exact laws.

All start from the formulas of (13): diffrax by Euler-Maruyama with a retraction of its own,
torchsde by its Euler on our coefficients, which knows no manifold. The number is the largest error
of an exact mean over all functions and times, in units of its standard error and the weak error
1e-3 together: that of a right solver is about 3, and above 5 a law is another one.
"""

from __future__ import annotations

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
NAMES = ("varying_circle", "normalized_linear")
PATHS, PER_UNIT = 10_000, 64
#: The weak error that counts as one unit beside the standard error.
BIAS = 1e-3


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks.

    Args:
        quick: Few paths and large steps of one entry: it shows that everything runs.
    """
    paths, per_unit = (32, 8) if quick else (PATHS, PER_UNIT)
    found = []
    with one_thread():
        for name in NAMES[:1] if quick else NAMES:
            entry = Reference.of(name)
            ours = entry.compare(entry.draws(paths, seed=1))
            peers = {"torchsde": by_torchsde(entry, paths, per_unit)}
            if installed("jax") and installed("diffrax"):
                peers["diffrax"] = by_diffrax(entry, paths, per_unit)
            for peer, states in peers.items():
                theirs = entry.compare(states)
                found.append(row(name, peer, ours, theirs, per_unit))
    return found


def row(name: str, peer: str, ours: Comparison, theirs: Comparison, per_unit: int) -> Row:
    """What two solvers make of an entry."""
    sizes = largest_error(ours), largest_error(theirs)
    said = "passes" if theirs.passed else "does not pass"
    note = f"{peer} at the step 1/{per_unit} {said}, and ends {theirs.off_manifold:.2g} off the "
    note += f"manifold; ours {'passes' if ours.passed else 'does not pass'} at its default step"
    return Row(name, *sizes, peer, "σ", sizes[0] / sizes[1], note=note)


def largest_error(found: Comparison) -> float:
    """The largest error of a mean, in units of its standard error and the bias together."""
    return max(abs(row.found - row.exact) / (row.error + BIAS) for row in found.rows)


@torch.no_grad()
def by_torchsde(entry: Reference, paths: int, per_unit: int, seed: int = 1) -> np.ndarray:
    """States at the times (K, n, D), by torchsde's Euler."""
    start = entry.problem.minimizer.expand(paths, -1).contiguous()
    ts = torch.tensor([0.0, *TIMES], dtype=torch.float64)
    path = torchsde.BrownianInterval(
        0.0, TIMES[-1], size=start.shape, dtype=start.dtype, dt=1.0 / per_unit, entropy=seed
    )
    sde = LimitingDiffusion(entry.problem)
    ys = torchsde.sdeint(sde, start, ts, bm=path, method="euler", dt=1.0 / per_unit)
    found: np.ndarray = ys[1:].numpy()
    return found


def by_diffrax(entry: Reference, paths: int, per_unit: int, seed: int = 1) -> np.ndarray:
    """The same by diffrax; each time has paths of its own."""
    from benchmarks import jax_diffusion, jax_equation

    problem: Any = entry.problem
    numbers = entry.parameters
    loss = (
        jax_equation.varying_circle(numbers["a"])
        if entry.name == "varying_circle"
        else jax_equation.normalized_linear(numbers["z"], numbers["t"])
    )
    ends = []
    for k, time in enumerate(TIMES):
        steps = round(time * per_unit)
        program = jax_diffusion.Diffrax(
            loss, problem.rank, numbers["s"], problem.minimizer, paths, steps, time
        )
        ends.append(program.end(seed + k).numpy())
    return np.stack(ends)
