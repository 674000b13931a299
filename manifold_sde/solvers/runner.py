"""SGD itself, for an ensemble of paths."""

from __future__ import annotations

import contextlib
import itertools
import time
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde import rng
from manifold_sde.arguments import check_path, check_point, integer, require_norms
from manifold_sde.compile import check_mode, compiler_available
from manifold_sde.deadline import Progress
from manifold_sde.errors import (
    ArgumentError,
    LostPathsWarning,
    TimeScaleError,
    WriteError,
)
from manifold_sde.paper import implements
from manifold_sde.problem import Problem, require_problem
from manifold_sde.schedules import Schedule
from manifold_sde.solvers.archive import (
    complete,
    held_file,
    read_archive,
    versions,
    write_archive,
)
from manifold_sde.solvers.fingerprint import Fingerprint, rates, summary
from manifold_sde.solvers.limits import (
    MAX_SGD_STEPS,
    check_length,
    check_max_steps,
    refuse_many_steps,
    require_memory,
)
from manifold_sde.solvers.sgd_step import BLOCK, LANES, SgdState, advance
from manifold_sde.solvers.solution import Solution
from manifold_sde.solvers.stopping import Stoppable
from manifold_sde.threads import one_thread

Rate = float | Sequence[float] | Tensor | Callable[[int], float] | Schedule

#: Steps from which on a run is compiled when the choice is left to the toolkit.
_WORTH_COMPILING = 5000
#: Largest number of paths that are stepped together.
_CHUNK = 4096
_CHECKPOINT_SECONDS = 20.0
_KIND = "checkpoint of run_sgd"


@implements("Equation (1)", "Equation (2)", "Equation (18)")
def run_sgd(
    problem: Problem,
    x0: Tensor,
    lr: Rate,
    weight_decay: Rate,
    steps: int | Sequence[int] | Tensor,
    *,
    n_paths: int | None = None,
    seed: int = 0,
    compile: bool | str = "auto",
    progress: bool | str = False,
    checkpoint: str | Path | None = None,
    max_steps: int = MAX_SGD_STEPS,
) -> Solution:
    r"""Run SGD with weight decay, x_{k+1} = (1 - eta lambda) x_k - eta grad L_{xi_k}(x_k).

    The noise of a path depends on (seed, path, step) alone: a path is the same alone and among
    thousands (to rounding), and the same seed gives the same samples at another learning rate.

    The weights x_k are off the manifold, and the theorems are about Phi(x_k): what
    :func:`~manifold_sde.solvers.predict_sgd` predicts is compared with
    ``run_sgd(...).limit(Geometry(problem))``.

    Args:
        problem: The problem, whose noise says what a step draws.
        x0: Start (D,), or a start for each path (B, D).
        lr: Learning rate eta: a number, a sequence, or a callable of the step.
        weight_decay: Weight decay lambda of (1), decoupled as eta lambda; likewise.
        steps: Step count or counts to keep, increasing; 0 is the start.
        n_paths: Number of paths from one start; ``None`` for one path, or as many as starts.
        seed: Seed of the noise, an integer.
        compile: Whether the step is compiled: "auto" does so for long runs where a C++ compiler
            is at hand.
        progress: Whether to show a progress bar, or its label.
        checkpoint: File to which the state is saved on the way. If it exists and belongs to this
            run, the run goes on from it, and ends with the same bits as if it had not stopped.
        max_steps: Number of steps beyond which the run is refused.

    Returns:
        Solution whose ``ts`` are the steps kept; ``ys`` is (K, D) for one path and (K, n, D) for
        several; ``clock`` is the intrinsic clock u of each path, and
        ``stats["non_finite_paths"]`` counts paths that blew up.

    Raises:
        ArgumentError, ShapeError: If an argument is out of range or shapes do not fit, or the run
            takes too many steps or too much memory.
        TimeScaleError: If a learning rate or weight decay cannot be used, or a schedule ends.
        CheckpointError: If the checkpoint is corrupted, belongs to another run, or is in use.
        WriteError: If the checkpoint cannot be written.
        KeyboardInterrupt: By Ctrl-C; it says what was saved. With a checkpoint
            SIGTERM saves too, and ends the process with status 143, where it has no handler.

    Warns:
        LostPathsWarning: If paths diverged.

    Example:
        >>> from manifold_sde import problems
        >>> from manifold_sde.solvers import run_sgd
        >>> problem = problems.great_circle()
        >>> solution = run_sgd(problem, problem.minimizer, 0.01, 0.05, [0, 10], n_paths=3)
        >>> solution.ys.shape
        torch.Size([2, 3, 3])

    Source: equations (1), (2) and (18).
    """
    require_problem(problem)
    kept = check_steps(steps)
    start, batched = starts(problem, x0, n_paths)
    most = check_max_steps(max_steps, MAX_SGD_STEPS)
    refuse_many_steps(kept[-1], most, "predict_sgd, which reaches such counts without SGD")
    require_memory(float(len(kept)) * start.numel(), start.element_size(), "fewer steps to keep")
    rng.seed_key(seed)
    seed = int(seed)
    schedules = (Schedule.of("lr", lr), Schedule.of("weight_decay", weight_decay))
    mode = check_mode(compile)
    worth = int(kept[-1]) >= _WORTH_COMPILING and compiler_available()
    compiled = worth if mode == "auto" else bool(mode)
    file = None if checkpoint is None else check_path("checkpoint", checkpoint)
    with (
        Stoppable(file),
        contextlib.nullcontext() if file is None else held_file(file),
    ):
        run = _Run(problem, start, schedules, kept, seed, compiled)
        return run.execute(progress, file, batched)


