r"""Steps whose sizes follow the error, each path its own.

A step of size h is compared with two of half its size on the same Brownian path. The difference,
relative to the tolerance, is

.. math::

    e = \frac{\|x_{h/2} - x_h\|}{\mathrm{atol} + \mathrm{rtol}\,\|x_{h/2}\|}.

At e <= 1 the two half steps count, otherwise the step is rejected and taken again, smaller. Steps
are the dyadic intervals of the Brownian tree: a rejected one is refined, so that no value of the
Brownian path that was looked at is ever skipped (skipping them would bias the paths; Foster and
Jelincic, arXiv:2311.14201; Gaines and Lyons, SIAM J. Appl. Math. 57, 1997).

Every path is at a time of its own, and its steps depend on that path alone: those that are done are
left out of the batch, and nothing else is shared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from manifold_sde.columns import column_norms
from manifold_sde.equations import StochasticEquation
from manifold_sde.errors import ArgumentError
from manifold_sde.solvers.brownian import BrownianPath
from manifold_sde.solvers.clock import RunningIntegrals, clock_left
from manifold_sde.solvers.fixed import (
    FixedSteps,
    Grid,
    RestartState,
    Save,
    SavedValues,
    SaveTimes,
    State,
    Step,
    threshold_crossings,
)
from manifold_sde.solvers.schemes import Scheme, StepNoise

#: Error that a new size aims at, relative to the tolerance, as a factor of the size.
_SAFETY = 0.9
#: Most halvings after one step that was refused, and those where it was lost altogether.
_MOST_HALVINGS = 3
_LOST_HALVINGS = 2
#: Levels of steps larger and smaller than the first one, where no limits are given.
_LARGER = 5
_SMALLER = 20
#: Most tries of a block, after which the paths that are done are left out.
_TRIES = 16
#: Levels by which a block may go deeper than any path was at its beginning.
_DEEPER = 4
#: Deepest level that the Brownian tree has for whole steps and their halves.
_DEEPEST = 39


@dataclass(frozen=True)
class Tolerance:
    """What a user says of adaptive steps, in the time of the given equation.

    Attributes:
        rtol: Tolerance relative to the norm.
        atol: Absolute tolerance.
        dt_min: Smallest step, or ``None`` for the first one over 2^20.
        dt_max: Largest step, or ``None`` for 32 times the first one.
    """

    rtol: float
    atol: float
    dt_min: float | None = None
    dt_max: float | None = None

    def plan(
        self, start: float, h: float, clock_unit: float, scheme: Scheme
    ) -> tuple[Grid, StepControl]:
        """The grid of the first steps, whose cell is the largest step, and the control.

        Args:
            start: Time at the start.
            h: First step, in the time of the equation that is simulated.
            clock_unit: What its time is multiplied by to give that of the given equation.
            scheme: The scheme.

        Raises:
            ArgumentError: If the limits leave no step.
        """
        largest = h * 2.0**_LARGER if self.dt_max is None else self.dt_max / clock_unit
        h = min(h, largest)
        level = math.floor(math.log2(largest / h) + 1e-9)
        smaller = _SMALLER
        if self.dt_min is not None:
            ratio = math.log2(h) + math.log2(clock_unit) - math.log2(self.dt_min)
            smaller = math.floor(ratio + 1e-9)
        if smaller < 0:
            raise ArgumentError(
                "the smallest step is larger than the first one",
                received=f"dt_min={self.dt_min:g}, first step {h * clock_unit:g}",
                expected="dt_min at most dt and dt_max",
                remedy="leave dt_min out",
            )
        grid = Grid(start, h, level, h * 2.0**level)
        exponent = scheme.strong_order + 0.5
        deepest = min(_DEEPEST, level + smaller)
        return grid, StepControl(self.rtol, self.atol, exponent, deepest)


#: Schemes that may be adaptive: functions of the Brownian path alone, in Stratonovich form.
ADAPTIVE = ("heun", "midpoint")


@dataclass(frozen=True)
class StepControl:
    """Tolerance and range of the steps of adaptive runs.

    Attributes:
        rtol: Tolerance relative to the norm of the state.
        atol: Absolute tolerance, in units of the state.
        exponent: Power of the step by which the error of one step falls: the strong order of the
            scheme for noise that does not commute, and a half.
        deepest: Level of the smallest step: the steps are cell / 2^level.
    """

    rtol: float
    atol: float
    exponent: float
    deepest: int

    def error(self, fine: Tensor, coarse: Tensor, beside: Tensor) -> Tensor:
        """Errors relative to the tolerance: states (D, n) -> (n,); NaN where a path was lost.

        Args:
            fine: States after two half steps.
            coarse: States after the whole step.
            beside: Errors of the logarithm of the norm (n,), where it is kept apart.
        """
        size = self.atol + self.rtol * column_norms(fine)
        apart = column_norms(fine - coarse) / size
        return torch.maximum(apart, beside / (self.atol + self.rtol))

    def next_levels(
        self, level: Tensor, error: Tensor, end: Tensor, deepest: int
    ) -> tuple[Tensor, Tensor]:
        """Which steps count, and the level of the next.

        Args:
            level: Levels of the steps (n,).
            error: Their errors (n,).
            end: Where they end, in steps of the deepest level (n,).
            deepest: Deepest level now.

        Returns:
            Whether the step counts (n,), and levels (n,) at most ``deepest``.
        """
        accepted = error <= 1.0
        # In halvings: 0 and less where a longer step would do.
        halvings = torch.log2(error.clamp(min=1e-30)) / self.exponent - torch.log2(
            torch.full_like(error, _SAFETY)
        )
        more = halvings.ceil().clamp(1.0, _MOST_HALVINGS)
        more = torch.where(torch.isfinite(error), more, float(_LOST_HALVINGS)).to(torch.int64)
        # A longer step begins where its interval does.
        aligned = end & ((1 << (self.deepest - level + 1)) - 1) == 0
        longer = aligned & (halvings <= -1.0) & (level > 0)
        after = torch.where(accepted, level - longer.to(torch.int64), level + more)
        return accepted, after.clamp(max=deepest)


@dataclass
class AdaptiveState(State):
    """State of a chunk whose paths are at times of their own.

    Attributes:
        tick: Where each path is, in steps of the deepest level (n,), int64.
        level: Level of the next step (n,), int64.
        accepted: Number of accepted steps (n,), int64.
        rejected: Number of rejected steps (n,), int64.
    """

    tick: Tensor = field(kw_only=True)
    level: Tensor = field(kw_only=True)
    accepted: Tensor = field(kw_only=True)
    rejected: Tensor = field(kw_only=True)

    def counts(self) -> tuple[int, int]:
        """Numbers of accepted and of rejected steps, over all paths."""
        return int(self.accepted.sum()), int(self.rejected.sum())

    def of(self, places: Tensor) -> AdaptiveState:
        """The state of some paths."""
        return AdaptiveState(
            position=self.position, **{k: getattr(self, k)[..., places] for k in _BY_PATH}
        )

    def put(self, places: Tensor, part: AdaptiveState) -> None:
        """Write the state of some paths back."""
        for name in _BY_PATH:
            whole = getattr(self, name).clone()
            whole[..., places] = getattr(part, name)
            setattr(self, name, whole)


_BY_PATH = ("x", "basis", "rate", "sums", "tick", "level", "accepted", "rejected")


class AdaptiveSteps(FixedSteps):
    """Steps of each path's own, for one chunk of paths, by a scheme that needs increments alone.

    Args:
        sde, grid, integrals, brownian, paths, saved: As for :class:`FixedSteps`; the grid is
            that of the first steps.
        control: Tolerance and range of the steps.
    """

    halves = False  # here the control does it

    def __init__(
        self,
        sde: StochasticEquation,
        grid: Grid,
        integrals: RunningIntegrals,
        brownian: Callable[[Tensor], BrownianPath],
        paths: Tensor,
        saved: SaveTimes,
        control: StepControl,
    ) -> None:
        super().__init__(sde, grid, integrals, brownian, paths, saved)
        self.control = control
        self._tick = grid.cell * 2.0**-control.deepest

    def begin(self, x: Tensor, restart: RestartState | None = None) -> AdaptiveState:
        """State of paths at the start (D, n), or where they are taken up again."""
        whole = super().begin(x, restart)
        zeros = torch.zeros(x.shape[1], dtype=torch.int64, device=x.device)
        return AdaptiveState(
            whole.x,
            whole.basis,
            whole.rate,
            whole.sums,
            tick=zeros if restart is None else restart.position,
            level=torch.full_like(zeros, self.grid.level) if restart is None else restart.level,
            accepted=zeros.clone(),
            rejected=zeros.clone(),
        )

    # The time of a path is counted in steps of the deepest level.

    def _time(self, position: Tensor) -> Tensor:
        return self.grid.start + position.to(torch.float64) * self._tick

    def _place(self, restart: RestartState) -> Tensor:
        return restart.position >> (self.control.deepest - restart.level)

    def _noise(self, path: BrownianPath, dw: Tensor, position: int | Tensor) -> StepNoise:
        return StepNoise(dw, _no_more)

    # How far it is.

    def finished(self, state: State) -> bool:
        """Whether every path has passed the last save time, or is lost."""
        assert isinstance(state, AdaptiveState)
        return state.position > 0 and not bool(self._moving(state).any())

    def _moving(self, state: AdaptiveState, places: Tensor | None = None) -> Tensor:
        """Which paths, those at these places of the chunk or all, have more steps to take."""
        if self.saved.log_elapsed is None:
            passed = self._time(state.tick) > self.saved.times[-1]
        else:
            last = self.saved.log_elapsed[-1]
            passed = state.sums[1] > (last if places is None else last[places])
        return ~passed & torch.isfinite(state.x).all(0)

    def _tries(self, state: AdaptiveState, places: Tensor) -> int:
        """Steps of the next block: as many as the present size makes of what is left."""
        if not state.position:
            return 1  # what it costs is not known
        left = self._left(state, places)
        steps = left * torch.pow(2.0, state.level.to(torch.float64)) / self.grid.cell
        return int((steps + 1.0).nan_to_num(1.0).clamp(1.0, _TRIES).max())

    def moving(self, state: State) -> int:
        """How many paths take the steps of the next block."""
        assert isinstance(state, AdaptiveState)
        return int(self._moving(state).sum())

    def left(self, state: State) -> tuple[float, float]:
        """Steps that are left, by how far those of each path have led."""
        assert isinstance(state, AdaptiveState)
        taken, came = state.accepted + state.rejected, self._time(state.tick) - self.grid.start
        steps = self._left(state) * taken / came
        steps = torch.where(self._moving(state), steps, 0.0).nan_to_num(0.0, 0.0, 0.0)
        return float(steps.max()), float(steps.sum())

    def _left(self, state: State, places: Tensor | None = None) -> Tensor:
        """Time that is left to paths at these places of the chunk, or to all, at present rates."""
        assert isinstance(state, AdaptiveState)
        if self.saved.log_elapsed is None:
            return self.saved.times[-1] - self._time(state.tick)
        last = self.saved.log_elapsed[-1]
        return clock_left(state.sums, state.rate, last if places is None else last[places])

    # Steps.

    def block(self, state: State, save: Save) -> Iterator[Step]:
        """Propose a block of tries, change the state, and save what lies in the block."""
        assert isinstance(state, AdaptiveState)
        places = torch.nonzero(self._moving(state))[:, 0]
        part = state.of(places)
        path = self._brownian(self.paths[places])
        deepest = min(self.control.deepest, int(part.level.max()) + _DEEPER)
        trajectory, tries = [part], self._tries(part, places)
        for _ in range(tries):
            part = yield from self._try(part, path, deepest, self._moving(part, places))
            trajectory.append(part)
        state.put(places, part)
        state.position += tries
        yield from self._save(places, trajectory, save)

    def _try(
        self, state: AdaptiveState, path: BrownianPath, deepest: int, moving: Tensor
    ) -> Generator[Step, None, AdaptiveState]:
        """One step of each path that is still moving, compared with two of half its size."""
        control, level = self.control, state.level
        position = state.tick >> (control.deepest - level)
        dw = path.dyadic(level, position, max_level=deepest)
        halves = path.halve(dw, level, position)
        h = (self.grid.cell * torch.pow(2.0, -level.to(torch.float64))).to(state.x.dtype)
        coarse = Step(state.x, state.basis, h, StepNoise(dw, _no_more))
        yield coarse
        coarse_sums = self.integrals.advance(state.sums, h, state.rate, coarse.rate)
        x, basis, rate, sums = state.x, state.basis, state.rate, state.sums
        for half in halves:
            step = Step(x, basis, 0.5 * h, StepNoise(half, _no_more))
            yield step
            sums = self.integrals.advance(sums, 0.5 * h, rate, step.rate)
            x, basis, rate = step.end, step.end_basis, step.rate
        error = control.error(x, coarse.end, self.integrals.norm_error(sums, coarse_sums))
        end = state.tick + (1 << (control.deepest - level))
        accepted, after = control.next_levels(level, error, end, deepest)
        # A step of the smallest size that is rejected ends its path.
        rejected, accepted = moving & ~accepted, moving & accepted
        lost = rejected & (level >= control.deepest)
        old = torch.where(lost, torch.nan, state.x)
        return AdaptiveState(
            torch.where(accepted, x, old),
            torch.where(accepted, basis, state.basis),
            torch.where(accepted, rate, state.rate),
            torch.where(accepted, sums, state.sums),
            state.position,
            tick=torch.where(accepted, end, state.tick),
            level=torch.where(moving, after, level),
            accepted=state.accepted + accepted.to(torch.int64),
            rejected=state.rejected + rejected.to(torch.int64),
        )

    # What is saved.

    def _save(self, places: Tensor, trajectory: list[AdaptiveState], save: Save) -> Iterator[Step]:
        """Save what lies in a block: states before and after each of B tries of some paths."""
        x, rate, sums, tick, level = (
            torch.stack([getattr(one, name) for one in trajectory])
            for name in ("x", "rate", "sums", "tick", "level")
        )
        log_elapsed = self.saved.log_elapsed
        passed = self._time(tick) if log_elapsed is None else sums[:, 1]
        for k, time in enumerate(self.saved.times):
            if log_elapsed is None:
                wanted = torch.full_like(passed[0], time)
            else:
                wanted = log_elapsed[k, places]
            among, index = threshold_crossings(passed, wanted)
            if not len(among):
                continue
            restart = RestartState(
                x[index, :, among].T.contiguous(),
                sums[index, :, among].T.contiguous(),
                tick[index, among],
                level[index, among],
            )
            paths, before = self.paths[places[among]], rate[index, among]
            begin = self._time(restart.position)
            if log_elapsed is None:
                times = torch.full_like(begin, time)
                h = (times - begin).to(x.dtype)
                moved = yield from self._side_step(paths, restart, before, h)
                values = SavedValues(*moved, times, restart)
            else:
                step = self._time(tick[index + 1, among]) - begin
                rates = before, rate[index + 1, among]
                values = yield from self._reach(
                    paths, restart, rates, step.to(before), wanted[among]
                )
            save(k, places[among], values)


def _no_more() -> Tensor:
    raise AssertionError("a scheme with steps of its own size draws nothing but increments")
