"""The runs of SGD behind Figure 2, kept on the way so that a run that is stopped goes on."""

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

from manifold_sde.errors import CompilationWarning, NonFiniteError
from manifold_sde.experiments.figure2.settings import DESIGNS, Plan, Settings
from manifold_sde.paper import implements
from manifold_sde.problems import NormalizedLinear
from manifold_sde.solvers import Solution, run_sgd
from manifold_sde.solvers.archive import complete, read_archive, versions, write_archive
from manifold_sde.verification.exact import AngleLaw

Array = NDArray[np.float64]

_ANEW = "make the figure anew, with --restart"
_RUN = "ensemble of figure 2"
_FIGURE = "figure 2"


@dataclass(frozen=True)
class Run:
    """What is kept of an ensemble of runs.

    The angle is that of the direction x/|x| in the plane of the circle. It is also the angle of
    Phi(x): gradient flow changes x inside the span of x and the inputs, which are orthogonal to
    the plane, so that the direction of the part in the plane stays.

    Attributes:
        plan: What was run.
        boxes: Coordinates in the plane, (boxes, runs, 2).
        angles: Angles unwrapped along each path, (times, paths).
        coarse_angles: The same over half as many records: where they differ, the number of
            windings was in doubt.
    """

    plan: Plan
    boxes: Array
    angles: Array
    coarse_angles: Array

    def save(self, path: Path) -> None:
        """Write to a file of its own."""
        write_archive(path, _RUN, {"plan": dataclasses.asdict(self.plan)}, self.arrays())

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read what :meth:`save` wrote."""
        header, arrays = read_archive(path, _RUN)
        with complete(path, "runs as this version writes them", _ANEW):
            return cls(_plan(header["plan"]), **{name: arrays[name] for name in _array_names()})

    def arrays(self) -> dict[str, Array]:
        """The arrays by name."""
        return {
            "boxes": self.boxes,
            "angles": self.angles,
            "coarse_angles": self.coarse_angles,
        }


def _plan(fields: dict[str, Any]) -> Plan:
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return Plan(**plain)


@dataclass(frozen=True)
class Figure2:
    """All that Figure 2 is drawn from.

    Attributes:
        settings: What was run.
        runs: The ensembles.
        laws: For each design the exact law of the limit.
        conditions: For each design the condition number of H on its range.
    """

    settings: Settings
    runs: tuple[Run, ...]
    laws: dict[str, AngleLaw]
    conditions: dict[str, float]

    def run(self, design: str, lr: float) -> Run | None:
        """The ensemble of a design and learning rate, or ``None`` if it was not run."""
        found = [r for r in self.runs if (r.plan.design, r.plan.lr) == (design, lr)]
        return found[0] if found else None

    def save(self, path: str | Path) -> None:
        """Write everything to one file, with the versions that it was made with."""
        arrays = {
            f"run{i}_{name}": value
            for i, run in enumerate(self.runs)
            for name, value in run.arrays().items()
        }
        header = {
            "settings": dataclasses.asdict(self.settings),
            "plans": [dataclasses.asdict(run.plan) for run in self.runs],
            "laws": {name: dataclasses.asdict(law) for name, law in self.laws.items()},
            "conditions": self.conditions,
            "versions": versions(),
        }
        write_archive(path, _FIGURE, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> Figure2:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: If the file is missing, corrupted, or holds something else.
        """
        header, arrays = read_archive(path, _FIGURE)
        with complete(path, "what Figure2.save of this version wrote", _ANEW):
            fields = header["settings"]
            runs = [
                Run(_plan(plan), **{n: arrays[f"run{i}_{n}"] for n in _array_names()})
                for i, plan in enumerate(header["plans"])
            ]
            return cls(
                Settings(**{**fields, "lrs": tuple(fields["lrs"])}),
                tuple(runs),
                {name: AngleLaw(**law) for name, law in header["laws"].items()},
                header["conditions"],
            )


def _array_names() -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(Run) if f.name != "plan")


