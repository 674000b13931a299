"""The runs of SGD behind Figure 2, kept on the way so that a run that is stopped goes on."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from manifold_sde.errors import CompilationWarning
from manifold_sde.experiments.experiment import (
    Array,
    SavedData,
    joined_arrays,
    require_finite,
    restored,
    split_arrays,
)
from manifold_sde.experiments.processes import Note, run_tasks
from manifold_sde.experiments.settings.figure2 import DESIGNS, Plan, Settings
from manifold_sde.paper import implements
from manifold_sde.problems import NormalizedLinear
from manifold_sde.solvers import Solution, run_sgd
from manifold_sde.verification.exact import AngleLaw

_PREFIX = "run{}_"


@dataclass(frozen=True)
class Run(SavedData):
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

    KIND = "ensemble of figure 2"

    plan: Plan
    boxes: Array
    angles: Array
    coarse_angles: Array


@dataclass(frozen=True)
class Figure2(SavedData):
    """All that Figure 2 is drawn from.

    Attributes:
        settings: What was run.
        runs: The ensembles.
        laws: For each design the exact law of the limit.
        conditions: For each design the condition number of H on its range.
    """

    KIND = "figure 2"

    settings: Settings
    runs: tuple[Run, ...]
    laws: dict[str, AngleLaw]
    conditions: dict[str, float]

    def run(self, design: str, lr: float) -> Run | None:
        """The ensemble of a design and learning rate, or ``None`` if it was not run."""
        found = [r for r in self.runs if (r.plan.design, r.plan.lr) == (design, lr)]
        return found[0] if found else None

    def header(self) -> dict[str, Any]:
        """What is not an array."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "plans": [dataclasses.asdict(run.plan) for run in self.runs],
            "laws": {name: dataclasses.asdict(law) for name, law in self.laws.items()},
            "conditions": self.conditions,
        }

    def arrays(self) -> dict[str, Array]:
        """The arrays of all ensembles."""
        return joined_arrays(self.runs, _PREFIX)

    @classmethod
    def restored(cls, header: dict[str, Any], arrays: dict[str, Array]) -> Figure2:
        """The data of a header and arrays."""
        return cls(
            restored(Settings, header["settings"]),
            tuple(
                Run.restored({"plan": plan}, split_arrays(arrays, _PREFIX, i))
                for i, plan in enumerate(header["plans"])
            ),
            {name: AngleLaw(**law) for name, law in header["laws"].items()},
            header["conditions"],
        )


@implements("Figure 2")
def simulate(
    settings: Settings | None = None,
    *,
    folder: str | Path | None = None,
    progress: bool = False,
    jobs: int = 1,
    console: Console | None = None,
) -> Figure2:
    """Run SGD for Figure 2.

    Args:
        settings: What to run; by default the quick form.
        folder: Where ensembles and checkpoints are kept, so that a run that is stopped goes on
            from there with the same bits; ``None`` keeps nothing.
        progress: Whether to show a progress bar for each ensemble.
        jobs: 1 runs all in this process, 2 run each design in a worker process, with a folder.
        console: Where worker processes show their progress.

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
    if jobs > 1:
        tasks = {d: functools.partial(run_design, settings, d, where, True) for d in DESIGNS}
        results = list(run_tasks(tasks, console or Console(), jobs=jobs).values())
        settings = results[-1][0]
        runs = [run for _, found in results for run in found]
    else:
        for design in DESIGNS:
            settings, found = run_design(settings, design, where, progress)
            runs += found
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
    note: Note | None = None,
) -> tuple[Settings, list[Run]]:
    """Run the ensembles of one design, with a line to ``note`` after each.

    Returns the settings, without compiling where that failed, and the ensembles.
    """
    problem = settings.problem(design)
    if settings.compiled and not _compiles(settings, problem):
        settings = settings.without_compiler()
    runs = []
    for plan in settings.plans(design):
        begun = time.monotonic()
        runs.append(_run(settings, problem, plan, folder, progress))
        if note is not None:
            size = f"{plan.n_paths} runs of {plan.kept[-1]:,} steps"
            note(f"{plan.label}: {size}, {time.monotonic() - begun:.0f} s")
    return settings, runs


def run_path(settings: Settings, plan: Plan, folder: Path) -> Path:
    """File of a finished ensemble; its name says what it depends on."""
    lr = f"{plan.lr:g}"
    return folder / f"{plan.design}-lr{lr}-{settings.key()}.npz"


def _run(
    settings: Settings, problem: NormalizedLinear, plan: Plan, folder: Path | None, progress: bool
) -> Run:
    def make(checkpoint: Path | None) -> Run:
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
        return _extract(settings, problem, plan, solution)

    return Run.kept(None if folder is None else run_path(settings, plan, folder), make)


def _extract(settings: Settings, problem: NormalizedLinear, plan: Plan, solution: Solution) -> Run:
    require_finite(
        solution.stats["non_finite_paths"],
        f"{plan.n_paths} runs at learning rate {plan.lr:g}",
        "a smaller learning rate; the theory needs it to be small",
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
    return Run(plan, circle.plane_coordinates(boxes).numpy(), unwrapped(records), unwrapped(coarse))


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
