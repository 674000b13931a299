"""One chunk of paths from beginning to end, with checkpoints on the way.

A chunk is described by plain data, so that it can be run in any process; all chunks of a run but
the last are of one size, and no number depends on who runs them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_sde.errors import CheckpointError
from manifold_sde.sdes import StochasticEquation
from manifold_sde.solvers.archive import read_archive, write_archive
from manifold_sde.solvers.bookkeeping import Book, GrowthBook
from manifold_sde.solvers.brownian import BrownianPath
from manifold_sde.solvers.march import Block, Grid, March, Records, State
from manifold_sde.solvers.schemes import SCHEMES, motion_of

_CHECKPOINT_SECONDS = 20.0
_KIND = "chunk of a run of solve"


@dataclass(frozen=True)
class Task:
    """What a chunk is to do.

    Attributes:
        sde: The equation, in the calculus of the scheme.
        method: Name of the scheme.
        grid: The grid.
        book: What is added up.
        seed: Seed of the Brownian paths.
        antithetic: Whether paths come in pairs of opposite noise.
        compiled: Whether kernels are compiled.
        first: Index of the first path.
        start: States at the start (D, n), paths last.
        times: Times asked for (K,), or ``None``.
        log_elapsed: Or values of log E asked for, (K, n), increasing.
        checkpoint: File for the state on the way, or ``None``.
        fingerprint: What the file has to agree in with the run.
    """

    sde: StochasticEquation
    method: str
    grid: Grid
    book: Book
    seed: int
    antithetic: bool
    compiled: bool
    first: int
    start: Tensor
    times: tuple[float, ...] | None
    log_elapsed: Tensor | None
    checkpoint: Path | None
    fingerprint: dict[str, Any]

    @property
    def moments(self) -> int:
        """Number K of moments asked for."""
        return len(self.times) if self.log_elapsed is None else len(self.log_elapsed)  # type: ignore[arg-type]

    @property
    def kept_grid(self) -> int:
        """Number of grid points kept: those from which a direction can be taken up again."""
        return self.moments if isinstance(self.book, GrowthBook) and self.times else 0

    def march(self) -> March:
        """The march of the chunk's paths."""
        x = self.start

        def brownian(paths: Tensor) -> BrownianPath:
            return BrownianPath(
                self.seed,
                self.sde.n_noise,
                paths,
                cell=self.grid.cell,
                start=self.grid.start,
                dtype=x.dtype,
                device=x.device,
                antithetic=self.antithetic,
            )

        paths = torch.arange(self.first, self.first + x.shape[1], device=x.device)
        motion = motion_of(self.sde, compiled=self.compiled)
        return March(motion, SCHEMES[self.method], self.grid, self.book, brownian, paths)


@dataclass
class Outcome:
    """States of a chunk at the moments asked for, NaN where there is none.

    Attributes:
        x: (K, D, n).
        sums: Sums of the book (K, k, n).
        time: The equation's own time (K, n).
        grid_x: States at the grid points before the times asked for (K, D, n).
        grid_sums: Sums there (K, k, n).
        steps: Number of steps taken.
    """

    x: Tensor
    sums: Tensor
    time: Tensor
    grid_x: Tensor
    grid_sums: Tensor
    steps: int = 0

    def keep(self, k: int, places: Tensor | slice, records: Records) -> None:
        """Write down records of some paths."""
        self.x[k, :, places] = records.x
        self.sums[k, :, places] = records.sums
        self.time[k, places] = records.time


