"""Steps whose sizes follow the error of each path, with output where it is asked for.

Every path is at a time of its own. A path's steps depend on that path alone: those that are done
are left out of the batch, and nothing else is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from manifold_sde.equations import StochasticEquation
from manifold_sde.solvers.bookkeeping import Book
from manifold_sde.solvers.brownian import BrownianPath
from manifold_sde.solvers.march import (
    Goal,
    Grid,
    March,
    Origin,
    Records,
    State,
    clock_left,
    crossings,
)
from manifold_sde.solvers.schemes import Scheme, StepNoise
from manifold_sde.solvers.step_control import StepControl

#: Most tries of a block, after which the paths that are done are left out.
_TRIES = 16
#: Levels by which a block may go deeper than any path was at its beginning.
_DEEPER = 4


@dataclass
class AdaptiveState(State):
    """State of a chunk whose paths are at times of their own.

    Attributes:
        tick: Where each path is, in steps of the deepest level (n,), int64.
        level: Level of the next step (n,), int64.
        accepted: Steps that counted (n,), int64.
        rejected: Steps that were tried in vain (n,), int64.
    """

    tick: Tensor = field(kw_only=True)
    level: Tensor = field(kw_only=True)
    accepted: Tensor = field(kw_only=True)
    rejected: Tensor = field(kw_only=True)

    def counts(self) -> tuple[int, int]:
        """Numbers of steps that counted, and of those tried in vain, over all paths."""
        return int(self.accepted.sum()), int(self.rejected.sum())


@dataclass(frozen=True)
class AdaptiveBlock:
    """States before and after each of B tries of some paths.

    Attributes:
        places: Places of the paths in the chunk (p,).
        x: (B + 1, D, p).
        rate: (B + 1, p).
        sums: (B + 1, k, p).
        tick: (B + 1, p).
        level: Levels of the steps tried from there, (B + 1, p).
        steps: Number B of tries.
    """

    places: Tensor
    x: Tensor
    rate: Tensor
    sums: Tensor
    tick: Tensor
    level: Tensor

    @property
    def steps(self) -> int:
        """Number B of tries."""
        return len(self.x) - 1


class AdaptiveMarch(March):
    """A scheme with steps of each path's own, for one chunk of paths.

    Args:
        sde: The equation.
        scheme: A scheme whose steps need the Brownian increment alone.
        grid: Grid of the first steps.
        book: What is added up on the way.
        brownian: Brownian paths of any set of path indices.
        paths: Indices of the chunk's paths (n,).
        control: Tolerance and range of the steps.
    """

    def __init__(
        self,
        sde: StochasticEquation,
        scheme: Scheme,
        grid: Grid,
        book: Book,
        brownian: Callable[[Tensor], BrownianPath],
        paths: Tensor,
        control: StepControl,
    ) -> None:
        super().__init__(sde, scheme, grid, book, brownian, paths)
        self.control = control
        self._tick = grid.cell * 2.0**-control.deepest

    def begin(self, x: Tensor) -> AdaptiveState:
        """State of paths at the start: (D, n)."""
        zeros = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
        return AdaptiveState(
            x,
            self.sde.reference_basis(x),
            self._rate(x),
            self.book.start(x),
            tick=zeros,
            level=torch.full_like(zeros, self.grid.level),
            accepted=zeros.clone(),
            rejected=zeros.clone(),
        )

    # The time of a path is counted in steps of the deepest level.

    def _time(self, position: Tensor) -> Tensor:
        return self.grid.start + position.to(torch.float64) * self._tick

    def _noise(self, path: BrownianPath, dw: Tensor, position: int | Tensor) -> StepNoise:
        return StepNoise(dw, _no_more)

    # Steps.

    def finished(self, state: State, goal: Goal) -> bool:
        """Whether every path has passed all that is asked for, or is lost."""
        assert isinstance(state, AdaptiveState)
        return state.position > 0 and not bool(self._moving(state, goal).any())

    def _moving(self, state: AdaptiveState, goal: Goal, places: Tensor | None = None) -> Tensor:
        """Which paths, those at these places of the chunk or all, have more steps to take."""
        if goal.log_elapsed is None:
            passed = self._time(state.tick) > goal.times[-1]
        else:
            last = goal.log_elapsed[-1]
            passed = state.sums[1] > (last if places is None else last[places])
        return ~passed & torch.isfinite(state.x).all(0)

    def _tries(self, state: AdaptiveState, goal: Goal, places: Tensor) -> int:
        """Steps of the next block: as many as the present size makes of what is left."""
        left = self._left(state, goal, places)
        steps = left * torch.pow(2.0, state.level.to(torch.float64)) / self.grid.cell
        return int((steps + 1.0).nan_to_num(1.0).clamp(1.0, _TRIES).max())

    def _left(self, state: State, goal: Goal, places: Tensor | None = None) -> Tensor:
        """Time that is left to paths at these places of the chunk, or to all, at present rates."""
        assert isinstance(state, AdaptiveState)
        if goal.log_elapsed is None:
            return goal.times[-1] - self._time(state.tick)
        last = goal.log_elapsed[-1]
        return clock_left(state, last if places is None else last[places])

    def advance(self, state: State, goal: Goal) -> AdaptiveBlock:  # type: ignore[override]
        """Try a block of steps, changing the state, and return the states on the way."""
        assert isinstance(state, AdaptiveState)
        places = torch.nonzero(self._moving(state, goal))[:, 0]
        part = _taken(state, places)
        path = self._brownian(self.paths[places])
        deepest = min(self.control.deepest, int(part.level.max()) + _DEEPER)
        kept, tries = [part], self._tries(part, goal, places)
        for _ in range(tries):
            part = self._try(part, path, deepest, self._moving(part, goal, places))
            kept.append(part)
        _put(state, places, part)
        state.position += tries
        return AdaptiveBlock(
            places,
            *(
                torch.stack([getattr(one, name) for one in kept])
                for name in ("x", "rate", "sums", "tick", "level")
            ),
        )

    def _try(
        self, state: AdaptiveState, path: BrownianPath, deepest: int, moving: Tensor
    ) -> AdaptiveState:
        """One step of each path that is still moving, compared with two of half its size."""
        control, level = self.control, state.level
        position = state.tick >> (control.deepest - level)
        dw = path.dyadic(level, position, max_level=deepest)
        halves = path.halve(dw, level, position)
        h = (self.grid.cell * torch.pow(2.0, -level.to(torch.float64))).to(state.x.dtype)
        x, anchor, rate, sums = state.x, state.anchor, state.rate, state.sums
        coarse, _ = self.scheme.step(self.sde, x, anchor, h, StepNoise(dw, _no_more))
        coarse_sums = self.book.advance(sums, h, rate, self._rate(coarse))
        for half in halves:
            x, anchor = self.scheme.step(self.sde, x, anchor, 0.5 * h, StepNoise(half, _no_more))
            new_rate = self._rate(x)
            sums = self.book.advance(sums, 0.5 * h, rate, new_rate)
            rate = new_rate
        error = control.error(x, coarse, self.book.norm_error(sums, coarse_sums))
        end = state.tick + (1 << (control.deepest - level))
        accepted, after = control.next_levels(level, error, end, deepest)
        # A step of the smallest size that is refused ends its path.
        refused, accepted = moving & ~accepted, moving & accepted
        lost = refused & (level >= control.deepest)
        old = torch.where(lost, torch.nan, state.x)
        return AdaptiveState(
            torch.where(accepted, x, old),
            torch.where(accepted, anchor, state.anchor),
            torch.where(accepted, rate, state.rate),
            torch.where(accepted, sums, state.sums),
            state.position,
            tick=torch.where(accepted, end, state.tick),
            level=torch.where(moving, after, level),
            accepted=state.accepted + accepted.to(torch.int64),
            rejected=state.rejected + refused.to(torch.int64),
        )

    # What is asked for.

    def found(self, block: object, goal: Goal) -> Iterator[tuple[int, Tensor, Records]]:
        """What is asked for and lies in a block: its number, places of paths, records there."""
        assert isinstance(block, AdaptiveBlock)
        course = self._time(block.tick) if goal.log_elapsed is None else block.sums[:, 1]
        for k, time in enumerate(goal.times):
            wanted = (
                torch.full_like(course[0], time)
                if goal.log_elapsed is None
                else goal.log_elapsed[k, block.places]
            )
            among, index = crossings(course, wanted)
            if not len(among):
                continue
            x = block.x[index, :, among].T.contiguous()
            sums = block.sums[index, :, among].T.contiguous()
            rate, position = block.rate[index, among], block.tick[index, among]
            origin = Origin(x, sums, position, block.level[index, among])
            paths = self.paths[block.places[among]]
            if goal.log_elapsed is None:
                records = self._at(paths, origin, rate, time)
            else:
                step = self._time(block.tick[index + 1, among]) - self._time(position)
                rates = rate, block.rate[index + 1, among]
                records = self.reach(paths, origin, rates, step.to(rate), wanted[among])
            yield k, block.places[among], replace(records, origin=origin)

    def _place(self, origin: Origin) -> Tensor:
        return origin.position >> (self.control.deepest - origin.level)

    def _at(self, paths: Tensor, origin: Origin, rate: Tensor, time: float) -> Records:
        """Side steps to a time that all paths share."""
        times = torch.full_like(self._time(origin.position), time)
        h = (times - self._time(origin.position)).to(origin.x.dtype)
        x, sums = self._side_step(paths, origin, rate, h)
        return Records(x, sums, times, origin)

    def resume(self, paths: Tensor, origin: Origin, log_elapsed: Tensor) -> Records:
        """Paths from states of their own to values of log E of their own.

        Args:
            paths: Path indices (p,).
            origin: Where they are taken up, with growth and log E as sums.
            log_elapsed: Values of log E to be reached (p,).
        """
        every = torch.arange(len(paths), device=paths.device)
        march = AdaptiveMarch(
            self.sde, self.scheme, self.grid, self.book, self._brownian, paths, self.control
        )
        state = march.begin(origin.x)
        state.sums, state.tick, state.level = origin.sums, origin.position, origin.level
        goal = Goal((0.0,), log_elapsed[None])
        records = Records(
            torch.full_like(origin.x, torch.nan),
            torch.full_like(origin.sums, torch.nan),
            torch.full_like(march._time(every), torch.nan),
            origin,
        )
        while not march.finished(state, goal):
            block = march.advance(state, goal)
            for _, places, some in march.found(block, goal):
                records.x[:, places] = some.x
                records.sums[:, places] = some.sums
                records.time[places] = some.time
        return records


def _no_more() -> Tensor:
    raise AssertionError("a scheme with steps of its own size draws nothing but increments")


_BY_PATH = ("x", "anchor", "rate", "sums", "tick", "level", "accepted", "rejected")


def _taken(state: AdaptiveState, places: Tensor) -> AdaptiveState:
    """The state of some paths."""
    tensors = {name: getattr(state, name)[..., places] for name in _BY_PATH}
    return AdaptiveState(position=state.position, **tensors)


def _put(state: AdaptiveState, places: Tensor, part: AdaptiveState) -> None:
    """Write the state of some paths back."""
    for name in _BY_PATH:
        whole = getattr(state, name).clone()
        whole[..., places] = getattr(part, name)
        setattr(state, name, whole)
