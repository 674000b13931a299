"""The simulations that the checks of ergodicity share: made once for a subject and an effort."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifold_sde.deadline import expecting, shared_property
from manifold_sde.degeneracy import Degeneracy
from manifold_sde.errors import ClockRangeError, LostPathsWarning, NoiseError, NotOnManifoldError
from manifold_sde.sdes import DirectionDiffusion, LimitingDiffusion
from manifold_sde.solvers import Solution
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.ergodicity.functionals import Functionals
from manifold_sde.verification.ergodicity.relaxation import (
    ExactLaw,
    Relaxation,
    exact_law,
    exact_relaxation,
    slowest_time,
)
from manifold_sde.verification.ergodicity.starts import far_apart
from manifold_sde.verification.subject import Subject
from manifold_sde.verification.two_sample import runs_for_mean

Array = NDArray[np.float64]

#: Starts, and the fourth powers of their norms in units of V there.
STARTS = 3
_NORMS = (1.0, 4.0, 0.25)
#: The influence of the start is to be below this part of the departure that is to be found.
_FORGOTTEN = 0.1
#: Length of the chains in relaxation times; the first of them do not count.
CHAIN = 10.0
BURN_IN = 3.0
#: Steps in a relaxation time at a departure of 1/4; the error of "weak2" is of second order.
_STEPS = 4.0
#: Times that are kept on the way to the equilibrium.
_KEPT = 8
#: Most steps of the chains, by departure: so many / departure.
_BUDGET = 250.0
#: Steps that show whether they are too large for the curvature.
_BEGINNING = 4.0
_SEEDS = {"ends": 1, "chains": 2, "sgd": 3, "early": 4}


@dataclass(frozen=True, eq=False)
class ErgodicRuns:
    """Simulations of a subject towards its equilibrium.

    Attributes:
        subject: The subject.
        effort: The effort.
        horizon: Relaxation times that the runs take; ``None`` for what the effort asks for.
    """

    subject: Subject
    effort: Effort
    horizon: float | None = None

    @classmethod
    def of(cls, subject: Subject, effort: Effort) -> ErgodicRuns:
        """Those of the subject, made once."""
        return subject.once((cls, effort), lambda: cls(subject, effort))

    # What is known before.

    @shared_property
    def degeneracy(self) -> Degeneracy:
        """Where the noise does not reach."""
        return Degeneracy.of(self.subject.problem, self.subject.start)

    @property
    def is_regular(self) -> bool:
        """Whether there is a diffusion, and one group of weights."""
        return self.degeneracy.noise_rank > 0 and len(self.degeneracy.groups) == 1

    @cached_property
    def functionals(self) -> Functionals:
        """What is compared."""
        return Functionals.of(self.subject)

    @cached_property
    def traces(self) -> Tensor:
        """V at points of Gamma_1, (n,)."""
        return self.subject.problem.noise_trace(self.subject.manifold_points(128))

    @property
    def trace_is_constant(self) -> bool:
        """Whether V does not vary on Gamma_1."""
        return float(self.traces.max() / self.traces.min()) - 1.0 <= 1e-9

    @shared_property
    def law(self) -> ExactLaw | None:
        """The exact law, if there is one."""
        return exact_law(self.subject)

    @property
    def effect(self) -> float:
        """Shift of a mean that is to be found, in standard deviations.

        Laws at the total variation distance d differ in the mean of some function by 2 d standard
        deviations or more.
        """
        return 2.0 * self.effort.departure

    def runs(self, tests: int, samples: float = 2.0) -> int:
        """Independent runs in a sample, for so many tests of means, by Holm's correction."""
        level = self.effort.false_alarm / tests
        one = runs_for_mean(self.effect, level, self.effort.miss, 1)
        return math.ceil(samples * one)

    @cached_property
    def relaxation(self) -> Relaxation:
        """The relaxation time: from the exact law, or else from the chains."""
        return self._known or self._chains[1]

    @cached_property
    def _known(self) -> Relaxation | None:
        """The relaxation time of the exact law."""
        if self.law is None:
            return None
        return exact_relaxation(self.law, float(self.traces.mean()))

    @property
    def relaxations(self) -> float:
        """Relaxation times after which the influence of the start is below what is to be found."""
        if self.horizon is not None:
            return self.horizon
        return math.log(2.0 * math.sqrt(2.0) / (_FORGOTTEN * self.effect))

    @property
    def end(self) -> float:
        """The time T of (13) at which the runs end."""
        return self.relaxations * self.relaxation.time

    @shared_property
    def starts(self) -> Tensor:
        """Unit vectors that are far apart, (STARTS, D)."""
        return far_apart(self.subject, STARTS)

    @shared_property
    def local_step(self) -> float:
        """Clock in which the noise moves the direction by half a radian where it is largest.

        Half of it where the trace varies: the direction then comes upon larger noise in a step.
        """
        points = self.subject.manifold_points(64)
        factor = self.subject.problem.noise_factor(points)
        along = [self.subject.geometry.tangent_projection(points, v) for v in factor.unbind(-1)]
        rates = torch.stack(along).square().sum((0, 2)) / self.degeneracy.manifold_dim
        return (0.25 if self.trace_is_constant else 0.125) / float(rates.max())

    # Chains of the direction, in the clock.

    @property
    def chains(self) -> Any:
        """Chains of the direction diffusion in the clock u: a ``DirectionSolution``."""
        return self._chains[0]

    @cached_property
    def n_chains(self) -> int:
        """Chains whose effective number of draws finds the departure."""
        draws = self.runs(len(self.functionals))
        return max(96, math.ceil(2.0 * draws / (CHAIN - BURN_IN) / 32) * 32)

    @shared_property
    def _chains(self) -> tuple[Any, Relaxation]:
        """Chains, and the relaxation time."""
        self._require_diffusion()
        known = self._known
        clock = known.clock if known is not None else 8.0 * self._step(None)
        while True:
            solution = self._direction(CHAIN * clock, self._step(known))
            if known is not None:
                return solution, known
            found = self._observed(solution)
            if found <= 1.1 * clock:
                time = max(found * float(self.traces.mean()), 0.5)
                return solution, Relaxation(found, time, "autocorrelation of chains")
            clock = max(found, 2.0 * clock)

    def _step(self, relaxation: Relaxation | None) -> float:
        """Step in the clock: the error of "weak2" is of second order in it."""
        coarsest = math.inf if relaxation is None else relaxation.clock / _STEPS
        return min(self.local_step, coarsest) / max(1.0, math.sqrt(0.25 / self.effort.departure))

    def _observed(self, solution: Any) -> float:
        """The slowest autocorrelation time of chains, in the clock."""
        late = solution.ys[len(solution.ys) // 4 :]
        table = np.stack([self.functionals.table(y) for y in late])
        return slowest_time(table, float(solution.ts[1] - solution.ts[0]))

    def _direction(self, length: float, dt: float) -> Any:
        n = self.n_chains
        points = self.subject.manifold_points(n)
        points = points[torch.arange(n) % len(points)]
        times = torch.linspace(0.0, length, 31, dtype=torch.float64)
        sde = DirectionDiffusion(self.subject.problem)
        for _ in range(5):
            self._require_affordable(length / dt, "chains")
            solution = self._solve(sde, points, times, dt, 2, length / dt)
            if solution.stats.get("lost_paths", 0) == 0:
                return solution
            dt *= 0.5
        raise self._lost(solution)

    # Independent runs in time, from starts that are far apart.

    @shared_property
    def ends(self) -> Solution:
        """Solution of (13), the runs of each start one after the other, at the kept times."""
        self._require_diffusion()
        dt, end = self._step(self.relaxation), self.end
        n = self.runs_per_start
        traces = self.subject.problem.noise_trace(self.starts)
        norms = (traces * torch.tensor(_NORMS[:STARTS], dtype=traces.dtype)) ** 0.25
        start = (self.starts * norms[:, None]).repeat_interleave(n, 0)
        unit = max(float(norms.max()) ** 4, float(traces.max()))  # dT = unit du, for the step
        times = torch.cat([torch.zeros(1), torch.linspace(1.0 / _KEPT, 1.0, _KEPT)]).double() * end
        steps = end / float(self.traces.min()) / dt
        self._require_affordable(steps, "runs")
        sde = LimitingDiffusion(self.subject.problem)
        for k in range(4):
            solution = self._solve(sde, start, times, dt * unit / 2.0**k, 1, steps * 2.0**k)
            if solution.stats.get("lost_paths", 0) == 0:
                return solution
        raise self._lost(solution)

    @property
    def tests_of_starts(self) -> int:
        """Tests of means when each start is compared with the others."""
        return STARTS * (len(self.functionals) + 1)

    @property
    def runs_per_start(self) -> int:
        """Runs from each start: against those of all the others."""
        return self.runs(self.tests_of_starts, STARTS / (STARTS - 1.0))

    def end_directions(self) -> Array:
        """Directions at the end, (STARTS, n, D)."""
        last = self.ends.directions[-1].numpy()
        return last.reshape(STARTS, -1, last.shape[-1])

    # Parts.

    def seed(self, use: str) -> int:
        """A seed of its own for each use."""
        return (self.subject.seed * 16 + _SEEDS[use]) % 2**63

    def _solve(
        self, sde: Any, start: Tensor, times: Tensor, dt: float, use: int, steps: float
    ) -> Any:
        """A solution; of the beginning alone where paths are lost there already."""
        compiled: Any = "auto" if self.effort.departure < 0.2 else False
        beginning = times.new_tensor([0.0, float(times[-1]) * min(1.0, _BEGINNING / steps)])
        for asked in (beginning, times):
            with warnings.catch_warnings(), expecting(steps):
                warnings.simplefilter("ignore", LostPathsWarning)
                solution = self.subject.solve(
                    sde, start, asked, dt=dt, seed=self.subject.seed * 16 + use, compile=compiled
                )
            if solution.stats.get("lost_paths", 0):
                break
        return solution

    def _require_diffusion(self) -> None:
        if self.degeneracy.noise_rank == 0:
            raise NoiseError(
                "there is no diffusion along the manifold",
                received="noise without a part along the manifold",
                expected="noise that moves the direction (Assumption 5.2)",
                remedy=str(self.degeneracy.statement),
            )

    def _require_affordable(self, steps: float, what: str) -> None:
        most = _BUDGET / self.effort.departure
        if steps > most:
            horizon = CHAIN if what == "chains" else self.relaxations
            raise ClockRangeError(
                "the equilibrium is out of the reach of this effort",
                received=f"{what} of {horizon:.3g} relaxation times need {steps:.0f} steps",
                expected=f"at most {most:.0f}",
                remedy='effort="thorough", or Effort(departure=...) with a smaller departure; the '
                "law at finite times does not need it",
            )

    def _lost(self, solution: Any) -> NotOnManifoldError:
        lost = solution.stats.get("lost_paths")
        return NotOnManifoldError(
            "paths were lost at every step that was tried",
            received=f"{lost} of {solution.ys.shape[1]} paths",
            expected="none: those that are left are not a random sample",
            remedy="solve(sde, y0, ts, rtol=1e-3) takes smaller steps where they are needed",
        )
