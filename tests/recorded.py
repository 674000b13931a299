"""Results on eight problems with fixed seeds, recorded before the package was rebuilt.

``python -m tests.recorded`` writes them anew; :mod:`tests.test_recorded` compares.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from manifold_sde import (
    DirectionDiffusion,
    FixedRatioDiffusion,
    Geometry,
    LabelNoise,
    LimitingDiffusion,
    Problem,
    SphericalNoise,
    WeightDecaySDE,
    problems,
)
from manifold_sde.networks import NormalizedMLP
from manifold_sde.solvers import DirectionSolution, run_sgd, solve
from manifold_sde.verification import verify

FILE = Path(__file__).with_name("recorded.npz")


def network() -> tuple[Problem, Tensor]:
    """A normalised network of 48 weights that fits its six samples, and its weights."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    module = NormalizedMLP((4, 12, 2), seed=1).double()
    targets = module(inputs).detach()
    problem = Problem.from_module(module, nn.MSELoss(), inputs, targets, SphericalNoise(0.15))
    x = problem.vector(module)
    return problem, x / x.norm()


def symbolic() -> tuple[Problem, Tensor]:
    """Half the square of the third coordinate of the direction, by SymPy."""
    import sympy

    x = sympy.symbols("x1:4", real=True)
    loss = x[2] ** 2 / (2 * (x[0] ** 2 + x[1] ** 2 + x[2] ** 2))
    problem = Problem.from_sympy(loss, x, SphericalNoise(0.3))
    return problem, torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64)


def _known(make: Callable[[], Problem]) -> Callable[[], tuple[Problem, Tensor]]:
    def both() -> tuple[Problem, Tensor]:
        problem = make()
        return problem, problem.minimizer

    return both


PROBLEMS: dict[str, Callable[[], tuple[Problem, Tensor]]] = {
    "great circle": _known(problems.great_circle),
    "great sphere": _known(lambda: problems.great_sphere(5)),
    "varying circle": _known(problems.varying_circle),
    "mixed noise": _known(problems.mixed_noise_circle),
    "linear model": _known(lambda: problems.normalized_linear(design="orthogonal")),
    "label noise": _known(problems.label_noise_circle),
    "network": network,
    "symbolic": symbolic,
}
COMPILED = ("mixed noise", "linear model")


def results(name: str, *, compile: bool = False) -> dict[str, Tensor]:
    """What is recorded of a problem."""
    problem, y = PROBLEMS[name]()
    flow = isinstance(problem.noise, LabelNoise)
    few = {"n_paths": 4, "seed": 7, "compile": compile}
    clock = 0.25 / float(problem.noise_trace(y))
    times = [0.0, 0.37 * clock, clock]
    found: dict[str, Tensor] = {}
    direction = solve(DirectionDiffusion(problem), y, times, dt=clock / 8, **few)
    assert isinstance(direction, DirectionSolution)
    found["direction"] = direction.ys
    found["at"] = direction.at(ratio=0.7, times=[0.0, 0.2 * clock], norm=1.1).ys
    steps = direction.at_steps(lr=1e-2, weight_decay=0.05, steps=[3, 40], norm=1.3)
    found["at steps"], found["at steps, clock"] = steps.ys, steps.clock
    sgd = run_sgd(problem, 1.1 * y, 0.01, 0.05, [0, 7, 50], **few)
    found["sgd"], found["sgd, clock"] = sgd.ys, sgd.clock
    if compile:
        return found
    trace = float(problem.noise_trace(y / y.norm()))
    dt = max(float((1.1 * y).norm()) ** 4, trace) / (64.0 * trace)
    split = solve(LimitingDiffusion(problem), 1.1 * y, [0.0, 0.1, 0.3], dt=dt, **few)
    found["split"], found["split, clock"] = split.ys, split.clock
    for calculus, method in (("ito", "euler"), ("stratonovich", "weak2")):
        sde = FixedRatioDiffusion(problem, 0.7, calculus)
        found[method] = solve(sde, y, times, method=method, dt=clock / 4, **few).ys
    ambient = WeightDecaySDE(problem, 0.01, 0.05)
    found["ambient"] = solve(ambient, 1.1 * y, [0, 5, 20], **few).ys
    sde = DirectionDiffusion(problem, "stratonovich")
    for method in ("heun", "midpoint", "walk", "phi_jet"):
        found[method] = solve(sde, y, times, method=method, dt=clock / 4, **few).ys
    products = DirectionDiffusion(problem, geometry=Geometry(problem, "matrix_free"))
    found["by products"] = solve(products, y, times, dt=clock / 4, **few).ys
    adaptive = solve(DirectionDiffusion(problem), y, times, rtol=1e-2, **few)
    found["adaptive"] = adaptive.ys
    if not flow:
        kept = [0.1 * k * clock for k in range(11)]
        run = solve(DirectionDiffusion(problem), y, kept, dt=clock / 4, **few | {"n_paths": 24})
        mean = run.equilibrium(lambda x: x[..., 0])
        found["equilibrium"] = torch.as_tensor([float(mean.mean), float(mean.standard_error)])
    generator = torch.Generator().manual_seed(5)
    near = y + 0.05 * torch.randn(3, problem.dim, generator=generator, dtype=y.dtype)
    geometry = Geometry(problem)
    found["limit map"] = limits = geometry.limit_map(near)
    found["second derivative"] = geometry.second_derivative(limits)
    matrix = torch.randn(problem.dim, problem.dim, generator=generator, dtype=y.dtype)
    found["of a matrix"] = geometry.second_derivative(limits, matrix @ matrix.mT)
    found["projection"] = geometry.tangent_projection(limits, near)
    found["retraction"] = geometry.retract(limits + 1e-3 * near)
    zero = torch.zeros(())
    for calculus in ("ito", "stratonovich"):
        sde = LimitingDiffusion(problem, calculus)
        found[f"f, {calculus}"], found["g"] = sde.f(zero, limits), sde.g(zero, limits)
    return found


def verdicts(name: str) -> list[str]:
    """Names and verdicts of the quick checks of a problem."""
    report = verify(PROBLEMS[name]()[0], seed=3)
    return [f"{result.name}: {result.verdict}" for result in report]


def everything() -> dict[str, np.ndarray]:
    """All results, by problem and name."""
    found = {}
    for problem in PROBLEMS:
        for name, value in results(problem).items():
            found[f"{problem}/{name}"] = value.detach().numpy()
    for problem in COMPILED:
        for name, value in results(problem, compile=True).items():
            found[f"{problem}, compiled/{name}"] = value.detach().numpy()
    return found


if __name__ == "__main__":
    recorded = everything()
    if "--verdicts" in sys.argv:
        for problem in ("great circle", "mixed noise", "linear model"):
            recorded[f"{problem}/verdicts"] = np.array(verdicts(problem))
    np.savez_compressed(FILE, **recorded)
    print(f"{len(recorded)} results in {FILE}")
