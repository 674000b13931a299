"""The law of SGD's weights after given numbers of steps, in one call and without running SGD."""

from __future__ import annotations

import functools
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde.arguments import Points
from manifold_sde.equations import ManifoldEquation
from manifold_sde.errors import (
    ArgumentError,
    ManifoldSDEError,
    ManifoldSDEWarning,
    NotOnManifoldError,
)
from manifold_sde.paper import implements
from manifold_sde.problem import Problem
from manifold_sde.progress import duration, with_alternative
from manifold_sde.sdes import LimitingDiffusion
from manifold_sde.solvers.arguments import check_steps, starts
from manifold_sde.solvers.chunk import CHUNK
from manifold_sde.solvers.limits import MAX_STEPS
from manifold_sde.solvers.sgd import run_sgd
from manifold_sde.solvers.solution import Solution
from manifold_sde.solvers.solver import solve
from manifold_sde.solvers.step_sizes import StepSizes, Terrain
from manifold_sde.time_scale import TimeScale

#: Seconds of a prediction from which on it is tried what SGD itself takes; the weights that are
#: stepped then, and how often.
_WORTH_TRYING = 5.0
_TRIED_NUMBERS, _TRIED_STEPS = 1 << 18, 512
#: Seconds of one step, with what a run begins with, from which on no more are tried.
_LONG_STEP = 0.05


@implements("Theorem 4.4")
def predict_sgd(
    problem: Problem,
    x0: Points,
    lr: Any,
    weight_decay: Any,
    steps: Any,
    *,
    n_paths: int | None = None,
    dt: float | None = None,
    rtol: float | None = None,
    seed: int = 0,
    antithetic: bool = False,
    compile: bool | str = "auto",
    progress: bool | str | None = None,
    checkpoint: str | Path | None = None,
    workers: int | None = None,
    chunk_size: int = CHUNK,
    max_steps: int = MAX_STEPS,
) -> Solution:
    r"""The law that the theory predicts for SGD's weights, where ``run_sgd`` would run them.

    With t_0 and a_k of :class:`~manifold_sde.TimeScale`, (13) is simulated from Phi(x0) to the
    times :math:`T_k = \tfrac12\ln(1 + 2 t_0(k))` by "split", and

    .. math::

        x_k \approx a_k\, e^{T_k/2}\, Y(T_k) .

    This is the law of Phi(x_k), on the manifold: the weights themselves go to it first, and are
    then off it by the square root of the learning rate. ``run_sgd(...).limit(Geometry(problem))``
    is what to compare with.

    Each path is simulated as far as it has to be, and no clock has to be chosen beforehand. If
    several rates are of interest, one run of a :class:`~manifold_sde.DirectionDiffusion` with
    :meth:`~manifold_sde.solvers.DirectionSolution.at_steps` answers for all of them.

    Args:
        problem: The problem.
        x0: Weights at step 0: (D,), or (B, D) for B paths; a tensor, array or list. Where they
            are not on the manifold of minimisers, the law is that of a start from Phi(x0), to
            which SGD goes first.
        lr: Learning rate eta: a number, a sequence, a callable of the step or a torch scheduler.
        weight_decay: Weight decay lambda, likewise.
        steps: Step counts, increasing.
        n_paths: Number of paths from one start.
        dt: Step in the time T of (13); as :func:`~manifold_sde.solvers.solve` takes it.
        rtol: Tolerance of adaptive steps, likewise.
        seed: Seed of the Brownian paths.
        antithetic: Whether paths come in pairs of opposite noise.
        compile: Whether kernels are compiled.
        progress: Whether to show a progress bar, or its label; as for ``solve``. Where SGD itself
            would take half as long or less, what is said of the cost says so.
        checkpoint: Folder from which a run that was stopped goes on.
        workers: Number of processes.
        chunk_size: Number of paths that are stepped together.
        max_steps: Number of steps of a path of (13) beyond which the run is refused.

    Returns:
        Solution whose ``ts`` are the steps; ``ys`` is (K, D) or (K, n, D). ``stats`` has the
        dimensionless steps of SGD, as for ``at_steps``, and ``start_moved``: how far from a start
        off the manifold the law starts, at norm 1.

    Warns:
        StepSizeWarning: If SGD would be unstable, or far from the manifold, at these rates.
        RankWarning: If paths end near points where the rank of the Hessian falls.

    Raises:
        ArgumentError, TimeScaleError: If an argument is out of range.
        LimitMapError: If gradient flow from x0 does not arrive at the manifold.
        NoiseError: If the noise vanishes on the manifold, or does not have the properties needed.

    Example:
        >>> from manifold_sde import problems
        >>> from manifold_sde.solvers import predict_sgd
        >>> problem = problems.great_circle()
        >>> predict_sgd(problem, problem.minimizer, 0.01, 0.05, [100, 500], n_paths=8)
        Solution(8 paths, 2 times from 100 to 500, dim=3)
          norm     0.9522 to 0.7847
          clock u  up to 0.08462
          ...

    Source: Theorem 4.4 and Theorem 3.2, with schedules by the exact reduction to no weight decay.
    """
    kept = check_steps(steps)
    if kept[-1] == 0:
        raise ArgumentError(
            "there is no step to predict",
            received=repr(steps)[:80],
            expected="at least one step count above 0",
            remedy="steps=[1000, 2000]",
        )
    scale = TimeScale(lr, weight_decay)
    sde = LimitingDiffusion(problem)
    first, batched = starts(problem, x0, None)
    start = on_manifold(sde, first)
    y0 = start if batched else start[0]
    n = len(start) if n_paths is None else n_paths
    with with_alternative(functools.partial(_sgd_instead, problem, start, scale, kept[-1], n)):
        run = weights_of_limit(
            sde,
            y0,
            scale,
            np.array(kept),
            n_paths=n_paths,
            dt=dt,
            rtol=rtol,
            seed=seed,
            antithetic=antithetic,
            compile=compile,
            progress=progress,
            checkpoint=checkpoint,
            workers=workers,
            chunk_size=chunk_size,
            max_steps=max_steps,
        )
    config: dict[str, Any] = {"lr": repr(scale.lr), "weight_decay": repr(scale.weight_decay)}
    # The ratio of (13) is that of its own equation, and not of these weights.
    config |= {k: v for k, v in run.config.items() if k not in ("ratio", *config)}
    if isinstance(scale.lr, float) and isinstance(scale.weight_decay, float):
        config["ratio"] = scale.weight_decay / scale.lr
    # The start as well, as every path may be lost.
    unit = start / start.norm(dim=1, keepdim=True)
    directions = torch.cat([unit, run.directions.reshape(-1, problem.dim)])
    seen = directions[torch.isfinite(directions).all(-1)]
    terrain = Terrain.of(sde, seen)
    sizes = StepSizes.of(scale, kept[-1], float(start.norm(dim=1).min()), terrain)
    sizes.warn_if_unstable()
    moved = way_to_manifold(first, start)
    stats = {**run.stats, **sizes.stats()} | ({"start_moved": moved} if moved > 0.0 else {})
    return replace(run, stats=stats, config=config)


