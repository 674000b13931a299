"""A program as a user writes it, from a fresh process: a plain loss, and ``solve`` with defaults.

python -m benchmarks.cold_program PROBLEM.npz END.npy
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from manifold_sde import LimitingDiffusion, Problem, SphericalNoise
from manifold_sde.solvers import solve


def main(file: str, end: str) -> None:
    """Run the program for the problem of a file."""
    data = {name: torch.from_numpy(value) for name, value in np.load(file).items()}

    def linear(x: Tensor) -> Tensor:
        y = x / x.norm()
        return 0.5 * (data["inputs"] @ y - data["targets"]).square().mean()

    def circle(x: Tensor) -> Tensor:
        y = x / x.norm()
        return 0.5 * ((1.0 + amplitude * y[0]) * y[2]) ** 2

    amplitude = float(data["amplitude"])
    loss = linear if "inputs" in data else circle
    start = data["start"]
    problem = Problem(loss, dim=len(start), noise=SphericalNoise(float(data["scale"])))
    found = solve(LimitingDiffusion(problem), start, [0.0, 1.0], n_paths=int(data["paths"]))
    np.save(end, found.ys[-1].numpy())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
