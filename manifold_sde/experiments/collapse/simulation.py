"""The runs of SGD and of the diffusion, kept on the way so that what was stopped goes on."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manifold_sde.errors import ArgumentError, LostPathsWarning
from manifold_sde.experiments.collapse.network import FUNCTIONS, SHARPNESS, Task, make_task
from manifold_sde.experiments.experiment import (
    Array,
    SavedData,
    SavedValues,
    joined_arrays,
    require_finite,
    restored,
    split_arrays,
)
from manifold_sde.experiments.settings.collapse import Settings
from manifold_sde.paper import implements
from manifold_sde.progress import counted
from manifold_sde.sdes import DirectionDiffusion
from manifold_sde.solvers import run_sgd, solve
from manifold_sde.solvers.lost_paths import check_average

_PREFIX = "{}/"
#: Axes on which the curves are laid out.
AXES = ("steps", "lr_steps", "lr_decay_steps", "clock")


@dataclass(frozen=True)
class Ensemble(SavedValues):
    """What is kept of an ensemble of paths, at K snapshots of n paths.

    Attributes:
        lr, weight_decay: Rates of SGD; ``None`` for the diffusion.
        steps: Step counts (K,); those of the diffusion are its own steps.
        clock: Intrinsic clock of each path, (K, n).
        values: Test functions by name, and "sharpness", (K, n) each.
        distances: |x - y| / |x| of SGD's weights x from the points y of the manifold at which the
            test functions are evaluated, (K, n).
        by_limit_map: Number of these points that few steps of the flow did not find, and
            the limit map did.
        limit_errors: For each test function the largest change, at the last snapshot of a few
            runs, where the limit map takes the place of few steps of the flow.
        lost: Paths of the diffusion that were lost, and are left out.
    """

    KIND = "ensemble of the collapse"
    NAMES = (*FUNCTIONS, SHARPNESS)

    lr: float | None
    weight_decay: float | None
    steps: Array
    clock: Array
    values: dict[str, Array]
    distances: Array
    by_limit_map: int = 0
    limit_errors: dict[str, float] = dataclasses.field(default_factory=dict)
    lost: int = 0

    def positions(self, axis: str) -> Array:
        """Positions of the snapshots on an axis, (K,), or (K, n) for the clock."""
        if axis == "clock":
            return self.clock
        if self.lr is None or self.weight_decay is None:
            raise ArgumentError(
                "the diffusion has a clock, and no steps of SGD",
                received=repr(axis),
                expected="'clock'",
                remedy="the other axes are for ensembles of SGD",
            )
        factors = {"lr_steps": self.lr, "lr_decay_steps": self.lr * self.weight_decay}
        return self.steps * factors.get(axis, 1.0)

    @property
    def largest_step(self) -> float:
        """Largest eta / |x|^2 between snapshots, by the clock: the root of its mean increase."""
        rise = np.diff(self.clock, axis=0) / np.diff(self.steps)[:, None]
        return float(np.sqrt(rise.max()))

    @property
    def stability(self) -> float:
        """Largest step times the largest eigenvalue of H, both as seen."""
        return self.largest_step * float(self.values[SHARPNESS].max())


@dataclass(frozen=True)
class CollapseData(SavedData):
    """All that the figure is drawn from.

    Attributes:
        settings: What was run.
        runs: SGD, an ensemble for each pair of rates, in the order of the settings.
        diffusion: The direction diffusion, simulated in its clock.
        dim, rank: Number of weights, and rank of the Hessian.
    """

    KIND = "collapse"

    settings: Settings
    runs: tuple[Ensemble, ...]
    diffusion: Ensemble
    dim: int
    rank: int

    def header(self) -> dict[str, Any]:
        """What is not an array."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "ensembles": [ensemble.header() for ensemble in (*self.runs, self.diffusion)],
            "dim": self.dim,
            "rank": self.rank,
        }

    def arrays(self) -> dict[str, Array]:
        """The arrays of all ensembles."""
        return joined_arrays((*self.runs, self.diffusion), _PREFIX)

    @classmethod
    def restored(cls, header: dict[str, Any], arrays: dict[str, Array]) -> CollapseData:
        """The data of a header and arrays."""
        *runs, diffusion = (
            Ensemble.restored(own, split_arrays(arrays, _PREFIX, i))
            for i, own in enumerate(header["ensembles"])
        )
        settings = restored(Settings, header["settings"])
        return cls(settings, tuple(runs), diffusion, header["dim"], header["rank"])