def _sgd_instead(
    problem: Problem, start: Tensor, scale: TimeScale, steps: int, n: int, seconds: float
) -> str:
    """What a run of SGD takes in place of a long prediction, where that is less; else "".

    Some steps are run of it, which are a small part of these seconds.
    """
    if seconds < _WORTH_TRYING:
        return ""
    paths = max(1, min(n, _TRIED_NUMBERS // problem.dim))
    x0 = start.expand(paths, -1) if len(start) == 1 else start[:paths]

    def run(count: int) -> float:
        begin = time.perf_counter()
        run_sgd(problem, x0, scale.lr, scale.weight_decay, count, progress=False)
        return time.perf_counter() - begin

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ManifoldSDEWarning)
            run(1)  # with it goes what is made once
            step, more = run(1), min(steps - 1, _TRIED_STEPS)
            if step < _LONG_STEP and more:
                step = (run(1 + more) - step) / more
    except ManifoldSDEError:
        return ""
    needed = steps * step * n / len(x0)
    if not 0.0 < needed <= 0.5 * seconds:
        return ""
    return f"SGD itself takes about {duration(needed)}: run_sgd with the same arguments"


def weights_of_limit(
    sde: LimitingDiffusion, y0: Tensor, scale: TimeScale, counts: np.ndarray, **options: Any
) -> Solution:
    """Weights a_k e^{T/2} Y(T) of SGD in the limit, with (13) solved to the times of step counts.

    Args:
        sde: The equation (13).
        y0: Start on the manifold, as for ``solve``.
        scale: Learning rate and weight decay.
        counts: Step counts, increasing, 0 or more, the last above 0, (K,).
        **options: Options of ``solve``.

    Returns:
        Solution whose ``ts`` are the counts.
    """
    T = np.asarray(scale.discrete_time(counts), dtype=float)
    times, place = np.unique(np.concatenate([[0.0], T]), return_inverse=True)
    run = solve(sde, y0, times.tolist(), **options)
    rows = torch.from_numpy(place[1:].copy())
    # e^{T/2} takes the norm of (13) to that of ratio 0, and a to that of the weights.
    log_shrinkage = np.asarray(scale.log_shrinkage(counts), dtype=float)
    factor = torch.from_numpy(np.exp(log_shrinkage + 0.5 * T)).to(run.ys)
    return replace(
        run,
        ts=torch.from_numpy(counts.astype(float)),
        ys=run.ys[rows] * factor.reshape(-1, *(1,) * (run.ys.dim() - 1)),
        clock=run.clock[rows],
    )


def on_manifold(sde: ManifoldEquation, x: Tensor) -> Tensor:
    """The points themselves where they are on the manifold, and Phi of them where they are not.

    Args:
        sde: The equation, which then knows its rank.
        x: Points (n, D).

    Raises:
        LimitMapError: If gradient flow does not arrive.
        RankError, NoiseError: As :meth:`~manifold_sde.sdes.ManifoldEquation.require_on_manifold`.
    """
    try:
        sde.require_on_manifold(x)
    except NotOnManifoldError:
        x = sde.geometry.limit_map(x)
        sde.require_on_manifold(x)
    return x


def way_to_manifold(x: Tensor, y: Tensor) -> float:
    """The largest distance at norm 1 between points (n, D) and their limits (n, D)."""
    unit = [z / z.norm(dim=1, keepdim=True) for z in (x, y)]
    return float((unit[0] - unit[1]).norm(dim=1).max())
