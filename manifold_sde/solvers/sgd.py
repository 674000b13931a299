"""SGD itself, for an ensemble of paths."""

from __future__ import annotations

import contextlib
import functools
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde import rng
from manifold_sde.arguments import Points, check_path, integer
from manifold_sde.compile import choose_mode
from manifold_sde.errors import LostPathsWarning, TimeScaleError
from manifold_sde.paper import implements
from manifold_sde.problem import Problem, require_problem
from manifold_sde.progress import Progress
from manifold_sde.schedules import Schedule
from manifold_sde.solvers.archive import (
    complete,
    held_file,
    read_archive,
    versions,
    write_archive,
)
from manifold_sde.solvers.arguments import check_steps, starts
from manifold_sde.solvers.fingerprint import Fingerprint, rates, summary
from manifold_sde.solvers.limits import (
    MAX_SGD_STEPS,
    check_max_steps,
    refuse_many_steps,
    require_memory,
)
from manifold_sde.solvers.radial_gradient import radial_gradient
from manifold_sde.solvers.sgd_step import BLOCK, LANES, SgdState, advance, c_step, go_alone
from manifold_sde.solvers.solution import Solution
from manifold_sde.solvers.stopping import Autosave, Stoppable
from manifold_sde.threads import one_thread

Rate = float | Sequence[float] | Tensor | Callable[[int], float] | Schedule

#: Steps above which "auto" compiles by torch, too.
_WORTH_COMPILING = 5000
#: Paths whose work a step is beside that of its own paths, where it is C code and where not.
_ALIKE = {True: 800, False: 2000}
#: Largest number of paths that are stepped together.
_CHUNK = 4096
_KIND = "checkpoint of run_sgd"