@implements("Figure 2")
def simulate(
    settings: Settings | None = None,
    *,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Figure2:
    """Run SGD for Figure 2, one ensemble after the other in this process.

    Args:
        settings: What to run; by default the quick form.
        folder: Where ensembles and checkpoints are kept, so that a run that is stopped goes on
            from there with the same bits; ``None`` keeps nothing.
        progress: Whether to show a progress bar for each ensemble.

    Returns:
        The data of the figure.

    Raises:
        NonFiniteError: If runs blew up.
        CheckpointError: If a file in the folder is corrupted.

    Example:
        >>> settings = Settings(lrs=(0.01,), runs=3, law_runs=8, horizon=0.01, compiled=False)
        >>> simulate(settings).run("gaussian", 0.01).boxes.shape
        (12, 3, 2)

    Source: section 6.1, Figure 2.
    """
    settings = settings or Settings.quick()
    where = None if folder is None else Path(folder)
    runs: list[Run] = []
    for design in DESIGNS:
        settings, found = run_design(settings, design, where, progress)
        runs += found
    return collect(settings, runs)


def collect(settings: Settings, runs: list[Run]) -> Figure2:
    """The data of the figure from its ensembles."""
    laws, conditions = {}, {}
    for design in DESIGNS:
        problem = settings.problem(design)
        laws[design] = AngleLaw.of(problem)
        values = torch.linalg.eigvalsh(problem.hessian(problem.minimizer))[-settings.n_samples :]
        conditions[design] = float(values[-1] / values[0])
    return Figure2(settings, tuple(runs), laws, conditions)


def run_design(
    settings: Settings,
    design: str,
    folder: Path | None,
    progress: bool = False,
    done: Callable[[Plan, float], None] | None = None,
) -> tuple[Settings, list[Run]]:
    """Run the ensembles of one design.

    Args:
        settings: What to run.
        design: The design.
        folder: Where ensembles and checkpoints are kept, or ``None``.
        progress: Whether to show progress bars.
        done: Called with each plan and the seconds that it took.

    Returns:
        The settings, without compiling where that failed, and the ensembles.
    """
    problem = settings.problem(design)
    if settings.compiled and not _compiles(settings, problem):
        settings = settings.without_compiler()
    runs = []
    for plan in settings.plans(design):
        begun = time.monotonic()
        runs.append(_run(settings, problem, plan, folder, progress))
        if done is not None:
            done(plan, time.monotonic() - begun)
    return settings, runs


def run_path(settings: Settings, plan: Plan, folder: Path) -> Path:
    """File of a finished ensemble; its name says what it depends on."""
    lr = f"{plan.lr:g}"
    return folder / f"{plan.design}-lr{lr}-{settings.key()}.npz"


def _run(
    settings: Settings,
    problem: NormalizedLinear,
    plan: Plan,
    folder: Path | None,
    progress: bool,
) -> Run:
    path = None if folder is None else run_path(settings, plan, folder)
    if path is not None and path.exists():
        return Run.load(path)
    checkpoint = None if path is None else path.with_suffix(".ckpt")
    solution = run_sgd(
        problem,
        problem.minimizer,
        plan.lr,
        settings.weight_decay,
        plan.kept,
        n_paths=plan.n_paths,
        seed=settings.noise_seed(plan.design),
        compile=settings.compiled,
        progress=plan.label if progress else False,
        checkpoint=checkpoint,
    )
    run = _extract(settings, problem, plan, solution)
    if path is not None and checkpoint is not None:
        run.save(path)
        checkpoint.unlink(missing_ok=True)
    return run


def _extract(settings: Settings, problem: NormalizedLinear, plan: Plan, solution: Solution) -> Run:
    blown = solution.stats["non_finite_paths"]
    if blown:
        raise NonFiniteError(
            "runs of SGD blew up",
            received=f"{blown} of {plan.n_paths} runs at learning rate {plan.lr:g}",
            expected="finite weights",
            remedy="a smaller learning rate; the theory needs it to be small",
        )
    circle = problem.facts.circle
    row = {int(k): i for i, k in enumerate(solution.ts)}

    def unwrapped(records: list[int]) -> Array:
        angles = circle.angle(solution.ys[[row[k] for k in records]]).numpy()
        along = np.unwrap(angles, axis=0)
        return along[[records.index(k) for k in plan.law_steps]]

    records = plan.records
    coarse = sorted({*records[::2], *plan.law_steps})
    boxes = solution.ys[[row[k] for k in plan.box_steps], : settings.runs]
    return Run(
        plan,
        circle.plane_coordinates(boxes).numpy(),
        unwrapped(records),
        unwrapped(coarse),
    )


def _compiles(settings: Settings, problem: NormalizedLinear) -> bool:
    """Whether the step compiles here: tried, because a compiler that is found may still fail."""
    n = max(settings.runs, settings.law_runs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompilationWarning)
        try:
            run_sgd(problem, problem.minimizer, 1e-3, 0.0, 1, n_paths=n, compile=True)
        except CompilationWarning:
            return False
    return True