class _Run:
    """One call of ``run_sgd``: chunks of paths one after the other, each with its checkpoints."""

    def __init__(
        self,
        problem: Problem,
        start: Tensor,
        schedules: tuple[Schedule, Schedule],
        kept: list[int],
        seed: int,
        compiled: bool,
    ) -> None:
        self.problem = problem
        self.start = start
        self.schedules = schedules
        self.kept = kept
        self.seed = seed
        self.compiled = compiled
        n, dim = start.shape
        self.fingerprint: Fingerprint | None = None
        self.ys = start.new_full((len(kept), n, dim), float("nan"))
        self.clock = start.new_full((len(kept), n), float("nan"))

    def execute(self, progress: bool | str, checkpoint: Path | None, batched: bool) -> Solution:
        """Run all chunks, from the checkpoint on if there is one."""
        n = len(self.start)
        if checkpoint is not None:
            self.fingerprint = self._fingerprint()
        position = self._resume(checkpoint) if checkpoint and checkpoint.exists() else None
        total = self.kept[-1] * -(-n // _CHUNK)
        label = progress if isinstance(progress, str) else "SGD"
        with (
            torch.no_grad(),
            Progress(
                total=total, desc=label, unit="step", disable=not progress, unit_scale=True
            ) as bar,
        ):
            for chunk, first in enumerate(range(0, n, _CHUNK)):
                if position is not None and chunk < position["chunk"]:
                    bar.update(self.kept[-1])
                    continue
                resumed = position if position is not None and chunk == position["chunk"] else None
                self._run_chunk(
                    chunk, slice(first, min(first + _CHUNK, n)), resumed, bar, checkpoint
                )
        finite = torch.isfinite(self.ys).all(-1)
        _warn_of_divergence(finite, self.kept)
        finite = finite[-1]
        ys, clock = (self.ys, self.clock) if batched else (self.ys[:, 0], self.clock[:, 0])
        return Solution(
            ts=torch.tensor(self.kept),
            ys=ys,
            clock=clock,
            stats={
                "steps": self.kept[-1],
                "paths": n,
                "non_finite_paths": int((~finite).sum()),
                "compiled": self.compiled,
            },
            config={**self._config(), "versions": versions()},
        )

    def _run_chunk(
        self,
        chunk: int,
        rows: slice,
        resumed: dict[str, Any] | None,
        bar: Progress,
        checkpoint: Path | None,
    ) -> None:
        start = self.start[rows]
        n = len(start)
        padded = -(-n // LANES) * LANES
        x = torch.cat([start, start[-1:].expand(padded - n, -1)]).T.contiguous()
        paths = torch.arange(rows.start, rows.start + padded, device=x.device)
        state = SgdState(x, x.new_zeros(padded), paths)
        done = 0
        if resumed is not None:
            state.x, state.clock = (resumed[k].to(x) for k in ("x", "clock"))
            done = resumed["step"]
            bar.update(done)
        self._keep(state, rows, done, n)
        saved, whole = time.monotonic(), (done, replace(state))
        try:
            while done < self.kept[-1]:
                stop = min(self._next_kept(done), done + BLOCK)
                lrs, decays = (self._rates(s, done, stop) for s in self.schedules)
                _check_decay(lrs * decays, done)
                for taken in advance(
                    self.problem,
                    state,
                    done,
                    (lrs, decays),
                    self.seed,
                    compiled=self.compiled,
                ):
                    bar.update(taken)
                done = stop
                self._keep(state, rows, done, n)
                whole = done, replace(state)
                if checkpoint and time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    self._save(checkpoint, chunk, *whole)
                    saved = time.monotonic()
        except (KeyboardInterrupt, SystemExit):
            # A block may be half done: the state before it is whole, as no step changes a tensor.
            if checkpoint:
                with contextlib.suppress(WriteError):
                    self._save(checkpoint, chunk, *whole)
            raise
        if checkpoint:
            self._save(checkpoint, chunk, done, state)

    def _next_kept(self, done: int) -> int:
        return self.kept[bisect_right(self.kept, done)]

    def _keep(self, state: SgdState, rows: slice, done: int, n: int) -> None:
        row = bisect_left(self.kept, done)
        if row < len(self.kept) and self.kept[row] == done:
            self.ys[row, rows] = state.x.T[:n]
            self.clock[row, rows] = state.clock[:n]

    def _rates(self, schedule: Schedule, start: int, stop: int) -> Tensor:
        if schedule.length is not None and schedule.length < self.kept[-1]:
            raise TimeScaleError(
                "a schedule ends before the run",
                received=f"{schedule.length} values for {self.kept[-1]} steps",
                expected="a value for every step",
                remedy="a longer sequence, a number, or a callable of the step",
            )
        values, fault = schedule.read(start, stop)
        if fault is not None:
            raise fault
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.start)

    # Checkpoints.

    def _config(self) -> dict[str, Any]:
        """What was run, as far as it can be written down."""
        config = {
            "method": "sgd",
            "problem": repr(self.problem),
            "lr": repr(self.schedules[0]),
            "weight_decay": repr(self.schedules[1]),
            "seed": self.seed,
        }
        lr, decay = (schedule.constant for schedule in self.schedules)
        return config if not lr or decay is None else {**config, "ratio": decay / lr}

    def _fingerprint(self) -> Fingerprint:
        """What a checkpoint has to agree in with the run that goes on from it."""
        said = {**self._config(), "paths": len(self.start), "compiled": self.compiled}
        seen = {
            "start": summary(self.start).cpu().numpy(),
            "kept": np.array(self.kept),
        }
        for schedule in self.schedules:
            known, sums = rates(schedule, self.kept[-1])
            said |= known
            seen |= sums
        with one_thread():
            return Fingerprint.of(self.problem, self.start[0], said, seen)

    def _save(self, path: Path, chunk: int, step: int, state: SgdState) -> None:
        assert self.fingerprint is not None
        arrays = {"x": state.x, "clock": state.clock, "kept_ys": self.ys, "kept_clock": self.clock}
        run, seen = self.fingerprint.stored()
        numbers = {name: value.cpu().numpy() for name, value in arrays.items()}
        write_archive(path, _KIND, {**run, "chunk": chunk, "step": step}, numbers | seen)

    def _resume(self, path: Path) -> dict[str, Any]:
        """Take up what was saved: chunk, step, x and clock."""
        assert self.fingerprint is not None
        header, arrays = read_archive(path, _KIND)
        self.fingerprint.require(path, header, arrays)
        n = len(self.start)
        with complete(path, "a checkpoint as run_sgd writes it", "delete it to start anew"):
            chunk, step = integer(header["chunk"]), integer(header["step"])
            if chunk is None or not 0 <= chunk * _CHUNK < n:
                raise ValueError(f"chunk {header['chunk']!r}")
            if step is None or not 0 <= step <= self.kept[-1]:
                raise ValueError(f"step {header['step']!r} of {self.kept[-1]}")
            lanes = -(-min(_CHUNK, n - chunk * _CHUNK) // LANES) * LANES
            shapes = {
                "x": (self.problem.dim, lanes),
                "clock": (lanes,),
                "kept_ys": tuple(self.ys.shape),
                "kept_clock": tuple(self.clock.shape),
            }
            found = {name: torch.from_numpy(arrays[name]) for name in shapes}
            for name, shape in shapes.items():
                if found[name].shape != shape or found[name].dtype != self.ys.dtype:
                    raise ValueError(f"{name} of shape {tuple(found[name].shape)}")
        self.ys, self.clock = (found[f"kept_{k}"].to(self.start) for k in ("ys", "clock"))
        return {"chunk": chunk, "step": step, "x": found["x"], "clock": found["clock"]}


def _warn_of_divergence(finite: Tensor, kept: list[int]) -> None:
    """Say how many paths diverged, and when: (K, n)."""
    lost, paths = int((~finite[-1]).sum()), finite.shape[1]
    if lost:
        first = kept[int((~finite).any(1).nonzero()[0])]
        warnings.warn(
            f"{lost} of {paths} runs of SGD diverged: the first weights that are not finite are "
            f"those of step {first} (of the steps kept). Way out: a smaller learning rate, or a "
            "start of larger norm",
            LostPathsWarning,
            stacklevel=4,
        )


def _check_decay(products: Tensor, first: int) -> None:
    """Equation (1) has to shrink the weights, not turn them round."""
    if bool((products >= 1.0).any()):
        index = int((products >= 1.0).nonzero()[0])
        raise TimeScaleError(
            "lr * weight_decay is too large",
            received=f"{float(products[index]):.3g} at step {first + index}",
            expected="less than 1, so that 1 - eta lambda is positive",
            remedy="a smaller learning rate or weight decay; lambda is the decoupled one of (1)",
        )


def check_steps(steps: object) -> list[int]:
    """Step counts.

    Raises:
        ArgumentError: If they are none, or do not increase.
    """
    check_length("steps", steps)
    if isinstance(steps, Tensor):
        steps = steps.tolist()
    if isinstance(steps, (int, np.integer)):
        listed: list[Any] = [steps]
    else:
        listed = list(steps) if isinstance(steps, Iterable) else [steps]
    whole = all(isinstance(k, (int, np.integer)) and not isinstance(k, bool) for k in listed)
    if (
        not listed
        or not whole
        or listed[0] < 0
        or any(b <= a for a, b in itertools.pairwise(listed))
    ):
        raise ArgumentError(
            "steps are not step counts to keep",
            received=repr(steps)[:80],
            expected="a count, or increasing counts from 0 on",
            remedy="steps=1000, or steps=[0, 100, 1000]; TimeScale(...).steps(T) gives counts",
        )
    if listed[-1] >= 2**48:
        raise ArgumentError(
            "there are too many steps",
            received=str(listed[-1]),
            expected="fewer than 2**48",
            remedy="the limiting diffusion reaches such times",
        )
    return [int(k) for k in listed]


def starts(
    problem: Problem, x0: Tensor, n_paths: int | None, *, name: str = "x0"
) -> tuple[Tensor, bool]:
    """Start of each path, (n, D), and whether the result has a path dimension.

    Raises:
        ArgumentError, DTypeError: If a start cannot be used, or their number is another one.
    """
    x0 = check_point(x0, problem.dim, name=name, values=True).detach()
    require_norms(x0, name=name)
    count = integer(n_paths)
    if n_paths is not None and (count is None or count < 1):
        raise ArgumentError(
            "n_paths is not a number of paths",
            received=repr(n_paths),
            expected="a positive integer",
            remedy="n_paths=60, as in Figure 2",
        )
    if x0.dim() == 1:
        require_memory(float(count or 1) * len(x0), x0.element_size(), "a smaller n_paths")
        return x0.expand(count or 1, -1).clone(), count is not None
    if x0.dim() != 2 or not len(x0) or count not in (None, len(x0)):
        raise ArgumentError(
            "the starts do not fit the number of paths",
            received=f"{name} of shape {tuple(x0.shape)}, n_paths={n_paths}",
            expected="one start (D,), or (B, D) with n_paths left out",
            remedy=f"{name}.reshape(-1, D), or repeat each start as often as it is wanted",
        )
    return x0.clone(), True
