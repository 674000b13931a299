"""The limit map of gradient flow to 1e-8, against SciPy's LSODA and torchdiffeq's dopri5.

Sixty-four points around a minimiser of the normalised linear model of section 6.1 (Gaussian inputs,
two draws, which differ in stiffness) and of a random nonlinear least-squares problem. Every solver
gets the loosest tolerance, among powers of ten, with which its largest relative error is below
1e-8; the errors are measured, against the closed form or LSODA at rtol 1e-13. The peers are told
how long to integrate; LSODA has a gradient written in NumPy, and goes point by point. The limit map
and dopri5 run uncompiled. Costs are processor time (a peer's is that of one run, some of which take
many seconds), and evaluations a point: gradients, with a Hessian counted as the number of gradients
that take as long. What the limit map does beside them, small eigenproblems above all, is in its
time.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.func import vmap

from benchmarks.rows import Row, installed, one_thread, seconds
from manifold_sde import Geometry, LeastSquaresProblem, SphericalNoise, problems
from manifold_sde.geometry.kernels import Kernels
from manifold_sde.geometry.limit_map import LimitMap

TITLE = "Limit map of gradient flow to 1e-8, float64: 64 points, a point"
PEERS = ("torchdiffeq",)
BATCH = 64
#: Draws of the linear model: an easy one, and the typical one that is the default.
DRAWS = (8, 1130)
TARGET = 1e-8
TOLERANCES = (1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-11)
Solver = Callable[["Setting", float], tuple[np.ndarray, float]]


class Residuals:
    """Residuals rows u + u^T bend u / 2 - offset of the direction u, in torch and in NumPy."""

    __name__ = "residuals"

    def __init__(self, rows: np.ndarray, bend: np.ndarray, minimizer: np.ndarray) -> None:
        self.rows, self.bend = rows, bend
        self.offset = rows @ minimizer + 0.5 * (bend @ minimizer) @ minimizer
        self.tensors = tuple(torch.from_numpy(a) for a in (rows, bend, self.offset))

    def __call__(self, x: Tensor) -> Tensor:
        rows, bend, offset = self.tensors
        u = x / x.norm()
        return rows @ u + 0.5 * (bend @ u) @ u - offset

    def force(self, x: np.ndarray) -> np.ndarray:
        norm = np.sqrt(x @ x)
        u = x / norm
        bent = self.bend @ u
        slope = (self.rows + bent).T @ (self.rows @ u + 0.5 * bent @ u - self.offset)
        return (u * (u @ slope) - slope) / (norm * len(self.rows))


@dataclass
class Setting:
    """A problem, points of unit norm, and the truth."""

    name: str
    problem: LeastSquaresProblem
    residuals: Residuals
    x: Tensor
    exact: np.ndarray
    horizon: float


@dataclass(frozen=True)
class Cost:
    """What a solver took, and how right it was."""

    seconds: float
    evaluations: float
    note: str


def linear_model(seed: int, batch: int, design: str = "gaussian") -> Setting:
    problem = problems.normalized_linear(seed=seed, design=design)
    rows = problem.inputs.numpy()
    bend = np.zeros((*rows.shape, rows.shape[1]))
    residuals = Residuals(rows, bend, problem.minimizer.numpy())
    setting = _setting(problem, residuals, problem.minimizer, batch, "linear")
    assert problem.facts.limit_map is not None
    setting.exact = problem.facts.limit_map(setting.x).numpy()
    return setting


def nonlinear(seed: int, batch: int) -> Setting:
    generator = np.random.default_rng(seed)
    bend = generator.standard_normal((6, 10, 10)) / 10
    rows = generator.standard_normal((6, 10))
    minimizer = generator.standard_normal(10)
    minimizer /= np.linalg.norm(minimizer)
    residuals = Residuals(rows, bend + bend.transpose(0, 2, 1), minimizer)
    problem = LeastSquaresProblem(residuals, 10, SphericalNoise(0.3), rank=6)
    setting = _setting(problem, residuals, torch.from_numpy(minimizer), batch, "nonlinear")
    setting.exact = lsoda(setting, 1e-13)[0]
    return setting


def _setting(
    problem: LeastSquaresProblem, residuals: Residuals, minimizer: Tensor, batch: int, name: str
) -> Setting:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, problem.dim, dtype=torch.float64, generator=generator)
    x = minimizer + 0.3 * noise / problem.dim**0.5
    values = torch.linalg.eigvalsh(problem.hessian(minimizer))
    assert problem.rank is not None
    smallest, largest = float(values[-problem.rank]), float(values[-1])
    name = f"{name}, cond {largest / smallest:.0f}"
    x = x / x.norm(dim=1, keepdim=True)
    return Setting(name, problem, residuals, x, x.numpy(), 25.0 / smallest)


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """Largest relative error over the points, of the directions."""
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    return float(np.linalg.norm(found - exact, axis=1).max())


def lsoda(setting: Setting, rtol: float) -> tuple[np.ndarray, float]:
    ends, evaluations = [], 0
    for point in setting.x.numpy():
        solution = solve_ivp(
            lambda _, z: setting.residuals.force(z),
            (0.0, setting.horizon),
            point,
            method="LSODA",
            rtol=rtol,
            atol=0.1 * rtol,
        )
        ends.append(solution.y[:, -1])
        evaluations += solution.nfev
    return np.stack(ends), evaluations / len(ends)


def dopri5(setting: Setting, rtol: float) -> tuple[np.ndarray, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchdiffeq warns of its own use of torch
        from torchdiffeq import odeint
    calls = 0
    gradient = vmap(setting.problem.pointwise.gradient)

    def force(_: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return -gradient(x)

    times = torch.tensor([0.0, setting.horizon], dtype=torch.float64)
    with torch.no_grad():
        end = odeint(force, setting.x, times, rtol=rtol, atol=0.1 * rtol, method="dopri5")[-1]
    return end.numpy(), float(calls)


def ours(setting: Setting, rtol: float) -> tuple[np.ndarray, float]:
    return Geometry(setting.problem, rtol=rtol).limit_map(setting.x).numpy(), 0.0


def loosest(solver: Solver, setting: Setting) -> tuple[float, Cost]:
    """The loosest tolerance that reaches the target, and the cost with it.

    Raises:
        AssertionError: If none does.
    """
    for rtol in TOLERANCES:
        start = time.process_time()
        found, evaluations = solver(setting, rtol)
        taken = time.process_time() - start
        error = relative_error(found, setting.exact)
        if error <= TARGET:
            return rtol, Cost(taken, evaluations, f"rtol {rtol:.0e}, error {error:.0e}")
    raise AssertionError(f"{setting.name}: error {error:.3g} at rtol {rtol:.0e}")


class CountingKernels(Kernels):
    """Uncompiled kernels that count the points they are called with."""

    gradients = hessians = 0

    def gradient(self, x: Tensor, size: int | None = None) -> Tensor:
        self.gradients += len(x)
        return super().gradient(x, size)

    def hessian(self, x: Tensor, size: int | None = None) -> Tensor:
        self.hessians += len(x)
        return super().hessian(x, size)


def our_cost(setting: Setting) -> Cost:
    """Time and evaluations of the limit map; a Hessian counts as the gradients it takes."""
    rtol, cost = loosest(ours, setting)
    taken = seconds(lambda: ours(setting, rtol), 3)
    kernels = CountingKernels(setting.problem, False)
    LimitMap(setting.problem, kernels, rtol=rtol, max_steps=2000)(setting.x)
    gradients, hessians = (k / len(setting.x) for k in (kernels.gradients, kernels.hessians))
    plain = Kernels(setting.problem, False)
    price = seconds(lambda: plain.hessian(setting.x), 15)
    price /= seconds(lambda: plain.gradient(setting.x), 15)
    note = f"{cost.note}, {gradients:.0f} gradients + {hessians:.0f} Hessians at {price:.1f}"
    return Cost(taken, gradients + price * hessians, note)


def rows(quick: bool = False) -> list[Row]:
    """Rows of the table of benchmarks.

    Args:
        quick: Two points and no stiffness: it shows that everything runs.
    """
    with one_thread():
        if quick:
            settings = [linear_model(0, 2, "orthogonal")]
        else:
            settings = [*(linear_model(seed, BATCH) for seed in DRAWS), nonlinear(0, BATCH)]
        return [row for setting in settings for row in _rows(setting)]


def _rows(setting: Setting) -> list[Row]:
    mine = our_cost(setting)
    solvers: list[tuple[str, Solver]] = [("LSODA", lsoda)]
    if installed("torchdiffeq"):
        solvers.append(("dopri5", dopri5))
    n = len(setting.x)
    found = []
    for name, solver in solvers:
        peer = loosest(solver, setting)[1]
        note = f"ours {mine.note}; peer {peer.note}"
        costs = (
            ("time", "ms", 1e3 * mine.seconds / n, 1e3 * peer.seconds / n, note),
            ("gradients", "", mine.evaluations, peer.evaluations, ""),
        )
        for what, unit, a, b, text in costs:
            found.append(Row(f"{setting.name}, {what}", a, b, name, unit, a / b, note=text))
    return found
