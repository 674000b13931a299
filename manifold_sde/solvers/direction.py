"""What one simulation of the direction answers: every ratio, every schedule, every time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde.errors import ArgumentError, ClockRangeError
from manifold_sde.noise import LabelNoise, SamplingNoise
from manifold_sde.paper import implements
from manifold_sde.problem import Problem
from manifold_sde.solvers.bookkeeping import log_time_at_zero_ratio
from manifold_sde.solvers.chunk import Task
from manifold_sde.solvers.solution import Solution
from manifold_sde.time_scale import TimeScale

#: Pairs of a path and a moment that are taken up again together.
_AT_ONCE = 8192


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
        task: How the paths were made.
    """

    growth: Tensor = field(kw_only=True)
    log_elapsed: Tensor = field(kw_only=True)
    grid_ys: Tensor = field(kw_only=True)
    grid_growth: Tensor = field(kw_only=True)
    grid_log_elapsed: Tensor = field(kw_only=True)
    task: Task | None = field(kw_only=True, default=None)

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
        if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 <= ratio < 1e12:
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
            Solution whose ``ts`` are the steps.

        Raises:
            ClockRangeError: If a path was not simulated that far, with the clock that is needed.
            TimeScaleError: If the rates cannot be used.
            ArgumentError: If another argument is out of range.

        Source: Theorem 4.4, with schedules by the exact reduction to no weight decay.
        """
        counts = self._times([steps] if isinstance(steps, int) else steps)
        scale = TimeScale(lr, weight_decay)
        whole = counts.to(torch.int64).numpy()
        log_time = np.asarray(scale.log_accumulated(whole), dtype=float)
        shrinkage = np.asarray(scale.log_shrinkage(whole), dtype=float)
        like = self.ys
        config = {"lr": repr(scale.lr), "weight_decay": repr(scale.weight_decay)}
        return self._moments(
            counts,
            torch.from_numpy(log_time).to(like),
            torch.from_numpy(shrinkage).to(like),
            norm,
            self._variance_factor(batch_size),
            config,
        )

    def _times(self, times: Any) -> Tensor:
        try:
            values = torch.as_tensor(times, dtype=torch.float64).reshape(-1)
        except (TypeError, ValueError, RuntimeError):
            values = torch.tensor([math.nan])
        if not bool((values >= 0).all()) or not bool((values.diff() > 0).all()) or not len(values):
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
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ArgumentError(
                "batch_size is not a mini-batch size",
                received=repr(batch_size),
                expected="a positive integer",
                remedy="leave it out for the batch size of the problem's noise",
            )
        problem = self._problem()
        noise = problem.noise
        if isinstance(noise, SamplingNoise):
            assert problem.n_samples is not None
            other = SamplingNoise(batch_size, replacement=noise.replacement)
            other.bind(problem.pointwise)
            n = problem.n_samples
            return other.variance_factor(n) / noise.variance_factor(n)
        if isinstance(noise, LabelNoise):
            return noise.batch_size / batch_size
        return 1.0 / batch_size

    def _problem(self) -> Problem:
        return self._task().sde.problem

    def _task(self) -> Task:
        if self.task is None:
            raise ArgumentError(
                "the paths cannot be taken up again",
                received="a solution that was loaded from a file, which holds no functions",
                expected="a solution that knows its equation",
                remedy="solve again with the same arguments: the paths will be the same",
            )
        return self.task

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
        x, growth, clock = self._reach(targets, single)
        log_norms = log_norm + 0.25 * growth + log_shrinkage.to(kept)[:, None]
        ys = x * log_norms.exp()[..., None]
        if single:
            ys, clock = ys[:, 0], clock[:, 0]
        lost = int((~torch.isfinite(x[-1]).all(-1)).sum())
        return Solution(
            ts=ts,
            ys=ys,
            clock=clock,
            stats={**self.stats, "lost_paths": lost},
            config={**self.config, **config, "batch_factor": variance},
        )

    def _log_norm(self, norm: float | Tensor, n: int) -> Tensor:
        like = self.growth
        value = torch.as_tensor(norm, dtype=like.dtype, device=like.device)
        if value.shape not in ((), (n,)) or not bool((value > 0).all()):
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
        states, growth, elapsed = (
            a[:, None] if single else a
            for a in (self.grid_ys, self.grid_growth, self.grid_log_elapsed)
        )
        last = self.log_elapsed[:, None] if single else self.log_elapsed
        self._require_range(targets, last[-1])
        task = self._task()
        march = task.march()
        grid_points = torch.tensor(
            [int((t - task.grid.start) / task.grid.h + 1e-9) for t in self.ts.tolist()],
            device=states.device,
        )
        moments, n = targets.shape
        x = states.new_full((moments * n, states.shape[-1]), torch.nan)
        sums = states.new_full((2, moments * n), torch.nan)
        time = torch.full((moments * n,), torch.nan, dtype=torch.float64, device=x.device)
        path = torch.arange(n, device=x.device).repeat(moments)
        wanted = targets.reshape(-1)
        before = (elapsed[:, None] <= targets[None]).sum(0).clamp(min=1).reshape(-1) - 1
        for start in range(0, moments * n, _AT_ONCE):
            part = slice(start, min(start + _AT_ONCE, moments * n))
            j, i = before[part], path[part]
            records = march.resume(
                i + task.first,
                states[j, i].T.contiguous(),
                torch.stack([growth[j, i], elapsed[j, i]]),
                grid_points[j],
                wanted[part],
            )
            x[part], sums[:, part], time[part] = records.x.T, records.sums, records.time
        clock = (time - task.grid.start).to(x.dtype)
        return (
            x.reshape(moments, n, -1),
            sums[0].reshape(moments, n),
            clock.reshape(moments, n),
        )

    def _require_range(self, targets: Tensor, last: Tensor) -> None:
        beyond = targets.max(0).values > last
        if not bool(beyond.any()):
            return
        growth = self.growth if self.growth.dim() > 1 else self.growth[:, None]
        clock = float(self.ts[-1] - self.ts[0])
        rate = growth[-1] / clock
        missing = torch.exp(targets.max(0).values - growth[-1]) - torch.exp(last - growth[-1])
        needed = clock + float((torch.log1p(rate * missing) / rate)[beyond].max())
        raise ClockRangeError(
            "the paths were not simulated that far",
            received=f"a clock u up to {clock:.6g}; {int(beyond.sum())} of {len(beyond)} paths "
            "need more",
            expected=f"about u = {1.1 * needed:.4g}",
            remedy=f"solve(sde, y0, [0.0, ..., {1.1 * needed:.4g}], ...): the paths go on as they "
            "began, with the same seed and step",
        )
