"""One chunk of paths from beginning to end, with checkpoints on the way.

A chunk is described by plain data, so that it can be run in any process; all chunks of a run but
the last are of one size, and it is run on one thread, so that no number depends on who runs it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from manifold_sde.errors import WriteError
from manifold_sde.solvers.archive import complete, read_archive, write_archive
from manifold_sde.solvers.fingerprint import Fingerprint
from manifold_sde.solvers.limits import Watch
from manifold_sde.solvers.march import Goal, Records, State
from manifold_sde.solvers.moments import Moments, moments_of
from manifold_sde.solvers.plan import Plan, Task
from manifold_sde.threads import one_thread

_CHECKPOINT_SECONDS = 20.0
_KIND = "chunk of a run of solve"
_ARRAYS = ("x", "sums", "time", "grid_x", "grid_sums", "grid_position", "grid_level")


@dataclass
class Outcome:
    """What is known of a chunk at the moments asked for, NaN where there is nothing.

    Attributes:
        x: States (K, D, n).
        sums: Sums of the book (K, k, n).
        time: The time of the equation that was simulated (K, n).
        grid_x: States where the last whole steps before ended (K, D, n).
        grid_sums: Sums there (K, k, n).
        grid_position: Numbers of those grid points (K, n), int64.
        grid_level: Levels of the steps that follow (K, n), int64.
        moments: Moments of the observables, by name.
        lost: Number of paths lost by these moments (K,).
        steps: Number of steps taken; of all paths, where each has its own.
        rejected: Number of steps that were tried and taken again in smaller ones.
    """

    x: Tensor
    sums: Tensor
    time: Tensor
    grid_x: Tensor
    grid_sums: Tensor
    grid_position: Tensor
    grid_level: Tensor
    moments: dict[str, Moments] = field(default_factory=dict)
    lost: Tensor = field(default_factory=lambda: torch.zeros(0))
    steps: int = 0
    rejected: int = 0

    @classmethod
    def empty(cls, like: Tensor, moments: int, sums: int, grid: int) -> Outcome:
        """Nothing yet, for states like these (D, n)."""
        n = like.shape[1]
        return cls(
            like.new_full((moments, *like.shape), torch.nan),
            like.new_full((moments, sums, n), torch.nan),
            torch.full((moments, n), torch.nan, dtype=torch.float64, device=like.device),
            like.new_full((grid, *like.shape), torch.nan),
            like.new_full((grid, sums, n), torch.nan),
            torch.zeros(grid, n, dtype=torch.int64, device=like.device),
            torch.zeros(grid, n, dtype=torch.int64, device=like.device),
        )

    def keep(self, k: int, places: Tensor, records: Records, grid: bool) -> None:
        """Write down records of some paths, and where they can be taken up again."""
        self.x[k, :, places] = records.x
        self.sums[k, :, places] = records.sums
        self.time[k, places] = records.time
        if grid:
            self.grid_x[k, :, places] = records.origin.x
            self.grid_sums[k, :, places] = records.origin.sums
            self.grid_position[k, places] = records.origin.position
            self.grid_level[k, places] = records.origin.level

    def arrays(self) -> dict[str, Tensor]:
        """The tensors that belong to paths, by name."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def without_paths(self) -> Outcome:
        """The moments alone."""
        few: dict[str, Any] = {name: a[..., :0].clone() for name, a in self.arrays().items()}
        return replace(self, **few)