@implements("Theorem 4.4")
def simulate(
    settings: Settings | None = None,
    *,
    folder: str | Path | None = None,
    progress: bool = False,
    done: Callable[[str, float], None] | None = None,
) -> CollapseData:
    """Run SGD at every pair of rates, and the diffusion once.

    Args:
        settings: What to run; by default the quick form.
        folder: Where ensembles and checkpoints are kept, so that what is stopped goes on from
            there with the same bits; ``None`` keeps nothing.
        progress: Whether to show progress bars.
        done: Called with the name of each ensemble and the seconds that it took.

    Returns:
        The data of the figure.

    Raises:
        ArgumentError: If SGD is unstable at these rates.
        NonFiniteError: If runs blew up.
        LimitMapError: If weights of SGD are not attracted by the manifold.
        CheckpointError: If a file in the folder is corrupted.

    Source: Theorem 4.4, in the intrinsic clock.
    """
    settings = settings or Settings.quick()
    task = make_task(settings)
    ensembles = []
    for index in range(len(settings.rates) + 1):
        begun = time.monotonic()
        run = _sgd if index < len(settings.rates) else _diffusion
        path = None if folder is None else ensemble_path(settings, index, Path(folder))
        make = functools.partial(run, settings, task, index, progress)
        ensembles.append(Ensemble.kept(path, make))
        if done is not None:
            done(label(settings, index), time.monotonic() - begun)
    *runs, diffusion = ensembles
    return CollapseData(settings, tuple(runs), diffusion, task.problem.dim, task.rank)


def label(settings: Settings, index: int) -> str:
    """Name of an ensemble; the diffusion comes after the pairs of rates."""
    if index == len(settings.rates):
        return "diffusion"
    lr, weight_decay = settings.rates[index]
    return f"SGD, η={lr:g}, λ={weight_decay:g}"


def ensemble_path(settings: Settings, index: int, folder: Path) -> Path:
    """File of a finished ensemble; its name says what it depends on."""
    return folder / f"ensemble{index}-{settings.key()}.npz"


def _sgd(
    settings: Settings, task: Task, index: int, progress: bool, checkpoint: Path | None
) -> Ensemble:
    lr, weight_decay = settings.rates[index]
    name = label(settings, index)
    solution = run_sgd(
        task.problem,
        task.start,
        lr,
        weight_decay,
        settings.steps(lr, weight_decay),
        n_paths=settings.paths,
        seed=settings.noise_seed(index),
        compile=settings.compiled,
        progress=name if progress else False,
        checkpoint=checkpoint,
    )
    require_finite(
        solution.stats["non_finite_paths"],
        f"{settings.paths} runs, {name}",
        "smaller rates, or a smaller head_scale: a smaller curvature",
    )
    points, failed = [solution.ys[0]], 0  # the start is on the manifold
    for x in counted(solution.ys[1:], progress, f"{name}: onto Γ"):
        y, count = task.onto_manifold(x)
        points.append(y)
        failed += count
    on = torch.stack(points)
    distances = (solution.ys - on).norm(dim=-1) / solution.ys.norm(dim=-1)
    return Ensemble(
        lr,
        weight_decay,
        solution.ts.double().numpy(),
        solution.clock.numpy(),
        _evaluate(task, on, name, progress),
        distances.numpy(),
        failed,
        _limit_errors(task, solution.ys[-1], on[-1], settings.limit_points),
    )


def _diffusion(
    settings: Settings, task: Task, index: int, progress: bool, checkpoint: Path | None
) -> Ensemble:
    name = label(settings, index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LostPathsWarning)  # counted below
        solution = solve(
            DirectionDiffusion(task.problem, geometry=task.geometry),
            task.start,
            settings.clocks,
            n_paths=settings.diffusion_paths,
            dt=settings.dt,
            seed=settings.seed,
            compile=False,
            progress=name if progress else False,
            checkpoint=checkpoint,
        )
    kept = torch.isfinite(solution.ys).all(-1).all(0)
    lost = int((~kept).sum())
    check_average(
        lost,
        settings.diffusion_paths,
        when=f" at a step of {settings.dt:g}",
        survivors="solve(...) with these settings returns all paths, NaN where lost",
    )
    ys = solution.ys[:, kept]
    clock = solution.ts[:, None].expand(ys.shape[:2]).double().numpy()
    return Ensemble(
        None,
        None,
        clock[:, 0] / settings.dt,
        clock.copy(),
        _evaluate(task, ys, name, progress),
        np.zeros(clock.shape),
        lost=lost,
    )


def _evaluate(task: Task, points: Tensor, name: str, progress: bool) -> dict[str, Array]:
    rows = [task.evaluate(y) for y in counted(points, progress, f"{name}: test functions")]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _limit_errors(task: Task, x: Tensor, near: Tensor, count: int) -> dict[str, float]:
    """Largest change of each test function where the limit map takes its points' place."""
    if not count:
        return {}
    there = task.evaluate(task.geometry.limit_map(x[:count]))
    here = task.evaluate(near[:count])
    return {name: float(np.abs(there[name] - here[name]).max()) for name in FUNCTIONS}
