"""Steps of one size for a chunk of paths, with output where it is asked for.

The paths march on a fixed grid, in blocks. What is asked for between two grid points (a time, or a
value of a sum that differs from path to path) is computed by a side step from the grid point
before it, on the same Brownian path: it leaves the path itself untouched, so that the numbers do
not depend on what is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from manifold_sde.equations import StochasticEquation
from manifold_sde.solvers.bookkeeping import Book, bend
from manifold_sde.solvers.brownian import BrownianPath
from manifold_sde.solvers.schemes import Scheme, StepNoise

#: Numbers that the states of one block may hold, and the most steps of a block.
_BLOCK_NUMBERS = 1 << 23
_BLOCK_STEPS = 16
#: Distance to a grid point, in steps, that counts as none.
_ON_GRID = 1e-9
#: Iterations that find where E has a value: each gains a factor of (h rate)^2 or so.
_ITERATIONS = 12


@dataclass(frozen=True)
class Grid:
    """A uniform grid of steps, aligned with the dyadic intervals of the Brownian paths.

    Attributes:
        start: Time of grid point 0.
        h: Step.
        level: The steps are the dyadic intervals of this level.
        cell: Length of a cell, h 2^level.
    """

    start: float
    h: float
    level: int
    cell: float

    @classmethod
    def of_step(cls, start: float, h: float) -> Grid:
        """Grid of a step, with cells of length near 1.

        Steps that differ by a power of two have the same cells, and so the same paths.
        """
        level = 0
        while h * 2.0**level < 0.75:
            level += 1
        return cls(start, h, level, h * 2.0**level)


@dataclass(frozen=True)
class Goal:
    """What is asked for: times that all paths share, or values of log E, each path its own.

    Attributes:
        times: Times, increasing (K,).
        log_elapsed: Values of log E (K, n), increasing along K, or ``None`` where times count.
    """

    times: tuple[float, ...]
    log_elapsed: Tensor | None = None


@dataclass
class State:
    """State of a chunk at a grid point, paths last.

    Attributes:
        x: States (D, n).
        anchor: Tangent bases there (D, d, n).
        rate: Rate of the book there (n,).
        sums: Sums of the book (k, n).
        position: Number of steps taken.
    """

    x: Tensor
    anchor: Tensor
    rate: Tensor
    sums: Tensor
    position: int = 0

    def counts(self) -> tuple[int, int]:
        """Numbers of steps taken, and of steps that were tried in vain."""
        return self.position, 0


@dataclass(frozen=True)
class Block:
    """States at consecutive grid points, the first of them at ``position``.

    Attributes:
        position: Number of the first grid point.
        x: (B + 1, D, n).
        rate: (B + 1, n).
        sums: (B + 1, k, n).
    """

    position: int
    x: Tensor
    rate: Tensor
    sums: Tensor

    @property
    def steps(self) -> int:
        """Number B of steps."""
        return len(self.x) - 1


@dataclass(frozen=True)
class Origin:
    """Where paths can be taken up again: states between which no step is under way.

    Attributes:
        x: States (D, p).
        sums: Sums of the book (k, p).
        position: Number of the grid point (p,), int64.
        level: Level of the step that follows (p,), int64.
    """

    x: Tensor
    sums: Tensor
    position: Tensor
    level: Tensor


@dataclass(frozen=True)
class Records:
    """What is known of paths at one moment.

    Attributes:
        x: States (D, p).
        sums: Sums of the book (k, p).
        time: The equation's own time (p,).
        origin: Where the last whole step before ended.
    """

    x: Tensor
    sums: Tensor
    time: Tensor
    origin: Origin


class March:
    """A scheme on a grid, for one chunk of paths.

    Args:
        sde: The equation.
        scheme: The scheme.
        grid: The grid.
        book: What is added up on the way.
        brownian: Brownian paths of any set of path indices, (p,) int64.
        paths: Indices of the chunk's paths (n,).
    """

    def __init__(
        self,
        sde: StochasticEquation,
        scheme: Scheme,
        grid: Grid,
        book: Book,
        brownian: Callable[[Tensor], BrownianPath],
        paths: Tensor,
    ) -> None:
        self.sde = sde
        self.scheme = scheme
        self.grid = grid
        self.book = book
        self.paths = paths
        self._brownian = brownian
        self._path = brownian(paths)

    def begin(self, x: Tensor) -> State:
        """State of paths at the start: (D, n)."""
        anchor = self.sde.reference_basis(x)
        return State(x, anchor, self._rate(x), self.book.start(x))

    def _rate(self, x: Tensor) -> Tensor:
        return self.book.rate(x, self.sde.noise_trace(x))

    def block_steps(self, x: Tensor) -> int:
        """Steps that a block of these states may have."""
        return max(1, min(_BLOCK_STEPS, _BLOCK_NUMBERS // max(1, x.numel())))

    def advance(self, state: State, goal: Goal) -> Block:
        """Take a block of steps, changing the state, and return the states on the way."""
        first, steps = state.position, self._next_steps(state, goal)
        level = self.grid.level
        increments = self._path.increments(level, first, steps)
        h = torch.tensor(self.grid.h, dtype=state.x.dtype, device=state.x.device)
        kept = [(state.x, state.rate, state.sums)]
        for i in range(steps):
            noise = self._noise(self._path, increments[i], first + i)
            x, anchor = self.scheme.step(self.sde, state.x, state.anchor, h, noise)
            rate = self._rate(x)
            sums = self.book.advance(state.sums, h, state.rate, rate)
            state.x, state.anchor, state.rate, state.sums = x, anchor, rate, sums
            kept.append((x, rate, sums))
        state.position = first + steps
        xs, rates, sums_of = (torch.stack(parts) for parts in zip(*kept, strict=True))
        return Block(first, xs, rates, sums_of)

    def _noise(self, path: BrownianPath, dw: Tensor, position: int | Tensor) -> StepNoise:
        return StepNoise(dw, lambda: path.auxiliary(self.grid.level, position, dw.shape[0]))

    # What is asked for.

    def _last_step(self, goal: Goal) -> int:
        """Number of steps to the last time asked for."""
        return max(1, -int(-((goal.times[-1] - self.grid.start) / self.grid.h - _ON_GRID) // 1))

    def finished(self, state: State, goal: Goal) -> bool:
        """Whether all that is asked for has been passed."""
        if goal.log_elapsed is None:
            return state.position >= self._last_step(goal)
        reached = state.sums[1] > goal.log_elapsed[-1]
        return state.position > 0 and bool((reached | ~torch.isfinite(state.x).all(0)).all())

    def _next_steps(self, state: State, goal: Goal) -> int:
        """Steps of the next block."""
        most = self.block_steps(state.x)
        if goal.log_elapsed is None:
            return min(most, self._last_step(goal) - state.position)
        # As many as it takes at the present rates, and a few more.
        steps = clock_left(state, goal.log_elapsed[-1]) / self.grid.h
        return int((1.0 + 1.05 * steps.nan_to_num(0.0, most)).clamp(max=most).max())

    def time_left(self, state: State, goal: Goal) -> float:
        """Time that is left to a path in the middle of the others, at the present rates."""
        return float(self._left(state, goal).nanmedian().nan_to_num(0.0).clamp(min=0.0))

    def _left(self, state: State, goal: Goal) -> Tensor:
        if goal.log_elapsed is None:
            steps = self._last_step(goal) - state.position
            return torch.full_like(state.rate, steps * self.grid.h)
        return clock_left(state, goal.log_elapsed[-1])

    def found(self, block: Block, goal: Goal) -> Iterator[tuple[int, Tensor, Records]]:
        """What is asked for and lies in a block: its number, places of paths, records there."""
        if goal.log_elapsed is not None:
            yield from self._found_elapsed(block, goal.log_elapsed)
            return
        end = block.position + block.steps
        everyone = torch.arange(block.x.shape[-1], device=block.x.device)
        for k, time in enumerate(goal.times):
            offset = (time - self.grid.start) / self.grid.h + _ON_GRID
            if block.position <= offset < end or (end == self._last_step(goal) and offset >= end):
                yield k, everyone, self.at_time(block, time)

    def _found_elapsed(
        self, block: Block, log_elapsed: Tensor
    ) -> Iterator[tuple[int, Tensor, Records]]:
        """Paths that reach values of log E in a block, each its own, (K, n)."""
        course = block.sums[:, 1]
        for k, wanted in enumerate(log_elapsed):
            places, index = crossings(course, wanted)
            if not len(places):
                continue
            x = block.x[index, :, places].T.contiguous()
            sums = block.sums[index, :, places].T.contiguous()
            origin = self._origin(x, sums, block.position + index)
            h = torch.full_like(origin.x[0], self.grid.h)
            rates = block.rate[index, places], block.rate[index + 1, places]
            yield k, places, self.reach(self.paths[places], origin, rates, h, wanted[places])

    def at_time(self, block: Block, time: float) -> Records:
        """All paths of a block at a time that lies in it."""
        offset = (time - self.grid.start) / self.grid.h
        index = min(int(offset + _ON_GRID), block.position + block.steps) - block.position
        x, rate, sums = block.x[index], block.rate[index], block.sums[index]
        n = x.shape[1]
        times = torch.full((n,), time, dtype=torch.float64, device=x.device)
        left = offset - (block.position + index)
        position = torch.full((n,), block.position + index, device=x.device)
        origin = self._origin(x, sums, position)
        if abs(left) <= _ON_GRID:
            return Records(x, sums, times, origin)
        h = torch.full((n,), left * self.grid.h, dtype=x.dtype, device=x.device)
        x, sums = self._side_step(self.paths, origin, rate, h)
        return Records(x, sums, times, origin)

    def _origin(self, x: Tensor, sums: Tensor, position: Tensor) -> Origin:
        return Origin(x, sums, position, torch.full_like(position, self.grid.level))

    def reach(
        self,
        paths: Tensor,
        origin: Origin,
        rates: tuple[Tensor, Tensor],
        step: Tensor,
        log_elapsed: Tensor,
    ) -> Records:
        """Side steps of the length at which E has a given value.

        The rate counts as linear in the step, as in the book, so that the moments of a path are
        increasing in what is asked for, whatever its noise does in between.

        Args:
            paths: Path indices (p,).
            origin: Grid points, with growth and log E as sums.
            rates: Rates there, and at the ends of the steps that follow, (p,) each.
            step: Lengths of these steps (p,).
            log_elapsed: Values of log E to be reached within the step, (p,).
        """
        missing = still_missing(origin.sums, log_elapsed)
        rate, slope = rates[0], (rates[1] - rates[0]) / step
        h = missing / relative_growth(missing, rate)
        for _ in range(_ITERATIONS):
            after = rate + slope * h.minimum(step)
            needed = missing / bend(h, rate, after)
            h = needed / relative_growth(needed, 0.5 * (rate + after))
        h = h.minimum(step)
        x = self._moved(paths, origin, h)
        sums = self.book.advance(origin.sums, h, rate, rate + slope * h)
        sums = torch.where(h <= 0, origin.sums, sums)
        return Records(x, sums, self._time(origin.position) + h, origin)

    def _longest(self, origin: Origin) -> Tensor:
        """Lengths of the steps that follow (p,), float64."""
        return self.grid.cell * torch.exp2(-origin.level.double())

    def _place(self, origin: Origin) -> Tensor:
        """Positions of the steps that follow among the dyadic intervals of their levels (p,)."""
        return origin.position

    def _time(self, position: Tensor) -> Tensor:
        """Times of grid points (p,)."""
        return self.grid.start + position.to(torch.float64) * self.grid.h

    def resume(self, paths: Tensor, origin: Origin, log_elapsed: Tensor) -> Records:
        """Paths from grid points of their own to values of log E of their own.

        Args:
            paths: Path indices (p,).
            origin: Where they are taken up, with growth and log E as sums.
            log_elapsed: Values of log E to be reached (p,).
        """
        path = self._brownian(paths)
        x, sums, position = origin.x, origin.sums, origin.position
        h = torch.tensor(self.grid.h, dtype=x.dtype, device=x.device)
        anchor, rate = self.sde.reference_basis(x), self._rate(x)
        level = self.grid.level
        moving, after = torch.isfinite(x).all(0), rate
        while bool(moving.any()):
            dw = path.dyadic(level, position, max_level=level)
            noise = self._noise(path, dw, position)
            x_new, anchor_new = self.scheme.step(self.sde, x, anchor, h, noise)
            rate_new = self._rate(x_new)
            sums_new = self.book.advance(sums, h, rate, rate_new)
            after = torch.where(moving, rate_new, after)
            moving &= sums_new[1] <= log_elapsed
            x = torch.where(moving, x_new, x)
            anchor = torch.where(moving, anchor_new, anchor)
            rate = torch.where(moving, rate_new, rate)
            sums = torch.where(moving, sums_new, sums)
            position = position + moving
        step = torch.full_like(rate, self.grid.h)
        origin = self._origin(x, sums, position)
        return self.reach(paths, origin, (rate, after), step, log_elapsed)

    def _side_step(
        self, paths: Tensor, origin: Origin, rate: Tensor, h: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Steps of lengths (p,) from grid points: states and sums at their ends."""
        x = self._moved(paths, origin, h)
        sums = self.book.advance(origin.sums, h, rate, self._rate(x))
        return x, torch.where(h <= 0, origin.sums, sums)

    def _moved(self, paths: Tensor, origin: Origin, h: Tensor) -> Tensor:
        """States after steps of lengths (p,) from grid points, lost where a length is NaN."""
        path = self._brownian(paths)
        dw = path.beginning(origin.level, self._place(origin), h.double() / self._longest(origin))
        noise = self._noise(path, dw, origin.position)
        x = origin.x
        moved, _ = self.scheme.step(self.sde, x, self.sde.reference_basis(x), h, noise)
        return torch.where(h <= 0, x, torch.where(h > 0, moved, torch.nan))


