"""The runs of SGD and of the diffusion, kept on the way so that what was stopped goes on."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from manifold_sde.errors import (
    ArgumentError,
    LostPathsWarning,
    NonFiniteError,
)
from manifold_sde.experiments.collapse.network import FUNCTIONS, SHARPNESS, Task, make_task
from manifold_sde.experiments.collapse.settings import Settings
from manifold_sde.experiments.files import discard
from manifold_sde.paper import implements
from manifold_sde.sdes import DirectionDiffusion
from manifold_sde.solvers import run_sgd, solve
from manifold_sde.solvers.archive import complete, read_archive, versions, write_archive
from manifold_sde.solvers.lost_paths import check_average

Array = NDArray[np.float64]

_ANEW = "make the figure anew, with --restart"
_ENSEMBLE, _COLLAPSE = "ensemble of the collapse", "collapse"
#: Axes on which the curves are laid out.
AXES = ("steps", "lr_steps", "lr_decay_steps", "clock")
_ARRAYS = ("steps", "clock", "distances")


@dataclass(frozen=True)
class Ensemble:
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

    def save(self, path: Path) -> None:
        """Write to a file of its own."""
        write_archive(path, _ENSEMBLE, self.header(), self.arrays())

    @classmethod
    def load(cls, path: Path) -> Ensemble:
        """Read what :meth:`save` wrote."""
        header, arrays = read_archive(path, _ENSEMBLE)
        with complete(path, "an ensemble as this version writes it", _ANEW):
            return cls.restored(header, arrays)

    def header(self) -> dict[str, Any]:
        """What is not an array."""
        names = ("lr", "weight_decay", "by_limit_map", "limit_errors", "lost")
        return {name: getattr(self, name) for name in names}

    def arrays(self) -> dict[str, Array]:
        """The arrays by name."""
        own = {name: getattr(self, name) for name in _ARRAYS}
        return {**own, **{f"value_{name}": value for name, value in self.values.items()}}

    @classmethod
    def restored(cls, header: dict[str, Any], arrays: dict[str, Array]) -> Ensemble:
        """The ensemble of a header and arrays."""
        values = {name: arrays[f"value_{name}"] for name in (*FUNCTIONS, SHARPNESS)}
        fields: dict[str, Any] = {**header, **{name: arrays[name] for name in _ARRAYS}}
        return cls(**fields, values=values)


@dataclass(frozen=True)
class CollapseData:
    """All that the figure is drawn from.

    Attributes:
        settings: What was run.
        runs: SGD, an ensemble for each pair of rates, in the order of the settings.
        diffusion: The direction diffusion, simulated in its clock.
        dim, rank: Number of weights, and rank of the Hessian.
        seconds: Time that this process spent on each ensemble, 0 for those taken up.
    """

    settings: Settings
    runs: tuple[Ensemble, ...]
    diffusion: Ensemble
    dim: int
    rank: int
    seconds: tuple[float, ...] = ()

    def save(self, path: str | Path) -> None:
        """Write everything to one file, with the versions that it was made with."""
        ensembles = (*self.runs, self.diffusion)
        header = {
            "settings": dataclasses.asdict(self.settings),
            "ensembles": [e.header() for e in ensembles],
            "dim": self.dim,
            "rank": self.rank,
            "versions": versions(),
        }
        arrays = {
            f"{i}/{name}": a for i, e in enumerate(ensembles) for name, a in e.arrays().items()
        }
        write_archive(path, _COLLAPSE, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> CollapseData:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: If the file is missing, corrupted, or holds something else.
        """
        header, arrays = read_archive(path, _COLLAPSE)
        with complete(path, "what CollapseData.save of this version wrote", _ANEW):
            fields = header["settings"]
            fields["rates"] = tuple(tuple(pair) for pair in fields["rates"])
            fields["widths"] = tuple(fields["widths"])
            found = [
                Ensemble.restored(
                    own,
                    {k.split("/")[1]: a for k, a in arrays.items() if k.startswith(f"{i}/")},
                )
                for i, own in enumerate(header["ensembles"])
            ]
            return cls(
                Settings(**fields), tuple(found[:-1]), found[-1], header["dim"], header["rank"]
            )


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
    where = None if folder is None else Path(folder)
    ensembles, seconds = [], []
    for index in range(len(settings.rates) + 1):
        begun = time.monotonic()
        ensembles.append(_ensemble(settings, task, index, where, progress))
        seconds.append(time.monotonic() - begun)
        if done is not None:
            done(label(settings, index), seconds[-1])
    return CollapseData(
        settings,
        tuple(ensembles[:-1]),
        ensembles[-1],
        task.problem.dim,
        task.rank,
        tuple(seconds),
    )


def label(settings: Settings, index: int) -> str:
    """Name of an ensemble; the diffusion comes after the pairs of rates."""
    if index == len(settings.rates):
        return "diffusion"
    lr, weight_decay = settings.rates[index]
    return f"SGD, η={lr:g}, λ={weight_decay:g}"


def ensemble_path(settings: Settings, index: int, folder: Path) -> Path:
    """File of a finished ensemble; its name says what it depends on."""
    return folder / f"ensemble{index}-{settings.key()}.npz"


def _ensemble(
    settings: Settings, task: Task, index: int, folder: Path | None, progress: bool
) -> Ensemble:
    path = None if folder is None else ensemble_path(settings, index, folder)
    if path is not None and path.exists():
        return Ensemble.load(path)
    checkpoint = None if path is None else path.with_suffix(".ckpt")
    run = _sgd if index < len(settings.rates) else _diffusion
    ensemble = run(settings, task, index, checkpoint, progress)
    if path is not None and checkpoint is not None:
        ensemble.save(path)
        if checkpoint.is_dir():
            discard(checkpoint)
        checkpoint.unlink(missing_ok=True)
    return ensemble


def _sgd(
    settings: Settings, task: Task, index: int, checkpoint: Path | None, progress: bool
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
    blown = solution.stats["non_finite_paths"]
    if blown:
        raise NonFiniteError(
            "runs of SGD blew up",
            received=f"{blown} of {settings.paths} runs, {name}",
            expected="finite weights",
            remedy="smaller rates, or a smaller head_scale: a smaller curvature",
        )
    points, failed = [solution.ys[0]], 0  # the start is on the manifold
    for x in tqdm(solution.ys[1:], desc=f"{name}: onto Γ", disable=not progress, leave=False):
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
    settings: Settings, task: Task, index: int, checkpoint: Path | None, progress: bool
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
    rows = [
        task.evaluate(y)
        for y in tqdm(points, desc=f"{name}: test functions", disable=not progress, leave=False)
    ]
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _limit_errors(task: Task, x: Tensor, near: Tensor, count: int) -> dict[str, float]:
    """Largest change of each test function where the limit map takes its points' place."""
    if not count:
        return {}
    there = task.evaluate(task.geometry.limit_map(x[:count]))
    here = task.evaluate(near[:count])
    return {name: float(np.abs(there[name] - here[name]).max()) for name in FUNCTIONS}
