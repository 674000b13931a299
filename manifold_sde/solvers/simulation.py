"""Simulation of the stochastic differential equations."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from manifold_sde import rng
from manifold_sde.arguments import check_path, integer, kind_of, real
from manifold_sde.degeneracy import measure_diffusion
from manifold_sde.equations import ManifoldEquation, StochasticEquation
from manifold_sde.errors import ArgumentError, DTypeError, NoDiffusionWarning
from manifold_sde.sdes import (
    DirectionDiffusion,
    WeightDecaySDE,
)
from manifold_sde.solvers.ensemble import check_workers, outcomes
from manifold_sde.solvers.limits import MAX_STEPS, check_length, check_max_steps
from manifold_sde.solvers.moments import Observable, evaluate
from manifold_sde.solvers.run import Request, Run
from manifold_sde.solvers.runner import starts
from manifold_sde.solvers.schemes import SCHEMES
from manifold_sde.solvers.solution import Solution
from manifold_sde.solvers.step_control import check_tolerance, require_adaptive_scheme
from manifold_sde.solvers.stopping import Stoppable
from manifold_sde.solvers.torchsde_bridge import TORCHSDE, refuse_unsound

#: Paths of a chunk, all of them stepped together.
CHUNK = 4096


def solve(
    sde: StochasticEquation,
    y0: Tensor,
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
    antithetic: bool = False,
    observables: Mapping[str, Observable] | None = None,
    compile: bool | str = "auto",
    progress: bool | str = False,
    checkpoint: str | Path | None = None,
    workers: int | None = None,
    backend: str = "loky",
    chunk_size: int = CHUNK,
    max_steps: int = MAX_STEPS,
) -> Solution:
    r"""Simulate paths of a stochastic differential equation on the manifold of minimisers.

    A path's noise depends on (seed, path, time) alone: paths are the same alone and among
    thousands (to rounding), at other times asked for, and at steps that differ by powers of two.
    Paths are run in chunks of one size, each on one thread: the result is the same to the bit for
    any number of workers, either backend, and however often the run was stopped and taken up.

    Args:
        sde: The equation.
        y0: Start (D,) on the manifold, or a start for each path (B, D).
        ts: Times asked for, increasing, in the equation's own time; ``ts[0]`` is the start.
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
        antithetic: Whether paths 2i and 2i + 1 have opposite noise, for smaller variance; the
            number of paths and ``chunk_size`` are then even, and standard errors are those of the
            means of pairs.
        observables: Functions of states (n, D), with a value (n, ...) for each, whose mean and
            standard error over the paths are kept, by name, in ``solution.observed``; the paths
            themselves are then not kept (``ys`` is (K, 0, D)), and memory does not grow with
            their number. Lost paths are left out, and counted in ``stats["lost_at_times"]``.
        compile: Whether kernels are compiled: "auto" does so for large runs where a C++ compiler
            is at hand.
        progress: Whether to show a progress bar, or its label: of steps, or of chunks where
            others run them.
        checkpoint: Folder in which the state is saved on the way, a file a chunk; the same call
            goes on from it, and ends with the same bits as if it had not stopped. Workers write
            it themselves: on several machines it is on a file system that they share.
        workers: Number of processes that run the chunks; ``None`` or 1 for this one. With "dask"
            the largest number of chunks under way at once, ``None`` for as many as it takes.
        backend: "loky" for processes on this machine, "dask" for the workers of the
            ``distributed.Client`` that this process has. Both need the extra ``cluster``.
        chunk_size: Number of paths that are stepped together. Another one changes the last bits.
        max_steps: Number of steps of a path beyond which the run is refused: beforehand where it
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

    Example:
        >>> from manifold_sde import LimitingDiffusion, problems
        >>> from manifold_sde.solvers import solve
        >>> problem = problems.great_circle()
        >>> solution = solve(LimitingDiffusion(problem), problem.minimizer, [0, 1], n_paths=4)
        >>> solution.ys.shape
        torch.Size([2, 4, 3])
    """
    require_equation(sde)
    times = check_times(ts)
    start, n, batched = check_starts(sde, y0, n_paths)
    rng.seed_key(seed)
    workers = check_workers(workers, backend)
    if not isinstance(antithetic, bool):
        raise ArgumentError(
            "antithetic is neither yes nor no",
            received=repr(antithetic),
            expected="True or False",
            remedy="antithetic=True for pairs of paths with opposite noise",
        )
    size = check_chunks(chunk_size, n, antithetic)
    folder = _check_folder(checkpoint)
    tolerance = check_tolerance(rtol, atol, adaptive, dt, dt_min, dt_max)
    name, equation = choose(sde, method, adaptive=tolerance is not None)
    share = require_start(sde, equation, start)
    request = Request(
        sde=sde,
        equation=equation,
        method=name,
        start=start,
        n_paths=n,
        times=times,
        dt=check_step(dt, times),
        tolerance=tolerance,
        seed=int(seed),
        antithetic=antithetic,
        observables=_check_observables(observables, start),
        compile=compile,
        chunk_size=size,
        max_steps=check_max_steps(max_steps),
        noise_along=share,
    )
    with Stoppable(folder, workers=workers is not None):
        run = Run(request)
        found = outcomes(run, workers, backend, progress, folder)
        with contextlib.closing(found):
            return run.collect(found, batched)


def choose(
    sde: StochasticEquation, method: str, *, adaptive: bool = False
) -> tuple[str, StochasticEquation]:
    """Name of the method and the equation that its scheme integrates.

    Args:
        sde: The equation asked for.
        method: Name, or "auto".
        adaptive: Whether steps are adaptive.

    Raises:
        ArgumentError: If there is no such method, or it does not fit the equation.
    """
    ambient = isinstance(sde, WeightDecaySDE)
    allowed = ("euler", "heun", "midpoint", *TORCHSDE) if ambient else (*SCHEMES, "split")
    if method == "auto":
        if ambient and adaptive:
            return "heun", sde.with_calculus("stratonovich")
        if ambient:
            return ("euler" if sde.calculus == "ito" else "heun"), sde
        method = "split"
    if method not in allowed:
        refuse_unsound(str(method))
        raise ArgumentError(
            f"there is no such method for {type(sde).__name__}",
            received=repr(method),
            expected=", ".join(repr(m) for m in allowed if m not in TORCHSDE),
            remedy='leave it at "auto"'
            + ", or torchsde:euler, heun, midpoint, euler_heun" * ambient,
        )
    if method == "walk" and not isinstance(sde, DirectionDiffusion):
        raise ArgumentError(
            '"walk" steps directions, and leaves the norm alone',
            received=type(sde).__name__,
            expected="a DirectionDiffusion",
            remedy='"split": the direction by itself, and the norm by its own equation',
        )
    if adaptive:
        require_adaptive_scheme(method)
    if method == "split":
        assert isinstance(sde, ManifoldEquation)
        return method, DirectionDiffusion(sde.problem, "stratonovich", geometry=sde.geometry)
    calculus = TORCHSDE[method] if method in TORCHSDE else SCHEMES[method].calculus
    if calculus is not None and calculus != sde.calculus:
        raise ArgumentError(
            f"{method!r} does not integrate the form of the equation that it was given",
            received=f"the {sde.calculus} form",
            expected=f"the {calculus} form: the drifts differ",
            remedy=f"sde.with_calculus({calculus!r}), the same process",
        )
    return method, sde


def require_start(
    sde: StochasticEquation, equation: StochasticEquation, start: Tensor
) -> float | None:
    """Check that starts are on the manifold, where the equation that is integrated lives on it.

    Returns:
        The part of the noise along the manifold there; ``None`` in the whole space.

    Raises:
        NotOnManifoldError, RankError, NoiseError: If one is not, or the noise vanishes there.

    Warns:
        LongRunWarning: If the tolerance asks for very many steps.
        LostPathsWarning: If paths were lost.
        NoDiffusionWarning: If the noise has no part along the manifold.
    """
    if not isinstance(equation, ManifoldEquation):
        return None
    # Where the direction is simulated for an equation with a norm, it is that of the start.
    own = type(equation) is type(sde)
    equation.require_on_manifold(start if own else start / start.norm(dim=1, keepdim=True))
    share, statement = measure_diffusion(equation, start)
    if statement is not None:
        warnings.warn(
            f"{statement}. Way out: noise along the manifold (SphericalNoise, SamplingNoise of "
            "samples that disagree); if a flow is meant, one path is enough",
            NoDiffusionWarning,
            stacklevel=3,
        )
    sde.problem.noise_along = share
    return share


def require_equation(sde: object) -> StochasticEquation:
    """Check that something is an equation of the toolkit.

    Raises:
        DTypeError: If it is none.
    """
    if isinstance(sde, StochasticEquation):
        return sde
    raise DTypeError(
        "the equation is not one of this toolkit",
        received=kind_of(sde),
        expected="DirectionDiffusion(problem), LimitingDiffusion(problem), ...",
        remedy="DirectionDiffusion(problem); torchsde.sdeint is for SDEs of your own",
    )


def check_starts(
    sde: StochasticEquation, y0: Tensor, n_paths: int | None
) -> tuple[Tensor, int, bool]:
    """The one start of all paths (1, D), or each its own (n, D); n; and whether ys has paths."""
    count = integer(n_paths)
    if count is not None and count > 2**32:
        raise ArgumentError(
            "there are too many paths",
            received=f"n_paths={n_paths}",
            expected="at most 2**32 paths of a seed",
            remedy="a few thousand paths have a small standard error; multilevel for more digits",
        )
    if count is not None and count > 0 and isinstance(y0, Tensor) and y0.dim() == 1:
        start, _ = starts(sde.problem, y0, None, name="y0")
        return start, count, True
    start, batched = starts(sde.problem, y0, n_paths, name="y0")
    return start, len(start), batched


def check_chunks(chunk_size: object, n_paths: int, antithetic: bool) -> int:
    """The number of paths that are stepped together.

    Raises:
        ArgumentError: If it is none, or does not fit pairs of paths.
    """
    size = integer(chunk_size)
    if size is None or size < 1 or (antithetic and size % 2):
        raise ArgumentError(
            "chunk_size is not a number of paths",
            received=repr(chunk_size),
            expected="a positive integer" + (", even, as pairs stay together" * bool(antithetic)),
            remedy=f"leave it out: {CHUNK}",
        )
    if antithetic and n_paths % 2:
        raise ArgumentError(
            "antithetic paths come in pairs",
            received=f"{n_paths} paths",
            expected="an even number of paths",
            remedy=f"n_paths={n_paths + 1}",
        )
    return size


def _check_folder(checkpoint: object) -> Path | None:
    """The folder of the checkpoints."""
    if checkpoint is None:
        return None
    folder = check_path("checkpoint", checkpoint)
    if folder.is_file():
        raise ArgumentError(
            "checkpoint is not a folder",
            received=f"{checkpoint}, a file",
            expected="the path of a folder, to which a file for each chunk is written",
            remedy='checkpoint="run" (the checkpoint of run_sgd, in contrast, is a file)',
        )
    return folder


def _check_observables(observables: object, start: Tensor) -> dict[str, Observable] | None:
    """The observables, each tried on the start."""
    if observables is None:
        return None
    names = list(observables) if isinstance(observables, Mapping) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ArgumentError(
            "observables are not functions with names",
            received=repr(observables)[:80],
            expected="a mapping of one or more names to functions of states (n, D)",
            remedy='observables={"first": lambda y: y[:, 0]}',
        )
    assert isinstance(observables, Mapping)
    with torch.no_grad():
        for name, function in observables.items():
            rows = start[:1].expand(3 if start.shape[1] == 2 else 2, -1).contiguous()
            evaluate(f"the observable {name!r}", function, rows)
    return dict(observables)


def check_times(ts: object) -> tuple[float, ...]:
    """Times as numbers.

    Raises:
        ArgumentError: If they do not increase.
    """
    check_length("times", ts)
    if isinstance(ts, (Tensor, np.ndarray)):
        ts = ts.tolist()
    listed = list(ts) if isinstance(ts, Iterable) and not isinstance(ts, (str, bytes)) else [ts]
    numbers = [
        float(t) if isinstance(t, (int, float, np.number)) and not isinstance(t, bool) else math.nan
        for t in listed
    ]
    increasing = all(a < b for a, b in itertools.pairwise(numbers))
    if len(numbers) < 2 or not all(math.isfinite(t) for t in numbers) or not increasing:
        raise ArgumentError(
            "ts are not times to solve for",
            received=repr(ts)[:80],
            expected="two or more finite numbers, increasing; the first is the start",
            remedy="ts=[0.0, 1.0], or torch.linspace(0, 1, 11)",
        )
    return tuple(numbers)


def check_step(dt: object, times: tuple[float, ...]) -> float | None:
    """A step, or ``None``.

    Raises:
        ArgumentError: If it is none.
    """
    if dt is None:
        return None
    step = real(dt)
    if 0 < step < math.inf and (times[-1] - times[0]) / step < 2**40:
        return step
    raise ArgumentError(
        "dt is not a step",
        received=repr(dt),
        expected="a positive number, not below 2^-40 of the time span",
        remedy="leave dt out, and look at solution.config['dt']",
    )
