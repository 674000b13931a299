r"""Averages under the equilibrium in time, and what they still know of the start.

Kept moments of a path in the time t count alike. Those of the direction diffusion are moments of
the clock u, and :math:`dt = \|Y\|^4 du`: each is weighted by :math:`\|Y\|^4`, which at every ratio
C > 0 is proportional to :math:`e^{a} / E` once (direction, norm) is in its joint equilibrium
(:mod:`manifold_sde.solvers.clock`; the initial norm is forgotten at the rate 2 V).

A process that is not periodic forgets its start like :math:`E f(t) - \pi(f) \approx
e^{-t/\tau} (E f(0) - \pi(f))`, and its conditional expectations in the same way: across paths, the
slope of f(t + l) on f(t) is :math:`e^{-l/\tau}`. So paths from one start, whose common mean says
nothing of :math:`\tau`, say it by how they forget what tells them apart. With B the average of
:math:`e^{-t/\tau}` over the times that count, the average :math:`\bar f` has the bias

.. math:: \bar f - \pi(f) = B (E f(0) - \pi(f)) = \frac{B}{1 - B} (E f(0) - \bar f) .

The start may be any moment before: the first, and one half way, when what is fast is forgotten.
Both factors are taken at the upper ends of their errors, at the slowest of three lags: the
shortest sees what is slow compared with the run, also where the mean oscillates, and the longest
what a faster part of f hides. Where the mean over a quarter of the time still tells that of the
next quarter but one, the slope between these two, with the first as the instrument, is that of the
slow part alone. Where a slope may be 1 the run does not know its relaxation time, and the bias is
bounded by the range of f over the manifold where the geometry is known, or not at all.

No run can tell of what no path has met, beyond a barrier, nor of a slow part of f so small that its
fast parts hide it: with less than a third of the variance of f, and in a run shorter than eight of
its relaxation times, it can pass for forgotten.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from manifold_sde.arguments import real
from manifold_sde.errors import ArgumentError, LimitMapError, NotMixedWarning
from manifold_sde.geometry import Geometry
from manifold_sde.loss_checks import fixed_directions
from manifold_sde.solvers.lost_paths import check_average, remedy_of
from manifold_sde.solvers.moments import Observable, evaluate

#: Independent parts from which a standard error is taken: paths, or else batches in time.
_FEWEST = 20
#: Consecutive moments of a batch in time, at least.
_SHORTEST_BATCH = 10
#: Standard errors by which two halves of a run in equilibrium are never apart (6e-7).
_DRIFT = 5.0
#: Lags at which the memory of paths is measured, in parts of the time that counts.
_LAGS = (0.125, 0.25, 0.5)
#: Blocks of that time whose means tell what is slow from what is fast, and the standard errors from
#: which on the first of three still tells the third.
_QUARTERS = 4
_TOLD = 4.0
#: Standard errors at which slopes, and distances from the start, are taken.
_UPPER = 2.0
#: Random directions whose limits show the range of a function over the manifold.
_DIRECTIONS = 64
#: Differences that are rounding, in units of the largest value and of the dtype's epsilon.
_ROUNDING = 1024.0

#: Smallest and largest value (...) of a function over the manifold, or ``None``.
Extent = Callable[[Observable], tuple[Tensor, Tensor] | None]


class Kept(Protocol):
    """What an average needs of a solution: times (K,), states (K, D) or (K, n, D), and how."""

    @property
    def ts(self) -> Tensor: ...  # noqa: D102
    @property
    def ys(self) -> Tensor: ...  # noqa: D102
    @property
    def config(self) -> Mapping[str, Any]: ...  # noqa: D102


@dataclass(frozen=True, repr=False)
class EquilibriumAverage:
    """An average under the equilibrium pi, in time.

    Attributes:
        mean: The average (...).
        standard_error: Its standard error, from the number of paths and their length alone (...).
        bias: By how much the start may move it besides, (...); infinite where the run cannot tell.
        effective_sample_size: Number of independent draws from pi whose mean would have the same
            mean square error, (...); a bias above two standard errors is a part of it.
        burn_in: Time after which states were counted.
        paths: Number of paths that were counted; lost ones are not.
        parts: Number of independent parts from which the standard error was taken.
        extent: Range (...) of f over the manifold, where it was asked for and is known.
        relaxation_time: Time (...) in which the paths forget, at the upper end of its error;
            infinite where the run cannot tell.
        unit: What that time, and the burn-in, are counted in.
    """

    mean: Tensor
    standard_error: Tensor
    bias: Tensor
    effective_sample_size: Tensor
    burn_in: float
    paths: int
    parts: int
    extent: tuple[Tensor, Tensor] | None = None
    relaxation_time: Tensor | None = None
    unit: str = "time"

    def __repr__(self) -> str:
        known = math.isfinite(largest := float(self.bias.max()))
        bias = f"at most {largest:.2g}" if known else "not known"
        lines = [
            f"average in equilibrium: {self._numbers()}",
            f"  bias     {bias}, by what the paths still remember of their start",
            f"  from     {self.paths} paths after {self.burn_in:g} {self.unit}, worth "
            f"{float(self.effective_sample_size.min()):.2g} independent draws",
        ]
        if self.relaxation_time is not None:
            time = float(self.relaxation_time.max())
            told = f"at most {time:.4g} {self.unit}"
            if math.isinf(time):
                told = "longer than the run can tell"
            lines.append(f"  memory   relaxation time {told}")
        return "\n".join(lines)

    def _numbers(self) -> str:
        pairs = zip(self.mean.reshape(-1), self.standard_error.reshape(-1), strict=True)
        shown = [f"{float(m):.4g} ± {float(e):.2g}" for m, e in itertools.islice(pairs, 3)]
        more = f", ... {tuple(self.mean.shape)}" if self.mean.numel() > len(shown) else ""
        return ", ".join(shown) + more

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Ends (...) of an interval that has the equilibrium's mean with this probability.

        Args:
            level: The probability, between 0 and 1.

        Raises:
            ArgumentError: If it is none.
        """
        if not isinstance(level, float) or not 0.0 < level < 1.0:
            raise ArgumentError(
                "level is not a probability",
                received=repr(level),
                expected="a number between 0 and 1",
                remedy="level=0.95",
            )
        from scipy.special import stdtrit  # slow to import

        wide = float(stdtrit(self.parts - 1, 0.5 * (1.0 + level))) * self.standard_error
        low, high = self.mean - wide - self.bias, self.mean + wide + self.bias
        if self.extent is None:
            return low, high
        return low.maximum(self.extent[0]), high.minimum(self.extent[1])


