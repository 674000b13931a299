"""What one simulation of the direction answers: every ratio, every schedule, every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from manifold_sde.arguments import real
from manifold_sde.errors import ArgumentError, CheckpointError, ClockRangeError, DTypeError
from manifold_sde.noise import LabelNoise, SamplingNoise
from manifold_sde.noise.base import check_batch_size
from manifold_sde.paper import implements
from manifold_sde.problem import Problem
from manifold_sde.sdes import DirectionDiffusion
from manifold_sde.solvers.bookkeeping import GrowthBook, clock_at, log_time_at_zero_ratio
from manifold_sde.solvers.equilibrium import extent_over
from manifold_sde.solvers.fingerprint import PROBES, close, probe, route, values_near
from manifold_sde.solvers.lost_paths import warn_of_lost_paths
from manifold_sde.solvers.march import Grid, Origin
from manifold_sde.solvers.moments import Observable
from manifold_sde.solvers.plan import Plan
from manifold_sde.solvers.solution import Solution
from manifold_sde.solvers.step_control import StepControl
from manifold_sde.solvers.step_sizes import StepSizes, Terrain
from manifold_sde.threads import one_thread
from manifold_sde.time_scale import TimeScale

#: Pairs of a path and a moment that are taken up again together.
_AT_ONCE = 8192
_FIELDS = (
    "growth",
    "log_elapsed",
    "grid_ys",
    "grid_growth",
    "grid_log_elapsed",
    "grid_position",
    "grid_level",
)


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
        plan: How the paths were made; ``None`` after loading, until :meth:`attach`.
        origin: What a file says of it.
    """

    growth: Tensor = field(kw_only=True)
    log_elapsed: Tensor = field(kw_only=True)
    grid_ys: Tensor = field(kw_only=True)
    grid_growth: Tensor = field(kw_only=True)
    grid_log_elapsed: Tensor = field(kw_only=True)
    grid_position: Tensor = field(kw_only=True)
    grid_level: Tensor = field(kw_only=True)
    plan: Plan | None = field(kw_only=True, default=None)
    origin: dict[str, Any] = field(kw_only=True, default_factory=dict)

    @implements("Theorem 3.2")
    def at(
        self, *, ratio: float, times: Sequence[float] | Tensor, norm: float | Tensor = 1.0
    ) -> Solution:
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
        log_time = log_time_at_zero_ratio(elapsed, float(ratio))
        config = {"ratio": float(ratio)}
        return self._moments(elapsed, log_time, -float(ratio) * elapsed, norm, 1.0, config)

    @implements("Theorem 4.4")
    def at_steps(
        self,
        lr: Any,
        weight_decay: Any,
        steps: int | Sequence[int] | Tensor,
        norm: float | Tensor = 1.0,
        batch_size: int | None = None,
    ) -> Solution:
        """Paths with the law that the theory predicts for SGD's weights after these steps.

        Args:
            lr: Learning rate eta: a number, a sequence, a callable of the step, or a schedule.
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
            StepSizeWarning: If SGD would be unstable at these rates.

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
        log_time = np.asarray(scale.log_accumulated(whole), dtype=float)
        shrinkage = np.asarray(scale.log_shrinkage(whole), dtype=float)
        like = self.ys
        config: dict[str, Any] = {"lr": repr(scale.lr), "weight_decay": repr(scale.weight_decay)}
        if isinstance(scale.lr, float) and isinstance(scale.weight_decay, float):
            config["ratio"] = scale.weight_decay / scale.lr
        variance = self._variance_factor(batch_size)
        found = self._moments(
            counts,
            torch.from_numpy(log_time).to(like),
            torch.from_numpy(shrinkage).to(like),
            norm,
            variance,
            config,
        )
        sizes = self._step_sizes(scale, int(whole[-1]), norm, variance)
        if sizes is None:
            return found
        sizes.warn_if_unstable()
        return replace(found, stats={**found.stats, **sizes.stats()})

    def _step_sizes(
        self, scale: TimeScale, steps: int, norm: float | Tensor, variance: float
    ) -> StepSizes | None:
        """The steps of SGD from the smallest norm, on the manifold that the paths have seen."""
        seen = self.ys.reshape(-1, self.ys.shape[-1])
        seen = seen[torch.isfinite(seen).all(-1)]
        if steps == 0 or not len(seen):
            return None
        terrain = Terrain.of(cast("DirectionDiffusion", self._plan().sde), seen, variance)
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
        return self._plan().sde.problem

    def _plan(self) -> Plan:
        self._require_paths()
        if self.plan is None:
            raise ArgumentError(
                "the paths cannot be taken up again",
                received="a solution that was loaded from a file, which holds no functions",
                expected="a solution that knows its equation",
                remedy="solution.attach(sde), or DirectionSolution.load(path, sde=sde), with the "
                "equation that was solved",
            )
        return self.plan

    def _equilibrium_weights(self, burn_in: float | None) -> Tensor:
        """The fourth power of the norm, in units of 4 C times itself: e^a / E."""
        if real(burn_in) <= float(self.ts[0]):
            raise ArgumentError(
                "the start of the run does not count",
                received=f"burn_in={burn_in!r}",
                expected=f"a clock u after {float(self.ts[0]):g}, where the norm is forgotten",
                remedy="leave it out for half of the run",
            )
        weights = torch.exp(self.growth - self.log_elapsed)
        return torch.where(torch.isfinite(weights), weights, 0.0)

    def _extent(self, function: Observable) -> tuple[Tensor, Tensor] | None:
        """Range of a function over the manifold, where the geometry is at hand."""
        equation = None if self.plan is None else self.plan.sde
        if not isinstance(equation, DirectionDiffusion):
            return None
        return extent_over(equation.geometry, function, self.ys)

    # Files.

    def _arrays(self) -> dict[str, Tensor]:
        arrays = super()._arrays() | {name: getattr(self, name) for name in _FIELDS}
        if self.plan is not None:
            arrays |= probe(self.plan.sde.problem, self.ys)
        return arrays | {k: v for k, v in self.origin.items() if isinstance(v, Tensor)}

    def _header(self) -> dict[str, Any]:
        if self.plan is None:
            return {"plan": self.origin.get("plan")}
        plan = self.plan
        return {
            "plan": {
                "problem": repr(plan.sde.problem),
                "calculus": plan.sde.calculus,
                "geometry": route(plan.sde),
                "method": plan.method,
                "grid": asdict(plan.grid),
                "control": None if plan.control is None else asdict(plan.control),
                "seed": plan.seed,
                "antithetic": plan.antithetic,
                "compiled": plan.compiled,
                "times": list(plan.times),
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
                received=f"{path}: {solution!r}",
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
            name: tensors[name] for name in ("ts", "ys", "clock", *_FIELDS)
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
        stored = self.origin if self.plan is None else self._as_origin()
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
                "the solution was made with another geometry",
                received=route(equation),
                expected=f"{plan.get('geometry')}, with which it was solved",
                remedy="DirectionDiffusion(problem, geometry=Geometry(problem, METHOD)) as then",
            )
        return replace(
            self,
            plan=Plan(
                sde=equation,
                method=plan["method"],
                grid=Grid(**plan["grid"]),
                book=GrowthBook(),
                seed=plan["seed"],
                antithetic=plan["antithetic"],
                compiled=plan["compiled"],
                times=tuple(plan["times"]),
                control=None if plan["control"] is None else StepControl(**plan["control"]),
            ),
            origin={},
        )

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

    def _moments(
        self,
        ts: Tensor,
        log_time: Tensor,
        log_shrinkage: Tensor,
        norm: float | Tensor,
        variance: float,
        config: dict[str, Any],
    ) -> Solution:
        """The paths where E reaches values that differ from path to path.

        Args:
            ts: What the moments are called (K,).
            log_time: log t_0 of these moments (K,).
            log_shrinkage: log of what the norm at ratio 0 is multiplied by, (K,).
            norm: Norm at the start.
            variance: Factor before the covariance that was simulated.
            config: What was asked for.
        """
        single = self.ys.dim() == 2
        kept = self.ys[:, None] if single else self.ys
        n = kept.shape[1]
        log_norm = self._log_norm(norm, n)
        targets = log_time.to(kept)[:, None] + math.log(variance) - 4.0 * log_norm
        with one_thread():
            x, growth, clock = self._reach(targets, single)
        log_norms = log_norm + 0.25 * growth + log_shrinkage.to(kept)[:, None]
        ys = x * log_norms.exp()[..., None]
        if single:
            ys, clock = ys[:, 0], clock[:, 0]
        lost = int((~torch.isfinite(x[-1]).all(-1)).sum())
        warn_of_lost_paths(lost, n, self.config)
        return Solution(
            ts=ts,
            ys=ys,
            clock=clock,
            stats={**self.stats, "lost_paths": lost},
            config={**self.config, **config, "batch_factor": variance},
        )

    def _log_norm(self, norm: float | Tensor, n: int) -> Tensor:
        like = self.growth
        several = isinstance(norm, Tensor) and norm.dim() > 0
        value = norm.to(like) if several else like.new_tensor(real(norm))  # type: ignore[union-attr]
        if value.shape not in ((), (n,)) or not bool(((value > 0) & (value < math.inf)).all()):
            raise ArgumentError(
                "norm is not the norm of the weights at the start",
                received=repr(norm)[:80],
                expected=f"a positive number, or one for each of {n} paths",
                remedy="norm=float(x0.norm())",
            )
        return value.log().expand(n)

    @torch.no_grad()
    def _reach(self, targets: Tensor, single: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Directions (K, n, D), growth (K, n) and clock (K, n) at values (K, n) of log E."""
        states, growth, elapsed, position, level = (
            a[:, None] if single else a
            for a in (
                self.grid_ys,
                self.grid_growth,
                self.grid_log_elapsed,
                self.grid_position,
                self.grid_level,
            )
        )
        last = self.log_elapsed[:, None] if single else self.log_elapsed
        self._require_range(targets, last[-1])
        plan = self._plan()
        moments, n = targets.shape
        march = plan.march(torch.arange(n, device=states.device), states)
        x = states.new_full((moments * n, states.shape[-1]), torch.nan)
        sums = states.new_full((2, moments * n), torch.nan)
        time = torch.full((moments * n,), torch.nan, dtype=torch.float64, device=x.device)
        path = torch.arange(n, device=x.device).repeat(moments)
        wanted = targets.reshape(-1)
        before = (elapsed[:, None] <= targets[None]).sum(0).clamp(min=1).reshape(-1) - 1
        for start in range(0, moments * n, _AT_ONCE):
            part = slice(start, min(start + _AT_ONCE, moments * n))
            j, i = before[part], path[part]
            origin = Origin(
                states[j, i].T.contiguous(),
                torch.stack([growth[j, i], elapsed[j, i]]),
                position[j, i],
                level[j, i],
            )
            records = march.resume(i, origin, wanted[part])
            x[part], sums[:, part], time[part] = records.x.T, records.sums, records.time
        clock = (time - plan.grid.start).to(x.dtype)
        return (
            x.reshape(moments, n, -1),
            sums[0].reshape(moments, n),
            clock.reshape(moments, n),
        )

    def _require_range(self, targets: Tensor, last: Tensor) -> None:
        beyond = targets.max(0).values > last
        if not bool(beyond.any()):
            return
        growth = (self.growth if self.growth.dim() > 1 else self.growth[:, None])[-1][beyond]
        most, last = targets.max(0).values[beyond], last[beyond]
        clock = float(self.ts[-1] - self.ts[0])
        # At the mean trace of each path so far.
        missing = most - growth + torch.log1p(-torch.exp(last - most))
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
