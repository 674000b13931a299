"""One call of ``solve``: its plan, its chunks, and the solution made of their outcomes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde.compile import check_mode, compiler_available
from manifold_sde.equations import ManifoldEquation, StochasticEquation
from manifold_sde.loss_checks import fixed_directions
from manifold_sde.sdes import (
    DirectionDiffusion,
    FixedRatioDiffusion,
    WeightDecaySDE,
)
from manifold_sde.solvers.archive import SUFFIX, versions
from manifold_sde.solvers.bookkeeping import (
    Book,
    ClockBook,
    GrowthBook,
    clock_at,
    log_time_at_zero_ratio,
)
from manifold_sde.solvers.chunk import Outcome
from manifold_sde.solvers.direction import DirectionSolution
from manifold_sde.solvers.fingerprint import Fingerprint, route, summary
from manifold_sde.solvers.limits import MAX_STEPS, refuse_many_steps, require_memory
from manifold_sde.solvers.lost_paths import check_average, remedy_of, warn_of_lost_paths
from manifold_sde.solvers.march import Grid
from manifold_sde.solvers.moments import Moments, Observable, evaluate
from manifold_sde.solvers.plan import Plan, Task
from manifold_sde.solvers.schemes import SCHEMES
from manifold_sde.solvers.solution import Solution
from manifold_sde.solvers.step_control import Tolerance
from manifold_sde.threads import one_thread

#: Steps, or steps times paths, from which on compiling pays where the choice is left to us.
_MANY_STEPS = 400
_WORTH_COMPILING = 2_000_000
#: Step of the clock u, times the largest noise trace at the starts, when none is given.
_DEFAULT_STEP = 1.0 / 64.0
#: Points at which observables are compared with those of a checkpoint.
_PROBES = 16


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        sde: The equation asked for.
        equation: The equation that the scheme integrates.
        method: Name of the method.
        start: The one start of all paths (1, D), or one for each (n, D).
        n_paths: Number n of paths.
        times: Times asked for.
        dt: Step, or the first one, or ``None``.
        tolerance: Tolerance and range of adaptive steps, or ``None`` for steps of one size.
        seed: Seed.
        antithetic: Whether paths come in pairs.
        observables: Functions whose moments are kept instead of the paths, or ``None``.
        compile: Mode of compiling.
        chunk_size: Number of paths that are stepped together.
        first_path: Index of the first path.
        max_steps: Largest number of steps of a path.
        noise_along: Part of the noise along the manifold at the start, if it was measured.
    """

    sde: StochasticEquation
    equation: StochasticEquation
    method: str
    start: Tensor
    n_paths: int
    times: tuple[float, ...]
    dt: float | None = None
    tolerance: Tolerance | None = None
    seed: int = 0
    antithetic: bool = False
    observables: Mapping[str, Observable] | None = None
    compile: bool | str = "auto"
    chunk_size: int = 4096
    first_path: int = 0
    max_steps: int = MAX_STEPS
    noise_along: float | None = None


def matrix_free(equation: StochasticEquation) -> bool:
    """Whether an equation is evaluated by products alone."""
    return isinstance(equation, ManifoldEquation) and equation.geometry.products is not None


def direction_scheme(equation: StochasticEquation, *, adaptive: bool = False) -> str:
    """The scheme that "split" takes for the direction."""
    if adaptive:
        return "heun"
    return "walk" if matrix_free(equation) else "weak2"