def average(
    solution: Kept,
    function: Observable,
    weights: Tensor | None,
    burn_in: float | None,
    extent: Extent = lambda _: None,
) -> EquilibriumAverage:
    """Average of a function over the kept states of a solution.

    The average is a ratio of sums, and its error is that of the ratio, linearised: from the paths
    (or antithetic pairs) if there are 20 or more, and from batches of consecutive times of each
    path otherwise.

    Args:
        solution: The solution.
        function: Function of states (n, D) with a value for each, (n, ...).
        weights: Weights of the kept states, (K,) or (K, n), not negative; ``None`` for equal ones.
        burn_in: Time after which states count; by default half of the time of the run.
        extent: Range of the function over the manifold, if it is known.
    """
    begin, clocked = _burn_in(solution.ts, burn_in), weights is not None
    single = solution.ys.dim() == 2
    every = solution.ys[:, None] if single else solution.ys
    late = (solution.ts >= begin).to(every.device)
    times = (solution.ts - solution.ts[0]).to(every.device, torch.float64)[late]
    alive = torch.isfinite(every[late]).all(-1).all(0)
    total = len(alive)
    lost = total - int(alive.sum())
    pairs = bool(solution.config.get("antithetic", False)) and not single
    if pairs:
        alive = alive.reshape(-1, 2).all(1).repeat_interleave(2)
    states = every[late][:, alive]
    moments, paths = states.shape[:2]
    units = paths // 2 if pairs else paths
    batches = 1 if units >= _FEWEST else -(-_FEWEST // max(1, units))
    shortest = 1 if batches == 1 else _SHORTEST_BATCH
    if not units or batches * shortest > moments:
        raise ArgumentError(
            "there are too few states for an average with a standard error",
            received=f"{paths} paths that were not lost, {moments} kept times from {begin:g} on",
            expected=f"{_FEWEST} paths or more (pairs, if antithetic), or paths times kept times "
            f"of {_FEWEST * _SHORTEST_BATCH} or more",
            remedy="n_paths=100, or ts=torch.linspace(0, T, 1000); observables keep no paths",
        )
    if weights is None:
        weights = every.new_ones(every.shape[:2])
    weights = (weights[:, None] if weights.dim() == 1 else weights).expand(every.shape[:2])
    # Two moments from which on the start is forgotten: the first, and one half way to the others.
    halfway = int((solution.ts <= 0.5 * (solution.ts[0] + begin)).sum().clamp(min=1)) - 1
    early = [0, halfway]
    passed = (solution.ts[early] - solution.ts[0]).to(times)
    values = torch.stack(
        [evaluate("f", function, y)[0] for y in (*every[early][:, alive], *states)]
    )
    shape = values.shape[2:]
    run = _Run(
        times,
        passed,
        values.reshape(moments + len(early), paths, -1).to(torch.float64),
        torch.cat([weights[early][:, alive], weights[late][:, alive]]).to(torch.float64),
        batches,
        units,
        _ROUNDING * torch.finfo(values.dtype).eps,
    )
    bias, error = run.bias, run.error
    ends = None
    if bool((_remembers(bias, error) | run.constant).any()):
        ends = _with_states(run, extent(function))
    if ends is not None:
        bias = _within(run, bias, *ends)
    # What it is worth; a bias that is bounded by the interval's own width does not count.
    square = error.square() + torch.where(_remembers(bias, error), bias.square(), 0.0)
    size = torch.where(square > 0, run.spread / square, math.inf).clamp(max=moments * paths)
    like = solution.ys.dtype
    mean, error, bias, size, relaxation = (
        v.reshape(shape).to(like) for v in (run.mean, error, bias, size, run.relaxation[1])
    )
    if ends is not None:
        ends = ends[0].reshape(shape).to(like), ends[1].reshape(shape).to(like)
    unit = "steps" if "lr" in solution.config else "of its time"
    if clocked:
        unit = "of the clock"
    found = EquilibriumAverage(
        *(mean, error, bias, size, begin, paths, batches * units, ends),
        relaxation_time=relaxation,
        unit=unit,
    )
    check_average(
        lost,
        total,
        when=f" between {begin:g} and {float(solution.ts[-1]):g}",
        partial=found,
        survivors="the error's attribute partial, or solution.ys, which is NaN for the lost",
        remedy=remedy_of(solution.config),
    )
    _warn_of_memory(found, run)
    return found


def extent_over(
    geometry: Geometry, function: Observable, like: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Range (...) of a function over directions that gradient flow from random ones leads to.

    Args:
        geometry: The geometry. Without matrices the limits would cost too much: ``None``.
        function: Function of states (n, D) with a value for each, (n, ...).
        like: States (..., D), for their dtype and device.
    """
    if geometry.products is not None:
        return None
    try:
        points = geometry.limit_map(fixed_directions(like.shape[-1], _DIRECTIONS).to(like))
    except LimitMapError as error:
        points = like.new_zeros(0, like.shape[-1]) if error.partial is None else error.partial
    points = points[torch.isfinite(points).all(-1)]
    if not len(points):
        return None
    values, _ = evaluate("f", function, points / points.norm(dim=-1, keepdim=True))
    return values.amin(0), values.amax(0)


def _with_states(run: _Run, ends: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
    """A range (C,) with that of the run's own states in it."""
    if ends is None:
        return None
    low, high = (end.reshape(-1).to(run.mean) for end in ends)
    return low.minimum(run.low), high.maximum(run.high)


def _within(run: _Run, bias: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """A bias (C,) that does not lead out of the range of f over the manifold."""
    most = torch.maximum(high - run.mean, run.mean - low)
    stuck = run.constant & (high - low > run.rounding)
    return torch.where(stuck, most, torch.minimum(bias, most))


class _Run:
    """What counts of a run, with its start.

    Args:
        times: Times that count (K,), from the start on.
        early: Times (E,) before them at which the memory of the start may begin.
        values: Values at the early times and at those that count (E + K, n, C).
        weights: Their weights (E + K, n).
        batches: Number of batches in time.
        units: Number of independent paths, or pairs of consecutive ones.
        rounding: Relative size of differences that are rounding.
    """

    def __init__(
        self,
        times: Tensor,
        early: Tensor,
        values: Tensor,
        weights: Tensor,
        batches: int,
        units: int,
        rounding: float,
    ) -> None:
        self.times = times
        self.batches = batches
        self.units = units
        v, w = values[len(early) :], weights[len(early) :, :, None]
        w = w / w.mean()
        self.mean = (w * v).sum((0, 1)) / w.sum()
        self.spread = (w * (v - self.mean).square()).sum((0, 1)) / w.sum()
        self.low, self.high = values.amin((0, 1)), values.amax((0, 1))
        self.rounding = rounding * values.abs().amax((0, 1))
        #: Whether f is the same everywhere, up to rounding.
        self.constant = self.high - self.low <= self.rounding
        #: What each state adds to the mean of its time, less the mean of all (K, n, C).
        self.residual = w / w.mean(1, keepdim=True) * (v - self.mean)
        parts = self._parts(w * (v - self.mean)) / w.sum()
        self.error = _error(parts.flatten(0, 1))
        self.relaxation = self._relaxation()
        if batches > 1:
            length = self._length / batches
            # Batch means that are correlated make the error too small by this.
            kept = 1.0 - (self.relaxation[0] / length).clamp(max=0.9)
            self.error = self.error / kept.sqrt()
        bias = self.error + torch.inf
        for k, moment in enumerate(early):
            distance = self._distance(values[k], weights[k, :, None], parts)
            share = w.mean(1) / w.mean(1).sum(0)
            memory = (share * torch.exp((moment - times[:, None]) / self.relaxation[1])).sum(0)
            left = memory / (1.0 - memory) * distance  # infinite where nothing is forgotten
            bias = bias.minimum(left.nan_to_num(torch.inf, torch.inf))
        bias = bias.maximum(self._drift(w, v))
        self.bias = torch.where(self.constant, 0.0, bias)

    def _distance(self, values: Tensor, weights: Tensor, parts: Tensor) -> Tensor:
        """How far the mean may be from that of another moment (C,).

        Args:
            values: Values there (n, C).
            weights: Their weights (n, 1).
            parts: What units add to the mean (batches, units, C).
        """
        # The weights of the clock at its start are infinite, and alike for all paths.
        weights = torch.where(weights.sum() > 0, weights, torch.ones_like(weights))
        weights = weights / weights.sum()
        there = (weights * values).sum(0)
        distance = (there - self.mean).abs()
        if self.batches > 1:  # too few paths for what they vary by
            return distance.maximum(self.spread.sqrt()) + _UPPER * self.error
        offsets = (weights * (values - there)).reshape(self.units, -1, len(there)).sum(1)
        return distance + _UPPER * _error(offsets - parts[0])

    @property
    def _length(self) -> float:
        return float(self.times[-1] - self.times[0])

    def _parts(self, terms: Tensor) -> Tensor:
        """Sums of terms (K, n, C) over batches in time and units: (batches, units, C)."""
        parts = torch.stack([part.sum(0) for part in terms.tensor_split(self.batches)])
        return parts.reshape(self.batches, self.units, -1, parts.shape[-1]).sum(2)

    def _relaxation(self) -> Tensor:
        """Relaxation time as it is found, and at the upper end of its error: (2, C)."""
        x = self.residual
        if self.batches == 1:
            x = x - x.mean(1, keepdim=True)
        found = x.new_zeros(2, x.shape[-1])
        known = False
        # A batch must be longer than the relaxation time, so that is what is looked at.
        longest = self._length * (1.0 if self.batches == 1 else 2.0 / self.batches)
        for lag in _LAGS:
            later = self._ahead(lag * longest)
            pairs = len(later)
            if pairs < max(1, self.batches):
                continue
            known = True
            actual = float((self.times[later] - self.times[:pairs]).max())
            both, one = self._parts(x[:pairs] * x[later]), self._parts(x[:pairs].square())
            found = torch.maximum(found, _forgetting(both, one, actual))
        if self.batches == 1 and len(x) >= _QUARTERS:
            blocks = torch.stack([part.mean(0) for part in x.tensor_split(_QUARTERS)])
            both, one = (self._parts(blocks[:-2] * blocks[k:][: len(blocks) - 2]) for k in (2, 1))
            told = both.sum((0, 1)) > _TOLD * _error((both - both.mean((0, 1))).flatten(0, 1))
            slow = _forgetting(both, one, self._length / _QUARTERS)
            found = torch.where(told, torch.maximum(found, slow), found)
        if not known:
            found += torch.inf
        elif self.batches > 1:
            long = found[1] > self._length / self.batches
            found[1] = torch.where(long, torch.inf, found[1])
        return found

    def _ahead(self, lag: float) -> Tensor:
        """Places of the times a lag after the first ones, as many as there are."""
        later = torch.searchsorted(self.times, self.times + lag * (1.0 - 1e-9))
        return later[later < len(self.times)]

    def _drift(self, w: Tensor, v: Tensor) -> Tensor:
        """How far the two halves of what counts are apart (C,); 0 where it may be chance."""
        half = len(w) // 2
        if half < max(1, self.batches // 2):
            return torch.zeros_like(self.mean)
        before, after = (
            (a * (b - self.mean), a.sum()) for a, b in ((w[:half], v[:half]), (w[half:], v[half:]))
        )
        apart = after[0].sum((0, 1)) / after[1] - before[0].sum((0, 1)) / before[1]
        parts = [
            self._parts(terms - terms.mean((0, 1))) / total for terms, total in (before, after)
        ]
        if self.batches == 1:
            error = _error((parts[1] - parts[0])[0])
        else:
            error = sum(_error(p.flatten(0, 1)).square() for p in parts) ** 0.5
        seen = (apart.abs() > _DRIFT * error) & (apart.abs() > self.rounding)
        return torch.where(seen, apart.abs(), 0.0)


def _remembers(bias: Tensor, error: Tensor) -> Tensor:
    """Whether the start may move an average by more than two standard errors."""
    return bias > _UPPER * error


def _forgetting(both: Tensor, one: Tensor, lag: float) -> Tensor:
    """Relaxation times (2, C) of a slope, as it is and at the upper end of its error.

    Args:
        both: Parts of the numerator (batches, units, C).
        one: Parts of the denominator.
        lag: Time in which the slope is what is left.
    """
    total = one.sum((0, 1))
    slope = both.sum((0, 1)) / total
    spread = _error((both - slope * one).flatten(0, 1)) / total.abs()
    left = torch.stack([slope, slope + _UPPER * spread]).nan_to_num(nan=1.0).clamp(0.0, 1.0)
    return lag / left.log().abs()


def _error(parts: Tensor) -> Tensor:
    """Standard error of a mean from its independent parts (n, ...), whose sum it is."""
    n = len(parts)
    return (parts.square().sum(0) * (n / (n - 1.0))).sqrt()


def _warn_of_memory(found: EquilibriumAverage, run: _Run) -> None:
    """Warn if the start may move an average by more than its sampling does."""
    bias, error = found.bias.reshape(-1), found.standard_error.reshape(-1)
    if not bool(_remembers(bias, error).any()):
        return
    worst = int((bias / error.clamp(min=1e-300)).argmax())
    mean, low, high = (float(v.reshape(-1)[worst]) for v in (found.mean, *found.interval()))
    time = float(run.relaxation[1, worst])
    long = "is longer than it can tell" if math.isinf(time) else f"may be {time:.3g}"
    warnings.warn(
        f"the run is too short for its equilibrium: its paths may still remember their start. An "
        f"average of {mean:.4g} +- {float(error[worst]):.2g} stands for one between {low:.4g} and "
        f"{high:.4g}. The run is {float(run.times[-1]):.4g} long, and its relaxation time {long}: "
        "run 16 relaxation times or more, and keep a dozen moments of them",
        NotMixedWarning,
        stacklevel=4,
    )


def _burn_in(ts: Tensor, burn_in: float | None) -> float:
    """The time after which states count."""
    first, last = float(ts[0]), float(ts[-1])
    if burn_in is None:
        return 0.5 * (first + last)
    begin = real(burn_in)
    if not begin <= last:
        raise ArgumentError(
            "burn_in is not a time of the run",
            received=repr(burn_in),
            expected=f"a number up to {last:g}, in the time of the solution",
            remedy="leave it out for half of the run",
        )
    return begin
