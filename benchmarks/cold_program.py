"""A program as a user writes it, from a fresh process: a problem, and ``solve`` with defaults.

python -m benchmarks.cold_program PROBLEM.npz END.npy
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from manifold_sde import LeastSquaresProblem, LimitingDiffusion, Problem, SphericalNoise
from manifold_sde.networks import NormalizedMLP
from manifold_sde.solvers import solve


def main(file: str, end: str) -> None:
    """Run the program for the problem of a file."""
    data = {name: torch.from_numpy(value) for name, value in np.load(file).items()}
    problem, start = made(data)
    found = solve(LimitingDiffusion(problem), start, [0.0, 1.0], n_paths=int(data["paths"]))
    np.save(end, found.ys[-1].numpy())


def made(data: Mapping[str, Tensor]) -> tuple[Problem, Tensor]:
    """The problem of a file, and where it starts."""

    def residuals(x: Tensor) -> Tensor:
        return data["inputs"] @ (x / x.norm()) - data["targets"]

    def linear(x: Tensor) -> Tensor:
        return 0.5 * residuals(x).square().mean()

    def circle(x: Tensor) -> Tensor:
        y = x / x.norm()
        return 0.5 * ((1.0 + amplitude * y[0]) * y[2]) ** 2

    amplitude, noise = float(data["amplitude"]), SphericalNoise(float(data["scale"]))
    if "widths" in data:
        module = NormalizedMLP(data["widths"].tolist()).double()
        targets = module(data["inputs"]).detach()
        problem = Problem.from_module(module, nn.MSELoss(), data["inputs"], targets, noise)
        return problem, problem.vector() / problem.vector().norm()
    start = data["start"]
    if "squares" in data:
        return LeastSquaresProblem(residuals, dim=len(start), noise=noise), start
    return Problem(linear if "inputs" in data else circle, dim=len(start), noise=noise), start


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
