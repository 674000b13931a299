"""Runs of the diffusions towards their equilibrium, from starts that are far apart."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde.deadline import expecting, shared_property
from manifold_sde.errors import (
    ClockRangeError,
    LostPathsWarning,
    ManifoldSDEError,
    NotOnManifoldError,
)
from manifold_sde.sdes import DirectionDiffusion, LimitingDiffusion
from manifold_sde.solvers import Solution
from manifold_sde.verification.effort import Effort
from manifold_sde.verification.exact import AngleLaw, CircleDiffusion, SphereLaw, law_of
from manifold_sde.verification.laws.engine import Array, Runs
from manifold_sde.verification.laws.functionals import Functionals
from manifold_sde.verification.subject import Subject
from manifold_sde.verification.two_sample import runs_for_mean

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
_SEEDS = {"runs": 1, "chains": 2, "sgd": 3, "early": 4}


#: Condition number of H up to which SciPy's explicit flow gives Phi for the exact law.
_SMOOTH = 20.0
#: Autocorrelations below this multiple of their standard error are not told from 0.
_SIGNIFICANT = 3.0

ExactLaw = AngleLaw | SphereLaw | CircleDiffusion


@dataclass(frozen=True)
class Relaxation:
    """The slowest of the times in which expectations settle.

    Attributes:
        clock: In the intrinsic clock u.
        time: In the time T of (13), with the norm.
        source: Where it is from, in words.
    """

    clock: float
    time: float
    source: str


class LongRuns(Runs):
    """Simulations of a system towards its equilibrium.

    Args:
        subject: The system under test.
        effort: The test budget.
        horizon: Relaxation times that the runs take; ``None`` for what the budget asks for.
    """

    def __init__(self, subject: Subject, effort: Effort, horizon: float | None = None) -> None:
        super().__init__(subject, effort)
        self.horizon = horizon

    def seed(self, use: str) -> int:
        """A seed of its own for each use."""
        return (self.subject.seed * 16 + _SEEDS[use]) % 2**63

    # What is known before.

    @property
    def is_regular(self) -> bool:
        """Whether there is a diffusion, and one group of weights."""
        return self.degeneracy.noise_rank > 0 and len(self.degeneracy.groups) == 1

    @cached_property
    def functionals(self) -> Functionals:
        """What is compared."""
        return Functionals(self.subject.walked)

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
        """Relaxation times that the runs take."""
        return self.needed_relaxations if self.horizon is None else self.horizon

    @property
    def needed_relaxations(self) -> float:
        """Relaxation times after which the influence of the start is below what is to be found."""
        return math.log(2.0 * math.sqrt(2.0) / (_FORGOTTEN * self.effect))

    @property
    def end(self) -> float:
        """The time T of (13) at which the runs end."""
        return self.relaxations * self.relaxation.time

    @shared_property
    def starts(self) -> Tensor:
        """Unit vectors that are far apart, (STARTS, D)."""
        return self.subject.far_apart(STARTS)

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
        self.require_diffusion()
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
        return self._solve(sde, points, times, dt, "chains", length / dt)

    # Independent runs in time, from starts that are far apart.

    @shared_property
    def ends(self) -> Solution:
        """Solution of (13), the runs of each start one after the other, at the kept times."""
        self.require_diffusion()
        dt, end = self._step(self.relaxation), self.end
        n = self.runs_per_start
        traces = self.subject.problem.noise_trace(self.starts)
        norms = (traces * torch.tensor(_NORMS[:STARTS], dtype=traces.dtype)) ** 0.25
        start = (self.starts * norms[:, None]).repeat_interleave(n, 0)
        unit = max(float(norms.max()) ** 4, float(traces.max()))  # dT = unit du, for the step
        times = torch.cat([torch.zeros(1), torch.linspace(1.0 / _KEPT, 1.0, _KEPT)]).double() * end
        steps = end / float(self.traces.min()) / dt
        sde = LimitingDiffusion(self.subject.problem)
        return self._solve(sde, start, times, dt * unit, "runs", steps)

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

    def all_ends(self) -> Array:
        """Directions at the end of all runs, (STARTS n, D)."""
        return np.concatenate(list(self.end_directions()))

    def _solve(
        self, sde: Any, start: Tensor, times: Tensor, dt: float, use: str, steps: float
    ) -> Any:
        """A solution in so many steps, or in smaller ones where paths are lost.

        Raises:
            ClockRangeError: If they are more than the budget has.
            NotOnManifoldError: If paths are lost at all of the steps.
        """
        compiled: Any = "auto" if self.effort.departure < 0.2 else False
        horizon, tries = (CHAIN, 5) if use == "chains" else (self.relaxations, 4)
        most = _BUDGET / self.effort.departure
        for halved in range(tries):
            if steps > most and (use == "chains" or not halved):
                raise ClockRangeError(
                    "the equilibrium is out of the reach of this effort",
                    received=f"{use} of {horizon:.3g} relaxation times need {steps:.0f} steps",
                    expected=f"at most {most:.0f}",
                    remedy='effort="thorough", or Effort(departure=...) with a smaller departure; '
                    "the law at finite times does not need it",
                )
            # The beginning shows whether paths are lost.
            beginning = times.new_tensor([0.0, float(times[-1]) * min(1.0, _BEGINNING / steps)])
            for asked in (beginning, times):
                with warnings.catch_warnings(), expecting(steps):
                    warnings.simplefilter("ignore", LostPathsWarning)
                    solution = self.subject.solve(
                        sde, start, asked, dt=dt, seed=self.seed(use), compile=compiled
                    )
                lost = solution.stats.get("lost_paths", 0)
                if lost:
                    break
            else:
                return solution
            dt, steps = 0.5 * dt, 2.0 * steps
        raise NotOnManifoldError(
            "paths were lost at every step that was tried",
            received=f"{lost} of {len(start)} paths",
            expected="none: those that are left are not a random sample",
            remedy="solve(sde, y0, ts, rtol=1e-3) takes smaller steps where they are needed",
        )


def exact_law(subject: Subject) -> ExactLaw | None:
    """The exact law of the problem, if there is one.

    Phi for the coefficients on a curve is SciPy's gradient flow; where that is stiff it is the
    subject's, which the solver does not use.
    """
    problem = subject.problem
    values = torch.linalg.eigvalsh(problem.hessian(subject.start))
    positive = values[values > 1e-8 * values[-1]]
    stiff = float(values[-1] / positive[0]) > _SMOOTH

    def limit_map(x: Array) -> Array:
        return np.asarray(subject.geometry.limit_map(torch.from_numpy(x)))

    try:
        return law_of(problem, subject.start, limit_map=limit_map if stiff else None)
    except ManifoldSDEError:
        return None


def exact_relaxation(law: ExactLaw, trace: float) -> Relaxation | None:
    """The relaxation time of an exact law.

    Args:
        law: The law.
        trace: Mean of V on Gamma_1: at equilibrium dT = V du where V is constant.
    """
    norm = 0.5  # 1 / (4 c) at c = 1/2
    if isinstance(law, AngleLaw):
        clock = 2.0 * (law.radius / law.noise_scale) ** 2
        return Relaxation(clock, max(law.noise_trace * clock, norm), "exact")
    if isinstance(law, SphereLaw):
        clock = 1.0 / law.rate(1)
        return Relaxation(clock, max(law.noise_trace * clock, norm), "exact")
    try:
        clock, time = law.relaxation_time, 1.0 / law.spectral_gap_in_time()
    except ManifoldSDEError:
        return None
    return Relaxation(clock, max(time, norm), "spectral gap of the generator on the curve")


def slowest_time(values: Array, spacing: float) -> float:
    """The slowest exponential decay of autocorrelations of several functions along chains.

    At each lag the slowest decay is the largest eigenvalue of C(0)^{-1/2} C(lag) C(0)^{-1/2},
    symmetrised; the lag is the largest one at which it is told from 0.

    Args:
        values: Values (K, n, m) at K equally spaced times, of n chains and m functions, settled.
        spacing: Time between them.

    Returns:
        The time, at least that between two values over 3.
    """
    moments, chains, _ = values.shape
    centred = values - values.mean((0, 1))
    flat = centred.reshape(-1, centred.shape[-1])
    spectrum, basis = np.linalg.eigh(flat.T @ flat / len(flat))
    kept = spectrum > 1e-6 * spectrum[-1]
    white = centred @ (basis[:, kept] / np.sqrt(spectrum[kept]))
    longest = spacing / 3.0
    for lag in range(1, moments // 2):
        pairs = (moments - lag) * chains
        moved = np.einsum("kni,knj->ij", white[:-lag], white[lag:]) / pairs
        largest = float(np.linalg.eigvalsh(0.5 * (moved + moved.T))[-1])
        # Independent pairs: chains times the relaxation times that fit in.
        independent = chains * max(1.0, (moments - lag) * spacing / (2.0 * longest))
        if largest <= _SIGNIFICANT / math.sqrt(independent):
            break
        longest = max(longest, lag * spacing / max(-math.log(min(largest, 0.9999)), 1e-4))
    return longest
