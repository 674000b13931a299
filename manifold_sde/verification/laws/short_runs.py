"""Runs of SGD and of the diffusions over short times, from one start, for the limit theorems."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor

from manifold_sde.deadline import shared_property
from manifold_sde.errors import ArgumentError, LimitMapError
from manifold_sde.progress import Progress
from manifold_sde.sdes import (
    DirectionDiffusion,
    FixedRatioDiffusion,
    LimitingDiffusion,
    WeightDecaySDE,
)
from manifold_sde.verification.laws.engine import Runs
from manifold_sde.verification.laws.functionals import PathFunctional, path_functionals
from manifold_sde.verification.laws.regime import (
    MOMENTS,
    TOLERATED,
    Rates,
    Regime,
    Surroundings,
)

#: Paths of the first pilot run, which sees the manifold, and of the second, which sees effects.
_SCOUTS = 64
_PILOTS = 1024
#: Largest step of the diffusions, in units of V u.
_STEP = 0.2
#: Points whose limit map is computed together.
_AT_ONCE = 4096
#: Difference up to which a closed form of Phi is taken for that of the geometry.
_SAME = 1e-6
_FEWEST_RUNS = 64
#: Multiple of the budget's departure that is the largest to be declared.
_LARGEST = 16.0
#: Whole steps of SGD at a time that rounding puts just below them.
_ROUNDING = 1e-9


class ShortRuns(Runs):
    """Runs of SGD and of the diffusions from norm 1, at the rates of one regime.

    Runs are told apart by what they simulate and by the number of their seed.
    """

    def seed(self, use: int) -> int:
        """Seed of a run."""
        return ((self.subject.seed << 8) % 2**63) + use

    # Before drawing.

    @shared_property
    def around(self) -> Surroundings:
        """What SGD finds at points that a first pilot run reaches.

        Raises:
            NoiseError: If there is no diffusion.
        """
        self.require_diffusion()
        y = self.subject.start
        here = Surroundings.of(self.subject, y[None])
        clock = Regime.of(here, self.effort).clock
        seen = self._pilot([clock], _SCOUTS, 100).directions[-1]
        return Surroundings.of(self.subject, torch.cat([y[None], seen[:15]]))

    @cached_property
    def regime(self) -> Regime:
        """Step sizes, times and rates."""
        return Regime.of(self.around, self.effort)

    def _pilot(self, clocks: list[float], n: int, use: int) -> Any:
        sde = DirectionDiffusion(self.subject.problem, "stratonovich")
        trace = float(sde.problem.noise_trace(self.subject.start))
        dt = clocks[-1] / max(2, math.ceil(trace * clocks[-1] / _STEP))
        times = [0.0, *clocks]
        seed = self.seed(use)
        return self.subject.solve(
            sde, self.subject.start, times, n_paths=n, dt=dt, seed=seed, compile=False
        )

    @shared_property
    def pilot(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the pilot run sees.

        Directions at the moments (K, n, D), the same with the clock off by the departure, and off
        by what is tolerated of it; and the growth of 4 log |Y| at the last moment, right and off,
        (2, n).
        """
        trace = self.around.trace
        right = [math.log1p(2.0 * trace * t) / (2.0 * trace) for t in self.regime.elapsed]
        factors = (1.0, 1.0 + self.effort.departure, 1.0 + TOLERATED * self.effort.departure)
        clocks = sorted({f * u for f in factors for u in right})
        found = self._pilot(clocks, _PILOTS, 101)
        rows = [[1 + clocks.index(f * u) for u in right] for f in factors]
        growth = torch.stack([found.growth[rows[k][-1]] for k in (0, 1)])
        right_clock, off, slightly = (found.directions[r] for r in rows)
        return right_clock, off, slightly, growth

    @shared_property
    def functionals(self) -> tuple[PathFunctional, ...]:
        """What is compared."""
        right, wrong, _, growth = self.pilot
        return path_functionals(self.subject, right, wrong, growth)

    @cached_property
    def _of_direction(self) -> list[PathFunctional]:
        return [f for f in self.functionals if not f.of_norm]

    @cached_property
    def effect(self) -> float:
        """Effect of the departure on the functional that feels it most, in its deviations."""
        return max(f.effect / f.spread for f in self._of_direction)

    @property
    def _quantiles(self) -> float:
        """Standard errors by which the departure has to be beyond what is tolerated."""
        # The tests of a comparison are those of the functionals, and the energy distance.
        alpha = self.effort.false_alarm / (len(self.functionals) + 1)
        return float(stats.norm.isf(alpha / 2) + stats.norm.isf(self.effort.miss))

    def needed(self, shares: tuple[float, ...]) -> int:
        """Runs that find the departure, on the side whose mean varies most.

        Args:
            shares: Variances of the means of the two sides, in units of one functional's over n.
        """
        return min(
            math.ceil(
                (f.deviation(shares, 1.0) * self._quantiles / ((1.0 - TOLERATED) * f.effect)) ** 2
            )
            for f in self._of_direction
            if f.effect > 0.0
        )

    @cached_property
    def runs(self) -> int:
        """Number of independent runs of each simulation, even."""
        needed = self.needed((2.0, 2.0))
        return 2 * (max(_FEWEST_RUNS, min(self.effort.runs, needed)) // 2)

    def departure(self, shares: tuple[float, ...]) -> float:
        """The departure that these runs find: that of the budget, or a larger one.

        Raises:
            ArgumentError: If these runs find none.
        """
        if self.needed(shares) <= self.runs:
            return self.effort.departure
        found = min(self._multiple(f, shares) for f in self._of_direction if f.effect > 0.0)
        if found >= _LARGEST:
            raise ArgumentError(
                "the runs are too few to find anything",
                received=f"{self.runs} runs, of which a clock that is off by "
                f"{_LARGEST * self.effort.departure:.0%} is not found",
                expected=f"{self.needed(shares)} runs, for {self.effort.departure:.0%}",
                remedy="an effort with more runs",
            )
        return self.effort.departure * found

    def _multiple(self, functional: PathFunctional, shares: tuple[float, ...]) -> float:
        """How many times the budget's departure a functional shows to these runs."""

        def short(k: float) -> float:
            error = functional.deviation(shares, k) / math.sqrt(self.runs)
            return self._quantiles * error - (1.0 - TOLERATED) * k * functional.effect

        if short(_LARGEST) > 0.0:
            return _LARGEST
        return 1.0 if short(1.0) <= 0.0 else float(optimize.brentq(short, 1.0, _LARGEST))

    # Times.

    @property
    def general_times(self) -> tuple[float, ...]:
        """Times T of (13) at the moments."""
        return tuple(0.5 * math.log1p(2.0 * t) for t in self.regime.elapsed)

    def at_general_times(self, rates: Rates) -> Rates:
        """The rates with the step counts that the time scale says for these times."""
        scale = self.subject.time_scale(rates.lr, rates.weight_decay)
        counts = np.asarray(scale.steps(np.array(self.general_times) * (1.0 + _ROUNDING)))
        return Rates(rates.lr, rates.weight_decay, tuple(int(k) for k in counts))

    # Runs.

    def _once(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        return self.subject.once((self.effort, *key), make)

    def sgd(self, rates: Rates, use: int) -> Tensor:
        """Phi of the weights at the moments, (K, n, D), from norm 1."""
        weights = self._weights(rates, use)
        return self._once(("limit of sgd", rates, use), lambda: self.limits(weights))

    def sgd_norms(self, rates: Rates, use: int) -> Tensor:
        """Norms of the weights at the moments, (K, n)."""
        self.sgd(rates, use)  # they lead to the manifold
        return self._weights(rates, use).norm(dim=-1)

    def _weights(self, rates: Rates, use: int) -> Tensor:
        def make() -> Tensor:
            ys: Tensor = self.subject.run_sgd(
                self.subject.problem,
                self.subject.start,
                rates.lr,
                rates.weight_decay,
                list(rates.counts),
                n_paths=self.runs,
                seed=self.seed(use),
            ).ys
            return ys

        return self._once(("sgd", rates, use), make)

    def limits(self, x: Tensor) -> Tensor:
        """Phi of weights (..., D).

        Raises:
            ArgumentError: If some of them do not flow to the manifold.
        """
        flat = x.reshape(-1, x.shape[-1])
        lost = int((~torch.isfinite(flat).all(1)).sum())
        if not lost:
            parts = []
            try:
                with Progress(False, "", total=len(flat)) as bar:
                    for part in flat.split(_AT_ONCE):
                        parts.append(self._phi(part))
                        bar.update(len(part))
                found = torch.cat(parts)
                lost = int((~torch.isfinite(found).all(1)).sum())
            except LimitMapError as error:
                lost = len(flat) if error.failed is None else int(error.failed.sum())
        if lost:
            raise ArgumentError(
                "SGD leaves the neighbourhood of the manifold",
                received=f"{lost} of {len(flat)} weights without a limit of gradient flow, at "
                f"eta / |x|^2 up to {self.regime.coarseness * self.regime.step_size:.2g}",
                expected="weights from which gradient flow leads to the manifold",
                remedy="an effort with a smaller step_size",
            )
        return found.reshape(x.shape)

    @cached_property
    def _phi(self) -> Any:
        """The geometry's limit map, or the closed form that the problem knows, if they agree."""
        geometry, facts = self.subject.geometry, self.subject.problem.facts
        closed = None if facts is None else facts.limit_map
        if closed is None:
            return geometry.limit_map
        x = self.subject.start + 0.05 * self.subject.normals(102, 16, self.subject.problem.dim)
        same = float((closed(x) - self.subject.limits(x)).abs().max()) <= _SAME
        return closed if same else geometry.limit_map

    def diffusion(self, sde: FixedRatioDiffusion, times: tuple[float, ...], use: int) -> Tensor:
        """States of (8) or (13), solved in its own time, (K, n, D)."""

        def make() -> Tensor:
            # du = dt / |Y|^4, and the norm is smallest at one of the two ends.
            trace, end = self.around.trace, times[-1]
            last = math.exp(-4.0 * sde.ratio * end) * (1.0 + 2.0 * trace * self.regime.elapsed[-1])
            steps = MOMENTS * math.ceil(end * trace / (MOMENTS * _STEP * min(1.0, last)))
            return self._solved(sde, times, "weak2", end / steps, use)

        return self._once((type(sde).__name__, sde.ratio, times, use), make)

    def at_ratio(self, ratio: float, times: tuple[float, ...], use: int) -> Tensor:
        """States of (8), (K, n, D)."""
        sde = FixedRatioDiffusion(self.subject.problem, ratio, "stratonovich")
        return self.diffusion(sde, times, use)

    def limiting(self) -> Tensor:
        """States of (13) at the moments, (K, n, D)."""
        sde = LimitingDiffusion(self.subject.problem, "stratonovich")
        return self.diffusion(sde, self.general_times, 115)

    def continuous(self, rates: Rates, times: tuple[float, ...], use: int) -> Tensor:
        """Phi of the states of the SDE (3) at times in steps, (K, n, D)."""
        sde = WeightDecaySDE(self.subject.problem, rates.lr, rates.weight_decay)
        return self._once(
            ("continuous", rates, times, use),
            lambda: self.limits(self._solved(sde, times, "euler", 0.5, use)),
        )

    def _solved(
        self, sde: Any, times: tuple[float, ...], method: str, dt: float, use: int
    ) -> Tensor:
        ys: Tensor = self.subject.solve(
            sde,
            self.subject.start,
            [0.0, *times],
            n_paths=self.runs,
            method=method,
            dt=dt,
            seed=self.seed(use),
            compile=False,
        ).ys
        return ys[1:]