class _Chunk:
    """One run of a chunk."""

    def __init__(self, plan: Plan, task: Task) -> None:
        self.plan = plan
        self.task = task
        self.goal = Goal(plan.times, task.log_elapsed(plan))
        start = task.begin(plan)
        paths = torch.arange(task.first, task.first + task.n_paths, device=start.device)
        self.march = plan.march(paths, start)
        self.start = start

    def run(self, report: Callable[[int], object]) -> Outcome:
        """All steps, from the checkpoint on if there is one."""
        state = self.march.begin(self.start)
        moments = len(self.plan.times)
        grid = moments if self.plan.keeps_grid else 0
        outcome = Outcome.empty(self.start, moments, len(state.sums), grid)
        file = self.task.checkpoint
        if file is not None and file.exists():
            finished = self._resume(state, outcome)
            report(state.position)
            if finished:
                return outcome
        control = self.plan.control
        rtol = None if control is None else control.rtol or control.atol
        watch = Watch(self.plan.max_steps, rtol, state.position)
        saved, whole = time.monotonic(), replace(state)
        try:
            while not self.march.finished(state, self.goal):
                block = self.march.advance(state, self.goal)
                for k, places, records in self.march.found(block, self.goal):
                    outcome.keep(k, places, records, grid > 0)
                whole = replace(state)
                report(block.steps)
                watch.look(state.position, lambda: self.march.time_left(state, self.goal))
                if file is not None and time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    self._save(state, outcome, finished=False)
                    saved = time.monotonic()
        except (KeyboardInterrupt, SystemExit):
            # A block may be half done: the state before it is whole, as no step changes a tensor.
            if file is not None:
                with contextlib.suppress(WriteError):
                    self._save(whole, outcome, finished=False)
            raise
        outcome = self._reduce(state, outcome)
        if file is not None:
            self._save(state, outcome, finished=True)
        return outcome

    def _reduce(self, state: State, outcome: Outcome) -> Outcome:
        """The states of the equation asked for; the moments alone if only these are kept."""
        plan = self.plan
        outcome.steps, outcome.rejected = state.counts()
        outcome.x = self.task.states(plan, outcome.x, outcome.sums)
        outcome.lost = (~torch.isfinite(outcome.x).all(1)).sum(-1)
        if plan.observables is None:
            return outcome
        states = outcome.x.movedim(1, -1)
        outcome.moments = {
            name: moments_of(f"the observable {name!r}", f, states, antithetic=plan.antithetic)
            for name, f in plan.observables.items()
        }
        return outcome.without_paths()

    # Checkpoints.

    def _save(self, state: State, outcome: Outcome, *, finished: bool) -> None:
        assert self.task.checkpoint is not None
        arrays = {f"kept_{name}": value for name, value in outcome.arrays().items()}
        if finished:
            arrays["lost"] = outcome.lost
            for number, moments in enumerate(outcome.moments.values()):
                arrays |= {f"{k}_{number}": getattr(moments, k) for k in Moments.names()}
        else:
            arrays |= {f"state_{name}": value for name, value in _tensors(state).items()}
        run, seen = self._fingerprint().stored()
        header = {
            **run,
            "position": state.position,
            "steps": [outcome.steps, outcome.rejected],
            "finished": finished,
            "observables": list(outcome.moments),
        }
        numbers = {name: value.cpu().numpy() for name, value in arrays.items()}
        write_archive(self.task.checkpoint, _KIND, header, numbers | seen)

    def _fingerprint(self) -> Fingerprint:
        assert self.task.fingerprint is not None
        return self.task.fingerprint

    def _resume(self, state: State, outcome: Outcome) -> bool:
        """Take up what was saved; whether it was finished."""
        file = self.task.checkpoint
        assert file is not None
        header, arrays = read_archive(file, _KIND)
        self._fingerprint().require(file, header, arrays)
        what = "a chunk as this version of the toolkit writes it"
        with complete(file, what, "delete the folder to start anew"):
            found = {k: torch.from_numpy(v).to(self.start.device) for k, v in arrays.items()}
            state.position = _count(header["position"])
            finished = header["finished"] is True
            for name, empty in outcome.arrays().items():
                alone = self.plan.observables is not None and finished
                like = empty[..., :0] if alone else empty
                setattr(outcome, name, _fitting(f"kept_{name}", found, like))
            if finished:
                outcome.steps, outcome.rejected = map(_count, header["steps"])
                outcome.lost = found["lost"]
                if len(outcome.lost) != len(self.plan.times):
                    raise ValueError(f"{len(outcome.lost)} counts of lost paths")
                outcome.moments = {
                    name: Moments(*(found[f"{k}_{number}"] for k in Moments.names()))
                    for number, name in enumerate(header["observables"])
                }
                return True
            for name, like in _tensors(state).items():
                setattr(state, name, _fitting(f"state_{name}", found, like))
            alive = torch.isfinite(state.x).all(0)
            over = self.march.finished(state, self.goal)
            if over and bool(torch.isnan(outcome.time[:, alive]).any()):
                raise ValueError(f"position {state.position}, which it has not reached")
        return False


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is not a number of steps")
    return value


def _fitting(name: str, found: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """A tensor of a file, of the shape and dtype of another."""
    value = found[name]
    if value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(f"{name} of shape {tuple(value.shape)}, {value.dtype}")
    return value


def _tensors(state: State) -> dict[str, Tensor]:
    """The tensors of a state, by name."""
    values = {f.name: getattr(state, f.name) for f in fields(state)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


@torch.no_grad()
def run_chunk(plan: Plan, task: Task, report: Callable[[int], object] = lambda _: None) -> Outcome:
    """Run a chunk, from its checkpoint on if there is one.

    Args:
        plan: What the run does.
        task: Which paths.
        report: Called with the number of steps just taken.
    """
    with one_thread():
        return _Chunk(plan, task).run(report)
