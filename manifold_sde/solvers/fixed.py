"""Steps of one size for a chunk of paths, with output at the save times.

The paths step on a fixed grid, in blocks. What is saved between two grid points (at a time, or at a
value of an integral that differs from path to path) is computed by a side step from the grid point
before it, on the same Brownian path: it leaves the path itself untouched, so that the numbers do
not depend on the save times.

The steps are proposed here, and taken by :func:`~manifold_sde.solvers.integrate.integrate`: what
yields a :class:`Step` finds its end there when it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from manifold_sde.arguments import is_known_false
from manifold_sde.equations import StochasticEquation
from manifold_sde.solvers.brownian import BrownianPath
from manifold_sde.solvers.clock import RunningIntegrals, clock_left, clock_within
from manifold_sde.solvers.halving import Halving, PathStates, Step, step_noise
from manifold_sde.solvers.schemes import StepNoise

#: Numbers that the states of one block may hold, and the most steps of a block.
_BLOCK_NUMBERS = 1 << 23
_BLOCK_STEPS = 16
#: Distance to a grid point, in steps, that counts as none.
_ON_GRID = 1e-9


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

    def halved(self, times: int) -> Grid:
        """The grid of the same cells whose step is halved so many times."""
        return Grid(self.start, self.h * 2.0**-times, self.level + times, self.cell)


@dataclass(frozen=True)
class SaveTimes:
    """When paths are saved: times that all share, or values of log E, each path its own.

    Attributes:
        times: Times, increasing (K,).
        log_elapsed: Values of log E (K, n), increasing along K, or ``None`` where times count.
    """

    times: tuple[float, ...]
    log_elapsed: Tensor | None = None


@dataclass(frozen=True)
class RestartState:
    """Where paths can be taken up again: states between which no step is under way.

    Attributes:
        x: States (..., D, p).
        sums: Running integrals (..., k, p).
        position: Number of the grid point (..., p), int64.
        level: Level of the step that follows (..., p), int64.
    """

    x: Tensor
    sums: Tensor
    position: Tensor
    level: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


@dataclass(frozen=True)
class SavedValues:
    """What is known of paths at one save time.

    Attributes:
        x: States (D, p).
        sums: Running integrals (k, p).
        time: The equation's own time (p,).
        restart: Where the last whole step before ended.
    """

    x: Tensor
    sums: Tensor
    time: Tensor
    restart: RestartState


@dataclass
class State(PathStates):
    """State of a chunk at a grid point.

    Attributes:
        position: Number of steps taken.
        halved: Number of steps that a path did not survive and took by their halves.
    """

    position: int = 0
    halved: int = 0

    def counts(self) -> tuple[int, int]:
        """Numbers of accepted and of rejected steps."""
        return self.position, self.halved


#: Receives the number of a save time, places of paths in the chunk, and what is known of them.
Save = Callable[[int, Tensor, SavedValues], object]


class FixedSteps:
    """Steps on a grid, for one chunk of paths; a step that a path does not survive is halved.

    Args:
        sde: The equation.
        grid: The grid.
        integrals: What is integrated on the way.
        brownian: Brownian paths of any set of path indices, (p,) int64.
        paths: Indices of the chunk's paths (n,).
        saved: When paths are saved.
    """

    #: Whether steps are halved here.
    halves = True

    def __init__(
        self,
        sde: StochasticEquation,
        grid: Grid,
        integrals: RunningIntegrals,
        brownian: Callable[[Tensor], BrownianPath],
        paths: Tensor,
        saved: SaveTimes,
    ) -> None:
        self.sde = sde
        self.grid = grid
        self.integrals = integrals
        self.paths = paths
        self.saved = saved
        self.halving = Halving(brownian, integrals, grid.cell)
        self._brownian = brownian
        self._path = brownian(paths)

    def begin(self, x: Tensor, restart: RestartState | None = None) -> State:
        """State of paths at the start (D, n), or where they are taken up again."""
        sums = self.integrals.start(x) if restart is None else restart.sums
        return State(x, self._basis(x), self.rate(x), sums)

    def _basis(self, x: Tensor) -> Tensor:
        """Reference bases at states: (D, n) -> (D, d, n); those of one start for all, once."""
        if x.shape[1] > 1 and is_known_false((x != x[:, :1]).any()):
            return self.sde.reference_basis(x[:, :1]).expand(-1, -1, x.shape[1]).contiguous()
        return self.sde.reference_basis(x)

    def rate(self, x: Tensor) -> Tensor:
        """Rate of the running integrals at states: (D, n) -> (n,)."""
        return self.integrals.rate(x, self.sde.noise_trace(x))

    def block(self, state: State, save: Save) -> Iterator[Step]:
        """Propose a block of steps, change the state, and save what lies in the block."""
        first, steps, begin = state.position, self._next_steps(state), PathStates(*state.tensors())
        increments = self._path.increments(self.grid.level, first, steps)
        h = torch.tensor(self.grid.h, dtype=state.x.dtype, device=state.x.device)
        trajectory = [(state.x, state.rate, state.sums)]
        for i in range(steps):
            noise = self._noise(self._path, increments[i], first + i)
            step = Step(state.x, state.basis, h, noise)
            yield step
            state.sums = self.integrals.advance(state.sums, h, state.rate, step.rate)
            state.x, state.basis, state.rate = step.end, step.end_basis, step.rate
            trajectory.append((state.x, state.rate, state.sums))
        state.position = first + steps
        x, rate, sums = (torch.stack(parts) for parts in zip(*trajectory, strict=True))
        yield from self._mend(state, begin, first, (x, rate, sums))
        if self.saved.log_elapsed is None:
            yield from self._save_times(first, x, rate, sums, save)
        else:
            yield from self._save_thresholds(first, x, rate, sums, save)

    def _mend(
        self,
        state: State,
        begin: PathStates,
        first: int,
        trajectory: tuple[Tensor, Tensor, Tensor],
    ) -> Iterator[Step]:
        """Take the steps of a block again for the paths that were lost in it, by halves.

        Args:
            state: The state at its end, which is changed.
            begin: The states at its beginning.
            first: Number of its first step.
            trajectory: States, rates and integrals between its steps, which are changed.
        """
        lost = begin.alive() & ~state.alive()
        if not is_known_false(~lost.any()):
            return
        places = torch.nonzero(lost)[:, 0]
        paths, part, before = self.paths[places], begin.at(places), self.halving.count
        for i in range(1, len(trajectory[0])):
            position = torch.full_like(places, first + i - 1)
            part = yield from self.halving.advance(paths, part, self.grid.level, position)
            for whole, some in zip(trajectory, (part.x, part.rate, part.sums), strict=True):
                whole[i, ..., places] = some
        mended = state.with_some(places, part)
        state.x, state.basis, state.rate, state.sums = mended.tensors()
        state.halved += self.halving.count - before

    def _noise(self, path: BrownianPath, dw: Tensor, position: int | Tensor) -> StepNoise:
        return step_noise(path, dw, self.grid.level, position)

    # How far it is.

    def _last_step(self) -> int:
        """Number of steps to the last save time."""
        offset = (self.saved.times[-1] - self.grid.start) / self.grid.h
        return max(1, -int(-(offset - _ON_GRID) // 1))

    def finished(self, state: State) -> bool:
        """Whether the last save time has been passed."""
        if self.saved.log_elapsed is None:
            return state.position >= self._last_step()
        reached = state.sums[1] > self.saved.log_elapsed[-1]
        return state.position > 0 and bool((reached | ~torch.isfinite(state.x).all(0)).all())

    def moving(self, state: State) -> int:
        """How many paths take the steps of the next block."""
        return len(self.paths)

    def left(self, state: State) -> tuple[float, float]:
        """Steps that are left, about: of the path that has most, and the sum over the paths."""
        if self.finished(state):
            return 0.0, 0.0
        steps = self._left(state).nan_to_num(0.0, 0.0, 0.0).clamp(min=0.0).max() / self.grid.h
        return float(steps), float(steps) * len(self.paths)

    def _next_steps(self, state: State) -> int:
        """Steps of the next block; one at the beginning, where what it costs is not known."""
        most = max(1, min(_BLOCK_STEPS, _BLOCK_NUMBERS // max(1, state.x.numel())))
        most = min(most, max(1, state.position))
        if self.saved.log_elapsed is None:
            return min(most, self._last_step() - state.position)
        # As many as it takes at the present rates, and a few more.
        steps = self._left(state) / self.grid.h
        return int((1.0 + 1.05 * steps.nan_to_num(0.0, most)).clamp(max=most).max())

    def time_left(self, state: State) -> float:
        """Time that is left to a path in the middle of the others, at the present rates."""
        return float(self._left(state).nanmedian().nan_to_num(0.0).clamp(min=0.0))

    def _left(self, state: State) -> Tensor:
        if self.saved.log_elapsed is None:
            steps = self._last_step() - state.position
            return torch.full_like(state.rate, steps * self.grid.h)
        return clock_left(state.sums, state.rate, self.saved.log_elapsed[-1])

    # What is saved.

    def _save_times(
        self, first: int, x: Tensor, rate: Tensor, sums: Tensor, save: Save
    ) -> Iterator[Step]:
        """Save all paths at the times that lie in a block (B + 1, ..., n)."""
        end, last = first + len(x) - 1, self._last_step()
        everyone = torch.arange(x.shape[-1], device=x.device)
        for k, time in enumerate(self.saved.times):
            offset = (time - self.grid.start) / self.grid.h
            reached = offset + _ON_GRID
            if not (first <= reached < end or (end == last and reached >= end)):
                continue
            index = min(int(reached), end) - first
            position = torch.full_like(everyone, first + index)
            restart = self._restart(x[index], sums[index], position)
            times = torch.full_like(everyone, time, dtype=torch.float64)
            left = offset - (first + index)
            if abs(left) <= _ON_GRID:
                save(k, everyone, SavedValues(x[index], sums[index], times, restart))
                continue
            h = torch.full_like(rate[index], left * self.grid.h)
            moved = yield from self._side_step(self.paths, restart, rate[index], h)
            save(k, everyone, SavedValues(*moved, times, restart))

    def _save_thresholds(
        self, first: int, x: Tensor, rate: Tensor, sums: Tensor, save: Save
    ) -> Iterator[Step]:
        """Save paths that reach their values of log E in a block (B + 1, ..., n)."""
        assert self.saved.log_elapsed is not None
        trajectory = sums[:, 1]
        for k, wanted in enumerate(self.saved.log_elapsed):
            places, index = threshold_crossings(trajectory, wanted)
            if not len(places):
                continue
            restart = self._restart(
                x[index, :, places].T.contiguous(),
                sums[index, :, places].T.contiguous(),
                first + index,
            )
            h = torch.full_like(restart.x[0], self.grid.h)
            rates = rate[index, places], rate[index + 1, places]
            paths = self.paths[places]
            values = yield from self._reach(paths, restart, rates, h, wanted[places])
            save(k, places, values)

    def _restart(self, x: Tensor, sums: Tensor, position: Tensor) -> RestartState:
        return RestartState(x, sums, position, torch.full_like(position, self.grid.level))

    def _reach(
        self,
        paths: Tensor,
        restart: RestartState,
        rates: tuple[Tensor, Tensor],
        step: Tensor,
        log_elapsed: Tensor,
    ) -> Generator[Step, None, SavedValues]:
        """Propose side steps of the length at which E has a given value.

        Args:
            paths: Path indices (p,).
            restart: Grid points, with growth and log E as integrals.
            rates: Rates there, and at the ends of the steps that follow, (p,) each.
            step: Lengths of these steps (p,).
            log_elapsed: Values of log E to be reached within the step, (p,).
        """
        h, after = clock_within(restart.sums, rates, step, log_elapsed)
        moved = yield from self._moved(paths, restart, h, rated=False)
        sums = self.integrals.advance(restart.sums, h, rates[0], after)
        sums = torch.where(h <= 0, restart.sums, sums)
        return SavedValues(moved[0], sums, self._time(restart.position) + h, restart)

    def _side_step(
        self, paths: Tensor, restart: RestartState, rate: Tensor, h: Tensor
    ) -> Generator[Step, None, tuple[Tensor, Tensor]]:
        """Propose steps of lengths (p,) from grid points: states and integrals at their ends."""
        x, after = yield from self._moved(paths, restart, h)
        sums = self.integrals.advance(restart.sums, h, rate, after)
        return x, torch.where(h <= 0, restart.sums, sums)

    def _moved(
        self, paths: Tensor, restart: RestartState, h: Tensor, *, rated: bool = True
    ) -> Generator[Step, None, tuple[Tensor, Tensor]]:
        """States after steps of lengths (p,), lost where a length is NaN, and the rates there."""
        path = self._brownian(paths)
        longest = self.grid.cell * torch.exp2(-restart.level.double())
        dw = path.beginning(restart.level, self._place(restart), h.double() / longest)
        step = Step(restart.x, None, h, self._noise(path, dw, restart.position), rated)
        yield step
        end = torch.where(h <= 0, restart.x, torch.where(h > 0, step.end, torch.nan))
        rate = step.rate if rated else h
        fine = torch.isfinite(end).all(0) | ~torch.isfinite(restart.x).all(0) | ~(h > 0)
        if self.halves and is_known_false(fine.all()):
            places = torch.nonzero(~fine)[:, 0]
            x = restart.x[:, places].contiguous()
            begin = PathStates(
                x, self.sde.reference_basis(x), self.rate(x), restart.sums[:, places]
            )
            position = self._place(restart)[places]
            part = yield from self.halving.partial(
                paths[places], begin, self.grid.level, position, h[places]
            )
            end[:, places] = part.x
            rate = rate.clone()
            rate[places] = part.rate if rated else h[places]
        return end, rate

    def _place(self, restart: RestartState) -> Tensor:
        """Positions of the steps that follow among the dyadic intervals of their levels (p,)."""
        return restart.position

    def _time(self, position: Tensor) -> Tensor:
        """Times of grid points (p,)."""
        return self.grid.start + position.to(torch.float64) * self.grid.h


class RestartedSteps(FixedSteps):
    """Steps on a grid, of paths that are taken up again at grid points of their own.

    Args:
        sde, grid, integrals, brownian, paths, saved: As for :class:`FixedSteps`.
        restart: Where the paths are taken up, with growth and log E as integrals.
    """

    restart: RestartState

    def begin(self, x: Tensor, restart: RestartState | None = None) -> State:
        """State of paths where they are taken up again."""
        assert restart is not None
        self.restart = restart
        return super().begin(x, restart)

    def finished(self, state: State) -> bool:
        """Whether the only block is done."""
        return state.position > 0

    def block(self, state: State, save: Save) -> Iterator[Step]:
        """Propose steps until every path is in the step in which E reaches its value."""
        assert self.saved.log_elapsed is not None
        log_elapsed, level, path = self.saved.log_elapsed[0], self.grid.level, self._path
        states, position = PathStates(*state.tensors()), self.restart.position
        h = states.x.new_tensor(self.grid.h)
        moving, after = states.alive(), states.rate
        while bool(moving.any()):
            dw = path.dyadic(level, position, max_level=level)
            step = Step(states.x, states.basis, h, self._noise(path, dw, position))
            yield step
            sums = self.integrals.advance(states.sums, h, states.rate, step.rate)
            new = PathStates(step.end, step.end_basis, step.rate, sums)
            before = replace(states, x=torch.where(moving, states.x, torch.nan))
            new = yield from self.halving.mended(self.paths, before, new, level, position)
            after = torch.where(moving, new.rate, after)
            moving &= new.sums[1] <= log_elapsed
            states = new.where(moving, states)
            position = position + moving
        length = torch.full_like(states.rate, self.grid.h)
        restart, rates = self._restart(states.x, states.sums, position), (states.rate, after)
        values = yield from self._reach(self.paths, restart, rates, length, log_elapsed)
        save(0, torch.arange(len(self.paths), device=position.device), values)
        state.position = 1


def threshold_crossings(trajectory: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where increasing trajectories pass values.

    Args:
        trajectory: Values at B + 1 moments (B + 1, n).
        wanted: Value that each is to pass (n,).

    Returns:
        Places of the trajectories that do (p,), and the last moments before (p,).
    """
    crossing = (trajectory[:-1] <= wanted) & (wanted < trajectory[1:])
    places = torch.nonzero(crossing.any(0))[:, 0]
    return places, crossing[:, places].to(torch.int8).argmax(0)
