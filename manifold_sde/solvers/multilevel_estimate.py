r"""Expectations to a given error by the multilevel Monte Carlo method.

.. math::

    E_{h/2^L} = E_h + \sum_{l=1}^{L} \bigl(E_{h/2^l} - E_{h/2^{l-1}}\bigr),

each term from paths of its own, as many as its variance is worth; the two steps of a term run on
the same Brownian paths (Giles, Operations Research 56, 2008), and each on two that are mirrored
(:mod:`~manifold_sde.solvers.coupled_path`), so that the variance of a term falls as h^2 whether the
noise commutes or not. Most paths then have the largest steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manifold_sde.arguments import check_integer, real
from manifold_sde.equations import StochasticEquation
from manifold_sde.errors import ArgumentError
from manifold_sde.solvers.adaptive import ADAPTIVE
from manifold_sde.solvers.arguments import require_equation
from manifold_sde.solvers.chunk import CHUNK
from manifold_sde.solvers.coupling import coupled, coupled_values, moments_at
from manifold_sde.solvers.lost_paths import SHARE, check_average
from manifold_sde.solvers.moments import Moments, Observable
from manifold_sde.solvers.schemes import SCHEMES
from manifold_sde.solvers.simulation import Simulation

#: Indices of paths that a level has: levels do not share paths.
_PATHS_OF_LEVEL = 1 << 27
_PILOT = 256
_FIRST_LEVELS = 3
_MOST_LEVELS = 12
#: Part of the tolerance that is left to the bias: with variances that fall as h^2 a smaller step
#: costs little.
_BIAS_PART = 1.0 / 3.0
#: Schemes whose paths at two steps are close to each other.
_COUPLED = ("weak2", *ADAPTIVE)
#: Share of the paths that are wanted from which on no more are drawn; the rest is allowed for.
_NEARLY = 0.98
#: Growth of a sample from one round to the next, at most.
_MOST_GROWTH = 8


@dataclass(frozen=True)
class Level:
    """One level of a multilevel estimate.

    Attributes:
        dt: Its step.
        paths: Number of paths.
        mean: Mean of what it adds, (...).
        variance: Variance of what it adds, for one path, (...).
        steps: Steps of one path: those of the two mirrored ones, and of the larger step that they
            are compared with, together.
    """

    dt: float
    paths: int
    mean: Tensor
    variance: Tensor
    steps: float


@dataclass(frozen=True)
class MultilevelEstimate:
    """An expectation at one time by the multilevel estimator.

    Attributes:
        mean: The expectation (...).
        standard_error: Its standard error (...).
        bias: Estimate of what the smallest step leaves, (...).
        levels: The levels, from the largest step on.
        lost: Number of paths lost.
    """

    mean: Tensor
    standard_error: Tensor
    bias: Tensor
    levels: tuple[Level, ...]
    lost: int

    @property
    def steps(self) -> float:
        """Number of steps of all paths of all levels."""
        return sum(level.paths * level.steps for level in self.levels)

    def __str__(self) -> str:
        """A table of the levels, and the result."""
        rows = [f"{'step':>10} {'paths':>10} {'mean':>12} {'variance':>12}"]
        for level in self.levels:
            mean, variance = level.mean.reshape(-1)[0], level.variance.reshape(-1)[0]
            rows.append(
                f"{level.dt:>10.3g} {level.paths:>10d} {float(mean):>12.4g} "
                f"{float(variance):>12.4g}"
            )
        first = [float(v.reshape(-1)[0]) for v in (self.mean, self.standard_error, self.bias)]
        rows.append(f"{first[0]:.6g} +- {first[1]:.2g}, bias about {first[2]:.1g}")
        return "\n".join(rows)


def multilevel(
    sde: StochasticEquation,
    y0: Tensor,
    time: float,
    function: Observable,
    *,
    tolerance: float,
    dt: float,
    start: float = 0.0,
    method: str = "weak2",
    seed: int = 0,
    compile: bool | str = "auto",
    chunk_size: int = CHUNK,
    max_paths: int = 10_000_000,
) -> MultilevelEstimate:
    """An expectation to a given root mean square error, by the multilevel Monte Carlo method.

    A third of the tolerance is left to the bias. The number of levels follows from the differences
    that the last ones make, under the scheme's weak order.

    Args:
        sde: The equation, in either form: the scheme takes the one that it needs.
        y0: Start (D,) on the manifold.
        time: Time of the expectation.
        function: Smooth function of states (n, D) with a value for each, (n, ...).
        tolerance: Root mean square error aimed at, in units of the function.
        dt: The largest step.
        start: Time at the start.
        method: "weak2", of weak order 2, or "heun" or "midpoint", of order 1.
        seed: Seed of the Brownian paths.
        compile: As in ``solve``.
        chunk_size: Number of paths that are stepped together.
        max_paths: Number of paths of a level beyond which it is given up.

    Returns:
        The estimate, with its levels.

    Warns:
        LostPathsWarning: If fewer paths were lost, and are left out.

    Raises:
        ArgumentError: If an argument is out of range, or the tolerance is out of reach.
        LostPathsError: If more than one path in a hundred is lost at a level.
        NotOnManifoldError, RankError, NoiseError: As in ``solve``.

    Example:
        >>> from manifold_sde import DirectionDiffusion, problems
        >>> from manifold_sde.solvers import multilevel
        >>> problem = problems.great_circle()
        >>> sde = DirectionDiffusion(problem)
        >>> found = multilevel(
        ...     sde, problem.minimizer, 1.0, lambda y: y[:, 0], tolerance=0.02, dt=0.5
        ... )
        >>> len(found.levels) >= 2
        True
    """
    if method not in _COUPLED:
        raise ArgumentError(
            "the paths of this method at two steps are not close to each other",
            received=repr(method),
            expected=" or ".join(repr(name) for name in _COUPLED),
            remedy='leave it at "weak2"; extrapolate takes every scheme',
        )
    if not 0.0 < real(tolerance) < math.inf:
        raise ArgumentError(
            "tolerance is not an error",
            received=repr(tolerance),
            expected="a positive number, in units of the function",
            remedy="tolerance=1e-3",
        )
    most = check_integer("max_paths", max_paths, 1, 2**63)
    sde = require_equation(sde).with_calculus("stratonovich")
    simulation = coupled(
        sde,
        y0,
        [real(start), real(time)],
        n_paths=_PILOT,
        dt=dt,
        method=method,
        seed=seed,
        compile=compile,
        chunk_size=chunk_size,
    )
    if len(simulation.start) > 1:
        raise ArgumentError(
            "a multilevel estimate begins at one start",
            received=f"{len(simulation.start)} starts",
            expected="(D,)",
            remedy="one call for each start",
        )
    run = _Multilevel(simulation, real(dt), compile, function, float(tolerance), most)
    return run.estimate()


@dataclass
class _Multilevel:
    """One multilevel estimate on its way.

    Attributes:
        simulation: The simulation at the largest step.
        dt: The largest step.
        compile: Mode of compiling.
        function: The function.
        tolerance: Root mean square error aimed at.
        max_paths: Most paths of a level.
        moments: Moments of what each level adds.
        drawn: Number of paths of each level.
        lost: Number of those that were lost.
    """

    simulation: Simulation
    dt: float
    compile: bool | str
    function: Observable
    tolerance: float
    max_paths: int
    moments: list[Moments] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)

    def estimate(self) -> MultilevelEstimate:
        """Add levels and paths until both parts of the error are small enough."""
        for _ in range(_FIRST_LEVELS):
            self._add_level()
        while True:
            self._fill()
            bias = self._bias()
            if float(bias.max()) <= self.tolerance * _BIAS_PART:
                break
            if len(self.moments) == _MOST_LEVELS:
                raise self._out_of_reach(f"a bias of {float(bias.max()):.2g} at the smallest step")
            self._add_level()
        levels = tuple(
            Level(self._step(k), int(m.count[0]), m.mean[0], m.variance[0], self._cost(k))
            for k, m in enumerate(self.moments)
        )
        mean = torch.stack([level.mean for level in levels]).sum(0)
        variance = torch.stack([level.variance / level.paths for level in levels]).sum(0)
        found = MultilevelEstimate(mean, variance.sqrt(), bias, levels, sum(self.lost))
        # Levels that lost more than this allows have been refused one by one.
        check_average(found.lost, sum(self.drawn), partial=found)
        return found

    def _step(self, level: int) -> float:
        return self.dt * 2.0**-level

    def _cost(self, level: int) -> float:
        first, last = self.simulation.times
        return (last - first) / self._step(level) * (3.0 if level else 1.0)

    def _bias(self) -> Tensor:
        """What the smallest step leaves, from the last two differences."""
        factor = 2.0 ** SCHEMES[self.simulation.scheme].weak_order
        last = torch.maximum(
            self.moments[-1].mean[0].abs(), self.moments[-2].mean[0].abs() / factor
        )
        return last / (factor - 1.0)

    def _add_level(self) -> None:
        self.drawn.append(0)
        self.lost.append(0)
        self.moments.append(self._sample(len(self.moments), _PILOT))

    def _sample(self, level: int, count: int) -> Moments:
        """Moments of what a level adds, from new paths."""
        first = self.drawn[level]
        simulation = self.simulation.at_step(
            self._step(level) * (2.0 if level else 1.0),
            compile=self.compile,
            n_paths=count,
            first_path=level * _PATHS_OF_LEVEL + first,
        )
        halvings = (0, 1) if level else (0,)
        total: Moments | None = None
        for values, valid in coupled_values(
            simulation, self.function, halvings, mirrored=level > 0
        ):
            self.lost[level] += int((~valid[-1]).sum())
            adds = values[1] - values[0] if level else values[0]
            new = moments_at(adds[-1:], valid[-1:])
            total = new if total is None else total.merge(new)
        assert total is not None
        self.drawn[level] += count
        if self.lost[level] > SHARE * self.drawn[level]:
            check_average(
                self.lost[level],
                self.drawn[level],
                when=f" at the step {self._step(level):.3g}",
                survivors="solve(sde, y0, ts, dt=...) returns all paths, NaN where lost",
            )
        return total

    def _fill(self) -> None:
        """Draw paths until the variance is within its part of the error."""
        allowed = _NEARLY * self.tolerance**2 * (1.0 - _BIAS_PART**2)
        while True:
            costs = [self._cost(k) for k in range(len(self.moments))]
            variances = [float(m.variance[0].max()) for m in self.moments]
            total = sum(math.sqrt(v * c) for v, c in zip(variances, costs, strict=True))
            wanted = [
                math.ceil(math.sqrt(v / c) * total / allowed)
                for v, c in zip(variances, costs, strict=True)
            ]
            counts = [int(m.count[0]) for m in self.moments]
            if all(have >= _NEARLY * want for have, want in zip(counts, wanted, strict=True)):
                return
            for k, (have, want) in enumerate(zip(counts, wanted, strict=True)):
                if want > self.max_paths:
                    raise self._out_of_reach(f"{want} paths at the step {self._step(k):.3g}")
                drawn = self.drawn[k]
                more = min(want - have, (_MOST_GROWTH - 1) * drawn)
                if more > 0:
                    self.moments[k] = self.moments[k].merge(self._sample(k, more))

    def _out_of_reach(self, received: str) -> ArgumentError:
        return ArgumentError(
            "the tolerance is out of reach",
            received=f"tolerance={self.tolerance:g}, which would need {received}",
            expected=f"at most {self.max_paths} paths of a level and {_MOST_LEVELS} levels",
            remedy="a larger tolerance, or a larger max_paths",
        )
