"""What ``manifold-sde figure 2`` does: run, compare, draw, say what was found and where it is."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

from rich.console import Console

from manifold_sde.compile import compiler_available
from manifold_sde.errors import CompilationWarning
from manifold_sde.experiments.experiment import GOING_ON, Findings, held_results
from manifold_sde.experiments.figure2.comparison import (
    Comparison,
    compare,
    comparison_table,
    verdicts,
)
from manifold_sde.experiments.figure2.plots import plot_figure2
from manifold_sde.experiments.figure2.simulation import Figure2, simulate
from manifold_sde.experiments.run_folder import Run
from manifold_sde.experiments.settings.figure2 import Settings


def make_figure2(
    settings: Settings, run: Run, console: Console, *, jobs: int = 2, restart: bool = False
) -> list[Path]:
    """Run Figure 2, write its files to the run's folder, and print what was found."""
    if settings.compiled and not compiler_available():
        settings = settings.without_compiler()
    name = "figure2" if settings.step_limit is None else "figure2_quick"
    with held_results(run, name, settings, restart=restart) as unfinished:
        _announce(settings, unfinished, console)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompilationWarning)
            figure = simulate(
                settings,
                folder=unfinished,
                progress=console.is_terminal,
                jobs=jobs,
                console=console,
            )
        if settings.compiled and not figure.settings.compiled:
            console.print(
                "The compiler failed: the runs are uncompiled, and the quick form shorter."
            )
        console.print("Comparing and drawing ...")
        found = findings(figure)
        files = found.write(run.folder / name, figure)
    found.print(console, files)
    return files


def findings(figure: Figure2) -> Findings:
    """What Figure 2 shows, in a picture, numbers and words."""
    rows, settings = compare(figure), figure.settings
    names = [field.name for field in dataclasses.fields(Comparison)]
    quick = (
        ""
        if settings.step_limit is None
        else f"The quick form ends after {settings.step_limit:,} steps and compares "
        f"{settings.law_runs} runs."
    )
    return Findings(
        figure=plot_figure2(figure),
        dpi=150,
        table=comparison_table(rows),
        sentences=verdicts(rows),
        csv={".csv": (names, [dataclasses.asdict(row) for row in rows])},
        quick=quick,
        command="figure 2",
    )


def _announce(settings: Settings, unfinished: Path, console: Console) -> None:
    form = "full" if settings.step_limit is None else "quick"
    console.print(
        f"[bold]Figure 2[/bold], {form} form: section 6.1, SGD on the normalised linear model"
    )
    lrs = ", ".join(f"{lr:g}" for lr in settings.lrs)
    console.print(
        f"D = {settings.dim}, N = {settings.n_samples}, noise {settings.noise_scale:g}, weight "
        f"decay {settings.weight_decay:g}, learning rates {lrs}; all runs start at x*, of norm 1 "
        "(the paper prints no start)."
    )
    if not settings.compiled:
        how = "no compiler was found" if not compiler_available() else "not compiled"
        console.print(f"Uncompiled ({how}): a step takes some 50 times longer.")
    if unfinished.is_dir() and any(unfinished.iterdir()):
        console.print(GOING_ON)
