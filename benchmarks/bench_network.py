"""The matrix-free route on networks: against fixed limits, the gradient of the loss, and SGD."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import vmap

from benchmarks.memory_use import peak
from benchmarks.network_problems import CLASSES, HIDDEN, network
from benchmarks.rows import Row, one_thread, seconds
from manifold_sde import (
    DirectionDiffusion,
    Geometry,
    LeastSquaresProblem,
    Problem,
    SphericalNoise,
)
from manifold_sde.networks import NormalizedMLP
from manifold_sde.networks.data import digits
from manifold_sde.solvers import run_sgd, solve

TITLE = "Networks on the digits, LayerNorm MLP, float64, one thread: products alone"
PEERS: tuple[str, ...] = ()
#: Seconds that the set-up, a projection, and drift with noise may take at 86,000 parameters and
#: 1000 constraints; steps a second at 10,000 and 100; and memory over that of J.
SET_UP, PROJECTION, DRIFT, STEPS_A_SECOND, MEMORY = 10.0, 0.5, 15.0, 10.0, 3.0
#: Seconds that the limit map from random weights may take at 86,000 parameters, 1000 constraints.
LIMIT_MAP = 60.0
#: Error that the projection may have.
ACCURACY = 1e-10
#: Clock to reach, the effective learning rates of SGD, and the steps that are timed of the small.
CLOCK, COARSE, FINE, TIMED = 1.0, 1e-2, 1e-4, 10_000
#: How much faster than the number of parameters times may grow from the last network but one to the
#: largest: linear growth is 1.
LINEAR = 1.5


@dataclass(frozen=True)
class Sizes:
    """Networks and samples of a run of the benchmarks."""

    large: tuple[str, int] = ("86k", 100)
    small: tuple[str, int] = ("10k", 10)
    growth: tuple[str, ...] = ("1k", "10k", "100k", "1M")
    steps: int = 50
    clock: float = CLOCK
    timed: int = TIMED
    repeats: int = 5


QUICK = Sizes(("1k", 2), ("1k", 2), ("1k", "10k"), 2, 0.001, 5, 1)


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks.

    Args:
        quick: Small networks: it shows that everything runs.
    """
    sizes = QUICK if quick else Sizes()
    with one_thread():
        found = large_network(*sizes.large)
        found += from_random_weights(*sizes.large)
        found.append(steps_a_second(*sizes.small, sizes.steps, min(sizes.repeats, 3)))
        found += growth(sizes.growth, sizes.repeats)
        found += against_sgd(*sizes.small, sizes.clock, sizes.timed)
    return found


def large_network(size: str, samples: int) -> list[Row]:
    """One set-up, one projection, one evaluation of the direction diffusion, and the memory."""
    problem, y = network(size, samples)
    geometry = Geometry(problem, "matrix_free")
    v = torch.ones_like(y) + y.flip(0)
    start = time.process_time()
    project = geometry.projector(y)
    set_up = time.process_time() - start
    projection = seconds(lambda: project(v), 3)
    check_projection(problem, y, v, project(v))
    sde = DirectionDiffusion(problem, "stratonovich", geometry=geometry)
    sde.require_on_manifold(y)
    clock = torch.zeros(())
    drift = seconds(lambda: sde.f_and_g_prod(clock, y[None], v[None]), 1)
    constraints = problem.pointwise.n_residuals
    of_j = constraints * problem.dim * 8 / 2**20
    used = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_network", size, str(samples)],
        check=True,
        capture_output=True,
        text=True,
    )
    where = f"{problem.dim} parameters, {constraints} constraints"
    return [
        _limit("set-up of dPhi", set_up, SET_UP, f"{where}; ours in seconds, peer the limit"),
        _limit("dPhi v", projection, PROJECTION, f"to {ACCURACY:g}, after the set-up"),
        _limit("drift and noise", drift, DRIFT, "of the direction diffusion, Stratonovich"),
        Row(
            "peak memory",
            float(used.stdout),
            of_j,
            "J itself",
            "MB",
            float(used.stdout) / of_j,
            MEMORY,
            "of a process that evaluates drift and noise, torch included",
        ),
    ]


def from_random_weights(size: str, samples: int) -> list[Row]:
    """The limit map of weights that were never trained, and its derivative backwards.

    Raises:
        AssertionError: If the end is no minimum, or if the derivative along the gradient of the
            loss, which the flow follows, does not vanish.
    """
    data = digits(samples)
    module = NormalizedMLP((64, *HIDDEN[size], CLASSES), seed=1).double()
    problem = Problem.from_module(
        module, nn.MSELoss(), data.inputs, data.one_hot(), SphericalNoise(1.0)
    )
    x = problem.vector(module).requires_grad_()
    start = time.process_time()
    y = Geometry(problem, "matrix_free").limit_map(x)
    forward = time.process_time() - start
    weights = y.detach().flip(0) / y.norm()
    start = time.process_time()
    (y @ weights).backward()
    backward = time.process_time() - start
    slope = problem.gradient(x.detach())
    assert x.grad is not None
    assert float(problem.gradient(y.detach()).norm()) < ACCURACY
    assert abs(float(x.grad @ slope)) < 1e-8 * float(x.grad.norm() * slope.norm())
    where = f"{problem.dim} parameters, {problem.pointwise.n_residuals} constraints"
    return [
        _limit("limit map, random weights", forward, LIMIT_MAP, where),
        _limit("its derivative, backwards", backward, LIMIT_MAP, "after the map itself"),
    ]