def crossings(course: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where increasing courses pass values.

    Args:
        course: Values at B + 1 moments (B + 1, n).
        wanted: Value that each is to pass (n,).

    Returns:
        Places of the courses that do (p,), and the last moments before (p,).
    """
    crossing = (course[:-1] <= wanted) & (wanted < course[1:])
    places = torch.nonzero(crossing.any(0))[:, 0]
    return places, crossing[:, places].to(torch.int8).argmax(0)


def clock_left(state: State, log_elapsed: Tensor) -> Tensor:
    """Clock until log E reaches values (n,), at the present rates: (n,); 0 where it has."""
    missing = still_missing(state.sums, log_elapsed).clamp(min=0)
    return torch.log1p(state.rate * missing) / state.rate


def still_missing(sums: Tensor, log_elapsed: Tensor) -> Tensor:
    """What E lacks to reach values, over its rate of growth now: (2, n), (n,) -> (n,)."""
    growth, elapsed = sums
    return torch.exp(log_elapsed - growth) - torch.exp(elapsed - growth)


def relative_growth(missing: Tensor, rate: Tensor) -> Tensor:
    """How much faster E grows than at its start: missing / (log(1 + rate missing) / rate)."""
    z = rate * missing
    safe = torch.where(z > 0, z, torch.ones_like(z))
    return torch.where(z > 0, safe / torch.log1p(safe), torch.ones_like(z))
