"""Which relaxation times the records of a run allow: profile likelihoods over all else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manifold_sde.training.likelihood import Array, Runs, log_likelihood

#: Relaxation times that are looked at, a factor apart: from a part of the spacing of the records
#: to a multiple of the length of the run.
_FACTOR, _SHORTEST, _LONGEST = 1.45, 0.25, 20.0
#: Between them, where the likelihood is largest: parts of that factor.
_FINE = (-0.75, -0.5, -0.25, -0.1, 0.0, 0.1, 0.25, 0.5, 0.75)
_SHARES = np.array([0.0, 0.1, 0.4, 0.75, 0.95, 1.0])
_OTHERS = 9
_ROUNDS = 6
_PEAKS = 4
#: A mode below noise: part of the weight that counts, and the slowest mode that may be seen beside
#: a run that is mixed, over a fifth of the run.
LIGHT, QUICK = 0.3, 1.0 / 8.0

_Function = Callable[[Array], Array]


@dataclass(frozen=True, eq=False)
class Profile:
    """What each relaxation time lacks in likelihood, at the best of all other numbers.

    The relaxation time is that of the slowest mode whose share of the variance is at least a
    weight; another mode may be faster, or slower and lighter.

    Attributes:
        tau: Relaxation times (n,), increasing.
        loss: Twice the log-likelihood that each lacks to the best of all models (n,).
        faster: What models without a mode of that weight lack.
        cutoff: A fifth of the length of the run, one of ``tau``.
        length: Length of the longest run, in the clock.
        modes: Number of modes, 1 or 2.
        best: The largest log-likelihood, up to a constant.
        noise: What white noise lacks, with no mode of ``LIGHT`` of the weight.
        hidden: What models lack whose slowest mode of ``LIGHT`` of the weight relaxes in the cutoff
            or in the length of the run.
        quick: What models lack all of whose modes relax in an eighth of the cutoff or faster.
    """

    tau: Array
    loss: Array
    faster: float
    cutoff: float
    length: float
    modes: int
    best: float
    noise: float = math.inf
    hidden: float = math.inf
    quick: float = 0.0

    def verdict(self, level: float) -> str:
        """As :meth:`tells`, but "cannot tell" and not "mixed" where ``hides`` says why."""
        found = self.tells(level)
        return "cannot tell" if found == "mixed" and self.hides(level) else found

    def tells(self, level: float) -> str:
        """Whether the run is long enough: "mixed", "not mixed" or "cannot tell".

        With one mode it is mixed if no relaxation time of a fifth of the run or more is left. With
        two that cannot be had: a mode that stands still all through the run is never rejected. Then
        it is mixed if a relaxation time of a fifth is rejected and a shorter one is not, which
        says nothing of longer ones.
        """
        kept = self.loss <= quantile(level)
        place = int(np.argmin(np.abs(self.tau - self.cutoff)))
        below = bool(kept[:place].any()) or self.faster <= quantile(level)
        above = kept[place : place + 1] if self.modes == 2 else kept[place:]
        if below and not above.any():
            return "mixed"
        return "cannot tell" if below or kept[place] else "not mixed"

    def hides(self, level: float) -> str:
        """Why a slow mode that is too light to count may be there: "", "noise" or "light".

        "noise": the records are not told from noise, and such a mode may be below it.
        "light": modes of an eighth of the cutoff at most do not explain the records.
        """
        most = quantile(level)
        if self.quick > most:
            return "light"
        return "noise" if self.noise <= most and self.hidden <= most else ""

    def interval(self, level: float) -> tuple[float, float]:
        """The hull of what is not rejected; of what is shorter than the cutoff, where mixed.

        The lower end is 0 where the records are too far apart to bound it, the upper one is
        infinite where the longest relaxation time that was looked at is not rejected.
        """
        most = quantile(level)
        places = np.flatnonzero(self.loss <= most)
        if self.verdict(level) == "mixed":
            places = places[self.tau[places] < self.cutoff]
        if not len(places):
            return 0.0, float(self.tau[0])
        first, last = int(places[0]), int(places[-1])
        open_below = first == 0 or self.faster <= most
        low = 0.0 if open_below else self._crossing(first, first - 1, most)
        high = math.inf if last == len(self.tau) - 1 else self._crossing(last, last + 1, most)
        return low, high

    def estimate(self, longest: float = math.inf) -> float:
        """The most likely relaxation time, up to a longest."""
        within = np.where(self.tau <= longest, self.loss, np.inf)
        return float(self.tau[np.argmin(within)])

    def _crossing(self, inside: int, outside: int, most: float) -> float:
        """Where the loss crosses a value: its root is nearly linear."""
        a, b = np.sqrt(np.maximum(self.loss[[inside, outside]], 0.0))
        share = (math.sqrt(most) - a) / (b - a) if np.isfinite(b) else 0.0
        logs = np.log(self.tau)
        return float(np.exp(logs[inside] + share * (logs[outside] - logs[inside])))


def quantile(level: float) -> float:
    """The quantile of chi-squared with one degree of freedom."""
    return float(NormalDist().inv_cdf(0.5 + 0.5 * level) ** 2)


def profiles_of(runs: Runs, weight: float, modes: int, means: Runs | None = None) -> list[Profile]:
    """Compute the profile likelihood of the relaxation time of each function.

    All functions are looked at together: the time is that of a few passes over the records.

    Args:
        runs: The records.
        weight: Least share of the variance of a mode that counts; without meaning for one mode.
        modes: 1 or 2.
        means: Of thinned records, means of those between; slow modes are looked for in these.

    Returns:
        The profiles.
    """
    cutoff = runs.length / 5.0
    least = min(_SHORTEST * runs.spacing, cutoff / 4.0)
    below = math.ceil(math.log(cutoff / least) / math.log(_FACTOR))
    above = math.ceil(math.log(5.0 * _LONGEST) / math.log(_FACTOR))
    taus: Array = cutoff * _FACTOR ** np.arange(-below, above + 1.0, dtype=np.float64)
    model = (_OneMode if modes == 1 else _TwoModes)(runs, taus, weight)
    functions, count = len(runs.values), len(taus)
    places = _product(np.arange(float(functions)), np.linspace(0.0, 1.0, count))
    values, points = _climb(model.slowest, places, model.axes)
    values, points = values.reshape(functions, count), points.reshape(-1, functions, count)
    apart = 1.0 / (count - 1)
    highest, tops = _peaks(model.slowest, values, points, [0.5 * apart, *(0.1 for _ in model.axes)])
    # Long runs know the relaxation time better than to a factor: more are looked at near the best.
    near = np.repeat(tops[:, :, None], len(_FINE), axis=2)
    near[1] = np.clip(near[1] + apart * np.array(_FINE), 0.0, 1.0)
    held = [0.0, *(0.1 for _ in model.axes)]
    fine, _ = _ascend(model.slowest, near.reshape(len(near), -1), held)
    values = np.concatenate([values, fine.reshape(functions, -1)], axis=1)
    places = np.concatenate([points[1], near[1]], axis=1)
    faster = model.faster()
    best = np.maximum(np.maximum(values.max(1), highest), faster)
    beside = np.stack([np.full(functions, np.inf)] * 2 + [np.zeros(functions)])
    # Only what may be mixed at some level is looked at.
    may = np.flatnonzero(2.0 * (best - values[:, below]) > quantile(0.5))
    if modes == 2 and len(may):
        given = runs if means is None else means
        part = Runs(given.clock, given.values[may], given.common_start)
        beside[:, may] = _beside(part, taus, weight, below, best[may] if means is None else None)
    found = []
    for i in range(functions):
        place, first = np.unique(places[i], return_index=True)
        lost = 2.0 * (best[i] - values[i, first])
        rest = (
            2.0 * float(best[i] - faster[i]),
            cutoff,
            runs.length,
            modes,
            float(best[i]),
            *beside[:, i].tolist(),
        )
        found.append(Profile(model.times(place), lost, *rest))
    return found


def _beside(runs: Runs, taus: Array, weight: float, cutoff: int, best: Array | None) -> Array:
    """What noise, a light slow mode and quick modes alone lack to the best, (3, S)."""
    # A slow mode is in means as it is in the records, and the noise is less.
    variance = np.nanvar(runs.values, axis=(1, 2))
    least = np.minimum(LIGHT * weight / np.maximum(variance, 1e-300), 0.95)
    model = _TwoModes(runs, taus, least)
    place = cutoff / (len(taus) - 1)
    # What relaxes in the length of the run varies less along it: it is the harder one to exclude.
    span = model.high - model.low
    slow = np.array([place, place + math.log(5.0) / span])
    hidden, _ = _climb(model.slowest, _product(np.arange(float(len(least))), slow), model.axes)
    quick = place + math.log(QUICK) / span
    kept = np.stack(
        [
            model.faster(),
            hidden.reshape(-1, 2).max(1),
            model.up_to(max(quick, 0.0)),
        ]
    )
    lost: Array = 2.0 * (np.maximum(kept.max(0), model.up_to(1.0) if best is None else best) - kept)
    return lost


class _OneMode:
    """One mode and white noise.

    Points are the number of a function and, in the unit square, relaxation time and share.
    """

    axes: tuple[Array, ...] = (_SHARES[1:],)

    def __init__(self, runs: Runs, taus: Array, weight: float | Array) -> None:
        self.runs, self.weight = runs, weight
        self.low, self.high = math.log(taus[0]), math.log(taus[-1])

    def times(self, place: Array) -> Array:
        """Relaxation times at places between 0 and 1."""
        times: Array = np.exp(self.low + (self.high - self.low) * place)
        return times

    def slowest(self, point: Array) -> Array:
        """Log-likelihoods at points (3, n)."""
        return log_likelihood(self.runs, self.times(point[1:2]), point[2:], point[0].astype(int))

    def faster(self) -> Array:
        """The log-likelihoods of white noise alone, (S,)."""
        functions = np.arange(len(self.runs.values))
        nothing = np.zeros((1, len(functions)))
        return log_likelihood(self.runs, nothing + 1.0, nothing, functions)


class _TwoModes(_OneMode):
    """A mode of a weight at least, another that is faster or lighter, and white noise.

    Points are the number of a function and, in the unit cube, the two relaxation times, the weight
    of the first above the least, and the share of the other in what is left.
    """

    axes = (np.linspace(0.0, 1.0, _OTHERS), _SHARES, _SHARES[[0, 2, 4, 5]])

    def _least(self, point: Array) -> Array:
        least = np.broadcast_to(self.weight, len(self.runs.values))
        return np.asarray(least[point[0].astype(int)])

    def slowest(self, point: Array) -> Array:
        """Log-likelihoods at points (5, n)."""
        least = self._least(point)
        own = least + (1.0 - least) * point[3]
        other = (1.0 - own) * point[4]
        allowed = (point[2] <= point[1]) | (other < least)
        values = np.full(len(own), -np.inf)
        # Without a share the other mode is the same at all of its relaxation times.
        models = np.stack([point[0], point[1], np.where(other > 0.0, point[2], 0.0), own, other])
        unique, back = np.unique(models[:, allowed], axis=1, return_inverse=True)
        times, function = self.times(unique[1:3]), unique[0].astype(int)
        values[allowed] = log_likelihood(self.runs, times, unique[3:], function)[back.reshape(-1)]
        return values

    def faster(self) -> Array:
        """The largest log-likelihoods without a mode of that weight, (S,)."""
        return self._best(lambda point: np.minimum(self._least(point), 0.5) * point[3:], 1.0)

    def up_to(self, last: float) -> Array:
        """The largest log-likelihoods of modes of any weight, with times up to a place, (S,)."""
        return self._best(lambda point: np.stack([point[3], (1.0 - point[3]) * point[4]]), last)

    def _best(self, shares_at: _Function, last: float) -> Array:
        def f(point: Array) -> Array:
            times = self.times(last * point[1:3])
            return log_likelihood(self.runs, times, shares_at(point), point[0].astype(int))

        functions = len(self.runs.values)
        places, shares = np.linspace(0.0, 1.0, _OTHERS), np.array([0.0, 0.5, 1.0])
        grid = _product(np.arange(float(functions)), places, places, shares, shares)
        values = f(grid).reshape(functions, -1)
        points = grid.reshape(len(grid), functions, -1)
        return _peaks(f, values, points, [0.06, 0.06, 0.25, 0.25])[0]


def _climb(f: _Function, fixed: Array, axes: tuple[Array, ...]) -> tuple[Array, Array]:
    """Maximise f over the unit cube at values of its first two coordinates: (n,), (d, n)."""
    grid = _product(*axes)
    n, size = fixed.shape[1], grid.shape[1]
    points = np.concatenate([np.repeat(fixed, size, axis=1), np.tile(grid, n)])
    best = f(points).reshape(n, size).argmax(1)
    start = points.reshape(len(points), n, size)[:, np.arange(n), best]
    return _ascend(f, start, [0.0, *(0.5 * float(np.diff(axis).max()) for axis in axes)])


def _peaks(f: _Function, values: Array, points: Array, steps: list[float]) -> tuple[Array, Array]:
    """Ascend from the best few points (d, S, n) of each function: (S,), (d, S)."""
    top = np.argsort(values, axis=1)[:, -_PEAKS:]
    start = np.take_along_axis(points, top[None], axis=2)
    found, ends = _ascend(f, start.reshape(len(points), -1), steps)
    found = found.reshape(top.shape)
    best = found.argmax(1)
    rows = np.arange(len(best))
    return found[rows, best], ends.reshape(start.shape)[:, rows, best]


def _ascend(f: _Function, points: Array, steps: list[float]) -> tuple[Array, Array]:
    """Move points (1 + d, n) to the best of neighbours that come nearer and nearer.

    The first coordinate stays, and the others are in the unit cube.
    """
    moves = (np.array([-step, 0.0, step] if step else [0.0]) for step in steps)
    offsets = _product(np.zeros(1), *moves)
    rows = np.arange(points.shape[1])
    values = np.full(len(rows), -np.inf)
    for power in range(_ROUNDS):
        tried = points[:, :, None] + offsets[:, None] * 0.5**power
        tried[1:] = np.clip(tried[1:], 0.0, 1.0)
        found = f(tried.reshape(len(points), -1)).reshape(len(rows), -1)
        chosen = found.argmax(1)
        points, values = tried[:, rows, chosen], found[rows, chosen]
    return values, points


def _product(*axes: NDArray[np.floating[Any]]) -> Array:
    """All combinations of values of coordinates: (d, n)."""
    return np.stack([part.ravel() for part in np.meshgrid(*axes, indexing="ij")])