def check_projection(problem: LeastSquaresProblem, y: Tensor, v: Tensor, found: Tensor) -> None:
    """Check that a vector is the projection of another on the kernel of J.

    Raises:
        AssertionError: If J times it is not zero to the accuracy, or what was taken away has a part
            along it.
    """
    loss = problem.pointwise
    slope = float(loss.residual_product(y, v).norm())
    assert float(loss.residual_product(y, found).norm()) <= ACCURACY * slope
    assert abs(float((v - found) @ found)) <= ACCURACY * float(v.norm()) ** 2


def _limit(name: str, ours: float, limit: float, note: str) -> Row:
    return Row(name, ours, limit, "limit", "s", ours / limit, 1.0, note)


def steps_a_second(size: str, samples: int, steps: int, repeats: int) -> Row:
    """Steps of the direction diffusion: the retraction walk, one path."""
    problem, y = network(size, samples)
    sde = DirectionDiffusion(problem, geometry=Geometry(problem, "matrix_free"))
    dt = 1.0 / 64.0

    whole = seconds(lambda: solve(sde, y, [0.0, steps * dt], dt=dt), repeats)
    note = f"{problem.dim} parameters, {problem.pointwise.n_residuals} constraints; of {steps} "
    return _limit("a step of the direction", whole / steps, 1.0 / STEPS_A_SECOND, f"{note}steps")


def growth(sizes: tuple[str, ...], repeats: int) -> list[Row]:
    """Growth of times with the number of parameters, at 100 constraints; costs in gradients."""
    times: dict[str, list[float]] = {}
    dims = []
    for size in sizes:
        problem, y = network(size, 10)
        dims.append(problem.dim)
        for name, found in operation_times(problem, y, repeats).items():
            times.setdefault(name, []).append(found)
    gradients = times.pop("gradient")
    found = []
    for name, listed in times.items():
        costs = [t / g for t, g in zip(listed, gradients, strict=True)]
        shown = ", ".join(f"{c:.3g} at {d}" for c, d in zip(costs, dims, strict=True))
        linear = listed[-2] * dims[-1] / dims[-2]
        note = f"linear in D from {dims[-2]}; in gradients: {shown}"
        ratio = listed[-1] / linear
        found.append(Row(f"growth, {name}", listed[-1], linear, "linear", "s", ratio, LINEAR, note))
    return found


def operation_times(problem: LeastSquaresProblem, y: Tensor, repeats: int) -> dict[str, float]:
    """Seconds that operations take, the gradient of the loss among them."""
    products = Geometry(problem, "matrix_free").products
    assert products is not None
    space, frames, _ = products.frames_at(y[None])
    frame = tuple(part[..., 0] for part in frames)
    v, none = y.flip(0), y.new_zeros(len(y), 0)
    repeats = repeats if problem.dim < 50_000 else min(repeats, 2)
    operations: dict[str, Callable[[], object]] = {
        "set-up": lambda: space.frame_at(y, none),
        "dPhi v": lambda: space.project_at(y, frame, v),
        "drift": lambda: space.third_of_inverse_at(y, frame),
        "step back": lambda: space.displacement_at(y, frame, y),
    }
    found = {"gradient": seconds(lambda: vmap(problem.pointwise.gradient)(y[None]), 4 * repeats)}
    return found | {name: seconds(run, repeats) for name, run in operations.items()}


def against_sgd(size: str, samples: int, clock: float, timed: int) -> list[Row]:
    """The direction to a clock: the diffusion in full, and SGD at two effective learning rates."""
    problem, y = network(size, samples)
    sde = DirectionDiffusion(problem, geometry=Geometry(problem, "matrix_free"))
    ours = seconds(lambda: solve(sde, y, [0.0, clock]), 1)

    def sgd(step: float, count: int) -> float:
        # Without weight decay the norm grows: the rate is kept in step with it.
        norm4 = 1.0
        rates = []
        for _ in range(count):
            rates.append(step * norm4**0.5)
            norm4 += 2.0 * rates[-1] ** 2
        return seconds(lambda: run_sgd(problem, y, rates, 0.0, [0, count]), 1)

    coarse = max(1, round(clock / COARSE**2))
    fine = round(clock / FINE**2)
    full = sgd(COARSE, coarse)
    part = sgd(FINE, min(timed, fine))
    whole = part * fine / min(timed, fine)
    note = f"to u = {clock:g}, {problem.dim} parameters; one path"
    return [
        Row(
            "to u, SGD at .01",
            ours,
            full,
            "SGD",
            "s",
            ours / full,
            None,
            f"{note}, {coarse} steps of SGD",
        ),
        Row(
            "to u, SGD at .0001",
            ours,
            whole,
            "SGD, extr.",
            "s",
            ours / whole,
            None,
            f"{fine} steps of SGD, extrapolated from {min(timed, fine)}",
        ),
    ]


def evaluate(size: str, samples: int) -> None:
    """One evaluation of drift and noise, for its memory."""
    torch.set_num_threads(1)
    problem, y = network(size, samples)
    sde = DirectionDiffusion(problem, "stratonovich", geometry=Geometry(problem, "matrix_free"))
    sde.require_on_manifold(y)
    sde.f_and_g_prod(torch.zeros(()), y[None], y.flip(0)[None])


if __name__ == "__main__":
    evaluate(sys.argv[1], int(sys.argv[2]))
    print(f"{peak():.1f}")
