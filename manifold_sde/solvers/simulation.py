"""Simulation of the stochastic differential equations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from manifold_sde import philox
from manifold_sde.compiling import check_mode, compiler_available
from manifold_sde.errors import ArgumentError, DTypeError
from manifold_sde.sdes import (
    DirectionDiffusion,
    FixedRatioDiffusion,
    ManifoldEquation,
    StochasticEquation,
    WeightDecaySDE,
)
from manifold_sde.solvers.archive import versions
from manifold_sde.solvers.bookkeeping import (
    Book,
    ClockBook,
    GrowthBook,
    log_time_at_zero_ratio,
)
from manifold_sde.solvers.chunk import Outcome, Task, run_chunk
from manifold_sde.solvers.direction import DirectionSolution
from manifold_sde.solvers.march import Grid
from manifold_sde.solvers.runner import digest, starts
from manifold_sde.solvers.schemes import SCHEMES
from manifold_sde.solvers.solution import Solution

Observable = Callable[[Tensor], Tensor]

#: Paths of a chunk, all of them stepped together.
CHUNK = 4096
#: Steps times paths from on which compiling pays when the choice is left to the toolkit.
_WORTH_COMPILING = 2_000_000
#: Step of the clock u, times the largest noise trace at the starts, when none is given.
_DEFAULT_STEP = 1.0 / 64.0


def solve(
    sde: StochasticEquation,
    y0: Tensor,
    ts: Sequence[float] | Tensor,
    *,
    n_paths: int | None = None,
    method: str = "auto",
    dt: float | None = None,
    seed: int = 0,
    antithetic: bool = False,
    observables: Mapping[str, Observable] | None = None,
    compile: bool | str = "auto",
    progress: bool | str = False,
    checkpoint: str | Path | None = None,
) -> Solution:
    r"""Simulate paths of a stochastic differential equation on the manifold of minimisers.

    A path's noise depends on (seed, path, time) alone: paths are the same alone and among
    thousands (to rounding), at other times asked for, and at steps that differ by powers of two.

    Args:
        sde: The equation.
        y0: Start (D,) on the manifold, or a start for each path (B, D).
        ts: Times asked for, increasing, in the equation's own time; ``ts[0]`` is the start.
        n_paths: Number of paths from one start; ``None`` for one path, or as many as starts.
        method: Scheme: "euler" (Ito), "heun", "midpoint", "weak2" (Stratonovich), "phi_jet" (any),
            or "split": the direction in the intrinsic clock by "weak2", and the norm by its own
            equation. "auto" is "split" on the manifold.
        dt: Step in the equation's time. "split" turns it into a step of the clock.
        seed: Seed of the Brownian paths, an integer.
        antithetic: Whether paths 2i and 2i + 1 have opposite noise, for smaller variance.
        observables: Functions of states (n, D) whose mean and standard error over the paths are
            kept, by name, in ``solution.observed``; the paths themselves are then not kept, and
            memory does not grow with their number.
        compile: Whether kernels are compiled: "auto" does so for large runs where a C++ compiler
            is at hand.
        progress: Whether to show a progress bar, or its label.
        checkpoint: Folder in which the state is saved on the way; the same call goes on from it,
            and ends with the same bits as if it had not stopped.

    Returns:
        Solution: ``ys`` is (K, D) for one path and (K, n, D) for several; a
        :class:`DirectionSolution` for a :class:`DirectionDiffusion`.

    Raises:
        ArgumentError, ShapeError: If an argument is out of range or shapes do not fit.
        NotOnManifoldError, RankError, NoiseError: If a start is not on the manifold, or the noise
            vanishes there.
        CheckpointError: If the checkpoint is corrupted or belongs to another run.

    Example:
        >>> from manifold_sde import LimitingDiffusion, problems
        >>> from manifold_sde.solvers import solve
        >>> problem = problems.great_circle()
        >>> solution = solve(LimitingDiffusion(problem), problem.minimizer, [0, 1], n_paths=4)
        >>> solution.ys.shape
        torch.Size([2, 4, 3])
    """
    if not isinstance(sde, StochasticEquation):
        raise DTypeError(
            "the equation is not one of this toolkit",
            received=type(sde).__name__,
            expected="WeightDecaySDE, FixedRatioDiffusion, LimitingDiffusion, DirectionDiffusion",
            remedy="torchsde.sdeint integrates SDEs of your own; it knows no manifold",
        )
    times = _check_times(ts)
    start, batched = starts(sde.problem, y0, n_paths)
    philox.seed_key(seed)
    name, equation = _choose(sde, method)
    if isinstance(equation, ManifoldEquation):
        equation.require_on_manifold(start)
    step = _check_step(dt, times)
    run = _Run(sde, equation, name, start, times, step, seed, antithetic, compile)
    outcomes = run.execute(progress, None if checkpoint is None else Path(checkpoint))
    return run.collect(outcomes, batched, observables)


class _Run:
    """One call of ``solve``."""

    def __init__(
        self,
        sde: StochasticEquation,
        equation: StochasticEquation,
        method: str,
        start: Tensor,
        times: tuple[float, ...],
        dt: float | None,
        seed: int,
        antithetic: bool,
        compile: bool | str,
    ) -> None:
        self.sde = sde
        self.method = method
        self.start = start
        self.times = times
        self.seed = seed
        self.antithetic = bool(antithetic)
        #: ‖Y(0)‖⁴ where the direction is simulated for a diffusion with a norm.
        self.split = method == "split" and isinstance(sde, FixedRatioDiffusion)
        self.equation = equation
        self.norms4 = start.norm(dim=1) ** 4
        h = self._step(dt)
        begin = 0.0 if self.split else times[0]
        self.grid = Grid.of_step(begin, h)
        mode = check_mode(compile)
        work = len(start) * max(1.0, (times[-1] - times[0]) / h)
        worth = work >= _WORTH_COMPILING and compiler_available()
        self.compiled = worth if mode == "auto" else bool(mode)

    def _step(self, dt: float | None) -> float:
        """The step of the equation that is simulated."""
        if isinstance(self.sde, WeightDecaySDE):
            return 1.0 if dt is None else dt
        unit = self.start / self.start.norm(dim=1, keepdim=True)
        trace = float(self.sde.problem.noise_trace(unit).max())
        natural = _DEFAULT_STEP / trace
        low = float(self.norms4.min())
        if self.split:
            assert isinstance(self.sde, FixedRatioDiffusion)
            settled = trace / (2.0 * self.sde.ratio) if self.sde.ratio > 0 else 0.0
            return natural if dt is None else dt / max(float(self.norms4.max()), settled)
        if isinstance(self.sde, DirectionDiffusion):
            return natural if dt is None else dt
        return natural * min(low, trace) if dt is None else dt

    def _book(self) -> Book:
        if isinstance(self.equation, DirectionDiffusion):
            return GrowthBook()
        if isinstance(self.equation, WeightDecaySDE):
            return ClockBook(self.equation.lr**2)
        return ClockBook()

    def tasks(self, checkpoint: Path | None) -> list[Task]:
        """The chunks."""
        found = []
        for number, first in enumerate(range(0, len(self.start), CHUNK)):
            start = self.start[first : first + CHUNK].T.contiguous()
            file = None if checkpoint is None else checkpoint / f"chunk-{number:06d}.npz"
            task = Task(
                sde=self.equation,
                method="weak2" if self.method == "split" else self.method,
                grid=self.grid,
                book=self._book(),
                seed=self.seed,
                antithetic=self.antithetic,
                compiled=self.compiled,
                first=first,
                start=start,
                times=self.times,
                log_elapsed=None,
                checkpoint=file,
                fingerprint=self._fingerprint(start),
            )
            if self.split:
                task = self._split_task(task)
            found.append(task)
        return found

    def _split_task(self, task: Task) -> Task:
        """The direction from unit vectors, until E reaches what the times asked for need."""
        assert isinstance(self.sde, FixedRatioDiffusion)
        norms = task.start.norm(dim=0)
        elapsed = torch.tensor(self.times, dtype=norms.dtype, device=norms.device) - self.times[0]
        targets = log_time_at_zero_ratio(elapsed, self.sde.ratio)
        return replace(
            task,
            start=task.start / norms,
            times=None,
            log_elapsed=targets[:, None] - 4.0 * norms.log(),
        )

    def execute(self, progress: bool | str, checkpoint: Path | None) -> list[Outcome]:
        """Run all chunks."""
        tasks = self.tasks(checkpoint)
        label = progress if isinstance(progress, str) else "SDE"
        total = None
        if not self.split:
            total = len(tasks) * math.ceil((self.times[-1] - self.times[0]) / self.grid.h - 1e-9)
        with tqdm(total=total, desc=label, unit="step", disable=not progress) as bar:
            return [run_chunk(task, bar.update) for task in tasks]

    def config(self) -> dict[str, Any]:
        """What was run, as far as it can be written down."""
        return {
            "sde": repr(self.sde),
            "method": self.method,
            "dt": self.grid.h,
            "seed": self.seed,
            "antithetic": self.antithetic,
        }

    def _fingerprint(self, start: Tensor) -> dict[str, Any]:
        probe = self.sde.problem.pointwise.gradient(self.start[0] + 0.125)
        return {
            **self.config(),
            "start": digest(start.cpu().numpy()),
            "times": digest(np.array(self.times)),
            "gradient": digest(probe.detach().cpu().numpy()),
            "compiled": self.compiled,
            "dtype": str(self.start.dtype),
            "torch": versions()["torch"],
        }

    def collect(
        self,
        outcomes: list[Outcome],
        batched: bool,
        observables: Mapping[str, Observable] | None,
    ) -> Solution:
        """The solution."""
        x = torch.cat([o.x for o in outcomes], -1)
        sums = torch.cat([o.sums for o in outcomes], -1)
        time = torch.cat([o.time for o in outcomes], -1)
        clock = sums[:, 0]
        extra: dict[str, Any] = {}
        if self.split:
            assert isinstance(self.sde, FixedRatioDiffusion)
            elapsed = torch.tensor(self.times, dtype=x.dtype, device=x.device) - self.times[0]
            growth = sums[:, 0] - 4.0 * self.sde.ratio * elapsed[:, None]
            x = x * (self.start.norm(dim=1) * torch.exp(0.25 * growth))[:, None]
            clock = time.to(x.dtype)
        elif isinstance(self.sde, DirectionDiffusion):
            clock = (time - self.times[0]).to(x.dtype)
            extra = {
                "growth": sums[:, 0],
                "log_elapsed": sums[:, 1],
                "grid_ys": torch.cat([o.grid_x for o in outcomes], -1).movedim(1, -1),
                "grid_growth": torch.cat([o.grid_sums for o in outcomes], -1)[:, 0],
                "grid_log_elapsed": torch.cat([o.grid_sums for o in outcomes], -1)[:, 1],
            }
        lost = int((~torch.isfinite(x[-1]).all(0)).sum())
        ys = x.movedim(1, -1)
        stats = {
            "steps": sum(o.steps for o in outcomes),
            "paths": len(self.start),
            "lost_paths": lost,
            "compiled": self.compiled,
        }
        ts = torch.tensor(self.times, dtype=torch.float64)
        observed = {}
        for key, function in (observables or {}).items():
            values = torch.stack([function(y) for y in ys])
            observed[key] = (values.mean(1), values.std(1) / values.shape[1] ** 0.5)
        if not batched:
            ys, clock = ys[:, 0], clock[:, 0]
            extra = {key: value[:, 0] for key, value in extra.items()}
        arguments: dict[str, Any] = {
            "ts": ts,
            "ys": ys.contiguous(),
            "clock": clock.contiguous(),
            "stats": stats,
            "config": self.config(),
            "observed": observed,
        }
        if isinstance(self.sde, DirectionDiffusion):
            task = self.tasks(None)[0]
            return DirectionSolution(**arguments, **extra, task=task)
        return Solution(**arguments)


def _choose(sde: StochasticEquation, method: str) -> tuple[str, StochasticEquation]:
    """Name of the method and the equation that its scheme integrates.

    Raises:
        ArgumentError: If there is no such method, or it does not fit the equation.
    """
    ambient = isinstance(sde, WeightDecaySDE)
    allowed = ("euler", "heun", "midpoint") if ambient else (*SCHEMES, "split")
    if method == "auto":
        if ambient:
            return ("euler" if sde.calculus == "ito" else "heun"), sde
        method = "split"
    if method not in allowed:
        raise ArgumentError(
            f"there is no such method for {type(sde).__name__}",
            received=repr(method),
            expected=", ".join(repr(m) for m in ("auto", *allowed)),
            remedy='leave it at "auto"',
        )
    if method == "split":
        return method, DirectionDiffusion(sde.problem, "stratonovich")
    calculus = SCHEMES[method].calculus
    if calculus is not None and calculus != sde.calculus:
        raise ArgumentError(
            f"{method!r} does not integrate the form of the equation that it was given",
            received=f"the {sde.calculus} form",
            expected=f"the {calculus} form: the drifts differ",
            remedy=f"sde.with_calculus({calculus!r}), the same process",
        )
    return method, sde


def _check_times(ts: object) -> tuple[float, ...]:
    if isinstance(ts, Tensor):
        ts = ts.detach().cpu().tolist()
    listed = list(ts) if isinstance(ts, Iterable) and not isinstance(ts, (str, bytes)) else [ts]
    numbers = [
        float(t) if isinstance(t, (int, float, np.number)) and not isinstance(t, bool) else math.nan
        for t in listed
    ]
    increasing = all(a < b for a, b in itertools.pairwise(numbers))
    if len(numbers) < 2 or not all(math.isfinite(t) for t in numbers) or not increasing:
        raise ArgumentError(
            "ts are not times to solve for",
            received=repr(ts)[:80],
            expected="two or more finite numbers, increasing; the first is the start",
            remedy="ts=[0.0, 1.0], or torch.linspace(0, 1, 11)",
        )
    return tuple(numbers)


def _check_step(dt: object, times: tuple[float, ...]) -> float | None:
    if dt is None:
        return None
    number = isinstance(dt, (int, float)) and not isinstance(dt, bool)
    if number and 0 < dt < math.inf and (times[-1] - times[0]) / dt < 2**40:  # type: ignore[operator]
        return float(dt)  # type: ignore[arg-type]
    raise ArgumentError(
        "dt is not a step",
        received=repr(dt),
        expected="a positive number, not below 2^-40 of the time span",
        remedy="leave dt out, and look at solution.config['dt']",
    )