class Run:
    """A request with its plan.

    Args:
        request: What is asked for.
        grid: The grid, where it is not to follow from the step.
    """

    def __init__(self, request: Request, grid: Grid | None = None) -> None:
        self.request = r = request
        #: Whether the direction is simulated for a diffusion with a norm.
        self.split = r.method == "split" and isinstance(r.sde, FixedRatioDiffusion)
        #: Time in which the clock of the slowest path advances by 1, where it is simulated.
        self._clock_unit = 1.0
        begin = 0.0 if self.split else r.times[0]
        method = r.method
        if method == "split":
            method = direction_scheme(r.equation, adaptive=r.tolerance is not None)
        h, control = self._step(), None
        self.grid = grid or Grid.of_step(begin, h)
        if r.tolerance is not None:
            self.grid, control = r.tolerance.plan(begin, h, self._clock_unit, SCHEMES[method])
        self._refuse_what_does_not_end()
        mode = check_mode(r.compile)
        steps = max(1.0, (r.times[-1] - r.times[0]) / (h * self._clock_unit))
        worth = steps >= _MANY_STEPS or r.n_paths * steps >= _WORTH_COMPILING
        self.plan = Plan(
            sde=r.equation,
            method=method,
            grid=self.grid,
            control=control,
            book=self._book(),
            seed=r.seed,
            antithetic=r.antithetic,
            compiled=not matrix_free(r.equation)
            and (worth and compiler_available() if mode == "auto" else bool(mode)),
            times=r.times,
            max_steps=r.max_steps,
            ratio=r.sde.ratio if self.split and isinstance(r.sde, FixedRatioDiffusion) else None,
            observables=r.observables or None,
        )

    def _refuse_what_does_not_end(self) -> None:
        """Refuse more steps than are allowed, of the largest size, and more states than fit.

        Raises:
            ArgumentError: If there are.
        """
        r = self.request
        span = r.times[-1] - r.times[0]
        if self.split:
            assert isinstance(r.sde, FixedRatioDiffusion)
            norms = r.start.norm(dim=1)
            trace = r.sde.problem.noise_trace(r.start / norms[:, None])
            log_time = log_time_at_zero_ratio(torch.tensor(span, dtype=torch.float64), r.sde.ratio)
            span = float(clock_at(log_time - 4.0 * norms.double().log(), trace.double()).max())
        # Adaptive steps are at most as long as a cell.
        longest = self.grid.h if r.tolerance is None else self.grid.cell
        fewer = "a larger dt" if r.tolerance is None else "a larger dt_max"
        refuse_many_steps(span / longest, r.max_steps, f"{fewer}, or an earlier last time")
        if not r.observables:
            numbers = float(len(r.times)) * r.n_paths * r.start.shape[1]
            fewer = "observables={...}, which keep no states; fewer times, or fewer paths"
            require_memory(numbers, r.start.element_size(), fewer)

    def _step(self) -> float:
        """The step of the equation that is simulated."""
        sde, dt, start = self.request.sde, self.request.dt, self.request.start
        if isinstance(sde, WeightDecaySDE):
            return 1.0 if dt is None else dt
        norms4 = start.norm(dim=1) ** 4
        trace = float(sde.problem.noise_trace(start / start.norm(dim=1, keepdim=True)).max())
        natural = _DEFAULT_STEP / trace
        if self.split:
            assert isinstance(sde, FixedRatioDiffusion)
            settled = trace / (2.0 * sde.ratio) if sde.ratio > 0 else 0.0
            self._clock_unit = max(float(norms4.max()), settled)
            return natural if dt is None else dt / self._clock_unit
        if isinstance(sde, DirectionDiffusion):
            return natural if dt is None else dt
        return natural * min(float(norms4.min()), trace) if dt is None else dt

    def _book(self) -> Book:
        equation = self.request.equation
        if isinstance(equation, DirectionDiffusion):
            return GrowthBook()
        if isinstance(equation, WeightDecaySDE):
            return ClockBook(equation.lr**2)
        return ClockBook()

    def _smallest_step(self) -> float:
        assert self.plan.control is not None
        return self.grid.cell * 2.0**-self.plan.control.deepest

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.request.n_paths // self.request.chunk_size)

    @property
    def steps(self) -> int | None:
        """Number of steps of all chunks, where it is known beforehand."""
        if self.split or self.plan.control is not None:
            return None
        span = self.request.times[-1] - self.request.times[0]
        return self.chunks * math.ceil(span / self.grid.h - 1e-9)

    def tasks(self, checkpoint: Path | None = None) -> Iterator[Task]:
        """The chunks, each made when it is asked for."""
        r = self.request
        common = None if checkpoint is None else self._fingerprint()
        for number, first in enumerate(range(0, r.n_paths, r.chunk_size)):
            size = min(r.chunk_size, r.n_paths - first)
            # One start for all is sent once to a worker, not once a path.
            one = len(r.start) == 1
            own = r.start if one else r.start[first : first + size].clone()
            start = own.expand(size, -1).T
            if checkpoint is None or common is None:
                yield Task(r.first_path + first, start)
                continue
            parts = {"start": summary(own).cpu().numpy()}
            file = checkpoint / f"chunk-{number:06d}{SUFFIX}"
            fingerprint = common.with_parts({"first path": r.first_path + first}, parts)
            yield Task(r.first_path + first, start, file, fingerprint)

    def config(self) -> dict[str, Any]:
        """What was run, as far as it can be written down."""
        r = self.request
        config: dict[str, Any] = {
            "sde": repr(r.sde),
            "method": r.method,
            "dt": self.grid.h * self._clock_unit,
            "seed": r.seed,
            "antithetic": r.antithetic,
        }
        if r.tolerance is not None:
            config |= {"rtol": r.tolerance.rtol, "atol": r.tolerance.atol}
            config["smallest_dt"] = self._smallest_step() * self._clock_unit
        if isinstance(r.sde, FixedRatioDiffusion):
            config["ratio"] = r.sde.ratio
        if isinstance(r.sde, WeightDecaySDE):
            config["ratio"] = r.sde.weight_decay / r.sde.lr
        return config

    def _fingerprint(self) -> Fingerprint:
        """What a checkpoint has to agree in with the run that goes on from it."""
        r, plan = self.request, self.plan
        probes = r.start[0].norm() * fixed_directions(r.start.shape[1], _PROBES).to(r.start)
        with one_thread():
            found = {
                name: evaluate(f"the observable {name!r}", function, probes)[0]
                for name, function in (r.observables or {}).items()
            }
            said = {
                **self.config(),
                "scheme": plan.method,
                "geometry": route(r.equation),
                "paths": r.n_paths,
                "chunk size": r.chunk_size,
                "grid": asdict(self.grid),
                "step control": None if plan.control is None else asdict(plan.control),
                "observables": {name: list(value.shape) for name, value in found.items()},
                "compiled": plan.compiled,
            }
            seen = {f"observables, {k}": summary(v).cpu().numpy() for k, v in found.items()}
            seen["times"] = np.array(r.times)
            return Fingerprint.of(r.sde.problem, r.start[0], said, seen)

    def collect(self, outcomes: Iterator[Outcome], batched: bool) -> Solution:
        """The solution, from the chunks in order."""
        collection = _Collection(self.request.n_paths if self.plan.observables is None else 0)
        for outcome in outcomes:
            collection.add(outcome)
        arrays = collection.arrays
        ys = arrays["x"].movedim(1, -1)
        sums, time = arrays["sums"], arrays["time"]
        clock = sums[:, 0]
        extra: dict[str, Any] = {}
        if self.split:
            clock = time.to(ys.dtype)
        elif isinstance(self.request.sde, DirectionDiffusion):
            clock = (time - self.request.times[0]).to(ys.dtype)
            extra = {
                "growth": sums[:, 0].contiguous(),
                "log_elapsed": sums[:, 1].contiguous(),
                "grid_ys": arrays["grid_x"].movedim(1, -1).contiguous(),
                "grid_growth": arrays["grid_sums"][:, 0].contiguous(),
                "grid_log_elapsed": arrays["grid_sums"][:, 1].contiguous(),
                "grid_position": arrays["grid_position"],
                "grid_level": arrays["grid_level"],
            }
        if not batched and self.plan.observables is None:
            ys, clock = ys[:, 0], clock[:, 0]
            extra = {key: value[:, 0] for key, value in extra.items()}
        assert collection.lost is not None
        stats: dict[str, Any] = {
            "steps": collection.steps,
            "paths": self.request.n_paths,
            "lost_paths": int(collection.lost[-1]),
            "compiled": self.plan.compiled,
        }
        if self.request.noise_along is not None:
            stats["noise_along"] = self.request.noise_along
        if self.plan.control is not None:
            stats["rejected_steps"] = collection.rejected
        config = {**self.config(), "versions": versions()}
        if self.plan.observables is None:
            warn_of_lost_paths(stats["lost_paths"], stats["paths"], config)
        else:
            stats["lost_at_times"] = collection.lost.tolist()
        arguments: dict[str, Any] = {
            "ts": torch.tensor(self.request.times, dtype=torch.float64),
            "ys": ys.contiguous(),
            "clock": clock.contiguous(),
            "stats": stats,
            "config": config,
            "observed": {
                name: tuple(value.to(ys.dtype) for value in moments.result())
                for name, moments in collection.moments.items()
            },
        }
        if isinstance(self.request.sde, DirectionDiffusion):
            solution: Solution = DirectionSolution(**arguments, **extra, plan=self.plan)
        else:
            solution = Solution(**arguments)
        if self.plan.observables is not None:
            check_average(
                stats["lost_paths"],
                stats["paths"],
                when=f" by {self.request.times[-1]:g}",
                partial=solution,
                survivors="the error's attribute partial, a solution whose lost_at_times counts "
                "them at each time",
                remedy=remedy_of(config),
            )
        return solution


class _Collection:
    """Outcomes of chunks, put together one after the other.

    Args:
        n_paths: Number of paths that are kept.
    """

    def __init__(self, n_paths: int) -> None:
        self.n_paths = n_paths
        self.arrays: dict[str, Tensor] = {}
        self.moments: dict[str, Moments] = {}
        self.lost: Tensor | None = None
        self.steps = 0
        self.rejected = 0
        self._filled = 0

    def add(self, outcome: Outcome) -> None:
        """The next chunk."""
        parts = outcome.arrays()
        if not self.arrays:
            self.arrays = {k: v.new_empty(*v.shape[:-1], self.n_paths) for k, v in parts.items()}
        size = parts["time"].shape[-1]
        for name, value in parts.items():
            self.arrays[name][..., self._filled : self._filled + size] = value
        self._filled += size
        for name, moments in outcome.moments.items():
            before = self.moments.get(name)
            self.moments[name] = moments if before is None else before.merge(moments)
        self.lost = outcome.lost if self.lost is None else self.lost + outcome.lost
        self.steps += outcome.steps
        self.rejected += outcome.rejected