@implements("Equation (1)", "Equation (2)", "Equation (18)")
def run_sgd(
    problem: Problem,
    x0: Points,
    lr: Rate,
    weight_decay: Rate,
    steps: int | Sequence[int] | Tensor,
    *,
    n_paths: int | None = None,
    seed: int = 0,
    compile: bool | str = "auto",
    progress: bool | str | None = None,
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
        x0: Start (D,), or a start for each path (B, D); a tensor, array or list.
        lr: Learning rate eta: a number, a sequence, a callable of the step or a torch scheduler.
        weight_decay: Weight decay lambda of (1), decoupled as eta lambda; likewise.
        steps: Step count or counts to keep, increasing; 0 is the start.
        n_paths: Number of paths from one start; ``None`` for one path, or as many as starts.
        seed: Seed of the noise, an integer.
        compile: Whether the step is compiled: "auto" does so in C up to 32 weights, and by torch
            for long runs, where a compiler is at hand.
        progress: Whether to show a progress bar, or its label; by default on a terminal, where it
            takes more than a second.
        checkpoint: File to which the state is saved on the way. If it exists and belongs to this
            run, the run goes on from it, and ends with the same bits as if it had not stopped.
        max_steps: Number of steps beyond which the run is refused.

    Returns:
        Solution whose ``ts`` are the steps kept; ``ys`` is (K, D) for one path and (K, n, D) for
        several; ``clock`` is the intrinsic clock u of each path, and
        ``stats["non_finite_paths"]`` counts paths that blew up. Where the loss is not
        scale-invariant, and has no such clock, ``stats["radial_gradient"]`` is the radial part of
        its gradient over all of it, at a fixed point, or near the start on a few samples of a
        network.

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
    worth = kept[-1] >= _WORTH_COMPILING and not go_alone(problem, len(start))
    compiled = choose_mode(compile, problem.dim, worth=worth)
    if problem.noise.lasting_share(problem.pointwise) != 1.0:
        compiled = False  # its steps do not draw for themselves
    file = None if checkpoint is None else check_path("checkpoint", checkpoint)
    with (
        Stoppable(file),
        contextlib.nullcontext() if file is None else held_file(file),
    ):
        run = _Run(problem, start, schedules, kept, seed, compiled, file)
        return run.execute(progress, batched)


@dataclass
class _Run:
    """One call of ``run_sgd``: chunks of paths one after the other, each with its checkpoints.

    Attributes:
        problem: The problem.
        start: Starts (n, D).
        schedules: Learning rate and weight decay.
        kept: Step counts to keep (K,).
        seed: Seed.
        compiled: Whether the step is compiled: "c" for what the C compiler can do in seconds.
        file: The checkpoint, or ``None``.
    """

    problem: Problem
    start: Tensor
    schedules: tuple[Schedule, Schedule]
    kept: list[int]
    seed: int
    compiled: bool | str
    file: Path | None

    def __post_init__(self) -> None:
        self.alone = not self.compiled and go_alone(self.problem, len(self.start))
        self.ys = self.start.new_full((len(self.kept), *self.start.shape), torch.nan)
        self.clock = torch.full_like(self.ys[..., 0], torch.nan)
        self.fingerprint = None if self.file is None else self._fingerprint()

    def execute(self, progress: bool | str | None, batched: bool) -> Solution:
        """Run all chunks, from the checkpoint on if there is one."""
        n = len(self.start)
        first_chunk, resumed = self._resume()
        total = self.kept[-1] * -(-n // _CHUNK)
        with (
            torch.no_grad(),
            Progress(
                *(progress, "SGD"),
                about=f"{n:,} paths" if n > 1 else "",
                total=total,
                unit="step",
                unit_scale=True,
            ) as bar,
        ):
            if resumed is not None:
                bar.skip(first_chunk * self.kept[-1] + resumed.step)
            for chunk in range(first_chunk, -(-n // _CHUNK)):
                self._run_chunk(chunk, resumed, bar)
                resumed = None
        finite = torch.isfinite(self.ys).all(-1)
        _warn_of_divergence(finite, self.kept)
        finite = finite[-1]
        reasons = self.problem.kernels.get(("reason", "sgd")) if self.compiled == "c" else None
        ys, clock = (self.ys, self.clock) if batched else (self.ys[:, 0], self.clock[:, 0])
        return Solution(
            ts=torch.tensor(self.kept),
            ys=ys,
            clock=clock,
            stats={
                "steps": self.kept[-1],
                "paths": n,
                "non_finite_paths": int((~finite).sum()),
                "compiled": bool(self.compiled) and not reasons,
                **radial_gradient(self.problem, self.start),
                **({"uncompiled": reasons[0]} if reasons else {}),
            },
            config={**self._config(), "versions": versions()},
        )

    def _run_chunk(self, chunk: int, resumed: SgdState | None, bar: Progress) -> None:
        """Run a chunk, from a state on if it is given."""
        rows = slice(chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self.start)))
        state = resumed or self._begin(rows)
        self._keep(state, rows)
        save = None if self.file is None else functools.partial(self._save, chunk)
        left = self._left(state, rows)
        with Autosave(save, replace(state)) as autosave:
            while state.step < self.kept[-1]:
                first = state.step
                stop = min(self.kept[bisect_right(self.kept, first)], first + BLOCK)
                lrs, decays = (self._rates(s, first, stop) for s in self.schedules)
                _check_decay(lrs * decays, first)
                for taken in advance(
                    *(self.problem, state, first, (lrs, decays), self.seed),
                    compiled=self.compiled,
                    alone=self.alone,
                ):
                    first += taken
                    bar.update(taken, functools.partial(left, first), taken * left.work)
                state.step = stop
                self._keep(state, rows)
                autosave.keep(replace(state))
        if save is not None:
            save(state)

    def _left(self, state: SgdState, rows: slice) -> _Left:
        """What is left after steps of a chunk."""
        in_c = bool(self.compiled) and c_step(self.problem, state) is not None
        later, alike = len(self.start) - rows.stop, _ALIKE[in_c]
        work = later + alike * -(-later // _CHUNK)
        return _Left(self.kept[-1], -(-later // _CHUNK), rows.stop - rows.start + alike, work)

    def _begin(self, rows: slice) -> SgdState:
        return SgdState.begin(self.start[rows], rows.start, 1 if self.alone else LANES)

    def _keep(self, state: SgdState, rows: slice) -> None:
        """Write the state down, where its step is one to keep."""
        row, n = bisect_left(self.kept, state.step), rows.stop - rows.start
        if self.kept[row] == state.step:
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

    def _save(self, chunk: int, state: SgdState) -> None:
        """Write the state of a chunk, and what was kept of it and those before."""
        assert self.fingerprint is not None
        assert self.file is not None
        arrays = {"x": state.x, "clock": state.clock, "kept_ys": self.ys, "kept_clock": self.clock}
        run, seen = self.fingerprint.stored()
        numbers = {name: value.cpu().numpy() for name, value in arrays.items()}
        write_archive(self.file, _KIND, {**run, "chunk": chunk, "step": state.step}, numbers | seen)

    def _resume(self) -> tuple[int, SgdState | None]:
        """Take up what was saved: the chunk that was under way, and its state."""
        if self.file is None or self.fingerprint is None or not self.file.exists():
            return 0, None
        header, arrays = read_archive(self.file, _KIND)
        self.fingerprint.require(self.file, header, arrays)
        n = len(self.start)
        with complete(self.file, "a checkpoint as run_sgd writes it", "delete it to start anew"):
            chunk, step = integer(header["chunk"]), integer(header["step"])
            if chunk is None or not 0 <= chunk * _CHUNK < n:
                raise ValueError(f"chunk {header['chunk']!r}")
            if step is None or not 0 <= step <= self.kept[-1]:
                raise ValueError(f"step {header['step']!r} of {self.kept[-1]}")
            state = self._begin(slice(chunk * _CHUNK, (chunk + 1) * _CHUNK))
            likes = {"x": state.x, "clock": state.clock, "kept_ys": self.ys}
            likes["kept_clock"] = self.clock
            found = {name: torch.from_numpy(arrays[name]) for name in likes}
            for name, like in likes.items():
                if found[name].shape != like.shape or found[name].dtype != like.dtype:
                    raise ValueError(f"{name} of shape {tuple(found[name].shape)}")
                found[name] = found[name].to(like)
        self.ys, self.clock = found["kept_ys"], found["kept_clock"]
        return chunk, SgdState(found["x"], found["clock"], state.paths, step)


@dataclass(frozen=True)
class _Left:
    """How many steps are left after some of a chunk, and how much work that is.

    Attributes:
        steps: Steps of a chunk.
        chunks: Number of chunks that follow.
        work: Work of a step of this chunk.
        later: Work of a step of those that follow.
    """

    steps: int
    chunks: int
    work: float
    later: float

    def __call__(self, taken: int) -> tuple[float, float]:
        """After so many steps of the chunk."""
        left = self.steps - taken
        return left + self.chunks * self.steps, left * self.work + self.steps * self.later


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
