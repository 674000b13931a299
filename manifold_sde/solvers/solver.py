"""Simulation of the stochastic differential equations."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifold_sde.arguments import Points
from manifold_sde.equations import ManifoldEquation, StochasticEquation
from manifold_sde.progress import Progress
from manifold_sde.sdes import DirectionDiffusion, WeightDecaySDE
from manifold_sde.solvers.archive import held_folder, versions
from manifold_sde.solvers.arguments import check_folder, check_tolerance, check_workers
from manifold_sde.solvers.chunk import CHUNK, Chunk, ChunkResult
from manifold_sde.solvers.direction import DirectionSolution
from manifold_sde.solvers.drift_error import drift_error
from manifold_sde.solvers.flat_points import warn_of_flat_points
from manifold_sde.solvers.integrate import Report, integrate
from manifold_sde.solvers.limits import MAX_STEPS
from manifold_sde.solvers.lost_paths import check_average, remedy_of, warn_of_lost_paths
from manifold_sde.solvers.moments import Observable
from manifold_sde.solvers.parallel import integrate_in_workers
from manifold_sde.solvers.radial_gradient import radial_gradient
from manifold_sde.solvers.simulation import Simulation
from manifold_sde.solvers.solution import Solution
from manifold_sde.solvers.stopping import Stoppable

#: Paths whose work a step is beside that of its own paths, where it is compiled and where not.
_ALIKE = {True: 400, False: 16384}


def solve(
    sde: StochasticEquation,
    y0: Points,
    ts: Sequence[float] | Tensor,
    *,
    n_paths: int | None = None,
    method: str = "auto",
    dt: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    adaptive: bool | None = None,
    dt_min: float | None = None,
    dt_max: float | None = None,
    seed: int = 0,
    accuracy: float | None = None,
    antithetic: bool = False,
    observables: Mapping[str, Observable] | None = None,
    compile: bool | str = "auto",
    progress: bool | str | None = None,
    checkpoint: str | Path | None = None,
    workers: int | None = None,
    backend: str = "loky",
    chunk_size: int = CHUNK,
    max_steps: int = MAX_STEPS,
) -> Solution:
    r"""Simulate paths of a stochastic differential equation on the manifold of minimisers.

    A path's noise depends on (seed, path, time) alone: paths are the same alone and among
    thousands (to rounding), at other save times, and at steps that differ by powers of two.
    Paths are run in chunks of one size, each on one thread: the result is the same to the bit for
    any number of workers, either backend, and however often the run was stopped and taken up.

    The main arguments are ``sde``, ``y0``, ``ts``, ``n_paths``, a step ``dt`` or a tolerance
    ``rtol``, ``seed`` and ``observables``; the others are for long runs and for comparisons.

    Which method: "auto" for almost everything (an exact norm; weak order 2, or 1 where the geometry
    is matrix-free); "heun" or "midpoint" for paths at several steps that are to be close to each
    other; "walk" for directions in many dimensions; "phi_jet", which needs no drift, to check the
    others; "euler" to compare with the literature.

    Args:
        sde: The equation.
        y0: Start (D,) on the manifold, or a start for each path (B, D); a tensor, array or list.
        ts: Save times, increasing, in the equation's own time; ``ts[0]`` is the start.
        n_paths: Number of paths from one start; ``None`` for one path, or as many as starts.
        method: Scheme: "euler" (Ito), "heun", "midpoint", "weak2" (Stratonovich), "phi_jet" (any),
            "walk" (any form, directions alone), or "split": the direction in the intrinsic clock by
            "weak2", or by "walk" where the geometry is matrix-free, and the norm by its own
            equation. "auto" is "split" on the manifold. For (3) in the whole space: "euler",
            "heun", "midpoint", or those of torchsde: "torchsde:euler" (Ito), "torchsde:heun",
            "torchsde:midpoint", "torchsde:euler_heun" (Stratonovich).
        dt: Step in the equation's time; with ``adaptive=True`` the first one. "split" turns it into
            a step of the clock.
        rtol: Tolerance of one step relative to the norm: steps are then adaptive, each path its
            own, for "heun", "midpoint" and "split" (whose direction then takes "heun").
        atol: Absolute tolerance beside it; 0 where left out.
        adaptive: Whether steps are adaptive; ``None`` where a tolerance says so.
        dt_min: Smallest adaptive step; a path that would need a smaller one is lost. By default
            the first one over 2^20.
        dt_max: Largest adaptive step; by default 32 times the first one.
        seed: Seed of the Brownian paths, an integer.
        accuracy: Weak error of bounded functions of the direction for which "auto" and "weak2"
            choose the step, where it is not given; 1e-3 by default. What is expected of the step
            is ``stats["expected_error"]``. Up to 32 weights.
        antithetic: Whether paths 2i and 2i + 1 have opposite noise, for smaller variance; the
            number of paths and ``chunk_size`` are then even, and standard errors are those of the
            means of pairs.
        observables: Functions of states (n, D), with a value (n, ...) for each, whose mean and
            standard error over the paths are kept, by name, in ``solution.observed``; the paths
            themselves are then not kept (``ys`` is (K, 0, D)), and memory does not grow with
            their number. Lost paths are left out, and counted in ``stats["lost_at_times"]``.
        compile: Whether kernels are compiled: "auto" does so in C up to 32 weights, and by torch
            for large runs, where a compiler is at hand.
        progress: Whether to show a progress bar, or its label: of steps, or of chunks where
            others run them; and above it, once the first steps are measured, what the run takes. By
            default on a terminal or in a notebook, where that is more than a second.
        checkpoint: Folder in which the state is saved on the way, a file a chunk; the same call
            goes on from it, and ends with the same bits as if it had not stopped. Workers write
            it themselves: on several machines it is on a file system that they share.
        workers: Number of processes that run the chunks; ``None`` or 1 for this one. With "dask"
            the largest number of chunks under way at once, ``None`` for as many as it takes.
        backend: "loky" for processes on this machine, "dask" for the workers of the
            ``distributed.Client`` that this process has. Both need the extra ``cluster``.
        chunk_size: Number of paths that are stepped together. Another one changes the last bits.
        max_steps: Number of steps of a path above which the run is refused: beforehand where it
            is known then, and otherwise as soon as it can be estimated.

    Returns:
        Solution: ``ys`` is (K, D) for one path and (K, n, D) for several; a
        :class:`DirectionSolution` for a :class:`DirectionDiffusion`.

    Raises:
        ArgumentError, ShapeError: If an argument is out of range or shapes do not fit.
        NotOnManifoldError, RankError, NoiseError: If a start is not on the manifold, or the noise
            vanishes there.
        CheckpointError: If the checkpoint is corrupted, belongs to another run, or is in use.
        WriteError: If the checkpoint cannot be written.
        KeyboardInterrupt: By Ctrl-C; it says what was saved. SIGTERM ends the
            workers too, and then the process with status 143, where it has no handler.
        WorkerError: If a worker of "loky" died, or the problem cannot be sent to workers. What a
            worker of "dask" was doing when it died is done again by another.
        MissingDependencyError: If joblib or Dask is needed and not installed.

    Warns:
        LongRunWarning: If the tolerance asks for very many steps.
        LostPathsWarning: If paths were lost.
        NoDiffusionWarning: If the noise has no part along the manifold at the start. What part it
            has there is ``stats["noise_along"]``.
        RankWarning: If paths end near points where the rank of the Hessian falls, by the matrices
            of a dense geometry. ``stats["flatness"]`` is how much flatter it is there than usual.

    Where the geometry has ``drift_columns``, ``stats["drift_error"]`` is the standard error of a
    step's drift over its size, and ``stats["drift_variance"]`` its part of the variance of a step,
    estimated at some of the saved states.

    Example:
        >>> from manifold_sde import LimitingDiffusion, problems
        >>> from manifold_sde.solvers import solve
        >>> problem = problems.great_circle()
        >>> solution = solve(LimitingDiffusion(problem), problem.minimizer, [0, 1], n_paths=4)
        >>> solution.ys.shape
        torch.Size([2, 4, 3])
    """
    workers = check_workers(workers, backend)
    folder = check_folder(checkpoint)
    alone = workers in (None, 1) and backend == "loky"
    unit = "step" if alone else "chunk"
    with (
        Stoppable(folder, workers=workers is not None),
        Progress(progress, "SDE", begun=False, unit=unit) as bar,
        contextlib.ExitStack() as stack,
    ):
        simulation = Simulation.of(
            sde,
            y0,
            ts,
            n_paths=n_paths,
            method=method,
            dt=dt,
            tolerance=check_tolerance(rtol, atol, adaptive, dt, dt_min, dt_max),
            seed=seed,
            accuracy=accuracy,
            antithetic=antithetic,
            observables=observables,
            compile=compile,
            chunk_size=chunk_size,
            max_steps=max_steps,
        )
        if folder is not None:
            stack.enter_context(held_folder(folder))
        bar.begin(
            simulation.n_steps if alone else simulation.n_chunks, f"{simulation.n_paths:,} paths"
        )
        results: Iterator[ChunkResult]
        if alone:
            chunks, same = itertools.tee(simulation.chunks(folder))
            reports = map(functools.partial(_report_to, bar, simulation), same)
            results = map(functools.partial(integrate, simulation), chunks, reports)
        else:
            others = integrate_in_workers(simulation, workers, backend, folder, bar.update)
            results = stack.enter_context(contextlib.closing(others))
        whole: ChunkResult | None = None
        for result in results:
            whole = result.merge(whole, 0 if simulation.observables else simulation.n_paths)
        assert whole is not None
        return _solution(simulation, whole)


def _report_to(bar: Progress, simulation: Simulation, chunk: Chunk) -> Report:
    """What tells a bar of the steps of a chunk, and of those that are left to all chunks."""
    alike, n = _ALIKE[bool(simulation.compiled)], len(chunk.paths)
    later = simulation.n_paths - (int(chunk.paths[0]) - simulation.first_path) - n
    chunks = -(-later // simulation.chunk_size)
    taken = [0.0, 0.0]

    def report(steps: int, paths: int, left: Callable[[], tuple[float, float]] | None) -> None:
        if left is None:
            bar.skip(steps)
            return
        taken[0] += steps
        taken[1] += steps * paths

        def both() -> tuple[float, float]:
            now = left()
            more = now[0] + chunks * (taken[0] + now[0])
            of_paths = now[1] + later / n * (taken[1] + now[1])
            return more, of_paths + alike * more

        bar.update(steps, both, steps * (paths + alike))

    return report


def _solution(simulation: Simulation, result: ChunkResult) -> Solution:
    """The solution that holds a result, with a dimension of paths or without."""
    batched = simulation.batched or simulation.observables is not None
    stats: dict[str, Any] = {
        "steps": result.steps,
        "paths": simulation.n_paths,
        "lost_paths": int(result.lost[-1]),
        "compiled": bool(simulation.compiled) and not result.uncompiled,
        "dt": simulation.grid.h * simulation.clock_unit,
    }
    if result.uncompiled:
        stats["uncompiled"] = "; ".join(sorted(result.uncompiled))
    if simulation.expected_error is not None:
        stats["expected_error"] = simulation.expected_error
    if simulation.noise_along is not None:
        stats["noise_along"] = simulation.noise_along
    if result.flatness:
        stats["flatness"] = result.flatness
    warn_of_flat_points(result.flatness)
    if isinstance(simulation.sde, WeightDecaySDE):  # the others refuse such a loss
        stats |= radial_gradient(simulation.sde.problem, simulation.start)
    stats |= drift_error(simulation, result.x if result.x.numel() else simulation.start.T)
    if simulation.control is not None:
        stats["rejected_steps"] = result.rejected
    else:
        stats["halved_steps"] = result.rejected
    config = {**simulation.config(), "versions": versions()}
    if isinstance(simulation.equation, ManifoldEquation) and simulation.equation.group_sizes:
        config["clock"] = "s"
    if simulation.observables is None:
        warn_of_lost_paths(stats["lost_paths"], stats["paths"], config)
    else:
        stats["lost_at_times"] = result.lost.tolist()
    direction = isinstance(simulation.sde, DirectionDiffusion)
    ys = result.x.movedim(1, -1)
    clock = result.sums[:, 0]
    if direction or simulation.ratio is not None:
        clock = (result.time - simulation.grid.start).to(ys.dtype)
    arguments: dict[str, Any] = {
        "ts": torch.tensor(simulation.times, dtype=torch.float64),
        "ys": (ys if batched else ys[:, 0]).contiguous(),
        "clock": (clock if batched else clock[:, 0]).contiguous(),
        "stats": stats,
        "config": config,
        "observed": {
            name: tuple(value.to(ys.dtype) for value in moments.result())
            for name, moments in result.moments.items()
        },
    }
    solution = Solution(**arguments)
    if direction:
        solution = DirectionSolution.of(simulation, result, arguments, batched=batched)
    if simulation.observables is not None:
        check_average(
            stats["lost_paths"],
            stats["paths"],
            when=f" by {simulation.times[-1]:g}",
            partial=solution,
            survivors="the error's attribute partial, a solution whose lost_at_times counts "
            "them at each time",
            remedy=remedy_of(config),
        )
    return solution
