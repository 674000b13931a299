"""One simulation: the arguments of ``solve``, resolved, as plain data for any process."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manifold_sde import rng
from manifold_sde.arguments import Points, check_flag
from manifold_sde.columns import column_norms
from manifold_sde.compile import QUICK_DIM, choose_mode
from manifold_sde.compile.random_numbers import fills
from manifold_sde.equations import ManifoldEquation, StochasticEquation
from manifold_sde.group_sdes import GroupDirectionDiffusion
from manifold_sde.loss_checks import fixed_directions
from manifold_sde.sdes import DirectionDiffusion, FixedRatioDiffusion, WeightDecaySDE
from manifold_sde.solvers.adaptive import AdaptiveSteps, StepControl, Tolerance
from manifold_sde.solvers.archive import SUFFIX
from manifold_sde.solvers.arguments import (
    check_accuracy,
    check_chunks,
    check_observables,
    check_starts,
    check_step,
    check_times,
    choose,
    require_equation,
    require_start,
)
from manifold_sde.solvers.brownian import BrownianPath
from manifold_sde.solvers.chunk import CHUNK, Chunk
from manifold_sde.solvers.clock import ReadOff, clock_at, integrals_of
from manifold_sde.solvers.coupled_path import CoupledPath, Coupling
from manifold_sde.solvers.fingerprint import Fingerprint, route, summary
from manifold_sde.solvers.fixed import FixedSteps, Grid, RestartedSteps, SaveTimes
from manifold_sde.solvers.limits import (
    MAX_STEPS,
    Watch,
    check_max_steps,
    refuse_many_steps,
    require_memory,
)
from manifold_sde.solvers.moments import Observable, evaluate
from manifold_sde.solvers.step_choice import choose_step
from manifold_sde.solvers.torchsde_schemes import scheme_named
from manifold_sde.threads import one_thread

#: Steps, or steps times paths, above which "auto" compiles.
_MANY_STEPS = 400
_WORTH_COMPILING = 2_000_000
#: Step of the clock u, times the largest noise trace at the starts, when none is given.
_DEFAULT_STEP = 1.0 / 64.0
#: Points at which observables are compared with those of a checkpoint.
_PROBES = 16


class _Clock(NamedTuple):
    """Largest V at the starts, the time of one unit of the clock u, and u at the last time."""

    trace: float
    unit: float
    span: float


@dataclass(frozen=True)
class Simulation:
    """What all chunks of a run share.

    Attributes:
        sde: The given equation.
        equation: The equation that is integrated, in the calculus of the scheme.
        method: Name of the given method.
        scheme: Name of the scheme that integrates.
        start: The one start of all paths (1, D), or one for each (n, D).
        n_paths: Number n of paths.
        times: Save times (K,), in the time of the given equation; the first is the start.
        grid: Grid of the steps, in the time of the equation that is integrated.
        control: Tolerance and range of adaptive steps, or ``None`` for steps of one size.
        clock_unit: Time of the given equation in one unit of the grid's.
        seed: Seed of the Brownian paths.
        antithetic: Whether paths 2i and 2i + 1 have opposite noise.
        observables: Functions whose moments are kept instead of the paths, or ``None``.
        compiled: Whether kernels are compiled: "c" for what the C compiler can do in seconds.
        expected_error: Weak error of the step that was chosen; ``None`` where it was given.
        chunk_size: Number of paths that are stepped together.
        first_path: Index of the first path.
        max_steps: Largest number of steps of a path.
        noise_along: Part of the noise along the manifold at the start, if it was measured.
        batched: Whether states have a dimension of paths.
        coupling: How the Brownian paths belong to those of another step, if they do.
    """

    sde: StochasticEquation
    equation: StochasticEquation
    method: str
    scheme: str
    start: Tensor
    n_paths: int
    times: tuple[float, ...]
    grid: Grid
    control: StepControl | None = None
    clock_unit: float = 1.0
    seed: int = 0
    antithetic: bool = False
    observables: Mapping[str, Observable] | None = None
    compiled: bool | str = False
    expected_error: float | None = None
    chunk_size: int = CHUNK
    first_path: int = 0
    max_steps: int = MAX_STEPS
    noise_along: float | None = None
    batched: bool = True
    coupling: Coupling | None = None

    @classmethod
    def of(
        cls,
        sde: StochasticEquation,
        y0: Points,
        ts: Sequence[float] | Tensor,
        *,
        n_paths: int | None = None,
        method: str = "auto",
        dt: float | None = None,
        tolerance: Tolerance | None = None,
        seed: int = 0,
        antithetic: bool = False,
        observables: Mapping[str, Observable] | None = None,
        compile: bool | str = "auto",
        accuracy: float | None = None,
        chunk_size: int = CHUNK,
        max_steps: int = MAX_STEPS,
    ) -> Simulation:
        """The simulation that :func:`~manifold_sde.solvers.solve` is asked for.

        Args:
            sde: The equation.
            y0: Start (D,), or a start for each path (B, D).
            ts: Save times; the first is the start.
            n_paths: Number of paths.
            method: Name of the method.
            dt: Step, or the first one.
            tolerance: Tolerance and range of adaptive steps, or ``None`` for steps of one size.
            seed: Seed.
            antithetic: Whether paths come in pairs.
            observables: Functions whose moments are kept instead of the paths.
            compile: Mode of compiling.
            accuracy: Weak error that is asked for.
            chunk_size: Number of paths that are stepped together.
            max_steps: Largest number of steps of a path.

        Raises:
            ArgumentError, ShapeError: If an argument is out of range, or the run would not end.
            NotOnManifoldError, RankError, NoiseError: If a start will not do.
        """
        require_equation(sde)
        times = check_times(ts)
        start, n, batched = check_starts(sde, y0, n_paths)
        rng.seed_key(seed)
        antithetic = check_flag("antithetic", antithetic)
        size = check_chunks(chunk_size, n, antithetic)
        name, equation = choose(sde, method, adaptive=tolerance is not None)
        found = cls(
            sde=sde,
            equation=equation,
            method=name,
            scheme=name if name != "split" else _direction_scheme(equation, tolerance),
            start=start,
            n_paths=n,
            times=times,
            grid=Grid(times[0], 1.0, 0, 1.0),
            seed=int(seed),
            antithetic=antithetic,
            chunk_size=size,
            noise_along=require_start(sde, equation, start),
            batched=batched,
        )
        step = check_step(dt, times)
        found = replace(
            found,
            observables=check_observables(observables, start),
            max_steps=check_max_steps(max_steps),
        )
        found, step = found._with_choice(step, tolerance, accuracy)
        return found.at_step(step, tolerance, compile)

    def at_step(
        self,
        dt: float | None,
        tolerance: Tolerance | None = None,
        compile: bool | str = "auto",
        **others: Any,
    ) -> Simulation:
        """The same with another step.

        Args:
            dt: Step, or the first one, or ``None``.
            tolerance: Tolerance and range of adaptive steps, or ``None`` for steps of one size.
            compile: Mode of compiling.
            **others: Other attributes.

        Raises:
            ArgumentError: If it would not end, or the limits of the steps leave none.
        """
        h, clock_unit = self._step(dt)
        begin = self.times[0] if self.ratio is None else 0.0
        grid, control = Grid.of_step(begin, h), None
        if tolerance is not None:
            grid, control = tolerance.plan(begin, h, clock_unit, scheme_named(self.scheme))
        found = replace(self, grid=grid, control=control, clock_unit=clock_unit, **others)
        found.require_an_end()
        steps = max(1.0, (self.times[-1] - self.times[0]) / (h * clock_unit))
        worth = steps >= _MANY_STEPS or found.n_paths * steps >= _WORTH_COMPILING
        compiled = choose_mode(compile, self.start.shape[1], worth=worth)
        return replace(found, compiled=False if _is_matrix_free(self.equation) else compiled)

    def _with_choice(
        self, dt: float | None, tolerance: Tolerance | None, accuracy: object
    ) -> tuple[Simulation, float | None]:
        """The same with the error that is expected of a step, and the step if it was chosen here.

        Raises:
            ArgumentError: If an accuracy is asked for that nothing here can choose a step for.
        """
        chooses = (
            dt is None
            and tolerance is None
            and self.scheme == "weak2"
            and (self.ratio is not None or isinstance(self.sde, DirectionDiffusion))
            and self.start.shape[1] <= QUICK_DIM
            and not _is_matrix_free(self.equation)
        )
        wanted = check_accuracy(accuracy, chooses)
        if not chooses:
            return self, dt
        assert isinstance(self.equation, DirectionDiffusion)
        directions = self.start / self.start.norm(dim=1, keepdim=True)
        if isinstance(self.equation, GroupDirectionDiffusion):
            directions = self.equation.balanced(directions)
        choice = choose_step(self.equation, directions, self._clock.trace, wanted)
        return replace(self, expected_error=choice.error), choice.h * self._clock.unit

    @functools.cached_property
    def _clock(self) -> _Clock:
        norms = self.start.norm(dim=1)
        trace = self.equation.start_trace(self.start / norms[:, None])
        norms = norms * self.equation.gauge(self.start)
        span, unit, largest = self.times[-1] - self.times[0], 1.0, float(trace.max())
        if self.ratio is not None:
            last = torch.tensor([span], dtype=torch.float64)
            read_off = ReadOff.at_ratio(norms.double(), last.to(norms.device), self.ratio)
            span = float(clock_at(read_off.log_elapsed, trace.double()).max())
            settled = largest / (2.0 * self.ratio) if self.ratio > 0 else 0.0
            unit = max(float(norms.max()) ** 4, settled)
        return _Clock(largest, unit, span)

    def halved(self, times: int) -> Simulation:
        """The same on the same Brownian paths, with the step halved so many times.

        Raises:
            ArgumentError: If it would take too many steps.
        """
        found = replace(self, grid=self.grid.halved(times))
        found.require_an_end()
        return found

    def _step(self, dt: float | None) -> tuple[float, float]:
        """The step of the equation that is integrated, and what one unit of its time is.

        Where the direction is integrated for a diffusion with a norm, the unit is the time in which
        the clock of the slowest path advances by 1.
        """
        sde, start = self.sde, self.start
        if isinstance(sde, WeightDecaySDE):
            return 1.0 if dt is None else dt, 1.0
        natural = _DEFAULT_STEP / self._clock.trace
        if self.ratio is not None:
            unit = self._clock.unit
            return natural if dt is None else dt / unit, unit
        if dt is not None:
            return dt, 1.0
        if isinstance(sde, DirectionDiffusion):
            return natural, 1.0
        return natural * min(float(start.norm(dim=1).min()) ** 4, self._clock.trace), 1.0

    def require_an_end(self) -> None:
        """Refuse more steps than are allowed, of the largest size, and more states than fit.

        Raises:
            ArgumentError: If there are.
        """
        span = self.times[-1] - self.times[0]
        if self.ratio is not None:
            span = self._clock.span
        # Adaptive steps are at most as long as a cell.
        longest, fewer = self.grid.h, "a larger dt"
        if self.control is not None:
            longest, fewer = self.grid.cell, "a larger dt_max"
        refuse_many_steps(span / longest, self.max_steps, f"{fewer}, or an earlier last time")
        if not self.observables:
            numbers = float(len(self.times)) * self.n_paths * self.start.shape[1]
            fewer = "observables={...}, which keep no states; fewer times, or fewer paths"
            require_memory(numbers, self.start.element_size(), fewer)

    # What follows from the attributes.

    @property
    def ratio(self) -> float | None:
        """Ratio C of (8) where the direction is integrated for it; else ``None``."""
        if self.method == "split" and isinstance(self.sde, FixedRatioDiffusion):
            return self.sde.ratio
        return None

    @property
    def keeps_restarts(self) -> bool:
        """Whether states are kept from which a direction can be taken up again."""
        return isinstance(self.sde, DirectionDiffusion) and not self.observables

    @property
    def n_chunks(self) -> int:
        """Number of chunks."""
        return -(-self.n_paths // self.chunk_size)

    @property
    def n_steps(self) -> int | None:
        """Number of steps of all chunks, where it is known beforehand."""
        if self.ratio is not None or self.control is not None:
            return None
        span = self.times[-1] - self.times[0]
        return self.n_chunks * math.ceil(span / self.grid.h - 1e-9)

    # What a chunk does.

    def begin(self, chunk: Chunk) -> Tensor:
        """States at which a chunk begins: directions where only these are integrated."""
        start = chunk.start.contiguous()
        return start if self.ratio is None else start / column_norms(start)

    def read_off(self, chunk: Chunk) -> ReadOff | None:
        """What turns directions into states of (8), where these were asked for."""
        if self.ratio is None or chunk.restart is not None:
            return None
        norm = column_norms(chunk.start) * self.equation.gauge(chunk.start.T)
        elapsed = torch.tensor(self.times, dtype=norm.dtype, device=norm.device) - self.times[0]
        return ReadOff.at_ratio(norm, elapsed, self.ratio)

    def steps(self, chunk: Chunk) -> FixedSteps:
        """The steps of a chunk."""
        paths, restarted = chunk.paths, chunk.restart is not None

        in_c = fills(torch.float64, chunk.start.device)
        coupling = self.coupling
        kind = BrownianPath if coupling is None else functools.partial(CoupledPath, coupling)

        def brownian(some: Tensor) -> BrownianPath:
            return kind(
                self.seed,
                self.equation.n_noise,
                some,
                cell=self.grid.cell,
                start=self.grid.start,
                dtype=chunk.start.dtype,
                device=chunk.start.device,
                antithetic=self.antithetic,
                # What torch compiles is for one number of paths, and does not serve some of them.
                compiled=bool(self.compiled) and (in_c or (some is paths and not restarted)),
            )

        read_off = self.read_off(chunk)
        saved = SaveTimes(self.times, None if read_off is None else read_off.log_elapsed)
        if chunk.log_elapsed is not None:
            saved = SaveTimes((0.0,), chunk.log_elapsed[None])
        sde = self.equation.prepare(compiled=self.compiled)
        common = (sde, self.grid, integrals_of(self.equation), brownian, paths, saved)
        if self.control is not None:
            return AdaptiveSteps(*common, self.control)
        return RestartedSteps(*common) if restarted else FixedSteps(*common)

    def watch(self, position: int) -> Watch:
        """What counts the steps ahead, from a number of steps on."""
        rtol = None if self.control is None else self.control.rtol or self.control.atol
        return Watch(self.max_steps, rtol, position)

    def chunks(self, checkpoint: Path | None = None) -> Iterator[Chunk]:
        """The chunks, each made when it is needed."""
        common = None if checkpoint is None else self._fingerprint()
        for number, first in enumerate(range(0, self.n_paths, self.chunk_size)):
            size = min(self.chunk_size, self.n_paths - first)
            # One start for all is sent once to a worker, not once a path.
            one = len(self.start) == 1
            own = self.start if one else self.start[first : first + size].clone()
            begin = self.first_path + first
            chunk = Chunk(
                torch.arange(begin, begin + size, device=own.device), own.expand(size, -1).T
            )
            if checkpoint is not None and common is not None:
                parts = {"start": summary(own).cpu().numpy()}
                fingerprint = common.with_parts({"first path": begin}, parts)
                file = checkpoint / f"chunk-{number:06d}{SUFFIX}"
                chunk = replace(chunk, checkpoint=file, fingerprint=fingerprint)
            yield chunk

    # What is said of it.

    def config(self) -> dict[str, Any]:
        """What is run, as far as it can be written down."""
        config: dict[str, Any] = {
            "sde": repr(self.sde),
            "method": self.method,
            "scheme": self.scheme,
            "dt": self.grid.h * self.clock_unit,
            "seed": self.seed,
            "antithetic": self.antithetic,
        }
        if self.control is not None:
            config |= {"rtol": self.control.rtol, "atol": self.control.atol}
            smallest = self.grid.cell * 2.0**-self.control.deepest
            config["smallest_dt"] = smallest * self.clock_unit
        if isinstance(self.equation, ManifoldEquation) and self.equation.drift_columns:
            config["drift_columns"] = self.equation.drift_columns
        if isinstance(self.sde, FixedRatioDiffusion):
            config["ratio"] = self.sde.ratio
        if isinstance(self.sde, WeightDecaySDE):
            config["ratio"] = self.sde.weight_decay / self.sde.lr
        return config

    def _fingerprint(self) -> Fingerprint:
        """What a checkpoint has to agree in with the run that goes on from it."""
        start = self.start[0]
        probes = start.norm() * fixed_directions(len(start), _PROBES).to(start)
        with one_thread():
            found = {
                name: evaluate(f"the observable {name!r}", function, probes)[0]
                for name, function in (self.observables or {}).items()
            }
            said = {
                **self.config(),
                "geometry": route(self.equation),
                "paths": self.n_paths,
                "chunk size": self.chunk_size,
                "grid": asdict(self.grid),
                "step control": None if self.control is None else asdict(self.control),
                "observables": {name: list(value.shape) for name, value in found.items()},
                "compiled": self.compiled,
            }
            seen = {f"observables, {k}": summary(v).cpu().numpy() for k, v in found.items()}
            seen["times"] = np.array(self.times)
            return Fingerprint.of(self.sde.problem, start, said, seen)


def _direction_scheme(equation: StochasticEquation, tolerance: Tolerance | None) -> str:
    """The scheme that "split" takes for the direction."""
    if tolerance is not None:
        return "heun"
    return "walk" if _is_matrix_free(equation) else "weak2"


def _is_matrix_free(equation: StochasticEquation) -> bool:
    return isinstance(equation, ManifoldEquation) and equation.geometry.products is not None