@torch.no_grad()
def run_chunk(task: Task, report: Callable[[int], object] = lambda _: None) -> Outcome:
    """Run a chunk, from its checkpoint on if there is one.

    Args:
        task: What to do.
        report: Called with the number of steps just taken.
    """
    march = task.march()
    state = march.begin(task.start)
    n = task.start.shape[1]
    outcome = Outcome(
        task.start.new_full((task.moments, *task.start.shape), torch.nan),
        task.start.new_full((task.moments, len(state.sums), n), torch.nan),
        torch.full((task.moments, n), torch.nan, dtype=torch.float64, device=task.start.device),
        task.start.new_full((task.kept_grid, *task.start.shape), torch.nan),
        task.start.new_full((task.kept_grid, len(state.sums), n), torch.nan),
    )
    if task.checkpoint is not None and task.checkpoint.exists():
        _resume(task, state, outcome)
        report(state.position)
    saved = time.monotonic()
    while not _finished(task, state):
        block = march.advance(state, _next_steps(task, march, state))
        _keep(task, march, block, outcome)
        report(block.steps)
        if task.checkpoint is not None and time.monotonic() - saved > _CHECKPOINT_SECONDS:
            _save(task, state, outcome)
            saved = time.monotonic()
    if task.checkpoint is not None:
        _save(task, state, outcome)
    outcome.steps = state.position
    return outcome


def _last_step(task: Task) -> int:
    """Number of steps to the last time asked for."""
    assert task.times is not None
    return -int(-((task.times[-1] - task.grid.start) / task.grid.h - 1e-9) // 1)


def _finished(task: Task, state: State) -> bool:
    if task.log_elapsed is None:
        return state.position >= max(1, _last_step(task))
    reached = state.sums[1] > task.log_elapsed[-1]
    return state.position > 0 and bool((reached | ~torch.isfinite(state.x).all(0)).all())


def _next_steps(task: Task, march: March, state: State) -> int:
    steps = march.block_steps(state.x)
    if task.log_elapsed is None:
        steps = min(steps, max(1, _last_step(task)) - state.position)
    return steps


def _keep(task: Task, march: March, block: Block, outcome: Outcome) -> None:
    """Write down what was asked for in a block; a grid point belongs to the block it begins."""
    if task.log_elapsed is not None:
        for k, targets in enumerate(task.log_elapsed):
            places, records = march.at_elapsed(block, targets)
            if len(places):
                outcome.keep(k, places, records)
        return
    assert task.times is not None
    end = block.position + block.steps
    for k, moment in enumerate(task.times):
        offset = (moment - task.grid.start) / task.grid.h + 1e-9
        if block.position <= offset < end or (end == _last_step(task) and offset >= end):
            outcome.keep(k, slice(None), march.at_time(block, moment))
            if task.kept_grid:
                _, outcome.grid_x[k], outcome.grid_sums[k] = march.before(block, moment)


def _save(task: Task, state: State, outcome: Outcome) -> None:
    assert task.checkpoint is not None
    arrays = {
        "x": state.x,
        "anchor": state.anchor,
        "rate": state.rate,
        "sums": state.sums,
        "kept_x": outcome.x,
        "kept_sums": outcome.sums,
        "kept_time": outcome.time,
        "grid_x": outcome.grid_x,
        "grid_sums": outcome.grid_sums,
    }
    write_archive(
        task.checkpoint,
        _KIND,
        {"position": state.position, "run": task.fingerprint},
        {name: value.cpu().numpy() for name, value in arrays.items()},
    )


def _resume(task: Task, state: State, outcome: Outcome) -> None:
    assert task.checkpoint is not None
    header, arrays = read_archive(task.checkpoint, _KIND)
    theirs = header.get("run", {})
    different = [k for k, mine in task.fingerprint.items() if mine != theirs.get(k)]
    if different:
        shown = "; ".join(
            f"{k}: {theirs.get(k)} there, {task.fingerprint[k]} here" for k in different[:3]
        )
        raise CheckpointError(
            "the checkpoint belongs to another run",
            received=f"{task.checkpoint}: {shown}",
            expected="the same equation, start, times, method, step, seed and versions",
            remedy="delete the folder to start anew, or name another checkpoint",
        )
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    for name in ("x", "anchor", "rate", "sums"):
        setattr(state, name, tensors[name].to(task.start))
    state.position = int(header["position"])
    outcome.x[:] = tensors["kept_x"].to(task.start)
    outcome.sums[:] = tensors["kept_sums"].to(task.start)
    outcome.grid_x[:] = tensors["grid_x"].to(task.start)
    outcome.grid_sums[:] = tensors["grid_sums"].to(task.start)
    outcome.time[:] = tensors["kept_time"].to(task.start.device)
