"""Programs that simulate the limiting diffusion (13): those of this toolkit, and torchsde.

A program makes a given number of steps for a given number of paths. To time it, a part of its steps
may be enough: ``timed_steps`` of the same size.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torchsde
from torch import Tensor

from benchmarks.weak_errors import TIME, Setting, Step
from manifold_sde import DirectionDiffusion, LimitingDiffusion, Problem
from manifold_sde.equations import ManifoldEquation
from manifold_sde.solvers import BrownianPath, solve
from manifold_sde.solvers.schemes import SCHEMES


class Program(Protocol):
    """A simulation with a fixed number of paths and steps."""

    name: str

    def run(self, seed: int) -> object:
        """All steps, until they are done."""

    def end(self, seed: int) -> Tensor:
        """Where the paths end, (n, D)."""


class Ours:
    """:func:`~manifold_sde.solvers.solve`, for (13) in T or for the direction in the clock u.

    The clock at T = 1 is known, because the noise (18) has a constant trace.

    Args:
        setting: The problem and its law.
        method: Name of the scheme.
        steps: Number of steps to T = 1.
        n_paths: Number of paths.
        clock: Whether the direction is simulated, in the clock u.
        compiled: Whether kernels are compiled.
        problem: The problem in another form, such as ``setting.plain()``.
        timed_steps: Steps of a run; all of them by default.
    """

    def __init__(
        self,
        setting: Setting,
        method: str,
        steps: int,
        n_paths: int,
        *,
        clock: bool,
        compiled: bool,
        problem: Problem | None = None,
        timed_steps: int | None = None,
    ) -> None:
        self.name = scheme_name(method, clock)
        problem = problem or setting.problem
        equation = DirectionDiffusion if clock else LimitingDiffusion
        calculus = "ito" if method == "split" else SCHEMES[method].calculus or "ito"
        self.sde: ManifoldEquation = equation(problem, calculus)
        self.start = setting.problem.minimizer
        span = setting.clock if clock or method == "split" else TIME
        self.dt = span / steps
        self.times = [0.0, TIME if method == "split" else (timed_steps or steps) * self.dt]
        self.method, self.n_paths, self.compiled = method, n_paths, compiled

    def end(self, seed: int) -> Tensor:
        """Where the paths end, (n, D)."""
        return solve(
            self.sde,
            self.start,
            self.times,
            n_paths=self.n_paths,
            method=self.method,
            dt=self.dt,
            seed=seed,
            compile=self.compiled,
        ).ys[-1]

    run = end


def scheme_name(method: str, clock: bool) -> str:
    """How a scheme is called in tables and pictures."""
    return f"{method} in u" if clock else method


class TorchSde:
    """``torchsde.sdeint`` with its Euler on ``LimitingDiffusion``; it knows no manifold.

    Args:
        setting: The problem and its law.
        steps: Number of steps to T = 1.
        n_paths: Number of paths.
        ours: Whether its Brownian paths are ours, or its own BrownianInterval.
        timed_steps: Steps of a run; all of them by default.
    """

    name = "torchsde"

    def __init__(
        self,
        setting: Setting,
        steps: int,
        n_paths: int,
        *,
        ours: bool = False,
        timed_steps: int | None = None,
    ) -> None:
        self.sde = LimitingDiffusion(setting.problem)
        self.x = setting.problem.minimizer.expand(n_paths, -1).contiguous()
        self.dt = TIME / steps
        self.span = (timed_steps or steps) * self.dt
        self.ours = ours
        self.form = "our Brownian paths" if ours else "its BrownianInterval with dt"

    def _source(self, seed: int) -> object:
        n, dim = self.x.shape
        if self.ours:
            cell = self.dt * 2.0 ** max(0, math.ceil(math.log2(0.75 / self.dt)))
            return BrownianPath(seed, dim, n, cell=cell)
        return torchsde.BrownianInterval(
            0.0, self.span, size=(n, dim), dtype=self.x.dtype, dt=self.dt, entropy=seed
        )

    @torch.no_grad()
    def end(self, seed: int) -> Tensor:
        """Where the paths end, (n, D)."""
        ts = torch.tensor([0.0, self.span], dtype=torch.float64)
        source = self._source(seed)
        ys: Tensor = torchsde.sdeint(self.sde, self.x, ts, bm=source, method="euler", dt=self.dt)
        return ys[-1]

    run = end


def without_retraction(problem: Problem, *, compiled: bool) -> Step:
    """The step of torchsde's Euler for (13), with compiled kernels."""
    sde = LimitingDiffusion(problem)
    sde.require_on_manifold(problem.minimizer)
    sde = sde.prepare(compiled=compiled)

    def step(x: Tensor, dw: Tensor, extra: Tensor, h: float) -> Tensor:
        size = torch.tensor(h, dtype=x.dtype)
        return x + sde.increment(x, sde.reference_basis(x), size, dw)

    return step


@torch.no_grad()
def paired_difference(
    setting: Setting, step: Step, other: Step, steps: int, n_paths: int, seed: int = 0
) -> tuple[float, float]:
    """E cos(angle) at T = 1 of one scheme less that of another, on the same Brownian paths.

    Paths that either loses are left out.

    Returns:
        Mean and standard error.
    """
    generator = torch.Generator().manual_seed(seed)
    start = setting.problem.minimizer[:, None]
    a = b = start.expand(-1, n_paths).contiguous()
    h = TIME / steps
    for _ in range(steps):
        dw = math.sqrt(h) * torch.randn(a.shape, dtype=a.dtype, generator=generator)
        a, b = step(a, dw, dw, h), other(b, dw, dw, h)
    difference = setting.cosine(a.T) - setting.cosine(b.T)
    difference = difference[torch.isfinite(difference)]
    return float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))
