"""What one simulation of the direction answers: every ratio, every schedule, every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from manifold_sde.arguments import real
from manifold_sde.errors import ArgumentError, CheckpointError, ClockRangeError, DTypeError
from manifold_sde.noise import LabelNoise, SamplingNoise
from manifold_sde.noise.base import check_batch_size
from manifold_sde.number_arrays import Numbers, as_float64
from manifold_sde.paper import implements
from manifold_sde.problem import Problem
from manifold_sde.sdes import DirectionDiffusion
from manifold_sde.solvers.adaptive import StepControl
from manifold_sde.solvers.chunk import Chunk, ChunkResult
from manifold_sde.solvers.clock import ReadOff, clock_at, equilibrium_weights, log_missing
from manifold_sde.solvers.equilibrium import extent_over
from manifold_sde.solvers.exports import headline
from manifold_sde.solvers.fingerprint import PROBES, close, probe, route, values_near
from manifold_sde.solvers.fixed import Grid, RestartState
from manifold_sde.solvers.integrate import integrate
from manifold_sde.solvers.lost_paths import warn_of_lost_paths
from manifold_sde.solvers.moments import Observable
from manifold_sde.solvers.simulation import Simulation
from manifold_sde.solvers.solution import Solution
from manifold_sde.solvers.step_sizes import StepSizes, Terrain
from manifold_sde.time_scale import TimeScale

#: Pairs of a path and a moment that are taken up again together.
_AT_ONCE = 8192
#: Marks the tensors with a value for each path and time kept, which a file holds by their names.
_OF_PATHS = {"of paths": True}


@dataclass(frozen=True, repr=False)
class DirectionSolution(Solution):
    r"""Paths of the direction diffusion, with what turns them into all the others.

    Attributes:
        growth: a = 2 \int V du at the times kept, the shape of ``clock``.
        log_elapsed: log E at the times kept, E = \int e^a du: the path of (8) at ratio 0 that
            starts at norm 1 is here at time E.
        grid_ys: States at the grid points before the times kept, from which the paths are taken
            up again.
        grid_growth, grid_log_elapsed: The sums there.
        grid_position, grid_level: The numbers of these grid points, and the levels of the steps
            that follow.
        simulation: How the paths were made; ``None`` after loading, until :meth:`attach`.
        origin: What a file says of it.
    """

    growth: Tensor = field(kw_only=True, metadata=_OF_PATHS)
    log_elapsed: Tensor = field(kw_only=True, metadata=_OF_PATHS)
    grid_ys: Tensor = field(kw_only=True, metadata=_OF_PATHS)
    grid_growth: Tensor = field(kw_only=True, metadata=_OF_PATHS)
    grid_log_elapsed: Tensor = field(kw_only=True, metadata=_OF_PATHS)
    grid_position: Tensor = field(kw_only=True, metadata=_OF_PATHS)
    grid_level: Tensor = field(kw_only=True, metadata=_OF_PATHS)
    simulation: Simulation | None = field(kw_only=True, default=None)
    origin: dict[str, Any] = field(kw_only=True, default_factory=dict)

    @classmethod
    def of(
        cls,
        simulation: Simulation,
        result: ChunkResult,
        arguments: dict[str, Any],
        *,
        batched: bool,
    ) -> DirectionSolution:
        """The solution that holds the result of a simulation.

        Args:
            simulation: The simulation, of a :class:`DirectionDiffusion`.
            result: The result of all its chunks.
            arguments: The attributes of a :class:`Solution`.
            batched: Whether there is a dimension of paths.
        """
        restart = result.restart
        own: dict[str, Any] = {
            "growth": result.sums[:, 0],
            "log_elapsed": result.sums[:, 1],
            "grid_ys": restart.x.movedim(1, -1),
            "grid_growth": restart.sums[:, 0],
            "grid_log_elapsed": restart.sums[:, 1],
            "grid_position": restart.position,
            "grid_level": restart.level,
        }
        own = {k: (v if batched else v[:, 0]).contiguous() for k, v in own.items()}
        return cls(**arguments, **own, simulation=simulation)

    @implements("Theorem 3.2")
    def at(self, *, ratio: float, times: Sequence[float] | Tensor, norm: Numbers = 1.0) -> Solution:
        """The same paths as solutions of (8) at a ratio, in its own time; (13) is ratio 1/2.

        Nothing is interpolated: the clock u at these times differs from path to path, and each
        path is stepped again, on the same Brownian path, from the last state kept before.

        Args:
            ratio: C = lambda / eta, not negative.
            times: Times t = eta^2 k of (8), T of (13), increasing from 0 on, (K,).
            norm: Norm of Y(0), one number or one a path.

        Returns:
            Solution at these times.

        Raises:
            ClockRangeError: If a path was not simulated that far, with the clock that is needed.
            ArgumentError: If an argument is out of range.

        Source: Theorem 3.2 and the time change u, path by path.
        """
        elapsed = self._times(times)
        if not 0 <= real(ratio) < 1e12:
            raise ArgumentError(
                "ratio cannot be used",
                received=repr(ratio),
                expected="a finite number, 0 or more: C = weight_decay / lr",
                remedy="ratio=0.5 is the limiting diffusion (13)",
            )
        ratio = float(ratio)
        read_off = ReadOff.at_ratio(self._norms(norm), elapsed, ratio)
        return self._moments(elapsed, read_off, {"ratio": ratio, "batch_factor": 1.0})

    @implements("Theorem 4.4")
    def at_steps(
        self,
        lr: Any,
        weight_decay: Any,
        steps: int | Sequence[int] | Tensor,
        norm: Numbers = 1.0,
        batch_size: int | None = None,
    ) -> Solution:
        """Paths with the law that the theory predicts for SGD's weights after these steps.

        Args:
            lr: Learning rate eta: a number, a sequence, callable of the step or scheduler of torch.
            weight_decay: Weight decay lambda, likewise.
            steps: Step counts, increasing.
            norm: Norm of the weights at step 0, one number or one a path.
            batch_size: Samples of a step; by default that of the problem's noise. The noise of
                (18) counts as that of one sample.

        Returns:
            Solution whose ``ts`` are the steps; of SGD, ``.limit(Geometry(problem))`` has this law.
            Its ``stats`` say how small the steps are, for the norm that the mean trace gives:
            ``step_size``, the largest eta / |x|^2 on the way, ``last_step_size``, and for constant
            rates ``equilibrium_step_size``; ``stability``, the largest times lambda_max(H), to be
            below 2 and small for a good prediction; and ``off_manifold``, SGD's distance from the
            manifold over its norm. How much a finite learning rate changes an expectation says
            :func:`~manifold_sde.solvers.finite_lr_error`.

        Warns:
            StepSizeWarning: If SGD would be unstable, or far from the manifold, at these rates.

        Raises:
            ClockRangeError: If a path was not simulated that far, with the clock that is needed.
            TimeScaleError: If the rates cannot be used.
            ArgumentError: If another argument is out of range.

        Source: Theorem 4.4, with schedules by the exact reduction to no weight decay.
        """
        counts = self._times([steps] if isinstance(steps, int) else steps)
        if bool((counts != counts.round()).any()):
            raise ArgumentError(
                "these are not step counts",
                received=repr(steps)[:80],
                expected="whole numbers, 0 or more, increasing",
                remedy="steps=[1000, 2000]",
            )
        scale = TimeScale(lr, weight_decay)
        whole = counts.to(torch.int64).numpy()
        log_time, shrinkage = (
            torch.from_numpy(np.asarray(values, dtype=float))
            for values in (scale.log_accumulated(whole), scale.log_shrinkage(whole))
        )
        config: dict[str, Any] = {"lr": repr(scale.lr), "weight_decay": repr(scale.weight_decay)}
        if isinstance(scale.lr, float) and isinstance(scale.weight_decay, float):
            config["ratio"] = scale.weight_decay / scale.lr
        variance = self._variance_factor(batch_size)
        log_time = log_time.to(self.ys) + math.log(variance)
        read_off = ReadOff(self._norms(norm), log_time, shrinkage)
        found = self._moments(counts, read_off, {**config, "batch_factor": variance})
        sizes = self._step_sizes(scale, int(whole[-1]), norm, variance)
        if sizes is None:
            return found
        sizes.warn_if_unstable()
        return replace(found, stats={**found.stats, **sizes.stats()})

    def _step_sizes(
        self, scale: TimeScale, steps: int, norm: Numbers, variance: float
    ) -> StepSizes | None:
        """The steps of SGD from the smallest norm, on the manifold that the paths have seen."""
        seen = self.ys.reshape(-1, self.ys.shape[-1])
        seen = seen[torch.isfinite(seen).all(-1)]
        if steps == 0 or not len(seen):
            return None
        terrain = Terrain.of(cast("DirectionDiffusion", self._known().equation), seen, variance)
        return StepSizes.of(scale, steps, float(torch.as_tensor(norm).min()), terrain)

    def _times(self, times: Any) -> Tensor:
        try:
            values = torch.as_tensor(times, dtype=torch.float64).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            values = torch.tensor([math.nan])
        good = (values >= 0) & (values < math.inf)
        good[1:] &= values.diff() > 0
        if not len(values) or not bool(good.all()):
            raise ArgumentError(
                "these are not moments of a path",
                received=repr(times)[:80],
                expected="increasing numbers, 0 or more",
                remedy="times=[0.5, 1.0], steps=[1000, 2000]",
            )
        return values.to(self.ys.device)

    def _variance_factor(self, batch_size: int | None) -> float:
        """The covariance at a batch size, over the one that was simulated."""
        if batch_size is None:
            return 1.0
        batch_size = check_batch_size(batch_size)
        problem = self._problem()
        noise, n = problem.noise, problem.n_samples
        if isinstance(noise, SamplingNoise):
            assert n is not None
            other = SamplingNoise(batch_size, replacement=noise.replacement)
            other.validate(problem.pointwise)
            return other.variance_factor(n) / noise.variance_factor(n)
        if isinstance(noise, LabelNoise):
            return noise.batch_size / batch_size
        return 1.0 / batch_size

    def _problem(self) -> Problem:
        return self._known().sde.problem

    def _known(self) -> Simulation:
        self._require_paths()
        if self.simulation is None:
            raise ArgumentError(
                "the paths cannot be taken up again",
                received="a solution that was loaded from a file, which holds no functions",
                expected="a solution that knows its equation",
                remedy="solution.attach(sde), or DirectionSolution.load(path, sde=sde), with the "
                "equation that was solved",
            )
        return self.simulation

    def _equilibrium_weights(self, burn_in: float | None) -> Tensor:
        """The fourth power of the norm, in units of 4 C times itself."""
        if real(burn_in) <= float(self.ts[0]):
            raise ArgumentError(
                "the start of the run does not count",
                received=f"burn_in={burn_in!r}",
                expected=f"a clock u after {float(self.ts[0]):g}, where the norm is forgotten",
                remedy="leave it out for half of the run",
            )
        return equilibrium_weights(self.growth, self.log_elapsed)

    def _extent(self, function: Observable) -> tuple[Tensor, Tensor] | None:
        """Range of a function over the manifold, where the geometry is at hand."""
        run = self.simulation
        equation = None if run is None else cast("DirectionDiffusion", run.equation)
        if equation is None or equation.group_sizes:  # their shares of the norm go from 0 to 1
            return None
        return extent_over(equation.geometry, function, self.ys)

    # Files.

    def _of_paths(self) -> dict[str, Tensor]:
        """The tensors of :class:`DirectionSolution` with a value for each path and time."""
        return {name: getattr(self, name) for name in _names()}

    def _arrays(self) -> dict[str, Tensor]:
        arrays = super()._arrays() | self._of_paths()
        if self.simulation is not None:
            arrays |= probe(self.simulation.sde.problem, self.ys)
        return arrays | {k: v for k, v in self.origin.items() if isinstance(v, Tensor)}

    def _header(self) -> dict[str, Any]:
        run = self.simulation
        if run is None:
            return {"plan": self.origin.get("plan")}
        return {
            "plan": {
                "problem": repr(run.sde.problem),
                "calculus": run.equation.calculus,
                "geometry": route(run.equation),
                "method": run.scheme,
                "grid": asdict(run.grid),
                "control": None if run.control is None else asdict(run.control),
                "seed": run.seed,
                "antithetic": run.antithetic,
                "compiled": run.compiled,
                "times": list(run.times),
            }
        }

    @classmethod
    def load(cls, path: str | Path, sde: DirectionDiffusion | None = None) -> DirectionSolution:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.
            sde: The equation that was solved, which :meth:`at` and :meth:`at_steps` need.

        Raises:
            CheckpointError: If the file is missing, corrupted, or holds something else, or the
                equation is another one.
        """
        solution = Solution.load(path)
        if not isinstance(solution, DirectionSolution):
            raise CheckpointError(
                "the file holds something else",
                received=f"{path}: {headline(solution)}",
                expected="a solution of a DirectionDiffusion",
                remedy="Solution.load(path)",
            )
        return solution if sde is None else solution.attach(sde)

    @classmethod
    def _restored(
        cls, header: dict[str, Any], tensors: dict[str, Tensor], common: dict[str, Any]
    ) -> DirectionSolution:
        origin = {name: tensors[name] for name in PROBES}
        arguments: dict[str, Any] = {
            name: tensors[name] for name in ("ts", "ys", "clock", *_names())
        }
        return cls(**arguments, **common, origin={"plan": header["plan"], **origin})

    def attach(self, sde: DirectionDiffusion) -> DirectionSolution:
        """The solution with its equation, so that its paths can be taken up again.

        Args:
            sde: The equation that was solved, in either form.

        Raises:
            CheckpointError: If it is not the equation that was solved.
        """
        if not isinstance(sde, DirectionDiffusion):
            raise DTypeError(
                "the equation is not the one that was solved",
                received=type(sde).__name__,
                expected="a DirectionDiffusion",
                remedy="DirectionDiffusion(problem)",
            )
        self._require_paths()
        stored = self.origin if self.simulation is None else self._as_origin()
        plan, problem = stored["plan"], sde.problem
        fits = repr(problem) == plan["problem"]
        if fits:
            mine = values_near(problem, stored["probe"])
            fits = all(close(value, stored[f"probe_{name}"]) for name, value in mine.items())
        if not fits:
            raise CheckpointError(
                "the solution belongs to another equation",
                received=f"{problem!r}",
                expected=f"{plan['problem']}, with the same gradient and noise",
                remedy="make the problem with the parameters and the seed of that time",
            )
        equation = sde.with_calculus(plan["calculus"])
        first = self.ys[0].reshape(-1, self.ys.shape[-1])[:1]
        equation.require_on_manifold(first)
        if route(equation) != plan.get("geometry"):
            raise CheckpointError(
                "the solution was made with another geometry, or in another clock",
                received=route(equation),
                expected=f"{plan.get('geometry')}, with which it was solved",
                remedy="the same equation, with geometry=Geometry(problem, METHOD) as then",
            )
        simulation = Simulation(
            sde=equation,
            equation=equation,
            method=plan["method"],
            scheme=plan["method"],
            start=first,
            n_paths=1 if self.ys.dim() == 2 else self.ys.shape[1],
            times=tuple(plan["times"]),
            grid=Grid(**plan["grid"]),
            control=None if plan["control"] is None else StepControl(**plan["control"]),
            seed=plan["seed"],
            antithetic=plan["antithetic"],
            compiled=plan["compiled"],
        )
        return replace(self, simulation=simulation, origin={})

    def _as_origin(self) -> dict[str, Any]:
        return {**self._header(), **probe(self._problem(), self.ys)}

    def _variables(self) -> dict[str, tuple[tuple[str, ...], Tensor]]:
        variables = super()._variables()
        dims = variables["clock"][0]
        if self.observed:
            return variables
        return variables | {
            "growth": (dims, self.growth),
            "log_elapsed": (dims, self.log_elapsed),
            "grid_state": ((*dims, "component"), self.grid_ys),
            "grid_growth": (dims, self.grid_growth),
            "grid_log_elapsed": (dims, self.grid_log_elapsed),
        }

    def _moments(self, ts: Tensor, read_off: ReadOff, config: dict[str, Any]) -> Solution:
        """The paths where E reaches values that differ from path to path.

        Args:
            ts: What the K moments are called.
            read_off: The moments.
            config: The arguments of the run.
        """
        single = self.ys.dim() == 2
        read_off = read_off.to(self.ys)
        x, growth, clock = self._reach(read_off.log_elapsed, single)
        ys = x * (read_off.norms(growth) / self._known().equation.gauge(x))[..., None]
        if single:
            ys, clock = ys[:, 0], clock[:, 0]
        lost, n = int((~torch.isfinite(x[-1]).all(-1)).sum()), x.shape[1]
        warn_of_lost_paths(lost, n, self.config)
        return Solution(
            ts=ts,
            ys=ys,
            clock=clock,
            stats={**self.stats, "lost_paths": lost},
            config={**self.config, **config},
        )

    def _norms(self, norm: Numbers) -> Tensor:
        """Norms of the paths at the start (n,)."""
        like, n = self.growth, 1 if self.ys.dim() == 2 else self.ys.shape[1]
        if isinstance(norm, (Tensor, np.ndarray, list, tuple)):
            value = torch.from_numpy(as_float64("norm", norm).copy()).to(like)
        else:
            value = like.new_tensor(real(norm))
        if value.shape not in ((), (n,)) or not bool(((value > 0) & (value < math.inf)).all()):
            raise ArgumentError(
                "norm is not the norm of the weights at the start",
                received=repr(norm)[:80],
                expected=f"a positive number, or one for each of {n} paths",
                remedy="norm=float(x0.norm())",
            )
        return value.expand(n) * self._known().equation.gauge(self.ys[0].reshape(n, -1))

    def _reach(self, targets: Tensor, single: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Directions (K, n, D), growth (K, n) and clock (K, n) at values (K, n) of log E."""
        kept = {k: v[:, None] if single else v for k, v in self._of_paths().items()}
        self._require_range(targets, kept["log_elapsed"][-1])
        simulation = self._known()
        moments, n = targets.shape
        elapsed, wanted = kept["grid_log_elapsed"], targets.reshape(-1)
        path = torch.arange(n, device=targets.device).repeat(moments)
        before = (elapsed[:, None] <= targets[None]).sum(0).clamp(min=1).reshape(-1) - 1
        parts = []
        for i, j, log_elapsed in zip(
            *(values.split(_AT_ONCE) for values in (path, before, wanted)), strict=True
        ):
            restart = RestartState(
                kept["grid_ys"][j, i].T.contiguous(),
                torch.stack([kept["grid_growth"][j, i], elapsed[j, i]]),
                kept["grid_position"][j, i],
                kept["grid_level"][j, i],
            )
            chunk = Chunk(i, restart.x, restart=restart, log_elapsed=log_elapsed)
            parts.append(integrate(simulation, chunk))
        x = torch.cat([part.x[0].T for part in parts])
        growth = torch.cat([part.sums[0, 0] for part in parts])
        clock = (torch.cat([part.time[0] for part in parts]) - simulation.grid.start).to(x.dtype)
        return x.reshape(moments, n, -1), growth.reshape(moments, n), clock.reshape(moments, n)

    def _require_range(self, targets: Tensor, last: Tensor) -> None:
        beyond = targets.max(0).values > last
        if not bool(beyond.any()):
            return
        growth = (self.growth if self.growth.dim() > 1 else self.growth[:, None])[-1][beyond]
        most, last = targets.max(0).values[beyond], last[beyond]
        clock = float(self.ts[-1] - self.ts[0])
        # At the mean trace of each path so far.
        missing = log_missing(last, growth, most)
        needed = 1.1 * (clock + float(clock_at(missing, growth / (2.0 * clock)).max()))
        raise ClockRangeError(
            "the paths were not simulated that far",
            received=f"a clock u up to {clock:.6g}; {int(beyond.sum())} of {len(beyond)} paths "
            "need more",
            expected=f"about u = {needed:.4g}",
            remedy=f"solve(sde, y0, [0.0, ..., {needed:.4g}], ...): the paths go on as they "
            "began, with the same seed and step",
            needed=needed,
        )


def _names() -> tuple[str, ...]:
    """The names of the tensors that a direction has for each path and time."""
    return tuple(f.name for f in fields(DirectionSolution) if "of paths" in f.metadata)
