"""The two designs of Figure 2 in two processes."""

from __future__ import annotations

import functools
from pathlib import Path

from manifold_sde.experiments.figure2.settings import DESIGNS, Plan, Settings
from manifold_sde.experiments.figure2.simulation import Figure2, Run, collect, run_design
from manifold_sde.experiments.processes import Note, Watcher, run_in_processes


def simulate_in_processes(settings: Settings, folder: Path, watcher: Watcher) -> Figure2:
    """Run SGD for Figure 2, each design in a process of one thread.

    Args:
        settings: What to run.
        folder: Where ensembles and checkpoints are kept; a run that was stopped goes on from it.
        watcher: Told of the progress.

    Returns:
        The data of the figure, the same to the bit as those of :func:`simulate`.

    Raises:
        ManifoldSDEError: What a process raised, or that one died.
    """
    tasks = {design: functools.partial(_task, settings, design, folder) for design in DESIGNS}
    found = run_in_processes(tasks, watcher, jobs=len(DESIGNS))
    return collect(found[DESIGNS[-1]][0], [run for _, runs in found.values() for run in runs])


def _task(settings: Settings, design: str, folder: Path, note: Note) -> tuple[Settings, list[Run]]:
    def done(plan: Plan, seconds: float) -> None:
        note(f"{plan.label}: {describe(plan)}, {seconds:.0f} s")

    return run_design(settings, design, folder, progress=True, done=done)


def describe(plan: Plan) -> str:
    """How much an ensemble is, in words."""
    return f"{plan.n_paths} runs of {plan.kept[-1]:,} steps"
